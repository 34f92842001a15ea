"""The recipes' numbers against the papers', and a few steps of every tiny twin."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from manyscale.config import Run, from_dict, to_dict
from manyscale.presets import model_config
from manyscale.recipes import RECIPES, tiny
from manyscale.train.loop import train

# recipe: image, window, epochs, warm-up, batch, peak, min and warm-up rate at that batch, decay, clip, drop path
TABLE = {
    **{
        f"imagenet_swinv2_{size}_window{w}": (256, w, 300, 20, 1024, 1e-3, 1e-5, 1e-6, 0.05, 5, drop)
        for size, drop in (("tiny", 0.2), ("small", 0.3), ("base", 0.5))
        for w in (8, 16)
    },
    **{f"imagenet22k_swinv2_{size}_window12": (192, 12, 90, 5, 4096, 1e-3, 1e-5, 1e-6, 0.1, 5, 0.2) for size in ("base", "large")},
    **{
        f"imagenet_swinv2_{size}_window{w}_from22k": (px, w, 30, 5, 1024, 4e-5, 4e-7, 4e-8, 1e-8, 5, 0.2)
        for size in ("base", "large")
        for px, w in ((256, 16), (384, 24))
    },
}


@pytest.mark.parametrize("name", TABLE)
def test_the_papers_numbers(name):
    image, window, epochs, warmup, batch, lr, low, start, decay, clip, drop = TABLE[name]
    run = RECIPES[name]()
    assert (run.model.image_size, run.model.window, run.model.drop_path) == (image, window, drop)
    assert (run.schedule.epochs, run.schedule.warmup, run.batch) == (epochs, warmup, batch)
    scale = batch / run.optim.lr_batch
    assert (run.optim.lr * scale, run.optim.min_lr * scale, run.optim.warmup_lr * scale) == pytest.approx((lr, low, start))
    assert (run.optim.weight_decay, run.optim.clip, run.optim.betas, run.optim.eps) == (decay, clip, (0.9, 0.999), 1e-8)
    a = run.augment
    assert (a.randaugment, a.magnitude, a.magnitude_std, a.erase, a.mixup, a.cutmix, a.mix_switch, a.smoothing) == (
        2,
        9,
        0.5,
        0.25,
        0.8,
        1.0,
        0.5,
        0.1,
    )
    size = name.split("swinv2_")[1].split("_")[0]
    preset = model_config(f"swinv2_{size}")
    assert (run.model.width, run.model.depths, run.model.heads) == (preset.width, preset.depths, preset.heads)
    if name.endswith("from22k"):
        assert run.model.pretrained_windows == tuple((w, w) for w in (12, 12, 12, 6)) and run.init


def test_every_recipe_is_listed_under_its_own_name_and_survives_json():
    assert set(TABLE) | {"digits", "cifar10", "folder"} == set(RECIPES)
    for name, recipe in RECIPES.items():
        run = recipe()
        assert run.recipe == name
        assert from_dict(Run, json.loads(json.dumps(to_dict(run)))) == run


@pytest.mark.parametrize("name", RECIPES)
def test_the_tiny_twin_keeps_the_switches(name):
    run, twin = RECIPES[name](), tiny(RECIPES[name]())
    assert twin.augment == run.augment and twin.optim.weight_decay == run.optim.weight_decay
    assert (twin.model.similarity, twin.model.norm, twin.model.bias) == (run.model.similarity, run.model.norm, run.model.bias)
    assert bool(twin.model.pretrained_window) == bool(run.model.pretrained_window)


@pytest.mark.parametrize(
    "name", [n for n in RECIPES if n in ("folder", "imagenet_swinv2_base_window16", "imagenet_swinv2_large_window24_from22k")]
)
def test_the_tiny_twin_trains(name, tmp_path):
    twin = tiny(RECIPES[name]())
    summary = train(replace(twin, out=str(tmp_path), batch=359, precision="float32", schedule=replace(twin.schedule, epochs=1)))
    assert summary["steps"] == 4 and (Path(tmp_path) / "best" / "model.safetensors").exists()
