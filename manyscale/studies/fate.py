"""What became of a run: it learns, is stuck, broke down, or diverged. Clipped gradients hide the last three in a finite loss."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from manyscale.config import Run
from manyscale.data.sources import open_split
from manyscale.studies.grid import Outcome
from manyscale.studies.study import Values, cell
from manyscale.tasks.simmim import Pretrain, on_pixels, score

BROKEN = 1.5  # times the lowest training loss on the way, at the end
Fate = Literal["learns", "stuck", "broke down", "diverged"]
FATES = (
    "A run diverged where its loss or a gradient stopped being finite; it broke down where its last training loss (a mean of ten steps) "
    f"is more than {BROKEN:g} times its lowest; it is stuck where it ends no better than a guess without a net: for classes the most "
    "frequent one, by two standard errors, for pixels the mean colour of the visible ones, by a hundredth."
)


def fate(outcome: Outcome, guess: float) -> Fate:
    """What became of a run.

    Args:
        guess: the metric of a guess, as `guessed_accuracy` and `guessed_painting` give it.
    """
    if not outcome.summary:
        return "diverged"
    losses = [loss for _, loss in curve(outcome.run)]
    if losses[-1] > BROKEN * min(losses):
        return "broke down"
    last = outcome.summary["last"]
    better = last["l1"] < 0.99 * guess if "l1" in last else last["accuracy"] > guess
    return "learns" if better else "stuck"


def fate_cell(values: Values, fates: Sequence[Fate], **shown: Any) -> str:
    """As `study.cell`, of the values of runs that learn; what became of the others is counted beside it."""
    fallen = [f"{fates.count(each)} of {len(fates)} {each}" for each in dict.fromkeys(fates) if each != "learns"]
    return ", ".join(filter(None, (cell([value for value in values if value is not None], **shown), *fallen)))


def curve(run: Run) -> list[tuple[int, float]]:
    """(step, training loss) of a run's log."""
    lines = (Path(run.out) / "metrics.jsonl").read_text().splitlines()
    return [(record["step"], record["loss"]) for record in map(json.loads, lines) if "lr" in record]


def guessed_accuracy(run: Run) -> float:
    """What always saying the most frequent class scores on the held-out pictures, and two standard errors."""
    val = open_split(replace(run.input, cache=False), "val", run.seed).source
    share = max(Counter(val.label(index) for index in range(len(val))).values()) / len(val)
    return share + 2 * (share * (1 - share) / len(val)) ** 0.5


def guessed_painting(run: Run) -> float:
    """The masked L1 of painting the mean colour of each picture's visible pixels, on the held-out pictures."""
    task = Pretrain(replace(run, input=replace(run.input, cache=False)))
    guess = VisibleMean(task.run.model.patches)
    return score(guess, task.eval_batches(), run.simmim, guess.patches, torch.device("cpu"), torch.float32, lambda path, reason: None)["l1"]


class VisibleMean(nn.Module):
    """(B, C, H, W) pictures and (B, h, w) masks -> the mean of what is visible, everywhere."""

    def __init__(self, patches: tuple[int, ...]) -> None:
        super().__init__()
        self.patches = patches

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """(B, C, H, W)."""
        visible = ~on_pixels(mask, self.patches)
        return ((images * visible).sum((2, 3), keepdim=True) / visible.sum((2, 3), keepdim=True)).expand_as(images)
