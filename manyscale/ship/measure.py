"""What every setting of a net takes on this machine: the settings in turns, the median, the slow tail, the memory."""

import json
import os
import platform
import random
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from manyscale.config import NetConfig, Setting, to_dict
from manyscale.models import Net, compile_settings
from manyscale.models.settings import run_at

WARM_UP = 3  # rounds that are not counted


class Timing(NamedTuple):
    """What a setting took."""

    p50: float  # seconds of a batch
    p95: float
    peak: int | None  # bytes at once besides weights and images; None: not known, as of a compiled net on the CPU


@torch.no_grad()
def measure(
    model: Net,
    settings: Sequence[Setting],
    *,
    batch: int,
    device: torch.device,
    precision: torch.dtype = torch.float32,
    compiled: bool = False,
    rounds: int = 30,
    seed: int = 0,
) -> dict[Setting, Timing]:
    """The forward pass of every setting on a batch of images that lie on the device at the setting's own size.

    That is what is paid by whoever decodes pictures to that size; resizing larger ones is not in it, nor is reading them. Every round
    runs all settings, in an order drawn anew, so that whatever else slows the machine slows all alike; each twice, of which the second
    counts: the first finds another setting's data in the caches, which a net that keeps to one setting does not. The net is left in
    evaluation mode.

    Raises:
        ValueError: a setting the net cannot be run at, or no batch or round.
    """
    for name, value in (("batch", batch), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"field `{name}`: {value} must be at least 1")
    model.eval()
    images = {size: _images(batch, size, model, device, seed) for size in {size_of(model.config, setting) for setting in settings}}
    run = partial(run_at, model)
    calls: Mapping[Setting, Callable[..., Tensor]] = {setting: partial(run, setting=setting) for setting in settings}
    if compiled:
        calls = compile_settings(run, settings, freeze=device.type == "cpu")
    seconds: dict[Setting, list[float]] = {setting: [] for setting in settings}
    generator = random.Random(seed)
    with torch.autocast(device.type, precision, enabled=precision != torch.float32):
        for number in range(WARM_UP + rounds):
            for setting in generator.sample(list(settings), len(settings)):
                call = partial(calls[setting], images[size_of(model.config, setting)])
                call()
                spent, _ = time_call(call, device)
                if number >= WARM_UP:
                    seconds[setting].append(spent)
        most = {
            setting: peak(partial(calls[setting], images[size_of(model.config, setting)]), device, traced=not compiled)
            for setting in settings
        }
    return {setting: Timing(*np.quantile(seconds[setting], [0.5, 0.95]).tolist(), most[setting]) for setting in settings}


def size_of(config: NetConfig, setting: Setting) -> tuple[int, int]:
    """(height, width) of the images at a setting; the net's own where it does not say."""
    size = setting.size or config.size
    return size if isinstance(size, tuple) else (size, size)


def _images(batch: int, size: tuple[int, int], model: Net, device: torch.device, seed: int) -> Tensor:
    shape = (batch, model.config.channels, *size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, next(model.parameters()).dtype)


def apart(found: Tensor, expected: Tensor) -> float:
    """How far answers are from those that are expected, of the largest of these."""
    largest = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)  # a net that has not learnt may answer zeros
    return ((found - expected).abs().max() / largest).item()


def time_call(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds from the call to the end of what it started on the device, and what it returned."""
    _wait(device)
    start = time.perf_counter()
    result = call()
    _wait(device)
    return time.perf_counter() - start, result


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak(call: Callable[[], Any], device: torch.device, *, traced: bool = False) -> int | None:
    """The most bytes that a call has at once, besides what is there before it; None where nobody counts them.

    Args:
        traced: whether, on the CPU, its operations are watched (`Allocations`): of an eager forward pass.
    """
    if device.type != "cpu":
        _wait(device)
        before = torch.accelerator.memory_allocated(device)
        torch.accelerator.reset_peak_memory_stats(device)
        call()
        _wait(device)
        most = torch.accelerator.max_memory_allocated(device)
        return most - before if most else None  # 0: the device keeps no account
    if not traced:
        return None
    with Allocations() as held:
        call()
    return held.peak


class Allocations(TorchDispatchMode):
    """The bytes of all tensors that operations make and that still live, and the most there were at once.

    Where there is no allocator to ask, as on the CPU. What a kernel needs within itself is not seen; of a SuperViT it came to the byte
    to what torch.profiler's trace of the CPU's allocations adds up to.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [x.untyped_storage() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        out = function(*args, **(kwargs or {}))
        for storage in (x.untyped_storage() for x in tree_leaves(out) if isinstance(x, Tensor)):
            if storage not in self.seen and not any(storage is one for one in given):
                self.seen.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _free(self, size: int) -> None:
        self.now -= size


def fingerprint(model: Net) -> str:
    """A hash of a net's configuration and weights: which net a measurement is of."""
    state = xxhash.xxh3_128(json.dumps(to_dict(model.config), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return state.hexdigest()


def device_name(device: torch.device) -> str:
    """The device in words: the GPU's name, or the processor's with the instructions that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return f"{device.type} ({platform.machine()})"
    known = Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    names = (line.partition(":")[2].strip() for line in known if line.startswith("model name"))
    return f"{next(names, platform.processor() or platform.machine())}, {torch.backends.cpu.get_cpu_capability()}"
