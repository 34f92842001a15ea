"""ViT weights in and out: round trips in every layout, .npz files of every age, and errors that name what is wrong."""

import numpy as np
import pytest
import torch

import manyscale as ms
from manyscale.ship.convert import VIT_SOURCES
from tests.conftest import loud
from tests.parity.test_vit_parity import flax_file

SMALL = {"image_size": 48, "patch": 16, "width": 12, "depth": 3, "heads": 2, "mlp_width": 20}
POOLS = {
    "timm": ("token", "gap", "map"),
    "transformers": ("token", "map"),
    "big_vision": ("token", "gap", "map"),
    "vision_transformer": ("token", "gap"),
}


@pytest.mark.parametrize(("target", "pool"), [(target, pool) for target in VIT_SOURCES for pool in POOLS[target]])
def test_round_trip(target, pool):
    model = loud(ms.create_model("vit_base_patch16", **SMALL, pool=pool, classes=0 if (target, pool) == ("transformers", "map") else 5))
    weights = ms.export_weights(model, target)
    back = ms.convert(weights, source=target, name="vit_base_patch16", **SMALL)
    assert back.config.pool == pool and back.config.classes == model.config.classes
    assert {name: t.tolist() for name, t in back.state_dict().items()} == {name: t.tolist() for name, t in model.state_dict().items()}
    again = ms.export_weights(back, target)
    assert weights.keys() == again.keys() and all(torch.equal(weights[name], again[name]) for name in weights)


def saved(path, tree):
    np.savez(path, **{name: tensor.numpy() for name, tensor in tree.items()})
    return path


def flax(pool="map"):
    weights, images, logits = flax_file(pool)
    return weights, {"image_size": (16, 24), "patch": 8, "width": 16, "depth": 2, "heads": 2, "mlp_width": 24}, images, logits


def stacked(weights):
    """The same tree as scan keeps it."""
    blocks = {name.partition("encoderblock_0/")[2] for name in weights if "encoderblock_0/" in name}
    rest = {name: tensor for name, tensor in weights.items() if "encoderblock_" not in name}
    scan = {
        f"params/Transformer/encoderblock/{leaf}": torch.stack([weights[f"params/Transformer/encoderblock_{i}/{leaf}"] for i in (0, 1)])
        for leaf in blocks
    }
    return {**rest, **scan}


OLD = {"MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1", "LayerNorm_1": "LayerNorm_2", "MlpBlock_0": "MlpBlock_3"}


def of_2020(weights):
    """The first names: a row of positions for the class token, no prefix."""
    tree = {}
    for name, tensor in weights.items():
        name = name.removeprefix("params/")
        if "encoderblock" in name:
            for new, old in OLD.items():
                name = name.replace(new, old)
        tree[name] = tensor
    position = tree.pop("pos_embedding")
    row = torch.full_like(position[:, :1], 0.25)
    tree["Transformer/posembed_input/pos_embedding"] = torch.cat([row, position], dim=1)
    tree["cls"] = tree["cls"] - 0.25
    return tree


@pytest.mark.parametrize("kind", ["plain", "scan", "siglip tower", "optimiser beside", "inlined head", "2020", "bfloat16"])
def test_files_of_every_age(kind, tmp_path):
    weights, shape, images, logits = flax("token" if kind == "2020" else "map")
    if kind == "scan":
        weights = stacked(weights)
    elif kind == "siglip tower":
        weights = {name.replace("params/", "params/img/"): tensor for name, tensor in weights.items()}
        weights |= {"params/txt/Encoder_0/encoderblock_0/LayerNorm_0/scale": torch.ones(3), "params/t": torch.zeros(1)}
    elif kind == "optimiser beside":
        moments = {name.replace("params/", "opt/0/mu/"): torch.zeros_like(tensor) for name, tensor in weights.items()}
        weights = {**moments, **{name.replace("params/", "opt/target/"): tensor for name, tensor in weights.items()}}
    elif kind == "inlined head":
        weights = {name.replace("MAPHead_0/", ""): tensor for name, tensor in weights.items()}
    elif kind == "2020":
        weights = of_2020(weights)
    path = saved(tmp_path / "weights.npz", weights)
    if kind == "bfloat16":  # two raw bytes a number, as jax writes them
        raw = {name: tensor.bfloat16().view(torch.int16).numpy().view("V2") for name, tensor in weights.items()}
        np.savez(path, **raw)
    model = ms.convert(path, source="vision_transformer" if kind == "2020" else "big_vision", name="vit_base_patch16", **shape)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16 if kind == "bfloat16" else torch.float32}
    tolerance = 0.05 * logits.abs().max().item() if kind == "bfloat16" else 1e-6
    with torch.no_grad():
        torch.testing.assert_close(model.double()(images), logits, rtol=0, atol=tolerance)


