"""SuperViT with every token kept is timm's DeiT, every parameter random; on LV-ViT it has no peer but the slow reference."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import manyscale as ms
from manyscale.config import Setting
from tests.conftest import loud
from tests.models.supervit_reference import run

timm = pytest.importorskip("timm", reason="timm is not installed: pip install manyscale[peers]")

pytestmark = pytest.mark.parity
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}  # of the largest logit
SIZES = (128, 160, 192, 224)
TOY = {"width": 48, "depth": 5, "heads": 3, "mlp_width": 192, "drop_blocks": (1, 3)}


def official(peer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """timm's weights as the official checkpoint keeps them: `pos_embed` is the table of 224 pixels, resized by timm for the others."""
    from timm.layers import resample_abs_pos_embed

    weights = peer.state_dict()
    table = weights.pop("pos_embed")
    for i, size in enumerate(SIZES):
        weights[f"pos_embed_list.{i}"] = resample_abs_pos_embed(table, [size // 16] * 2, num_prefix_tokens=1)
    assert torch.equal(weights["pos_embed_list.3"], table)
    return weights


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Relative to the largest logit."""
    scale = theirs.abs().max()
    assert scale > 0.1, "a silent peer proves nothing"
    return ((ours - theirs).abs().max() / scale).item()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("whole", [False, True], ids=["toy", "full size"])
def test_timm(whole, dtype, record_property):
    shape = {} if whole else {"embed_dim": 48, "depth": 5, "num_heads": 3}
    peer = loud(timm.create_model("deit_small_patch16_224", dynamic_img_size=True, **shape)).to(dtype).eval()
    weights = official(peer)
    assert len(weights) == (155 if whole else 71)
    model = ms.convert({"model": weights}, source="supervit", name="supervit_deit_small", **({} if whole else TOY))
    worst = 0.0
    for size in (224, 160) if whole else SIZES:
        images = torch.randn(1 if whole else 3, 3, size, size, dtype=dtype)
        with torch.no_grad():
            worst = max(worst, difference(model(images), peer(images)))
    name = "SuperViT DeiT-S *" if whole else "SuperViT toy"
    record_property("parity", ("timm", name, "128 to 224" if not whole else "160, 224", "", "", str(dtype)[6:], f"{worst:.1e}"))
    assert worst <= TOLERANCE[dtype]


def test_images_are_resized_on_the_way_in():
    peer = loud(timm.create_model("deit_small_patch16_224", dynamic_img_size=True, embed_dim=48, depth=5, num_heads=3)).double().eval()
    model = ms.convert(official(peer), source="supervit", name="supervit_deit_small", **TOY)
    images = torch.randn(2, 3, 224, 224, dtype=torch.float64)
    with torch.no_grad():
        small = F.interpolate(images, (160, 160), mode="bilinear", align_corners=True)
        assert difference(model(images, Setting(size=160)), peer(small)) <= 1e-12


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_plain_deit_becomes_one_and_goes_back(dtype):
    peer = loud(timm.create_model("deit_small_patch16_224", dynamic_img_size=True, embed_dim=48, depth=5, num_heads=3)).to(dtype).eval()
    model = ms.convert(peer.state_dict(), source="timm", name="supervit_deit_small", **TOY)
    assert model.config.sizes == SIZES
    for size in SIZES:
        images = torch.randn(2, 3, size, size, dtype=dtype)
        with torch.no_grad():
            assert difference(model(images), peer(images)) <= TOLERANCE[dtype]
    back = timm.create_model("deit_small_patch16_224", embed_dim=48, depth=5, num_heads=3).to(dtype).eval()
    back.load_state_dict(ms.export_weights(model, "timm"), strict=True)
    with torch.no_grad():
        assert difference(model(images), back(images)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("name", ["vit_small_patch16", "supervit_deit_small"])
def test_distilled_deits_are_refused(name):
    peer = timm.create_model("deit_small_distilled_patch16_224", embed_dim=48, depth=5, num_heads=3)
    fields = {key: value for key, value in TOY.items() if "super" in name or key != "drop_blocks"}
    with pytest.raises(ValueError, match=r"unknown: dist_token[\s\S]*second class token and head for distillation: take one without"):
        ms.convert(peer.state_dict(), source="timm", name=name, **fields)


def test_lvvit_from_an_official_file_equals_the_slow_reference():
    """Names and shapes of the official file; the numbers in numpy, from the file's own tensors."""
    shape = {"sizes": (32, 48), "width": 12, "depth": 5, "heads": 3, "mlp_width": 36, "stem_width": 8, "drop_blocks": (1, 3)}
    generator = torch.Generator().manual_seed(0)
    sample = ms.export_weights(ms.create_model("supervit_lvvit_small", **shape, classes=7), "supervit")
    file = {}
    for name, tensor in sample.items():
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        file[name] = noise / max(1, tensor[0].numel()) ** 0.5 if tensor.dim() > 1 else noise.abs() + 0.5 if "var" in name else noise
    file = {name: tensor.to(torch.int64) if "tracked" in name else tensor for name, tensor in file.items()}
    model = ms.convert({"state_dict_ema": file}, source="supervit", name="supervit_lvvit_small", **shape)
    ours = {"cls_token": "token", "aux_head": "token_head", "patch_embed.proj": "patch", "patch_embed.conv": "stem.conv",
            "patch_embed.bn": "stem.norm", "running_mean": "mean", "running_var": "variance", ".attn.": ".attention.",
            "pos_embed_list": "positions"}  # fmt: skip
    state = {}
    for name, tensor in file.items():
        for there, here in ours.items():
            name = name.replace(there, here)
        rows = name == "token" or name.startswith("positions")
        state[name] = (tensor.reshape(-1, 12) if rows else tensor[None] if name.endswith(("mean", "variance")) else tensor).numpy()
    state["token"] = state["token"][0]
    for i, size in enumerate(shape["sizes"]):
        for keep in (0.5, 1.0):
            image = torch.randn(3, size, size, generator=generator, dtype=torch.float64)
            with torch.no_grad():
                logits = model(image[None], Setting(keep=keep))[0].numpy()
            drops = dict.fromkeys(shape["drop_blocks"], keep)
            expected, _ = run(state, image.numpy(), patch=16, heads=3, drops=drops, eps=1e-5, skip=2.0, token_head=0.25, table=i)
            np.testing.assert_allclose(logits, expected, rtol=1e-10, atol=1e-11)
