"""ViT against timm, transformers and flax, every parameter random; and a real checkpoint on real pictures."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import manyscale as ms
from tests.conftest import loud

pytestmark = pytest.mark.parity
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # of the largest logit
TOY = {"width": 48, "depth": 3, "heads": 3, "mlp_width": 100}
SIZES = [(64, 16), ((48, 80), 16), ((64, 48), (16, 8))]
DATA = Path(os.environ.get("MANYSCALE_DATA") or Path.home() / ".cache/manyscale/data")


def agree(model, peer, images, *, tolerance=None):
    ours, theirs = model(images), peer(images)
    scale = theirs.abs().max()
    assert scale > 0.1, "a silent peer proves nothing"
    assert ((ours - theirs).abs().max() / scale).item() <= (tolerance or TOLERANCE[images.dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("size", "patch"), SIZES)
@pytest.mark.parametrize("pool", ["token", "gap", "map"])
def test_timm(pool, size, patch, dtype):
    timm = pytest.importorskip("timm", reason="timm is not installed: pip install manyscale[peers]")
    options = {
        "token": {"global_pool": "token"},
        "gap": {"global_pool": "avg", "class_token": False, "fc_norm": False},
        "map": {"global_pool": "map", "class_token": False},
    }[pool]
    peer = timm.create_model(
        "vit_base_patch16_224",
        img_size=size,
        patch_size=patch,
        embed_dim=48,
        depth=3,
        num_heads=3,
        mlp_ratio=100 / 48,
        num_classes=7,
        **options,
    )
    peer = loud(peer).to(dtype).eval()
    model = ms.convert(peer.state_dict(), source="timm", name="vit_base_patch16", image_size=size, patch=patch, **TOY)
    assert (model.config.pool, model.config.classes, model.config.gelu) == (pool, 7, "exact")
    images = torch.randn(2, 3, *model.config.size, dtype=dtype)
    with torch.no_grad():
        agree(model, peer, images)
        back = ms.export_weights(model, "timm")
        peer.load_state_dict(back, strict=True)
        agree(model, peer, images)


def test_timm_at_another_size():
    timm = pytest.importorskip("timm", reason="timm is not installed: pip install manyscale[peers]")
    peer = loud(timm.create_model("vit_tiny_patch16_224", depth=2, dynamic_img_size=True)).eval()
    model = ms.convert(peer.state_dict(), source="timm", name="vit_tiny_patch16", depth=2)
    for size in ((288, 192), (160, 256)):
        with torch.no_grad():
            agree(model, peer, torch.randn(1, 3, *size))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_transformers_vit(dtype):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install manyscale[peers]")
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=100, image_size=64, num_labels=7
    )
    peer = loud(transformers.ViTForImageClassification(config)).to(dtype).eval()
    model = ms.convert(peer.state_dict(), source="transformers", name="vit_base_patch16", image_size=64, **TOY)
    assert (model.config.pool, model.config.norm_eps) == ("token", 1e-12)
    images = torch.randn(2, 3, 64, 64, dtype=dtype)
    with torch.no_grad():
        agree(model, lambda x: peer(x).logits, images)
        peer.load_state_dict(ms.export_weights(model, "transformers"), strict=True)
        agree(model, lambda x: peer(x).logits, images)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_transformers_siglip(dtype):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install manyscale[peers]")
    vision = {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "intermediate_size": 100,
        "image_size": 64,
        "patch_size": 16,
    }
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16, "vocab_size": 10}
    peer = loud(transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))).to(dtype).eval()
    model = ms.convert(peer.state_dict(), source="transformers", name="vit_base_patch16", image_size=64, **TOY)
    assert (model.config.pool, model.config.classes, model.config.gelu) == ("map", 0, "tanh")
    images = torch.randn(2, 3, 64, 64, dtype=dtype)

    def pooled(x):
        return peer.vision_model(x).pooler_output

    with torch.no_grad():
        agree(model, pooled, images)
        peer.vision_model.load_state_dict(ms.export_weights(model, "transformers"), strict=True)
        agree(model, pooled, images)


def flax_file(pool: str) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Weights as big_vision keeps them, pictures and logits of tools/goldens/flax_vit.py."""
    with np.load(Path(__file__).parent / "flax_vit.npz") as arrays:
        weights = {
            name.removeprefix(f"{pool}/"): torch.from_numpy(arrays[name]) for name in arrays.files if name.startswith(f"{pool}/params")
        }
        return weights, torch.from_numpy(arrays["images"]).double().permute(0, 3, 1, 2), torch.from_numpy(arrays[f"{pool}/logits"])


@pytest.mark.parametrize("pool", ["token", "gap", "map"])
def test_flax(pool):
    """The original's own layers in float64: attention, GELU, norm and MAP head, of weights kept in float32."""
    weights, images, logits = flax_file(pool)
    shape = {"image_size": (16, 24), "patch": 8, "width": 16, "depth": 2, "heads": 2, "mlp_width": 24}
    model = ms.convert(weights, source="big_vision", name="vit_base_patch16", **shape)
    assert (model.config.pool, model.config.pre_logits, model.config.classes) == (pool, 12, 5)
    with torch.no_grad():
        torch.testing.assert_close(model.double()(images), logits, rtol=0, atol=1e-10)


@pytest.mark.skipif(
    not (DATA / "vit_tiny_patch16_224.safetensors").exists(), reason="no vit_tiny_patch16_224.safetensors in $MANYSCALE_DATA"
)
@pytest.mark.skipif(not (DATA / "imagenet-sample").exists(), reason="no imagenet-sample in $MANYSCALE_DATA")
def test_a_real_checkpoint_classifies_real_pictures():
    """ViT-Ti/16 on every fifth of the sample's 1,000 photographs; on all of them it is 81.3 % and 95.6 %."""
    model = ms.convert(DATA / "vit_tiny_patch16_224.safetensors", source="timm", name="vit_tiny_patch16")
    paths = sorted(
        path for path in (DATA / "imagenet-sample").rglob("*") if path.is_file() and path.suffix.lower() in (".jpg", ".jpeg", ".png")
    )
    assert len(paths) == 1000
    right = np.zeros(2)
    for start in range(0, 1000, 100):
        chosen = range(start, start + 100, 5)
        batch = []
        for index in chosen:
            picture = Image.open(paths[index]).convert("RGB")
            scale = 248 / min(picture.size)
            picture = picture.resize([round(side * scale) for side in picture.size], Image.Resampling.BICUBIC)
            left, top = (picture.width - 224) // 2, (picture.height - 224) // 2
            batch.append(torch.from_numpy(np.array(picture.crop((left, top, left + 224, top + 224)))))
        images = torch.stack(batch).permute(0, 3, 1, 2) / 127.5 - 1
        with torch.no_grad():
            ranks = model(images).topk(5).indices == torch.tensor(list(chosen))[:, None]
        right += ranks[:, 0].sum().item(), ranks.any(1).sum().item()
    top1, top5 = right / 200
    assert top1 == pytest.approx(0.813, abs=0.06) and top5 == pytest.approx(0.959, abs=0.035)
