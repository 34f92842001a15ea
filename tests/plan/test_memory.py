"""Planned bytes against those of real optimisers."""

import pytest
import torch

import manyscale as ms
from manyscale.config import Optim
from manyscale.plan import memory as planned
from manyscale.plan.memory import METHODS, memory
from manyscale.presets import model_config
from manyscale.train.moments import LEAST
from manyscale.train.optim import make_optimiser
from tests.train.test_moments import state_bytes

VIT = {"image_size": 64, "patch": 8, "width": 128, "depth": 2, "heads": 2, "mlp_width": 200, "classes": 40}
SWIN = {"image_size": 64, "patch": 4, "window": 4, "width": 64, "depths": (2, 1), "heads": (2, 4), "classes": 33}
SUPER = {"sizes": (48, 64), "patch": 8, "width": 128, "depth": 2, "heads": 2, "mlp_width": 200, "drop_blocks": (1,), "classes": 40}
NETS = [
    ("vit_tiny_patch16", {**VIT, "pool": "map", "pre_logits": 48}),
    ("vit_tiny_patch16", {**VIT, "pool": "token", "mask_token": True}),
    ("vit_tiny_patch16", {**VIT, "position": "sincos2d", "classes": 0, "heads": 4, "patch": 32}),
    ("vit_tiny_patch16", {**VIT, "width": 1024, "heads": 32, "depth": 1, "patch": 32}),  # heads and their width are axes too
    ("swinv2_tiny", {**SWIN, "level_norms": True, "mask_token": True, "extra_norm_every": 1}),
    ("swinv2_tiny", {**SWIN, "heads": (2, 32), "width": 64}),
    ("swin_tiny", {**SWIN, "heads": (2, 32)}),
    ("supervit_deit_tiny", {**SUPER, "registers": 40}),
    ("supervit_lvvit_tiny", {**SUPER, "stem_width": 40, "positions": "interpolated"}),
]


@pytest.mark.parametrize(("name", "fields"), NETS)
def test_planned_bytes_are_the_optimisers_own(name, fields):
    model = ms.create_model(name, **fields)
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    for method, half in METHODS:
        optimiser = make_optimiser(model, Optim(method=method, momentum="bfloat16" if half else "float32"))
        optimiser.step()
        counters = 4 * len(parameters)
        assert memory(model.config, method, half=half).optimiser == state_bytes(optimiser) - counters, (method, half)
    assert memory(model.config).weights == sum(4 * p.numel() for p in parameters)
    assert planned.FACTORED_FROM == LEAST


def test_the_papers_numbers_for_g():
    """Of 1.88 billion parameters with MAP pooling: 7.0 GiB of weights, +14.0 for Adam, +10.5, +3.5 (section 3.4)."""
    giant = model_config("G/14", pool="map", classes=0)

    def gib(*arguments, **options):
        return memory(giant, *arguments, **options).optimiser / 2**30

    assert memory(giant).weights / 2**30 == pytest.approx(7.0, abs=0.05)
    assert (gib("adamw"), gib("adamw", half=True), gib("adafactor", half=True)) == pytest.approx((14.0, 10.5, 3.5), abs=0.05)
    assert memory(giant, ema=True).total - memory(giant).total == memory(giant).weights