def test_what_is_written_is_what_flax_has():
    weights, shape, *_ = flax()
    model = ms.convert(weights, source="big_vision", name="vit_base_patch16", **shape)
    again = ms.export_weights(model, "big_vision")
    assert again.keys() == weights.keys() and all(torch.equal(again[name], weights[name]) for name in weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {k: v for k, v in w.items() if "Dense_1" not in k}, "missing: MAPHead_0/MlpBlock_0/Dense_1/bias .16,."),
        (lambda w: {**w, "params/extra/kernel": torch.ones(2, 2)}, "unknown: extra/kernel .2, 2."),
        (lambda w: {k: v[..., :8] if "encoder_norm" in k else v for k, v in w.items()}, "shape: Transformer/encoder_norm/bias is .8,."),
        (lambda w: {k: v for k, v in w.items() if "embedding/kernel" not in k}, "no `embedding/kernel` in it: not a ViT"),
        (
            lambda w: {k: v[:1] if k.endswith("encoderblock/LayerNorm_0/scale") else v for k, v in stacked(w).items()},
            "several depths, .1, 2.",
        ),
        (lambda w: {k: v[0] if "encoderblock/" in k else v for k, v in stacked(w).items()}, "the first axis must be the depth everywhere"),
    ],
)
def test_files_that_do_not_fit(change, message, tmp_path):
    weights, shape, *_ = flax()
    path = saved(tmp_path / "weights.npz", change(weights))
    with pytest.raises(ValueError, match=rf"weights.npz[\s\S]*{message}"):
        ms.convert(path, source="big_vision", name="vit_base_patch16", **shape)


def test_another_shape_a_truncated_file_and_pickled_arrays(tmp_path):
    weights, shape, *_ = flax()
    path = saved(tmp_path / "weights.npz", weights)
    with pytest.raises(ValueError, match=r"does not hold vit_base_patch16[\s\S]*missing: Transformer/encoderblock_2"):
        ms.convert(path, source="big_vision", name="vit_base_patch16", **{**shape, "depth": 3})
    with pytest.raises(ValueError, match="shape: pos_embedding is"):
        ms.convert(path, source="big_vision", name="vit_base_patch16", **{**shape, "image_size": 64})
    half = tmp_path / "half.npz"
    half.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"half\.npz: refused, not a checkpoint or only half of one"):
        ms.convert(half, source="big_vision", name="vit_base_patch16", **shape)
    np.savez(tmp_path / "pickled.npz", **{"embedding/kernel": np.array([print], dtype=object)})
    with pytest.raises(ValueError, match=r"pickled\.npz: refused.*embedding/kernel is no array of numbers"):
        ms.convert(tmp_path / "pickled.npz", source="big_vision", name="vit_base_patch16", **shape)


def test_fixed_positions_stand_in_no_file():
    """big_vision's nets have positions, and its files those that are learnt; so a file without a table means the others."""
    shape = {"image_size": 32, "patch": 8, "width": 16, "depth": 1, "heads": 2, "mlp_width": 24}
    model = loud(ms.create_model("vit_base_patch16", **shape, pool="gap", position="sincos2d", classes=5))
    weights = ms.export_weights(model, "big_vision")
    again = ms.convert(weights, source="big_vision", name="vit_base_patch16", **shape)
    assert again.config.position == "sincos2d" and again.config == model.config
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(again.eval()(images), model.eval()(images))
    with pytest.raises(ValueError, match="big_vision has no ViT with position=none"):
        ms.export_weights(ms.create_model("vit_base_patch16", **shape, position="none"), "big_vision")


def test_hints_and_refusals():
    model = loud(ms.create_model("vit_tiny_patch16", depth=1, classes=3, image_size=32))
    weights = ms.export_weights(model, "timm")
    with pytest.raises(ValueError, match='It fits source="timm", name="vit_tiny_patch16"'):
        ms.convert(weights, source="timm", name="vit_small_patch16", depth=1, image_size=32)
    with pytest.raises(ValueError, match="unknown source `torchvison` of a ViT; known: big_vision, timm"):
        ms.convert(weights, source="torchvison", name="vit_tiny_patch16")
    with pytest.raises(ValueError, match="transformers has no ViT with pool=gap"):
        ms.export_weights(model, "transformers")
    odd = ms.create_model("vit_tiny_patch16", depth=1, position="sincos2d", pre_logits=8)
    with pytest.raises(ValueError, match="timm has no ViT with position=sincos2d, pre_logits=8"):
        ms.export_weights(odd, "timm")
    with pytest.raises(ValueError, match="vision_transformer has no ViT with pool=map"):
        ms.export_weights(ms.create_model("vit_tiny_patch16", depth=1, pool="map"), "vision_transformer")


def test_older_names_of_transformers():
    """The files on the hub, from before version 5."""
    model = loud(ms.create_model("vit_base_patch16", **SMALL, pool="token", classes=5))
    new = ms.export_weights(model, "transformers")
    renamed = {"layers.": "encoder.layer.",
               "attention.q_proj": "attention.attention.query", "attention.k_proj": "attention.attention.key",
               "attention.v_proj": "attention.attention.value", "attention.o_proj": "attention.output.dense",
               "mlp.fc1": "intermediate.dense",
               "mlp.fc2": "output.dense"}  # fmt: skip
    old = {}
    for name, tensor in new.items():
        for now, then in renamed.items():
            name = name.replace(now, then)
        old[name] = tensor
    old["vit.pooler.dense.weight"] = torch.ones(12, 12)
    back = ms.convert(old, source="transformers", name="vit_base_patch16", **SMALL)
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), model.state_dict().values(), strict=True))
