"""Converters: round trips in every layout, strict loading by the peers, and errors that name what is wrong."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import manyscale as ms
from manyscale.config import SwinConfig
from manyscale.heads.pixels import MaskedImages
from manyscale.layers.patch import PatchMerge
from manyscale.ship.convert import SOURCES
from manyscale.ship.convert.layout import merge_order

SMALL = {"width": 8, "depths": (1, 3, 2), "heads": (1, 2, 4), "image_size": 64, "window": 4, "classes": 5}
NAMES = ("swin_tiny", "swinv2_tiny")
BUFFERS = ("relative_position_index", "relative_coords_table", "attn_mask")


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def foreign(target: str, name: str, **fields: object) -> dict[str, Tensor]:
    """A file of `target` made of random numbers, from its own names and shapes, with no zeros or structure of ours."""
    torch.manual_seed(1)
    sample = ms.export_weights(ms.create_model(name, **{**SMALL, **fields}), target)
    return {key: t if key.endswith(BUFFERS) else torch.randn(t.shape) for key, t in sample.items()}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for key in left:
        assert left[key].dtype == right[key].dtype, key
        assert torch.equal(left[key], right[key]), key


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("target", SOURCES)
def test_round_trip_from_ours(target: str, name: str) -> None:
    model = randomise(ms.create_model(name, **SMALL))
    weights = ms.export_weights(model, target)
    back = ms.convert(weights, source=target, name=name, **{**SMALL, "classes": 5})
    assert_same(model.state_dict(), back.state_dict())
    assert back.config == model.config
    assert not back.training


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("target", SOURCES)
def test_round_trip_from_theirs(target: str, name: str) -> None:
    weights = foreign(target, name)
    if (target, name) == ("torchvision", "swinv2_tiny"):
        for key in weights:  # torchvision itself zeroes the bias of k
            if key.endswith("qkv.bias"):
                weights[key].view(3, -1)[1] = 0
    fields = {key: value for key, value in SMALL.items() if key != "classes"}
    model = ms.convert(weights, source=target, name=name, **fields)
    assert model.config.classes == 5
    assert_same(weights, ms.export_weights(model, target))


def test_torchvision_bias_of_k_is_dropped() -> None:
    weights = foreign("torchvision", "swinv2_tiny")
    again = ms.export_weights(ms.convert(weights, source="torchvision", name="swinv2_tiny", **SMALL), "torchvision")
    key = "features.3.1.attn.qkv.bias"
    q, k, v = weights[key].chunk(3)
    assert k.abs().min() > 0
    assert torch.equal(again[key], torch.cat([q, torch.zeros(16), v]))


def test_copies_and_dtype() -> None:
    weights = {key: tensor.double() for key, tensor in foreign("timm", "swinv2_tiny").items()}
    model = ms.convert(weights, source="timm", name="swinv2_tiny", **SMALL)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert all(parameter.requires_grad for parameter in model.parameters())
    before = model.state_dict()["norm.weight"].clone()
    weights["norm.weight"].zero_()
    exported = ms.export_weights(model, "timm")
    exported["norm.weight"].zero_()
    assert torch.equal(model.norm.weight, before)
    assert all(tensor.is_contiguous() for tensor in exported.values())
    assert len({tensor.untyped_storage().data_ptr() for tensor in exported.values()}) == len(exported)


def test_every_published_depth_round_trips() -> None:
    for name in ("swin_small", "swinv2_base"):
        with torch.device("meta"):
            model = ms.create_model(name)
        for target in SOURCES:
            weights = ms.export_weights(model, target)
            assert sum(t.numel() for key, t in weights.items() if not key.endswith(BUFFERS)) >= sum(p.numel() for p in model.parameters())


# --- what the peers load -----------------------------------------------------------------------------------------------


def peer(target: str, name: str) -> torch.nn.Module:
    """The same small net as `target` builds it."""
    if target == "timm":
        timm = pytest.importorskip("timm")
        entry = {"swin_tiny": "swin_tiny_patch4_window7_224", "swinv2_tiny": "swinv2_tiny_window8_256"}[name]
        return timm.create_model(entry, embed_dim=8, depths=(1, 3, 2), num_heads=(1, 2, 4), img_size=64, window_size=4, num_classes=5)
    if target == "torchvision":
        from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2

        v2 = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2} if name == "swinv2_tiny" else {}
        return SwinTransformer([4, 4], 8, [1, 3, 2], [1, 2, 4], [4, 4], num_classes=5, **v2)
    transformers = pytest.importorskip("transformers")
    fields = {"image_size": 64, "embed_dim": 8, "depths": [1, 3, 2], "num_heads": [1, 2, 4], "window_size": 4, "num_labels": 5}
    if name == "swin_tiny":
        return transformers.SwinForImageClassification(transformers.SwinConfig(**fields))
    return transformers.Swinv2ForImageClassification(transformers.Swinv2Config(**fields))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("target", ["timm", "transformers", "torchvision"])
def test_peers_load_strictly(target: str, name: str) -> None:
    model = randomise(ms.create_model(name, **SMALL)).eval()
    net = peer(target, name).eval()
    made = {key: tensor.clone() for key, tensor in net.state_dict().items() if key.endswith(BUFFERS)}
    net.load_state_dict(ms.export_weights(model, target), strict=True)
    for key, tensor in made.items():  # the buffers written are the peer's own, bit for bit
        assert torch.equal(net.state_dict()[key], tensor), key
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        logits = net(images)
        torch.testing.assert_close(model(images), getattr(logits, "logits", logits), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_transformers_saved_files_load(name: str, tmp_path) -> None:
    net = randomise(peer("transformers", name))
    net.save_pretrained(tmp_path)  # in the hub's names, which for V1 differ from those in memory
    saved = ms.convert(tmp_path / "model.safetensors", source="transformers", name=name, **SMALL)
    assert_same(saved.state_dict(), ms.convert(net.state_dict(), source="transformers", name=name, **SMALL).state_dict())
    bare = (net.swin if name == "swin_tiny" else net.swinv2).state_dict()
    assert ms.convert(bare, source="transformers", name=name, **{**SMALL, "classes": 0}).config.classes == 0


def test_torchvision_computes_with_a_pretrained_window() -> None:
    model = randomise(ms.create_model("swinv2_tiny", **SMALL, pretrained_window=3)).eval()
    net = peer("torchvision", "swinv2_tiny").eval()
    net.load_state_dict(ms.export_weights(model, "torchvision"))
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(images), net(images), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("norm", ["before", "after"])
def test_mmpretrain_merging_is_an_unfold(norm: str) -> None:
    """What mmpretrain computes, from torch's Unfold: channels-first patches, then its columns."""
    ours = randomise(PatchMerge(6, norm))
    order = merge_order(24)
    x = torch.randn(2, 4, 8, 6)
    columns = F.unfold(x.permute(0, 3, 1, 2), kernel_size=2, stride=2).transpose(1, 2)  # (B, h/2·w/2, 4C)
    if norm == "before":
        columns = F.layer_norm(columns, (24,), ours.norm_in.weight[order], ours.norm_in.bias[order])
    columns = columns @ ours.reduction.weight[:, order].T
    if norm == "after":
        columns = F.layer_norm(columns, (12,), ours.norm_out.weight, ours.norm_out.bias)
    torch.testing.assert_close(ours(x).flatten(1, 2), columns)


