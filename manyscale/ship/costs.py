"""A saved net's settings on this machine: what they take, how well they answer, and what a cascade of two would give."""

from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch

from manyscale.config import NetConfig, Setting, SuperViTConfig
from manyscale.config.checks import require
from manyscale.data.loader import Batch, eval_batches, worker_count
from manyscale.data.transforms import eval_transform
from manyscale.models import Net, load
from manyscale.plan.count import count
from manyscale.plan.switch import Budget, Cell, Costs, find_costs, front
from manyscale.ship.answers import Answers, collect, halves, prepared
from manyscale.ship.cascade import Cascade, Judged, calibration_error, fit_temperature, judge, outcome, run_cascade, search
from manyscale.ship.evaluate import open_scored, recipe_of
from manyscale.ship.measure import WARM_UP, Timing, device_name, fingerprint, measure, time_call
from manyscale.tasks.pictures import Report
from manyscale.train.state import pick_device, pick_precision

REPEATS = 5  # runs of each batch through a cascade
CURVE = 16  # budgets along which a picture shows what cascades reach


class Verdict(NamedTuple):
    """How well every setting answers, and how sure it is: temperatures chosen on one half of the pictures, errors of the other."""

    settings: tuple[Setting, ...]
    accuracy: list[float]  # of all pictures
    temperatures: list[float]
    raw_ece: list[float]
    choosing: Judged
    reporting: Judged
    data: str
    pictures: int


def verdict(answers: Answers, data: str, seed: int = 0) -> Verdict:
    """The verdict on answers to a set of this name."""
    settings, labels = tuple(answers.logits), answers.labels
    choosing, reporting = halves(len(labels), seed)
    temperatures = [fit_temperature(answers.logits[setting][choosing], labels[choosing]) for setting in settings]
    raw = judge(answers, settings, [1.0] * len(settings)).part(reporting)
    whole = judge(answers, settings, temperatures)
    return Verdict(
        settings,
        whole.right.mean(axis=1).tolist(),
        temperatures,
        [calibration_error(sure, right) for sure, right in zip(raw.sure, raw.right, strict=True)],
        whole.part(choosing),
        whole.part(reporting),
        data,
        len(labels),
    )


def cells(model: Net, timings: dict[Setting, Timing], heard: Verdict | None) -> tuple[Cell, ...]:
    """A table's cells: what was measured, counted and heard of every setting."""
    found = []
    for place, (setting, (p50, p95, peak)) in enumerate(timings.items()):
        macs = count(model.config, setting).macs
        cell = {"setting": setting, "macs": macs, "p50": p50, "p95": p95, "peak": peak}
        if heard:
            assert heard.settings[place] == setting
            sure, right = heard.reporting.sure[place], heard.reporting.right[place]
            cell |= {"accuracy": heard.accuracy[place], "reported": float(right.mean()), "temperature": heard.temperatures[place]}
            cell |= {"ece": calibration_error(sure, right), "raw_ece": heard.raw_ece[place]}
        found.append(Cell(**cell))
    return tuple(found)


class Found(NamedTuple):
    """The best cascade of two settings for a budget, beside the best setting alone; both chosen on one half, both told of the other."""

    cascade: Cascade
    accuracy: float
    cost: float  # the mean, in the budget's unit
    seconds: float  # of a batch, the mean
    alone: Cell | None  # the best setting for the same budget; None: no setting meets it
    alone_cost: float
    alone_says: str

    @property
    def gain(self) -> str:
        """How it compares with the setting alone, in words; empty where there is none."""
        if self.alone is None:
            return ""
        better, cheaper = self.accuracy - self.alone.reported, self.alone_cost - self.cost
        if better < 0 < cheaper or cheaper < 0 < better:
            return "is cheaper and less accurate" if cheaper > 0 else "is more accurate and dearer"
        return "pays" if max(better, cheaper) > 0 else "does not pay"


