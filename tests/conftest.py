"""What several floors' tests share: a run small enough for a second, and nets whose every part speaks."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from manyscale.config import Augment, Input, Optim, Run, Schedule, SwinConfig

torch.set_num_threads(1)  # `make test` has a process per core

TESTS = Path(__file__).parent
HOMES = {"distributed": "ranks", "crash": "crash", "badinput": "badinput"}  # marks whose tests all live in one folder


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m` and a mark that has a home the rest is not imported, which takes as long as many a test."""
    home, inside = HOMES.get(config.option.markexpr), collection_path.relative_to(TESTS).parts
    return True if home and inside and inside[0] != home else None


def loud(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter random, norms too: fresh Swin V2 blocks are the identity, and would pass any test."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            center, spread = (1.0, 0.3) if "norm" in name and name.endswith("weight") else (0.0, 0.3)
            if name.endswith("logit_scale"):
                center = 2.3
            if parameter.ndim > 1 and not name.endswith(("logit_scale", "table")):
                spread = parameter[0].numel() ** -0.5
            parameter.copy_(center + spread * noise)
    return model


@pytest.fixture
def micro(tmp_path) -> Run:
    return micro_run(tmp_path)


def micro_run(folder: Path) -> Run:
    """A run on digits with everything on that could break a resume: augmentation, drop path, EMA, mixing, accumulation."""
    return Run(
        recipe="micro",
        model=SwinConfig(image_size=16, patch=2, window=4, width=8, depths=(2, 1), heads=(2, 4), mlp_ratio=1.0, drop_path=0.2),
        input=Input(data="digits", statistics="half", crop_ratio=1.0, workers=0),
        augment=Augment(scale=(0.5, 1.0), color_jitter=0.2, erase=0.2, mixup=0.4, cutmix=0.5, smoothing=0.1),
        optim=Optim(lr=2e-3, ema=0.9, layer_decay=0.9),
        schedule=Schedule(epochs=2, warmup=0.5),
        batch=240,
        accumulate=2,
        precision="float32",
        out=str(folder / "run"),
        log_every=1,
    )


def shorter(run: Run, **schedule) -> Run:
    return replace(run, schedule=replace(run.schedule, **schedule))
