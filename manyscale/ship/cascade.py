"""A cheap setting first, a better one where it is unsure: thresholds calibrated on held-out pictures (as in arXiv 2105.15075).

Confidence is the largest probability after temperature scaling (Guo et al., arXiv 1706.04599, section 4.2).
Letters: N pictures, K classes, S settings.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor

from manyscale.config import Setting, from_dict, to_dict
from manyscale.config.checks import require
from manyscale.models import Net
from manyscale.models.settings import run_at
from manyscale.ship.answers import Answers
from manyscale.storage import read_json, write_json

BINS = 15  # of the calibration error, as in the paper
WIDEST = 20.0  # temperatures lie between its inverse and it: where all is answered right, the likelihood knows no end


@dataclass(frozen=True, kw_only=True)
class Cascade:
    """Settings in the order they are asked, how sure each must be to have the last word, and what to expect of it."""

    model: str  # fingerprint of the net it was calibrated for
    settings: tuple[Setting, ...]
    thresholds: tuple[float, ...]  # for each but the last: below it, the next is asked
    temperatures: tuple[float, ...]  # for each
    aim: str  # what the thresholds were chosen for
    place: str  # the table of costs: where its cost was measured
    data: str  # set and split, of which one half chose the thresholds, and the other gave these:
    shares: tuple[float, ...]  # of pictures that each setting was asked
    accuracy: float
    cost: str  # the mean, by the settings' own costs

    def __post_init__(self) -> None:
        asked = len(self.settings)
        require(asked >= 2, "settings", f"{asked} are no cascade; give two or more")
        require(
            len(self.thresholds) == asked - 1, "thresholds", f"{len(self.thresholds)} for {asked} settings; give one for each but the last"
        )
        require(len(self.temperatures) == asked, "temperatures", f"{len(self.temperatures)} for {asked} settings; give one for each")
        fits = all(0 <= t <= 1.001 for t in self.thresholds)  # just above 1: everything goes on
        require(fits, "thresholds", f"{self.thresholds} must be probabilities")
        require(all(0 < t < math.inf for t in self.temperatures), "temperatures", f"{self.temperatures} must be positive")


class Judged(NamedTuple):
    """How sure every setting is of each picture, and whether it is right."""

    sure: np.ndarray  # (S, N) float32
    right: np.ndarray  # (S, N) bool

    def part(self, places: Tensor) -> "Judged":
        """The pictures at `places`."""
        return Judged(self.sure[:, places.numpy()], self.right[:, places.numpy()])


class Cut(NamedTuple):
    """A threshold between two settings, and what it gives on the pictures it was chosen on."""

    threshold: float
    cost: float  # the mean
    accuracy: float


class Cascaded(NamedTuple):
    """What a cascade says of a batch."""

    probabilities: Tensor  # (B, K), after temperature scaling
    stages: Tensor  # (B,) int64, which of its settings had the last word

    def asked(self, stages: int) -> list[int]:
        """How many pictures each stage was asked."""
        last = self.stages.bincount(minlength=stages)
        return last.flip(0).cumsum(0).flip(0).tolist()


def probabilities(logits: Tensor, temperature: float) -> Tensor:
    """(N, K) -> (N, K) float32, softmax of the logits over a temperature."""
    return (logits.float() / temperature).softmax(-1)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature at which the labels are likeliest: (N, K), (N,) -> one in [1/20, 20].

    The likelihood is unimodal in it (it is concave in its inverse), so a bounded line search finds it.
    """
    logits = logits.double()
    limit = math.log(WIDEST)

    def loss(log: float) -> float:
        return F.cross_entropy(logits / math.exp(log), labels).item()

    return math.exp(minimize_scalar(loss, bounds=(-limit, limit), method="bounded", options={"xatol": 1e-6}).x)


def calibration_error(sure: np.ndarray, right: np.ndarray, bins: int = BINS) -> float:
    """How far confidence and accuracy lie apart, the mean over bins of equal width weighted by their pictures (ECE): (N,), (N,) bool."""
    index = np.clip(np.ceil(sure * bins).astype(int) - 1, 0, bins - 1)  # (0, 1/15], (1/15, 2/15], ...
    gaps = np.bincount(index, weights=right.astype(float) - sure, minlength=bins)
    return float(np.abs(gaps).sum() / len(sure))


def judge(answers: Answers, settings: Sequence[Setting], temperatures: Sequence[float]) -> Judged:
    """How sure the settings are at their temperatures, and whether they are right."""
    sure, right = [], []
    for setting, temperature in zip(settings, temperatures, strict=True):
        confidence, said = probabilities(answers.logits[setting], temperature).max(-1)
        sure.append(confidence.numpy())
        right.append((said == answers.labels).numpy())
    return Judged(np.stack(sure), np.stack(right))