def best_cascade(costs: Costs, heard: Verdict, budget: Budget | None = None) -> Found:
    """The best cascade within a budget: of time or GFLOPs the most accurate, of accuracy the cheapest in time.

    Args:
        budget: None: to be as accurate as the most accurate setting alone.

    Raises:
        ValueError: no cascade meets it.
    """
    budget = budget or Budget("accuracy", float(heard.choosing.right.mean(axis=1).max()))
    spent = [budget.cost(cell, costs.batch) for cell in costs.cells]
    wanted = budget.amount if budget.kind == "accuracy" else 0.0
    pair = search(heard.choosing, spent, most=budget.limit, accuracy=wanted)
    if pair is None:
        raise ValueError(f"field `{budget.kind}`: no cascade of two of these settings meets {budget}; give another budget or more settings")
    first, second, cut = pair
    accuracy, cost, shares = outcome(heard.reporting, (first, second), (cut.threshold,), spent)
    cascade = Cascade(
        model=costs.model,
        settings=(costs.cells[first].setting, costs.cells[second].setting),
        thresholds=(cut.threshold,),
        temperatures=(heard.temperatures[first], heard.temperatures[second]),
        aim=str(budget),
        place=costs.key,
        data=heard.data,
        shares=tuple(shares),
        accuracy=accuracy,
        cost=budget.say(cost),
    )
    seconds = shares[0] * costs.cells[first].p50 + shares[1] * costs.cells[second].p50
    right = heard.choosing.right.mean(axis=1)
    good = [i for i, cost in enumerate(spent) if cost <= budget.limit and right[i] >= wanted - 1e-9]
    if not good:
        return Found(cascade, accuracy, cost, seconds, None, 0.0, "")
    alone = min(good, key=lambda i: spent[i]) if wanted else max(good, key=lambda i: (right[i], -spent[i]))
    return Found(cascade, accuracy, cost, seconds, costs.cells[alone], spent[alone], budget.say(spent[alone]))


def curve(costs: Costs, heard: Verdict) -> list[tuple[float, float]]:
    """Mean seconds of a batch and accuracy of the best cascades, for budgets from the cheapest setting's to the dearest's."""
    spent = [cell.p50 for cell in costs.cells]
    points = []
    for most in np.geomspace(min(spent), max(spent), CURVE).tolist():
        pair = search(heard.choosing, spent, most=most)
        if pair:
            first, second, cut = pair
            accuracy, cost, _ = outcome(heard.reporting, (first, second), (cut.threshold,), spent)
            points.append((cost, accuracy))
    return [points[i] for i in front(points)]


