"""The closed form against the model itself: parameters to the digit, multiply-adds against torch's own counter."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from manyscale.config import NetConfig, Setting, SuperViTConfig, SwinConfig, ViTConfig
from manyscale.layers.attention import Attention, CrossAttention, WindowAttention
from manyscale.models import build
from manyscale.plan.count import count, table
from manyscale.presets import list_models, model_config

MICRO = {"image_size": 32, "width": 16, "depths": (2, 3), "heads": (2, 4), "window": ((4, 4), (4, 4)), "classes": 10}
NORMS, BIASES = ("pre", "post", "sandwich", "res-post"), ("table", "linear-cpb", "log-cpb")
SWITCHES = list(itertools.product(("dot", "cosine"), NORMS, BIASES, ("before", "after")))
OTHERS = {
    "padded": {"image_size": (36, 43)},
    "clipped": {"image_size": (12, 64), "window": ((7, 5), (3, 8))},
    "one window an axis": {"window": (3, 5)},
    "one token": {"image_size": 1},
    "no head": {"classes": 0},
    "level norms": {"level_norms": True},
    "mask token": {"mask_token": True},
    "grey": {"channels": 1, "patch": (2, 3)},
    "uneven mlp": {"mlp_ratio": 2.7},
    "extra norms by stage": {"depths": (2, 5), "extra_norm_every": 2},
    "extra norms by model": {"depths": (3, 4), "extra_norm_every": 2, "extra_norm_scope": "model"},
    "video": {"image_size": (6, 20, 33), "patch": (2, 4, 4), "window": ((2, 4, 4), (8, 2, 2))},
    "video table": {"image_size": (5, 20, 33), "patch": (2, 4, 4), "window": (2, 3, 4), "bias": "table"},
    "three stages": {"depths": (1, 1, 1), "heads": (1, 2, 4), "window": 4},
}


def measured(config: NetConfig) -> tuple[int, float]:
    """Parameters and multiply-adds of the real model, on the meta device."""
    with torch.device("meta"):
        model = build(config).eval().requires_grad_(False)
        images = torch.empty(1, config.channels, *config.size)
    for module in model.modules():
        if isinstance(module, (WindowAttention, Attention, CrossAttention)):
            module.attention_path = "reference"  # two plain products, which the counter sees
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() / 2


def agrees(config: NetConfig) -> None:
    counted, (parameters, macs) = count(config), measured(config)
    assert counted.parameters == parameters
    assert counted.macs == macs
    assert counted.parameters == sum(row.parameters for row in counted.rows)
    assert counted.macs == sum(row.macs for row in counted.rows)


@pytest.mark.parametrize("name", list_models())
def test_presets(name):
    agrees(model_config(name))


@pytest.mark.parametrize(("similarity", "norm", "bias", "merge_norm"), SWITCHES)
def test_switches(similarity, norm, bias, merge_norm):
    agrees(SwinConfig(**{**MICRO, "similarity": similarity, "norm": norm, "bias": bias, "merge_norm": merge_norm}))


@pytest.mark.parametrize("fields", OTHERS.values(), ids=OTHERS.keys())
def test_other_fields(fields):
    agrees(SwinConfig(**{**MICRO, **fields}))


VIT = {"image_size": 32, "patch": 8, "width": 24, "depth": 2, "heads": 3, "mlp_width": 50, "classes": 10}


@pytest.mark.parametrize("pool", ["token", "gap", "map"])
@pytest.mark.parametrize("position", ["learned", "sincos2d", "none"])
@pytest.mark.parametrize("fields", [{}, {"pre_logits": 7}, {"classes": 0}, {"mask_token": True}, {"image_size": (35, 50), "patch": (8, 4)}])
def test_vits(pool, position, fields):
    agrees(ViTConfig(**{**VIT, "pool": pool, "position": position, **fields}))


@pytest.mark.parametrize(("size", "window"), [(640, 40), (384, 24), (500, 16)])
def test_large_images(size, window):
    agrees(model_config("swinv2_tiny", image_size=size, window=window))


SUPER = SuperViTConfig(sizes=(16, 24), patch=4, width=24, depth=4, heads=3, mlp_width=50, drop_blocks=(1, 2), classes=7)
SUPER_FIELDS = [
    {},
    {"fuse": True},
    {"registers": 3},
    {"count_rule": "patches", "positions": "interpolated"},
    {"drop_blocks": (0, 3)},
    {"classes": 0},
    {"stem": "conv", "stem_width": 6, "token_head": 0.25, "qkv_bias": False},
    {"sizes": ((16, 24), 16), "drop_blocks": ()},
]


@pytest.mark.parametrize("fields", SUPER_FIELDS, ids=str)
def test_supervits_at_every_setting(fields):
    """Exactly what torch counts, the class token's row of scores too."""
    config = replace(SUPER, **fields)
    with torch.device("meta"):
        model = build(config).eval().requires_grad_(False)
    for block in model.blocks:
        block.attention.attention_path = "reference"
    for setting in (*config.settings, Setting(size=config.sizes[0], keep=0.3)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, 3, *config.size, device="meta"), setting)
        counted = count(config, setting)
        assert counted.macs == counter.get_total_flops() / 2 == sum(row.macs for row in counted.rows)
        assert counted.parameters == sum(p.numel() for p in model.parameters()) == sum(row.parameters for row in counted.rows)