def cut(
    sure: np.ndarray, first: np.ndarray, second: np.ndarray, costs: tuple[float, float], *, most: float = math.inf, accuracy: float = 0.0
) -> Cut | None:
    """The threshold on the first setting's confidence below which the second is asked.

    Of all thresholds that spend at most `most` on average: with an `accuracy` to reach the cheapest that does, else the most accurate,
    and of equals the cheapest.

    Args:
        sure: (N,), of the first setting.
        first, second: (N,) bool, whether each is right.
        costs: of one picture with each; who asks the second has asked the first.

    Returns:
        None where no threshold does.
    """
    count, order = len(sure), np.argsort(sure, kind="stable")
    sure = sure[order]
    ahead = np.cumsum(second[order].astype(int) - first[order].astype(int))
    right = first.sum() + np.concatenate([[0], ahead])  # where the m least sure pictures go on, m from 0 to N
    cost = costs[0] + np.arange(count + 1) / count * costs[1]
    fits = np.concatenate([[True], sure[1:] > sure[:-1], [True]])  # no threshold parts equals
    places = np.flatnonzero(fits & (cost <= most) & (right >= accuracy * count - 1e-9))
    if not len(places):
        return None
    place = places[0] if accuracy else places[np.argmax(right[places])]
    threshold = sure[place] if place < count else np.nextafter(sure[-1], np.inf, dtype=sure.dtype)
    return Cut(float(threshold), float(cost[place]), float(right[place] / count))


def search(judged: Judged, costs: Sequence[float], *, most: float = math.inf, accuracy: float = 0.0) -> tuple[int, int, Cut] | None:
    """The best pair of settings, the cheaper first, and the threshold between them; `most` and `accuracy` as of `cut`."""
    found = []
    for first, second in permutations(range(len(costs)), 2):
        if costs[first] < costs[second]:
            here = cut(
                judged.sure[first], judged.right[first], judged.right[second], (costs[first], costs[second]), most=most, accuracy=accuracy
            )
            if here:
                found.append((first, second, here))
    if not found:
        return None
    return min(found, key=lambda one: (one[2].cost, -one[2].accuracy) if accuracy else (-one[2].accuracy, one[2].cost))


def outcome(judged: Judged, stages: Sequence[int], thresholds: Sequence[float], costs: Sequence[float]) -> tuple[float, float, list[float]]:
    """Accuracy, mean cost, and the share of pictures that each stage is asked, of a cascade on other pictures.

    Args:
        stages: which of the judged settings it asks, in order.
        costs: of one picture with each of the judged settings.
    """
    count = judged.sure.shape[1]
    going = np.ones(count, dtype=bool)
    right, cost, shares = 0, 0.0, []
    for place, stage in enumerate(stages):
        shares.append(float(going.mean()))
        cost += shares[-1] * costs[stage]
        last = place == len(stages) - 1
        stays = going if last else going & (judged.sure[stage] >= thresholds[place])
        right += int(judged.right[stage][stays].sum())
        going = going & ~stays
    return right / count, cost, shares


@torch.no_grad()
def run_cascade(model: Net, cascade: Cascade, images: Tensor) -> Cascaded:
    """Images (B, 3, H, W) through a cascade: only those that a setting is unsure of go on to the next, as a smaller batch."""
    rest = torch.arange(len(images), device=images.device)
    stages = torch.zeros_like(rest)
    said = None
    for place, (setting, temperature) in enumerate(zip(cascade.settings, cascade.temperatures, strict=True)):
        answers = probabilities(run_at(model, images[rest] if place else images, setting), temperature)
        said = answers if said is None else said.index_copy(0, rest, answers)
        stages[rest] = place
        if place < len(cascade.thresholds):
            rest = rest[answers.amax(-1) < cascade.thresholds[place]]
            if not len(rest):
                break
    return Cascaded(said, stages)


def write_cascade(path: Path | str, cascade: Cascade) -> None:
    """Put a cascade into a JSON file."""
    write_json(path, to_dict(cascade))


def read_cascade(path: Path | str, model: str) -> Cascade:
    """The cascade in a file, for the net with this fingerprint.

    Raises:
        ValueError: no such file, not a cascade, or one of another net; the message names the file and the field.
    """
    if not Path(path).exists():
        raise ValueError(f"{path}: no such file; `manyscale plan cost RUN --cascade` writes one")
    cascade = from_dict(Cascade, read_json(path), str(path))
    if cascade.model != model:
        raise ValueError(
            f"{path}: field `model`: calibrated for other weights ({cascade.model[:12]}, these are {model[:12]}); make it anew with "
            f"`manyscale plan cost RUN --cascade`"
        )
    return cascade