class Planner:
    """A saved net on a device, the settings in question, and the pictures they are judged by.

    Args:
        path: a run's folder, or any folder that `ms.save` wrote.
        settings: as `Setting.read` reads them; none: of a SuperViT its whole grid. None: those of the table that is read first.
        data: a set by name or folder; empty: the run's own. A net without either is measured, not judged.
        compiled: whether every setting is compiled before it is measured.
        report: called with path and reason of every picture that could not be read.

    Raises:
        ValueError: no such model, device, set or split; settings that the net cannot be run at.
    """

    def __init__(
        self,
        path: str,
        report: Report,
        *,
        settings: Sequence[str] | None = (),
        data: str = "",
        split: str = "val",
        device: str = "auto",
        precision: str = "float32",
        compiled: bool = False,
        workers: int = -1,
        seed: int = 0,
    ) -> None:
        self.device, self.report, self.workers, self.seed, self.compiled = pick_device(device), report, workers, seed, compiled
        self.model, self.precision = load(path).to(self.device), pick_precision(precision, self.device)
        self.mark = fingerprint(self.model)
        self.settings = () if settings is None else _grid(self.model.config, settings)
        self.scored = open_scored(path, self.model, data, split) if data or recipe_of(path) else None

    @property
    def place(self) -> dict[str, Any]:
        """Where and how it measures: fields of `Costs`."""
        precision = str(self.precision).removeprefix("torch.")
        at = {"device": device_name(self.device), "threads": torch.get_num_threads(), "torch": torch.__version__}
        return {**at, "precision": precision, "compiled": self.compiled}

    @cached_property
    def heard(self) -> Verdict | None:
        """How well every setting answers; None without pictures."""
        if not self.scored:
            return None
        batches = self._batches(self.settings, 64)
        answers = collect(self.model, self.settings, batches, self.device, self.precision, self.report, self.scored.order)
        return verdict(answers, self.scored.name, self.seed)

    def measure(self, batch: int, rounds: int = 30) -> Costs:
        """The table of one batch size; see `ship.measure.measure`."""
        how = {"device": self.device, "precision": self.precision, "compiled": self.compiled, "rounds": rounds, "seed": self.seed}
        timings = measure(self.model, self.settings, batch=batch, **how)
        about = {"data": self.heard.data, "pictures": self.heard.pictures, "seed": self.seed} if self.heard else {}
        return Costs(model=self.mark, batch=batch, **self.place, **about, cells=cells(self.model, timings, self.heard))

    def read(self, path: str, batch: int) -> Costs:
        """The table of one batch size that was measured earlier, here and on this net.

        Raises:
            ValueError: as `plan.switch.find_costs`.
        """
        costs = find_costs(path, self.mark, {**self.place, "batch": batch})
        self.settings = self.settings or tuple(cell.setting for cell in costs.cells)
        return costs

    def check(
        self, budget: Budget | None, *, cascade: bool, tables: Sequence[Costs] = (), batches: Sequence[int] = (), rounds: int = 1
    ) -> None:
        """See, before minutes are spent, that a budget can be answered.

        Args:
            tables: those that were read.
            batches, rounds: what will be measured.

        Raises:
            ValueError: a batch or rounds of none; a net that no picture can be prepared for; fewer GFLOPs than the cheapest setting's;
                accuracy asked for, and no labels to know it by; a cascade asked for by tables whose accuracies are of other pictures.
        """
        for name, value in (*(("batch", batch) for batch in batches), ("rounds", rounds)):
            require(value >= 1, name, f"{value} must be at least 1")
        if self.scored:
            prepared(self.model, self.settings)
        if not self.scored and (cascade or (budget and budget.kind == "accuracy")):
            raise ValueError("field `data`: no labels to calibrate with, and no recipe.json that names the model's data; give --data")
        for table in tables if cascade else ():
            if (table.data, table.seed) != (self.scored.name, self.seed):
                raise ValueError(
                    f"field `measured`: its accuracies are of {table.data or 'no pictures'}, seed {table.seed}, not of {self.scored.name}, "
                    f"seed {self.seed}; give the same --data, --split and --seed, or measure anew"
                )
        least = min(self.settings, key=lambda setting: count(self.model.config, setting).macs)
        giga = count(self.model.config, least).macs / 1e9
        if budget and budget.kind == "gflops" and giga > budget.amount:
            raise ValueError(f"field `gflops`: no setting meets {budget}; the nearest, {least}, has {giga:.4g} GFLOPs")

    @torch.no_grad()
    def time_cascade(self, cascade: Cascade, batch: int, rounds: int = 30) -> tuple[float, list[float]] | None:
        """Mean seconds of a batch of real pictures through a cascade, resizing included, and the share each setting was asked.

        Batches differ in how many pictures go on, so of every batch the median of some runs is taken, and of these the mean.

        Returns:
            None where the pictures do not fill one batch.
        """
        seconds, asked = [], np.zeros(len(cascade.settings))
        self.model.eval()
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            for pictures in self._batches(cascade.settings, batch):
                if len(seconds) == rounds:
                    break
                if len(pictures.labels) < batch:
                    continue
                call = partial(run_cascade, self.model, cascade, pictures.images.to(self.device))
                for _ in range(0 if seconds else WARM_UP):
                    call()
                timed = [time_call(call, self.device) for _ in range(REPEATS)]
                seconds.append(float(np.median([spent for spent, _ in timed])))
                asked += timed[0][1].asked(len(asked))
        return (float(np.mean(seconds)), (asked / (batch * len(seconds))).tolist()) if seconds else None

    def _batches(self, settings: Sequence[Setting], batch: int) -> Iterator[Batch]:
        assert self.scored
        transform = eval_transform(prepared(self.model, settings))
        return eval_batches(self.scored.source, transform, batch=batch, workers=worker_count(self.workers), policy=self.scored.policy)


def _grid(config: NetConfig, texts: Sequence[str]) -> tuple[Setting, ...]:
    """The settings in question, each once, those that compute least first.

    Raises:
        ValueError: none, or one that the net cannot be run at.
    """
    if not texts and not isinstance(config, SuperViTConfig):
        raise ValueError("field `settings`: only a SuperViT has some of its own; give --settings, such as 192 256 of a ViT, "
                         "192/window=12 256/window=16 of a Swin V2")  # fmt: skip
    settings = dict.fromkeys(map(Setting.read, texts) if texts else config.settings)
    return tuple(sorted(settings, key=lambda setting: count(config, setting).macs))