def test_mmpretrain_keeps_the_extra_norm() -> None:
    model = randomise(ms.create_model("swinv2_tiny", **SMALL, extra_norm_every=2))
    weights = ms.export_weights(model, "mmpretrain")
    assert {"backbone.stages.1.blocks.1.norm3.weight", "backbone.norm2.weight", "head.fc.bias"} <= weights.keys()
    back = ms.convert(weights, source="mmpretrain", name="swinv2_tiny", **SMALL, extra_norm_every=2)
    assert_same(model.state_dict(), back.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_mmpretrain_permutes_what_it_unfolds(name: str) -> None:
    """The published recipe, spelt out: view (out, 4, C), blocks [0, 2, 1, 3], transpose to (out, C, 4)."""
    model = randomise(ms.create_model(name, **SMALL))
    weights = ms.export_weights(model, "mmpretrain")
    at, norm = ("stages.0.downsample", "norm_in") if name == "swin_tiny" else ("stages.1.downsample", "norm_out")
    merge = model.stages[0].merge
    expected = merge.reduction.weight.view(16, 4, 8)[:, [0, 2, 1, 3]].transpose(1, 2).reshape(16, 32)
    assert torch.equal(weights[f"backbone.{at}.reduction.weight"], expected)
    scale = getattr(merge, norm).weight
    expected = scale.view(4, 8)[[0, 2, 1, 3]].T.reshape(32) if name == "swin_tiny" else scale
    assert torch.equal(weights[f"backbone.{at}.norm.weight"], expected)


# --- files as they are found -------------------------------------------------------------------------------------------


def test_simmim_file() -> None:
    model = randomise(ms.create_model("swinv2_tiny", **{**SMALL, "classes": 0}))
    plain = ms.export_weights(model, "official")
    file = {f"encoder.{key.replace('cpb_mlp', 'rpe_mlp')}": tensor for key, tensor in plain.items()}
    file |= {"encoder.mask_token": torch.zeros(1, 1, 8), "decoder.0.weight": torch.zeros(12, 32, 1, 1), "decoder.0.bias": torch.zeros(12)}
    fields = {key: value for key, value in SMALL.items() if key != "classes"}
    assert_same(model.state_dict(), ms.convert({"model": file, "epoch": 799}, source="official", name="swinv2_tiny", **fields).state_dict())
    with pytest.raises(ValueError, match="unknown: mask_token"):  # without the prefix it is no SimMIM file
        ms.convert({**plain, "mask_token": torch.zeros(1, 1, 8)}, source="official", name="swinv2_tiny", **fields)


@pytest.mark.parametrize("name", ["swinv2_tiny", "swin_tiny"])
@pytest.mark.parametrize("early", [False, True])
def test_simmim_files_whole_both_ways(name, early) -> None:
    fields = {key: value for key, value in SMALL.items() if key != "classes"}
    model = randomise(MaskedImages(ms.create_model(name, **fields, classes=0, mask_token=True)))
    file = ms.export_weights(model, "simmim")
    assert file["encoder.mask_token"].shape == (1, 1, 8) and file["decoder.0.weight"].ndim == 4
    assert all(key.startswith(("encoder.", "decoder.0.")) for key in file)
    if early:  # as the first files of Swin V2 called the bias network
        file = {key.replace("cpb_mlp", "rpe_mlp"): tensor for key, tensor in file.items()}
    again = ms.convert({"model": file}, source="simmim", name=name, **fields)
    assert isinstance(again, MaskedImages)
    assert_same(model.state_dict(), again.state_dict())
    images, mask = torch.randn(1, 3, *again.config.size), torch.rand(1, *again.config.grids[0]) < 0.5
    assert torch.equal(model.eval()(images, mask), again(images, mask))
    encoder = ms.convert(file, source="official", name=name, **fields)
    assert_same(
        {k[8:]: t for k, t in again.state_dict().items() if k.startswith("encoder.") and "mask_token" not in k}, encoder.state_dict()
    )
    assert "mask_token" not in " ".join(ms.export_weights(again.encoder, "timm"))
    for lost in ("encoder.mask_token", "decoder.0.bias"):
        with pytest.raises(ValueError, match=f"no whole SimMIM file of this model(.|\n)*{lost} is missing"):
            ms.convert({key: tensor for key, tensor in file.items() if key != lost}, source="simmim", name=name, **fields)
    with pytest.raises(ValueError, match="takes encoder and decoder"):
        ms.export_weights(encoder, "simmim")


def test_official_buffers_are_dropped_and_the_window_they_tell_is_used() -> None:
    fields = {**SMALL, "window": 8, "pretrained_window": (6, 6, 3)}
    model = randomise(ms.create_model("swinv2_tiny", **fields))
    file = ms.export_weights(model, "official")
    assert not any(key.endswith(BUFFERS) for key in file)
    coordinates = {(8, 6): None, (4, 3): None}
    for window, learnt in coordinates:
        axis = torch.arange(1 - window, window) / (learnt - 1) * 8
        axis = axis.sign() * torch.log2(axis.abs() + 1) / 3
        coordinates[window, learnt] = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1)[None]
    for stage, depth in enumerate(SMALL["depths"]):
        for block in range(depth):
            at = f"layers.{stage}.blocks.{block}"
            file[f"{at}.attn.relative_coords_table"] = coordinates[(4, 3) if stage == 2 else (8, 6)]
            file[f"{at}.attn.relative_position_index"] = torch.zeros(64, 64, dtype=torch.int64)
            file[f"{at}.attn_mask"] = torch.zeros(4, 64, 64)
    assert_same(model.state_dict(), ms.convert(file, source="official", name="swinv2_tiny", **fields).state_dict())
    with pytest.raises(ValueError, match=r"stage 1 learnt at windows of \(6, 6\).*\(8, 8\).*pretrained_window"):
        ms.convert(file, source="official", name="swinv2_tiny", **{**fields, "pretrained_window": 0})


