"""Everything a run carries from step to step, as tensors and values that a checkpoint can hold.

No random generator is in it: every step seeds its own from (seed, step), every sample its own from (seed, epoch, sample).
"""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from manyscale.config import Optim
from manyscale.train.optim import make_optimiser


@dataclass
class Clock:
    """The run's plain numbers."""

    step: int = 0  # steps done
    steps: int = 0  # steps planned
    seconds: float = 0.0  # spent, over all sittings
    best: float | None = None  # of the task's metric
    best_step: int = 0
    stale: int = 0  # evaluations since the best
    precision: str = ""  # computed in; `auto` may mean another on another machine
    data: str = ""  # fingerprint of the set's classes and files
    history: list[dict[str, Any]] = field(default_factory=list)  # every evaluation's metrics


class State:
    """The model, its moving average, the optimiser and the clock of one run."""

    def __init__(self, model: nn.Module, optim: Optim) -> None:
        self.model = model
        self.ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(optim.ema), use_buffers=True) if optim.ema else None
        self.optimiser = make_optimiser(model, optim)
        self.clock = Clock()

    @property
    def final(self) -> nn.Module:
        """The weights to evaluate and keep: the moving average where there is one."""
        return self.ema.module if self.ema else self.model

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name: `model.`, `ema.` and `optimiser.<parameter>.<moment>`."""
        named = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        if self.ema:
            named |= {f"ema.{name}": tensor for name, tensor in self.ema.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for moment, tensor in self.optimiser.state.get(parameter, {}).items():
                named[f"optimiser.{name}.{moment}"] = tensor
        return named

    def values(self) -> dict[str, Any]:
        """The clock as JSON values."""
        return asdict(self.clock)

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Become the state that gave `tensors()` and `values()`."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

        self.model.load_state_dict(part("model."))
        if self.ema:
            self.ema.load_state_dict(part("ema."))
        moments = part("optimiser.")
        for name, parameter in self.model.named_parameters():
            own = {key.rpartition(".")[2]: tensor for key, tensor in moments.items() if key.rpartition(".")[0] == name}
            if own:
                self.optimiser.state[parameter] = {key: tensor.to(parameter.device) for key, tensor in own.items()}
        self.clock = Clock(**values)


def pick_device(name: str) -> torch.device:
    """The device of a name; `auto`: the accelerator where there is one.

    Raises:
        ValueError: a device that is not there.
    """
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"field `device`: {name!r} cannot be used here: {str(error).splitlines()[0]}; try cpu") from None
    return device


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """float32 or bfloat16; `auto`: bfloat16 where the device multiplies in it (GPUs, CPUs with AMX)."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if device.type == "cpu" and torch.cpu._is_amx_tile_supported() else torch.float32