@pytest.mark.parametrize(("keep", "giga"), [(1.0, 4.60), (0.7, 3.01), (0.5, 2.30)])
def test_the_official_costs_of_supervit(keep, giga):
    assert round(count(model_config("supervit_deit_small"), Setting(size=224, keep=keep)).macs / 1e9, 2) == giga


def test_settings_of_other_nets():
    swin, vit = model_config("swinv2_tiny"), ViTConfig(**VIT)
    assert count(swin, Setting(size=384, window=12)).macs == count(replace(swin, image_size=384, window=12)).macs
    assert count(swin, Setting(size=384)).macs == count(replace(swin, image_size=384, window=swin.windows)).macs
    assert count(vit, Setting(size=64)).macs == count(replace(vit, image_size=64)).macs
    assert count(vit, Setting(size=64)).parameters == count(vit).parameters
    for config, setting in ((swin, Setting(keep=0.5)), (vit, Setting(keep=0.5)), (vit, Setting(window=3))):
        with pytest.raises(ValueError, match="keeps every token"):
            count(config, setting)


# FLOPs of the official zoo: name, image size, window, GFLOPs.
ZOO = [
    ("swinv2_tiny", 256, 8, 5.9),
    ("swinv2_small", 256, 8, 11.5),
    ("swinv2_base", 256, 8, 20.3),
    ("swinv2_tiny", 256, 16, 6.6),
    ("swinv2_small", 256, 16, 12.6),
    ("swinv2_base", 256, 16, 21.8),
    ("swinv2_large", 256, 16, 47.5),
    ("swinv2_base", 384, 24, 54.7),
    ("swinv2_large", 384, 24, 115.4),
    ("swin_tiny", 224, 7, 4.5),
    ("swin_small", 224, 7, 8.7),
    ("swin_base", 224, 7, 15.4),
    ("swin_base", 384, 12, 47.1),
    ("swin_large", 384, 12, 103.9),
]


@pytest.mark.parametrize(("name", "size", "window", "giga"), ZOO)
def test_against_the_zoo(name, size, window, giga):
    counted = count(model_config(name, image_size=size, window=window))
    assert counted.macs / 1e9 == pytest.approx(giga, rel=0.015)
    without_bias = counted.macs - sum(row.bias for row in counted.rows)
    assert without_bias / 1e9 == pytest.approx(giga, rel=0.005)


def test_rows_follow_the_image():
    rows = count(model_config("swinv2_tiny", window=16)).rows
    assert [row.part for row in rows] == ["stem", "stage 1", "merge 1", "stage 2", "merge 2", "stage 3", "merge 3", "stage 4", "head"]
    assert [row.window for row in rows if row.window] == [(16, 16), (16, 16), (16, 16), (8, 8)]
    assert [row.grid for row in rows if row.window] == [(64, 64), (32, 32), (16, 16), (8, 8)]


def test_attention_grows_with_the_window_alone():
    small, large = (count(model_config("swinv2_tiny", window=window)) for window in (8, 16))
    for before, after in zip(small.rows[1:6:2], large.rows[1:6:2], strict=True):  # the stages that are not clipped
        assert after.attention == 4 * before.attention
        assert after.macs - after.attention - after.bias == before.macs - before.attention - before.bias
        assert after.parameters == before.parameters


def test_table():
    counted = count(model_config("swinv2_tiny"))
    heading, *rows, total = table(counted)
    assert len(rows) == len(counted.rows)
    assert all(len(row) == len(heading) and all(isinstance(cell, str) for cell in row) for row in (*rows, total))
    assert total == ("total", "", "", "28,347,154", "5.940", "4.0%", "0.3%")
    assert rows[1][:3] == ("stage 1", "64x64", "8x8")
