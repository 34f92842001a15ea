"""Everything a run carries from step to step, as tensors and values that a checkpoint can hold.

No random generator is in it: every step seeds its own from (seed, step), every sample its own from (seed, epoch, sample).
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from manyscale.config import Optim
from manyscale.ranks import Ranks
from manyscale.train.checkpoint import empty_tensors, read_tensors, read_values
from manyscale.train.optim import make_optimiser
from manyscale.train.spread import Spread


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
    parts: int = 0  # of a batch, each passed on its own: what random numbers depend on
    recent: list[float] = field(default_factory=list)  # losses of the last steps, where spikes are watched for
    passed: list[list[int]] = field(default_factory=list)  # [first, past the last] steps whose samples were left out after a spike
    left_out: int = 0  # steps in a row whose loss or gradient was not finite
    history: list[dict[str, Any]] = field(default_factory=list)  # every evaluation's metrics


class State:
    """The model, its moving average, the optimiser and the clock of one run, laid out on the ranks by `spread`."""

    def __init__(self, model: nn.Module, optim: Optim, spread: Spread | None = None) -> None:
        self.spread = spread or Spread()
        self.model = model
        self.ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(optim.ema), use_buffers=True) if optim.ema else None
        self.spread.place(model, self.ema.module if self.ema else None)
        self.optimiser = make_optimiser(model, optim, self.spread.optimiser)
        self.clock = Clock()

    @property
    def final(self) -> nn.Module:
        """The weights to evaluate and keep: the moving average where there is one."""
        return self.ema.module if self.ema else self.model

    @property
    def called(self) -> nn.Module:
        """What a loss calls: the model, or what sums its gradients over the ranks."""
        return self.spread.call or self.model

    @property
    def moments(self) -> dict[nn.Parameter, dict[str, Tensor]]:
        """What the optimiser remembers of each parameter; of ZeRO-1 those of this rank's share."""
        return getattr(self.optimiser, "optim", self.optimiser).state

    def weights(self) -> dict[str, Tensor]:
        """The tensors of the model and its moving average by name: `model.` and `ema.`"""
        named = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        if self.ema:
            named |= {f"ema.{name}": tensor for name, tensor in self.ema.state_dict().items()}
        return named

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name: `weights`, and `optimiser.<parameter>.<moment>`."""
        named = self.weights()
        for name, parameter in self.model.named_parameters():
            for moment, tensor in self.moments.get(parameter, {}).items():
                named[f"optimiser.{name}.{moment}"] = tensor
        return named

    def values(self) -> dict[str, Any]:
        """The clock as JSON values."""
        return asdict(self.clock)

    def restore(self, path: Path, ranks: Ranks) -> None:
        """Become the state that a checkpoint holds.

        Raises:
            ValueError: it is of another model or optimiser; the tensors are named.
        """
        there, weights = empty_tensors(path), self.weights()
        moments: dict[nn.Parameter, dict[str, Tensor]] = {}
        named, own = dict(self.model.named_parameters()), self._own()
        for name, like in there.items():
            parameter, _, moment = name.removeprefix("optimiser.").rpartition(".")
            if name.startswith("optimiser.") and named.get(parameter) in own:
                moments.setdefault(named[parameter], {})[moment] = _moment(like, named[parameter])
        wrong = [name for name in there if name not in weights and not name.startswith("optimiser.")]
        wrong += [name for name, tensor in weights.items() if name not in there or there[name].shape != tensor.shape]
        if wrong:
            raise ValueError(f"{path} is of another model or optimiser: {', '.join(wrong[:5])}; give another --out")
        names = {parameter: name for name, parameter in named.items()}
        found = {f"optimiser.{names[p]}.{moment}": tensor for p, each in moments.items() for moment, tensor in each.items()}
        read_tensors(path, weights | found, ranks)
        self.moments.clear()
        self.moments.update(moments)
        self.clock = Clock(**read_values(path))

    def _own(self) -> set[nn.Parameter]:
        """The parameters whose moments this rank keeps."""
        optimiser = getattr(self.optimiser, "optim", self.optimiser)
        return {parameter for group in optimiser.param_groups for parameter in group["params"]}

    @torch.no_grad()
    def start_again(self, kept: dict[str, Tensor]) -> None:
        """Put back weights that `weights` gave, and forget what the optimiser remembers."""
        for name, tensor in self.weights().items():
            tensor.copy_(kept[name])
        self.moments.clear()


def _moment(like: Tensor, parameter: nn.Parameter) -> Tensor:
    """Room for a moment: where it has its parameter's shape, as that lies on the ranks; else whole on each."""
    if like.shape == parameter.shape and like.ndim:
        return torch.empty_like(parameter, dtype=like.dtype).detach()
    return torch.empty_like(like, device=parameter.device)


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
        raise ValueError(f"field `device`: {name!r} cannot be used here: {str(error).splitlines()[0][:150]}; try cpu") from None
    if device.type == "meta" or (device.type == "cpu" and device.index):
        raise ValueError(f"field `device`: {name!r} computes nothing; give cpu, or an accelerator such as cuda:0")
    return device


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """float32 or bfloat16; `auto`: bfloat16 where the device multiplies in it (GPUs, CPUs with AMX)."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if device.type == "cpu" and torch.cpu._is_amx_tile_supported() else torch.float32
