"""One optimiser step: the parts of a batch forward and back, the same on any number of ranks that share them."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from manyscale.config import Run
from manyscale.data.loader import Batch, seed_from
from manyscale.ranks import Ranks
from manyscale.tasks.pictures import Pictures
from manyscale.train.moments import whole
from manyscale.train.optim import set_rate
from manyscale.train.parts import Full, is_full
from manyscale.train.state import State


class Taken(NamedTuple):
    """How a step went."""

    loss: float  # the mean over the batch of all ranks
    fault: str  # why no weight was changed, or nothing


class Step:
    """The steps of one run. All ranks take them together, each with its share of the batch."""

    def __init__(self, run: Run, task: Pictures, state: State, ranks: Ranks, device: torch.device, precision: torch.dtype) -> None:
        self.run, self.task, self.state, self.ranks = run, task, state, ranks
        self.device, self.precision = device, precision

    def take(self, batch: Batch, lr: float, step: int, parts: int) -> Taken:
        """One step at learning rate `lr`. Where the loss or gradient of any rank is not finite, nothing changes on any.

        Args:
            batch: this rank's share.
            parts: into which the whole batch falls, each passed on its own.

        Raises:
            Full: a part does not fit into memory.
        """
        state = self.state
        set_rate(state.optimiser, lr)
        state.model.train()
        try:
            totals = self._pass(batch, step, parts)
        except RuntimeError as error:
            if not is_full(error):
                raise
            state.optimiser.zero_grad()
            state.spread.forget()
            raise Full(str(error).splitlines()[0]) from error
        everyones = self.ranks.gather(torch.stack(totals).tolist()).flatten().tolist()
        mean = math.fsum(everyones) / parts if all(map(math.isfinite, everyones)) else math.nan  # fsum: in any order the same
        parameters = [p for p in state.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        fault = self._fault(mean, norm)
        if not fault:
            if self.run.optim.clip:
                nn.utils.clip_grads_with_norm_(parameters, self.run.optim.clip, norm)
            state.optimiser.step()
            if state.ema:
                state.ema.update_parameters(state.model)
        state.optimiser.zero_grad()
        return Taken(mean, fault)

    def _pass(self, batch: Batch, step: int, parts: int) -> list[Tensor]:
        """Forward and back through this rank's parts; the loss of each."""
        spread, own = self.state.spread, parts // self.ranks.count
        weight = 1 / (parts if spread.exact else own)  # else the ranks take the mean of their gradients
        totals, passes = [], self.task.passes(step)
        for number, part in enumerate(batch.parts(own)):
            total = torch.zeros((), device=self.device)
            losses = self._losses(part, number, step, own)
            for place in range(passes):
                with spread.part(last=number == own - 1, ends=place == passes - 1):
                    loss = next(losses)
                    (loss * weight).backward()
                    total += loss.detach()
            spread.add()
            totals.append(total)
        spread.reduce()
        return totals

    def _fault(self, loss: float, norm: Tensor) -> str:
        if not math.isfinite(loss):
            return "the loss is not finite"
        if torch.isfinite(whole(norm)):
            return ""
        named = ((name, p.grad) for name, p in self.state.model.named_parameters() if p.grad is not None)
        first = next((name for name, gradient in named if not whole(gradient).isfinite().all()), "all parameters together")
        return f"the gradient of {first} is not finite"

    def _losses(self, part: Batch, number: int, step: int, own: int) -> Iterator[Tensor]:
        """The task's losses of a part, computed one by one in the run's precision, at most one of their graphs alive.

        Args:
            number: of the part among the `own` of this rank.
        """
        which = self.ranks.rank * own + number
        torch.manual_seed(seed_from(self.run.seed, step, *([which] if which else [])))
        inputs = self.task.targets(part, self.device)
        average = self.state.ema.module if self.state.ema else None
        losses = self.task.losses(self.state.called, *inputs, step, average)
        while True:
            with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
                loss = next(losses, None)
            if loss is None:
                return
            yield loss

    def culprit(self, batch: Batch, step: int, parts: int) -> str:
        """The first module whose output is not finite when the batch is passed once more, on whichever rank; in words."""
        culprits: list[str] = []

        def watch(name: str) -> Any:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                if isinstance(output, Tensor) and not culprits and not output.isfinite().all():
                    culprits.append(name)

            return hook

        hooks = [module.register_forward_hook(watch(name)) for name, module in self.state.model.named_modules() if name]
        own = parts // self.ranks.count
        with torch.no_grad(), eager(self.run):
            for number, part in enumerate(batch.parts(own)):
                for _ in self._losses(part, number, step, own):
                    pass
        for hook in hooks:
            hook.remove()
        first = next((names[0] for names in self.ranks.collect(culprits) if names), "")
        return f"first in module {first}" if first else "with every module's output finite"


def eager(run: Run) -> AbstractContextManager:
    """Where compiling does not pay: few batches, some of another size, or modules that are watched."""
    return torch.compiler.set_stance("force_eager") if run.compile else nullcontext()
