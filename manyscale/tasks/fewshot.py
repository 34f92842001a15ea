"""How much a frozen model's features know: linear regression on a few pictures of every class.

What big_vision calls `fewshot_lsr`, by which "Scaling Vision Transformers" (arXiv 2106.04560, appendix D) compares its models.

Letters: M pictures to draw from, N drawn, T to be told, D features, C classes; S shot counts, R seeds, L values of l2.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from manyscale.config import Input, Preprocess, Run
from manyscale.config.checks import require
from manyscale.data.loader import eval_batches, worker_count
from manyscale.data.sources import Part, Source, open_split, same_set
from manyscale.data.transforms import Transform, few_shot_transform
from manyscale.models import Net
from manyscale.ranks import ALONE, Ranks
from manyscale.tasks.pictures import Report, all_reported, something

SHOTS = (1, 5, 10, 25)
L2 = 2.0**10  # for D of 768 and more, N in the thousands; small features want less, so give a grid
BIAS = 100.0  # the value of the constant feature: its weight is as good as free, its penalty l2 / 10^4


# --- The regression, on tensors -----------------------------------------------------------------------------------------


class Draw(NamedTuple):
    """Which pictures are learnt from."""

    picks: tuple[tuple[np.ndarray, ...], ...]  # S of R of (N,) int64
    short: dict[int, dict[str, int]]  # shots -> the classes that have fewer pictures, and how many


def choose(labels: Sequence[int] | np.ndarray, shots: int, seed: int, usable: np.ndarray | None = None) -> np.ndarray:
    """The first `shots` pictures of every class, in an order drawn class by class: (M,) labels -> (N,) indices.

    More shots hold all that fewer hold. A class that has fewer gives all.

    Args:
        usable: (M,) bool; pictures that are not make way for the next of their class, and the others stay.
    """
    labels = np.asarray(labels)
    generator = np.random.default_rng(seed)
    members = np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels))[:-1])
    drawn = [generator.permutation(each) for each in members]
    return np.concatenate([(each if usable is None else each[usable[each]])[:shots] for each in drawn])


def draw(
    labels: Sequence[int] | np.ndarray,
    shots: Sequence[int] = SHOTS,
    seeds: int = 3,
    *,
    usable: np.ndarray | None = None,
    classes: Sequence[str] = (),
    fewer: bool = False,
) -> Draw:
    """What `choose` gives for every shot count and the seeds 0 to `seeds` - 1.

    Args:
        classes: names of the labels, for messages.
        fewer: where a class is too small take what it has, as big_vision does.

    Raises:
        ValueError: a class has fewer pictures than shots, and `fewer` is off.
    """
    labels = np.asarray(labels)
    counts = np.bincount(labels if usable is None else labels[usable], minlength=labels.max(initial=-1) + 1)
    small = {count: {_name(c, classes): int(counts[c]) for c in np.unique(labels) if counts[c] < count} for count in shots}
    short = {count: names for count, names in small.items() if names}
    if short and not fewer:
        most, names = max(short.items())
        name = min(names, key=names.__getitem__)
        fix = "ask for fewer shots, or set `fewer` to take what there is"
        raise ValueError(f"field `shots`: class {name} has {names[name]} readable pictures in the train split, not {most}; {fix}")
    picks = tuple(tuple(choose(labels, count, seed, usable) for seed in range(seeds)) for count in shots)
    return Draw(picks, short)


def whiten(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Both by mean and standard deviation of the few pictures, (N, D) and (T, D), with the constant feature: (N, D+1), (T, D+1)."""
    mean, std = train.mean(0), train.std(0, correction=0) + 1e-5
    return F.pad((train - mean) / std, (0, 1), value=BIAS), F.pad((test - mean) / std, (0, 1), value=BIAS)


def ridge(x: Tensor, y: Tensor, l2s: Iterable[float]) -> Iterator[Tensor]:
    """For each l2 in turn the W (D, C) that minimises |x W - y|^2 + l2 |W|^2, all from one eigendecomposition.

    x (N, D), y (N, C): W = (x' x + l2)^-1 x' y where N >= D, else x' (x x' + l2)^-1 y, which is the same.
    """
    primal = len(x) >= x.shape[1]
    values, vectors = torch.linalg.eigh(x.T @ x if primal else x @ x.T)
    values = values.clamp(min=0)  # rounding leaves some below
    right = vectors.T @ (x.T @ y if primal else y)
    left = vectors if primal else x.T @ vectors
    return (left @ (right / (values + l2)[:, None]) for l2 in l2s)


