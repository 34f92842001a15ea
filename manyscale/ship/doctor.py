"""Is this machine ready? Versions, devices, one training step of each model family, loader speed."""

import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.nn.functional as F

import manyscale
from manyscale.config import NetConfig, Optim, Setting, SuperViTConfig, SwinConfig, ViTConfig
from manyscale.models import build
from manyscale.models.settings import run_at
from manyscale.recipes import RECIPES
from manyscale.tasks import TASKS
from manyscale.train.optim import make_optimiser
from manyscale.train.state import pick_device, pick_precision

PACKAGES = ("torch", "torchvision", "safetensors", "pillow", "numpy", "scikit-learn", "tyro", "timm", "transformers", "tensorboard")
MICRO = SwinConfig(image_size=32, patch=4, window=4, width=32, depths=(2, 2), heads=(2, 4), classes=10)
FAMILIES: dict[str, NetConfig] = {
    "Swin V1": replace(MICRO, similarity="dot", norm="pre", bias="table", merge_norm="before"),
    "Swin V2": MICRO,
    "Swin V2 for SimMIM": replace(MICRO, mask_token=True),
    "Swin V2 on clips": replace(MICRO, image_size=(4, 32, 32), patch=(2, 4, 4), window=(2, 4, 4)),
    "ViT": ViTConfig(image_size=32, patch=8, width=32, depth=2, heads=2, mlp_width=128, pool="map", classes=10),
    "SuperViT, half the tokens": SuperViTConfig(
        sizes=(32,), patch=8, width=32, depth=2, heads=2, mlp_width=128, drop_blocks=(0,), classes=10
    ),
}


def examine() -> Iterator[tuple[str, str, bool]]:
    """Rows of (what, finding, whether it is well)."""
    yield "manyscale", f"{manyscale.__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}", True
    for name in PACKAGES:
        try:
            yield name, version(name), True
        except PackageNotFoundError:
            yield name, "not installed (optional)", True
    device = pick_device("auto")
    what = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    )
    yield "device", f"{device}: {what}", True
    for precision in (torch.float32, torch.bfloat16):
        a = torch.randn(512, 512, device=device, dtype=precision)
        spent = _time(lambda a=a: a @ a)
        chosen = " (chosen by --precision auto)" if pick_precision("auto", device) == precision else ""
        yield f"product in {str(precision).removeprefix('torch.')}", f"{2 * 512**3 / spent / 1e9:,.0f} GFLOP/s{chosen}", True
    for family, config in FAMILIES.items():
        yield f"one step of {family}", *_one_step(config, device)
    run = RECIPES["digits"]()
    task = TASKS[run.task](run)
    start, count = time.perf_counter(), 0
    for batch in task.train_batches(0, 10, torch.device("cpu")):
        count += len(batch.labels)
    rate = count / (time.perf_counter() - start)
    yield "loader", f"{rate:,.0f} pictures/s (cached digits, augmented, in one process; files on disk are slower)", True


def _one_step(config: NetConfig, device: torch.device) -> tuple[str, bool]:
    torch.manual_seed(0)
    model = build(config).to(device)
    optimiser = make_optimiser(model, Optim(lr=1e-3))
    x = torch.randn(8, 3, *config.size, device=device)
    y = torch.arange(8, device=device)
    setting = Setting(keep=0.5) if isinstance(config, SuperViTConfig) else None
    losses = []
    start = time.perf_counter()
    for _ in range(2):
        loss = F.cross_entropy(run_at(model, x, setting), y)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    well = losses[1] < losses[0]
    return f"loss {losses[0]:.3f} -> {losses[1]:.3f} in {time.perf_counter() - start:.2f} s", well


def _time(act: Callable[[], object]) -> float:
    act()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        act()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / 10