def test_classes_follow_the_file() -> None:
    weights = foreign("timm", "swin_tiny", classes=7)
    fields = {key: value for key, value in SMALL.items() if key != "classes"}
    assert ms.convert(weights, source="timm", name="swin_tiny", **fields).config.classes == 7
    bare = ms.convert(weights, source="timm", name="swin_tiny", **fields, classes=0)
    assert bare.config.classes == 0
    headless = ms.export_weights(bare, "timm")
    assert not any(key.startswith("head") for key in headless)
    assert ms.convert(headless, source="timm", name="swin_tiny", **fields).config.classes == 0
    with pytest.raises(ValueError, match=r"missing: head.fc.weight \(3, 32\)"):
        ms.convert(headless, source="timm", name="swin_tiny", **fields, classes=3)


# --- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", SOURCES)
def test_every_misfit_is_named_at_once(target: str) -> None:
    weights = foreign(target, "swinv2_tiny")
    keys = [key for key in weights if not key.endswith(BUFFERS) and "head" not in key and "classifier" not in key]
    missing, misshapen, whole = keys[3], keys[7], keys[11]
    del weights[missing]
    weights[misshapen] = torch.zeros(3, 1)
    weights[whole] = torch.zeros(weights[whole].shape, dtype=torch.int8)
    weights["surprise"] = torch.zeros(2)
    weights["epoch"] = 3
    with pytest.raises(ValueError) as error:
        ms.convert(weights, source=target, name="swinv2_tiny", **SMALL)
    for line in (
        f"missing: {missing} (",
        f"shape: {misshapen} is (3, 1)",
        "unknown: surprise (2,)",
        "unknown: epoch int",
        f"dtype: {whole} is",
    ):
        assert line in str(error.value)