@dataclass(frozen=True)
class Scores:
    """Top-1 accuracies of one model on one set."""

    shots: tuple[int, ...]
    l2s: tuple[float, ...]
    accuracy: Tensor  # (S, R, L) float64
    pictures: tuple[int, ...]  # N of each shot count
    test_pictures: int
    classes: int
    short: dict[int, dict[str, int]] = field(default_factory=dict)  # shots -> classes that had fewer pictures, and how many

    @property
    def mean(self) -> Tensor:
        """Over seeds, (S, L)."""
        return self.accuracy.mean(1)

    @property
    def deviation(self) -> Tensor:
        """Standard deviation of one seed's accuracy, (S, L); NaN where there is one seed."""
        several = self.accuracy.shape[1] > 1
        return self.accuracy.std(1) if several else torch.full_like(self.mean, math.nan)

    def best(self) -> dict[int, tuple[float, float]]:
        """Shots -> the l2 with the highest mean, and that mean; the smallest of equals. Optimistic where l2 is a grid: see `few_shot`."""
        values, places = self.mean.max(1)
        return {count: (self.l2s[place], value) for count, place, value in zip(self.shots, places, values.tolist(), strict=True)}

    def rows(self) -> list[dict[str, Any]]:
        """One row for each shot count and l2, as JSON values."""
        several, result = self.accuracy.shape[1] > 1, []
        for s, count in enumerate(self.shots):
            for place, l2 in enumerate(self.l2s):
                mean, deviation = self.mean[s, place].item(), self.deviation[s, place].item() if several else None
                seeds = self.accuracy[s, :, place].tolist()
                result.append({"shots": count, "l2": l2, "accuracy": mean, "deviation": deviation, "seeds": seeds})
        return result

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {
            "classes": self.classes,
            "train_pictures": dict(zip(map(str, self.shots), self.pictures, strict=True)),
            "test_pictures": self.test_pictures,
            "short": {str(count): names for count, names in self.short.items()},
            "rows": self.rows(),
            "best": [{"shots": count, "l2": l2, "accuracy": mean} for count, (l2, mean) in self.best().items()],
        }


def few_shot(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    shots: Sequence[int] = SHOTS,
    seeds: int = 3,
    l2s: Sequence[float] = (L2,),
    classes: Sequence[str] = (),
    fewer: bool = False,
) -> Scores:
    """Top-1 accuracy on the test pictures of ridge regressions on a few of the train pictures.

    The few are standardised by their own mean and deviation and get a constant feature; targets are +1 for the class and
    -1 for the others; the class is that of the highest output. All in float64.

    With several l2s every one is scored on the test pictures. To quote the best of them is optimistic on a single set, as
    it was picked on the pictures it is quoted for; quote the fixed 2^10, or pick by `common_l2` over several sets.

    Args:
        train_features: (M, D), of which (N, D) are drawn; labels (M,) int64.
        test_features: (T, D); labels (T,) int64.
        seeds: how often the few are drawn.
        classes: names of the labels, for messages.
        fewer: where a class is too small take what it has; `Scores.short` says which.

    Raises:
        ValueError: settings out of range; a class too small; one of the test split that the train split lacks; no
            pictures; features that are not finite, or the same for every picture.
    """
    shots, l2s = _checked(shots, seeds, l2s)
    drawn = draw(train_labels, shots, seeds, classes=classes, fewer=fewer)
    return _score(drawn, train_features, train_labels, test_features, test_labels, shots, l2s, classes)


def _score(
    drawn: Draw,
    x: Tensor,
    labels: Tensor,
    test: Tensor,
    truth: Tensor,
    shots: tuple[int, ...],
    l2s: tuple[float, ...],
    names: Sequence[str],
) -> Scores:
    for split, features in (("train", x), ("test", test)):
        _check_features(features, split)
    if len(missing := sorted(set(truth.tolist()) - set(labels.tolist()))):
        wanted = ", ".join(_name(label, names) for label in missing[:10])
        raise ValueError(f"no readable picture of class {wanted} in the train split, but some in the test split; add some, or remove them")
    if (x - x[0]).abs().max() <= 1e-6 * x.abs().max():  # no more than rounding
        raise ValueError(
            f"all {len(x)} train pictures have the same features, from which nothing can be told; give a model that has learnt"
        )
    x, test, targets = x.double(), test.double(), 2 * F.one_hot(labels).double() - 1
    accuracy = torch.empty(len(shots), len(drawn.picks[0]), len(l2s), dtype=torch.float64)
    for s, seeds in enumerate(drawn.picks):
        for seed, pick in enumerate(map(torch.from_numpy, seeds)):
            few, all_test = whiten(x[pick], test)
            for place, weights in enumerate(ridge(few, targets[pick], l2s)):
                accuracy[s, seed, place] = ((all_test @ weights).argmax(1) == truth).double().mean()
    pictures = tuple(len(seeds[0]) for seeds in drawn.picks)
    return Scores(shots, l2s, accuracy, pictures, len(truth), len(labels.unique()), drawn.short)


