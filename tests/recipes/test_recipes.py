"""The recipes' numbers against the papers', and a few steps of every tiny twin."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from manyscale.config import Run, SuperViTConfig, SwinConfig, ViTConfig, from_dict, to_dict
from manyscale.presets import model_config
from manyscale.recipes import RECIPES, tiny
from manyscale.recipes.vit_ladder import SIZES
from manyscale.train.branches import train as train_branches
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


def test_the_numbers_of_simmim():
    base, giant, tune = (RECIPES[name]() for name in ("simmim_imagenet_swinv2_base", "simmim_swinv2_giant_70m", "finetune"))
    for run in (base, giant):
        assert (run.task, run.model.image_size, run.model.window) == ("simmim", 192, 12)
        assert (run.simmim.mask_unit, run.simmim.mask_ratio, run.simmim.target_window) == (32, 0.6, 47)
        assert (run.augment.crop, run.augment.scale, run.augment.flip, run.augment.randaugment) == ("resized", (0.67, 1.0), 0.5, 0)
        assert not run.optim.decay_position_bias
    assert (base.model.depths, base.model.drop_path) == ((2, 2, 18, 2), 0.1)
    assert (base.batch, base.optim.lr * base.batch / 512, base.optim.weight_decay, base.optim.clip) == (2048, 4e-4, 0.05, 5)
    assert (base.schedule.epochs, base.schedule.warmup, base.schedule.milestones) == (800, 10, (700,))
    assert (giant.model.width, giant.model.depths, giant.model.extra_norm_every) == (512, (2, 2, 42, 4), 6)
    assert (giant.batch, giant.optim.lr, giant.optim.lr_batch, giant.optim.weight_decay, giant.optim.clip) == (9216, 1.4e-3, 0, 0.1, 100)
    assert giant.schedule.epochs == 20 and giant.schedule.warmup == "30k-steps"
    assert (tune.model.image_size, tune.model.window, tune.model.pretrained_window) == (224, 14, (12, 12, 12, 6))
    assert (tune.optim.lr * tune.batch / tune.optim.lr_batch, tune.optim.layer_decay, tune.model.drop_path) == (5e-3, 0.75, 0.1)
    assert (tune.schedule.epochs, tune.schedule.warmup, tune.optim.weight_decay) == (100, 20, 0.05)


def test_every_recipe_is_listed_under_its_own_name_and_survives_json():
    others = {"digits", "cifar10", "folder", "simmim_cifar10", "simmim_folder", "finetune", "vit_cifar10", "vit_giant_pretrain"}
    others |= {"vit_finetune", *(f"vit_ladder_{size}" for size in SIZES)}
    others |= {"supervit_cifar10", "supervit_folder", "supervit_imagenet_deit_small", "supervit_imagenet_lvvit_small"}
    assert set(TABLE) | others | {"simmim_imagenet_swinv2_base", "simmim_swinv2_giant_70m"} == set(RECIPES)
    for name, recipe in RECIPES.items():
        run = recipe()
        assert run.recipe == name
        assert from_dict(Run, json.loads(json.dumps(to_dict(run)))) == run


@pytest.mark.parametrize("name", RECIPES)
def test_the_tiny_twin_keeps_the_switches(name):
    run, twin = RECIPES[name](), tiny(RECIPES[name]())
    assert twin.augment == run.augment and twin.optim.weight_decay == run.optim.weight_decay
    kept = {
        SwinConfig: ("similarity", "norm", "bias"),
        ViTConfig: ("pool", "position", "gelu", "head_bias"),
        SuperViTConfig: ("keeps", "stem", "skip", "token_head", "qkv_bias", "positions", "count_rule"),
    }
    assert all(getattr(twin.model, name) == getattr(run.model, name) for name in kept[type(run.model)])
    assert (twin.supernet.sampling, twin.supernet.mix_token) == (run.supernet.sampling, run.supernet.mix_token)
    if isinstance(run.model, SwinConfig):
        assert bool(twin.model.pretrained_window) == bool(run.model.pretrained_window)
    else:
        assert (twin.optim.method, twin.loss, twin.schedule.curve) == (run.optim.method, run.loss, run.schedule.curve)
        assert bool(twin.schedule.branches) == bool(run.schedule.branches)


@pytest.mark.parametrize(
    "name",
    [
        "folder",
        "imagenet_swinv2_base_window16",
        "imagenet_swinv2_large_window24_from22k",
        "simmim_swinv2_giant_70m",
        "finetune",
        "vit_giant_pretrain",
        "vit_finetune",
        "supervit_imagenet_deit_small",
        "supervit_imagenet_lvvit_small",
    ],
)
def test_the_tiny_twin_trains(name, tmp_path):
    twin = tiny(RECIPES[name]())
    summary = train(replace(twin, out=str(tmp_path), batch=359, precision="float32", schedule=replace(twin.schedule, epochs=1)))
    assert summary["steps"] == 4 and (Path(tmp_path) / "best" / "model.safetensors").exists()


def test_the_ladder_s_twin_branches(tmp_path):
    twin = tiny(RECIPES["vit_ladder_w64"]())
    summary = train_branches(replace(twin, out=str(tmp_path), batch=120))
    assert list(summary["branches"]) == ["1.5-epochs", "2-epochs"]
    assert all(0 < branch["last"]["digits 5shot"] <= 1 for branch in summary["branches"].values())


def test_vit_recipes_are_the_papers():
    giant, tune = RECIPES["vit_giant_pretrain"](), RECIPES["vit_finetune"]()
    assert (giant.model.width, giant.model.depth, giant.model.mlp_width, giant.model.patch, giant.model.pool) == (1408, 40, 6144, 14, "map")
    assert (giant.optim.lr, giant.optim.weight_decay, giant.optim.head_decay, giant.optim.clip) == (8e-4, 0.03, 3.0, 1.0)
    assert (giant.loss, giant.model.head_bias, giant.batch, giant.optim.method) == ("sigmoid", -10.0, 16_384, "adafactor")
    assert (tune.optim.method, tune.optim.momentum, tune.optim.betas[0], tune.optim.weight_decay) == ("sgd", "bfloat16", 0.9, 0.0)
    assert (tune.batch, tune.schedule.length, tune.schedule.warmup, tune.model.image_size) == (512, "20k-steps", "500-steps", 384)


def test_supervit_recipes_are_the_official_runs():
    deit, lvvit = (RECIPES[f"supervit_imagenet_{name}_small"]() for name in ("deit", "lvvit"))
    for run in (deit, lvvit):
        assert (run.task, run.batch, run.schedule.epochs, run.schedule.warmup) == ("supernet", 1024, 300, 5)
        assert (run.model.sizes, run.model.keeps, run.model.drop_blocks) == ((128, 160, 192, 224), (0.5, 0.7, 1.0), (3, 6, 9))
        assert (run.optim.weight_decay, run.optim.eps, run.optim.clip, run.model.drop_path) == (0.05, 1e-8, 0.0, 0.1)
        assert (run.supernet.sampling, run.supernet.teacher, run.supernet.temperature) == ("paper", "size", 1.0)
        assert (run.augment.randaugment, run.augment.magnitude, run.augment.erase, run.augment.smoothing) == (2, 9, 0.25, 0.1)
    assert (deit.optim.lr * 2, deit.optim.warmup_lr * 2, deit.optim.min_lr * 2, deit.optim.lr_batch) == (1e-3, 1e-6, 1e-5, 512)
    assert (deit.augment.mixup, deit.augment.cutmix, deit.augment.repeats, deit.input.crop_ratio) == (0.8, 1.0, 3, 0.875)
    assert (lvvit.optim.lr, lvvit.optim.warmup_lr, lvvit.optim.min_lr, lvvit.optim.lr_batch) == (1.6e-3, 1e-6, 1e-5, 0)
    assert (lvvit.augment.mixup, lvvit.augment.cutmix, lvvit.supernet.mix_token, lvvit.optim.ema) == (0, 0, 1.0, 0.99992)
    assert (lvvit.input.crop_ratio, lvvit.model.token_head, lvvit.model.skip, lvvit.model.depth) == (0.9, 0.25, 2.0, 16)