def test_hints() -> None:
    small = ms.export_weights(ms.create_model("swinv2_small"), "timm")
    with pytest.raises(ValueError, match='It fits source="timm", name="swinv2_small"'):
        ms.convert(small, source="official", name="swinv2_tiny")
    wide = ms.export_weights(ms.create_model("swin_tiny", **{**SMALL, "window": 8, "image_size": 128}), "official")
    with pytest.raises(ValueError, match="windows of 8: pass window=8"):
        ms.convert(wide, source="official", name="swin_tiny", **SMALL)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm": "sandwich"}, "norm=sandwich"),
        ({"bias": "linear-cpb"}, "bias=linear-cpb"),
        ({"image_size": (4, 64, 64)}, "3 axes"),
        ({"extra_norm_every": 2}, "extra_norm_every=0"),
        ({"level_norms": True}, "level_norms.0.bias"),
    ],
)
def test_models_no_other_package_holds(fields: dict, message: str) -> None:
    model = ms.create_model("swinv2_tiny", **{**SMALL, **fields})
    with pytest.raises(ValueError, match=message):
        ms.export_weights(model, "timm")
    with pytest.raises(ValueError, match=message):
        ms.convert({}, source="timm", name="swinv2_tiny", **{**SMALL, **fields})


def test_a_window_torchvision_would_pad_to() -> None:
    with pytest.raises(ValueError, match="never clips"):
        ms.export_weights(ms.create_model("swinv2_tiny", **{**SMALL, "window": 8}), "torchvision")


def test_wrong_arguments() -> None:
    model = ms.create_model("swinv2_tiny", **SMALL)
    with pytest.raises(ValueError, match="did you mean `timm`"):
        ms.export_weights(model, "tim")
    with pytest.raises(ValueError, match="did you mean `swinv2_tiny`"):
        ms.convert({}, source="timm", name="swinv2_tin")
    with pytest.raises(ValueError, match=r"pass \.state_dict\(\)"):
        ms.convert(model, source="timm", name="swinv2_tiny")
    assert isinstance(model.config, SwinConfig)