def common_l2(results: Sequence[Scores]) -> dict[int, float]:
    """Shots -> the one l2 for all sets: that of the best mean rank over them, as scenic picks it; the smallest of equals.

    A set ranks its l2s by accuracy, equal ones sharing their mean rank, so that no set counts for more than another.

    Raises:
        ValueError: no results, or of different shot counts or l2s.
    """
    if len({(scores.shots, scores.l2s) for scores in results}) != 1:
        raise ValueError(f"field `results`: {len(results)} sets; give one or more, all with the same shots and the same l2s")
    means = torch.stack([scores.mean for scores in results])  # (sets, S, L)
    one, other = means[..., :, None], means[..., None, :]
    ranks = ((one > other).double() + 0.5 * (one == other)).sum(-1).mean(0)  # (S, L)
    return {count: results[0].l2s[place] for count, place in zip(results[0].shots, ranks.argmax(1).tolist(), strict=True)}


def _checked(shots: Sequence[int], seeds: int, l2s: Sequence[float]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Shots and l2s in order, each once."""
    require(len(shots) > 0 and min(shots) >= 1, "shots", f"{tuple(shots)}: give one count or more, each at least 1")
    require(seeds >= 1, "seeds", f"{seeds} must be at least 1")
    positive = len(l2s) > 0 and all(0 < l2 < math.inf for l2 in l2s)
    require(positive, "l2", f"{tuple(l2s)}: give one number or more, each positive, such as 1024")
    return tuple(sorted(set(shots))), tuple(sorted({float(l2) for l2 in l2s}))


def _check_features(features: Tensor, split: str) -> None:
    if not len(features):
        raise ValueError(f"no picture of the {split} split could be read; repair its files or give another set")
    bad = int((~features.isfinite().all(1)).sum())
    if bad:
        fix = "give a checkpoint from before it diverged, or compute in float32"
        raise ValueError(f"the features of {bad} of {len(features)} {split} pictures are NaN or infinite; {fix}")


def _name(label: int, names: Sequence[str]) -> str:
    return names[label] if label < len(names) else str(label)


# --- From pictures to features ------------------------------------------------------------------------------------------


class Embedded(NamedTuple):
    """What a model sees in the pictures of a source that could be read."""

    features: Tensor  # (M, D) float64 on the CPU; (0, 0) where no picture could be read
    labels: Tensor  # (M,) int64
    kept: np.ndarray  # (M,) int64: their places in the source


@torch.no_grad()
def embed(
    model: Net,
    source: Source,
    transform: Transform,
    report: Report,
    *,
    batch: int = 64,
    workers: int = 0,
    device: torch.device | None = None,
    precision: torch.dtype = torch.float32,
    policy: Literal["skip", "stop"] = "skip",
    ranks: Ranks = ALONE,
) -> Embedded:
    """The pooled features of all pictures of a source, in evaluation mode; the model is left in the mode it was in.

    Args:
        report: called with path and reason of every picture that could not be read; it is left out.
        ranks: who share the pictures; each has all features in the end.
        workers: loader processes, as `data.loader.worker_count` gives.
        device: where the model is; left out: the CPU.

    Raises:
        ValueError: with policy "stop", a file that cannot be read, by name.
    """
    device, was_training = device or torch.device("cpu"), model.training
    features, labels, bad = [torch.empty(0, 0, dtype=torch.float64)], [torch.empty(0, dtype=torch.int64)], set()

    def left_out(path: str, reason: str) -> None:
        report(path, reason)
        bad.add(path)

    model.eval()
    batches = eval_batches(source, transform, batch=batch, workers=workers, policy=policy, share=(ranks.rank, ranks.count))
    try:
        for read in all_reported(batches, left_out, ranks):
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                pooled = model.features(something(read.images).to(device)).pooled
            features.append(pooled.float().cpu().double()[: len(read.labels)])  # not every accelerator has float64
            labels.append(read.labels)
    finally:
        model.train(was_training)
    whole, targets = (ranks.in_turns(parts[1:]) or parts[:1] for parts in (features, labels))
    kept = [index for index in range(len(source)) if not bad or source.path(index) not in bad]
    return Embedded(torch.cat(whole), torch.cat(targets), np.array(kept, dtype=np.int64))


@dataclass(frozen=True, kw_only=True)
class FewShot:
    """The evaluation of models on one set, whenever it is called: after training, or in the midst of it.

    Only what some seed draws of the train split is looked at, so a large one costs no more than shots x seeds x classes
    pictures. The accuracies are those of `few_shot` on the whole, but that bad files make way for the next of their class.

    Raises:
        ValueError: settings out of range; when called, as `few_shot`.
    """

    train: Source
    test: Source
    classes: tuple[str, ...] = ()  # names, for messages
    shots: tuple[int, ...] = SHOTS
    seeds: int = 3
    l2s: tuple[float, ...] = (L2,)
    fewer: bool = False  # where a class has fewer pictures than shots, take what it has
    batch: int = 64  # pictures at a time
    workers: int = 0  # loader processes
    policy: Literal["skip", "stop"] = "skip"  # for bad files
    ranks: Ranks = ALONE  # who share the pictures

    def __post_init__(self) -> None:
        _checked(self.shots, self.seeds, self.l2s)
        require(self.batch >= 1, "batch", f"{self.batch} must be at least 1")

    def check(self) -> None:
        """See that there are pictures enough before anything is computed. Raises as `draw`."""
        draw([self.train.label(index) for index in range(len(self.train))], self.shots, 1, classes=self.classes, fewer=self.fewer)

    def __call__(
        self, model: Net, preprocess: Preprocess, device: torch.device, precision: torch.dtype, report: Report
    ) -> dict[str, float]:
        """Mean accuracy over seeds of each shot count, `{"1shot": ..., ...}`; of several l2s the best, which is optimistic."""
        best = self.scores(model, preprocess, device, precision, report).best()
        return {f"{count}shot": mean for count, (_, mean) in best.items()}

    def scores(self, model: Net, preprocess: Preprocess, device: torch.device, precision: torch.dtype, report: Report) -> Scores:
        """All there is to know. The model is on the device; its pictures are squashed, and cropped to `preprocess.image_size`."""
        shots, l2s = _checked(self.shots, self.seeds, self.l2s)
        transform = few_shot_transform(preprocess)
        reading = {"batch": self.batch, "workers": self.workers, "policy": self.policy, "ranks": self.ranks}
        look = partial(embed, model, transform=transform, report=report, device=device, precision=precision, **reading)
        drawn, train = self._draw(look, shots)
        test = look(self.test)
        return _score(drawn, train.features, train.labels, test.features, test.labels, shots, l2s, self.classes)

    def _draw(self, look: Callable[[Source], Embedded], shots: tuple[int, ...]) -> tuple[Draw, Embedded]:
        """The draw of the whole train split, as places in what of it was looked at, and that."""
        labels = np.array([self.train.label(index) for index in range(len(self.train))], dtype=np.int64)
        usable, place = np.ones(len(labels), dtype=bool), np.full(len(labels), -1)
        seen: list[Embedded] = []
        while True:  # again only where there were bad files, for those that take their place
            drawn = draw(labels, shots, self.seeds, usable=usable, classes=self.classes, fewer=self.fewer)
            needed = np.unique(np.concatenate(drawn.picks[-1]))  # the largest count holds the others
            needed = needed[place[needed] < 0]
            if not len(needed):
                break
            new = look(Part(self.train, needed))
            usable[needed] = False
            usable[needed[new.kept]] = True
            place[needed[new.kept]] = sum(len(each.labels) for each in seen) + np.arange(len(new.kept))
            seen += [new] if len(new.kept) else []
        picks = tuple(tuple(place[pick] for pick in seeds) for seeds in drawn.picks)
        whole = [torch.cat(parts) for parts in zip(*((each.features, each.labels) for each in seen), strict=True)]
        return drawn._replace(picks=picks), Embedded(*(whole or (torch.empty(0, 0), torch.empty(0))), np.flatnonzero(place >= 0))


def probes(run: Run) -> dict[str, FewShot]:
    """The evaluations that `run.fewshot` asks for, by the name of their set.

    Raises:
        ValueError: a set that is not there, without labels, or with too few pictures; two sets of one name.
    """
    found: dict[str, FewShot] = {}
    for name in run.fewshot.probe:
        if Path(name).name in found:
            raise ValueError(f"field `probe`: two sets are called {Path(name).name}, as their results would be; rename a folder")
        settings = Input(data=name, bad_files=run.input.bad_files, max_pixels=run.input.max_pixels, cache=run.input.cache)
        seed = 0
        if same_set(name, run.input.data):  # split as the run splits it, so that nothing is scored that it was trained on
            settings, seed = replace(run.input, data=name, share=1.0, held_out=0), run.seed
        train, classes, _ = open_split(replace(settings, cache=False), "train", seed)  # few of its pictures are ever read
        found[Path(name).name] = FewShot(
            train=train,
            test=open_split(settings, "val", seed).source,
            classes=classes,
            shots=run.fewshot.shots,
            seeds=run.fewshot.draws,
            l2s=(run.fewshot.l2,),
            batch=run.batch,
            workers=worker_count(run.input.workers),
            policy=run.input.bad_files,
        )
        found[Path(name).name].check()
    return found
