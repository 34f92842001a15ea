"""Which setting to use: tables of what every setting of a net cost on a machine, their Pareto front, the answer to a budget.

GFLOPs are multiply-adds of one image, as papers count them and `plan.count` gives them. A table is of one machine and one batch size:
what dropping tokens saves depends on both, and at a small batch it may save nothing (arXiv 2407.05941 measures it costing time).
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from manyscale.config import Setting, from_dict, to_dict
from manyscale.config.checks import finite, require
from manyscale.storage import read_json, write_json

FORMAT = 1  # of costs.json; raised when an older reader would misread it
_IN_A_SECOND = {"us": 1e6, "ms": 1e3, "s": 1.0}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What one setting costs, and how well it answers."""

    setting: Setting
    macs: int  # multiply-adds of one image
    p50: float  # seconds of one batch, the median
    p95: float  # seconds within which 95 of 100 batches are done
    peak: int | None = None  # bytes at once, besides weights and images; None: not known on this device
    accuracy: float | None = None  # top-1 of all pictures; None: not measured
    reported: float | None = None  # top-1 of the pictures that the temperature was not chosen on, and of these the two errors:
    ece: float | None = None  # expected calibration error of the confidence at `temperature`
    raw_ece: float | None = None  # of the confidence as the net has it
    temperature: float | None = None  # what logits are divided by

    def __post_init__(self) -> None:
        finite(self, "p50", "p95")
        require(self.macs >= 1, "macs", f"{self.macs} must be at least 1")
        require(0 < self.p50 <= self.p95, "p50", f"{self.p50:g} must be positive, and not above p95, {self.p95:g}")
        for name in ("accuracy", "reported", "ece", "raw_ece"):
            value = getattr(self, name)
            require(value is None or 0 <= value <= 1, name, f"{value} must be in [0, 1]")
        known = self.temperature is None or 0 < self.temperature < math.inf
        require(known, "temperature", f"{self.temperature} must be positive")

    @property
    def value(self) -> float:
        """What is wanted of a setting: its accuracy, or where that was not measured, that it computes much."""
        return self.macs if self.accuracy is None else self.accuracy


@dataclass(frozen=True, kw_only=True)
class Costs:
    """One table: the settings of one model, measured in turns on one machine."""

    model: str  # fingerprint of configuration and weights
    device: str
    torch: str
    threads: int  # of the CPU
    batch: int
    precision: str
    compiled: bool = False
    data: str = ""  # set and split of the accuracies
    pictures: int = 0  # of them
    seed: int = 0  # of the halves: one chose the temperatures, the other is reported
    cells: tuple[Cell, ...]

    def __post_init__(self) -> None:
        require(self.batch >= 1, "batch", f"{self.batch} must be at least 1")
        require(len(self.cells) > 0, "cells", "a table needs at least one setting")
        known = {cell.accuracy is None for cell in self.cells}
        require(len(known) == 1, "cells", "some settings have an accuracy and some have none")
        require(len({cell.setting for cell in self.cells}) == len(self.cells), "cells", "a setting appears twice")

    @property
    def place(self) -> dict[str, str]:
        """Where and how it was measured, in words: what must agree before its seconds can be trusted."""
        return {
            "device": self.device,
            "threads": f"{self.threads} threads",
            "torch": f"torch {self.torch}",
            "precision": self.precision + (", compiled" if self.compiled else ""),
            "batch": f"batch {self.batch}",
        }

    @property
    def key(self) -> str:
        """The table's name in a file."""
        return " | ".join(self.place.values())

    @property
    def full(self) -> Cell:
        """The setting that computes most: what speed-ups are over."""
        return max(self.cells, key=lambda cell: cell.macs)

    def speed_up(self, cell: Cell) -> float:
        """How many times as fast as `full`, by the medians."""
        return self.full.p50 / cell.p50

    def saving(self, cell: Cell) -> float:
        """How many times fewer multiply-adds than `full`: what the speed-up would be if only these took time."""
        return self.full.macs / cell.macs


@dataclass(frozen=True)
class Budget:
    """What may be spent: at most so many seconds a batch or GFLOPs an image, or at least so many images a second or so accurate."""

    kind: Literal["latency", "gflops", "throughput", "accuracy"]
    amount: float

    def __post_init__(self) -> None:
        require(0 < self.amount < math.inf, self.kind, f"{self.amount:g} must be positive")
        require(self.kind != "accuracy" or self.amount <= 1, self.kind, f"{self.amount:g} must be at most 1")

    def __str__(self) -> str:
        return f"{self.amount:.4g} top-1" if self.kind == "accuracy" else self.say(self.limit)

    @property
    def limit(self) -> float:
        """The most that may be spent, in the unit of `cost`."""
        return {"throughput": 1 / self.amount, "accuracy": math.inf}.get(self.kind, self.amount)

    def cost(self, cell: Cell, batch: int) -> float:
        """What a setting spends: seconds of a batch, GFLOPs of an image, or seconds of an image."""
        return {"gflops": cell.macs / 1e9, "throughput": cell.p50 / batch}.get(self.kind, cell.p50)

    def say(self, cost: float) -> str:
        """A cost in words."""
        return {"gflops": f"{cost:.4g} GFLOPs", "throughput": f"{1 / cost:,.4g} images/s"}.get(self.kind, f"{1e3 * cost:.4g} ms")


def read_budget(
    latency: str = "", gflops: float | None = None, throughput: float | None = None, accuracy: float | None = None
) -> Budget | None:
    """The one budget that was given; a latency is written with its unit, such as 20ms. Without any: no limit, and the best answer.

    Raises:
        ValueError: more than one, or one that is no positive number.
    """
    given = {"latency": latency or None, "gflops": gflops, "throughput": throughput, "accuracy": accuracy}
    named = {kind: value for kind, value in given.items() if value is not None}
    if len(named) > 1:
        raise ValueError(f"give one budget: {' or '.join(f'--{kind}' for kind in named)}")
    for kind, value in named.items():
        if kind != "latency":
            return Budget(kind, value)
        found = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(us|ms|s)", value.strip().lower())
        require(found is not None, "latency", f"{value!r} is no time; write 20ms, 0.5s or 800us")
        return Budget(kind, float(found[1]) / _IN_A_SECOND[found[2]])
    return None


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which points (cost, value) no other dominates: none costs no more and is worth no less, and differs; the cheapest first."""

    def dominated(point: tuple[float, float]) -> bool:
        return any(other != point and other[0] <= point[0] and other[1] >= point[1] for other in points)

    return sorted((i for i, point in enumerate(points) if not dominated(point)), key=lambda i: points[i])


def front_of(costs: Costs, budget: Budget | None = None) -> list[Cell]:
    """The settings that no other dominates in accuracy and what the budget counts, the cheapest first; by default in median time."""
    budget = budget or Budget("latency", 1.0)
    return [costs.cells[i] for i in front([(budget.cost(cell, costs.batch), cell.value) for cell in costs.cells])]


def choose(costs: Costs, budget: Budget) -> Cell:
    """The best setting within the budget; it is on the front. Of a budget of accuracy, the fastest that reaches it.

    Raises:
        ValueError: no setting meets the budget; names the nearest.
    """
    candidates = front_of(costs, budget)
    where = f"at batch {costs.batch} on {costs.device}"
    if budget.kind == "accuracy":
        require(costs.full.accuracy is not None, "accuracy", "no accuracy was measured; give --data")
        good = [cell for cell in candidates if cell.accuracy >= budget.amount]
        best = candidates[-1]
        require(bool(good), "accuracy", f"no setting reaches {budget.amount:.2%}; the best, {best.setting}, has {best.accuracy:.2%}")
        return good[0]
    met = [cell for cell in candidates if budget.cost(cell, costs.batch) <= budget.limit]
    nearest = candidates[0]
    said = f"the nearest, {nearest.setting}, has {budget.say(budget.cost(nearest, costs.batch))} {where}"
    require(bool(met), budget.kind, f"no setting meets {budget}; {said}")
    return met[-1]


def answer(costs: Costs, budget: Budget) -> str:
    """The chosen setting in words.

    Raises:
        ValueError: as `choose`.
    """
    cell = choose(costs, budget)
    top = (
        f"top-1 {cell.accuracy:.2%}"
        if cell.accuracy is not None
        else "of those that meet it the one that computes most (no accuracy known)"
    )
    speed = f"{costs.batch / cell.p50:,.4g} images/s, {costs.speed_up(cell):.2f} x as fast as {costs.full.setting}"
    said = f"{budget} at batch {costs.batch}: {cell.setting}, {top}; {1e3 * cell.p50:.4g} ms a batch, {cell.macs / 1e9:.4g} GFLOPs, {speed}"
    if budget.kind == "latency" and cell.p95 > budget.limit:
        said += f"; but in one batch of twenty it takes {1e3 * cell.p95:.4g} ms or longer, more than the budget"
    return said


def remarks(costs: Costs) -> list[str]:
    """Where dropping tokens saves no time, in words: pruned settings that are no faster than the complete one of their size."""
    slow, pruned = [], 0
    whole = {cell.setting.size: cell for cell in costs.cells if cell.setting.is_full}
    for cell in costs.cells:
        other = whole.get(cell.setting.size)
        if other is None or cell.setting.is_full:
            continue
        pruned += 1
        if cell.p50 >= other.p50:
            slow.append(f"{cell.setting} takes {cell.p50 / other.p50:.2f} x the time of {other.setting}")
    if not slow:
        return []
    extent = "nowhere" if len(slow) == pruned else f"not everywhere ({len(slow)} of {pruned} pruned settings are no faster than the whole)"
    return [f"dropping tokens pays {extent} at batch {costs.batch} on {costs.device}: " + ", ".join(slow)]


def table(costs: Costs) -> list[tuple[str, ...]]:
    """The settings as text, one tuple of cells each, under a heading; a star marks those that no other dominates."""
    heading = ("", "setting", "GFLOPs", "ms", "p95", "images/s", "peak MiB", "speed-up", "/ GFLOPs saved", "top-1", "ECE", "scaled", "by T")
    best = {cell.setting for cell in front_of(costs)}
    rows = []
    for cell in costs.cells:
        speed = costs.speed_up(cell)
        times = (f"{1e3 * cell.p50:.2f}", f"{1e3 * cell.p95:.2f}", f"{costs.batch / cell.p50:,.1f}")
        peak = "" if cell.peak is None else f"{cell.peak / 2**20:.1f}"
        known = (cell.accuracy, cell.raw_ece, cell.ece)
        shares = tuple("" if share is None else f"{share:.2%}" for share in known)
        scale = "" if cell.temperature is None else f"{cell.temperature:.2f}"
        gain = (f"{speed:.2f}", f"{speed / costs.saving(cell):.2f}")
        rows.append(("*" * (cell.setting in best), str(cell.setting), f"{cell.macs / 1e9:.4g}", *times, peak, *gain, *shares, scale))
    return [heading, *rows]


def read_costs(path: Path | str) -> dict[str, Costs]:
    """The tables of a file by their names, all of one model.

    Raises:
        ValueError: not a file of this form; the message names the file and the field.
    """
    values = read_json(path)
    if values.get("format") != FORMAT or set(values) != {"format", "tables"} or not isinstance(values["tables"], dict):
        raise ValueError(f"{path}: not a table of costs of this version: expected `format` {FORMAT} and `tables`; measure with `plan cost`")
    tables = {key: from_dict(Costs, table, f"{path}: {key}") for key, table in values["tables"].items()}
    for key, table in tables.items():
        if key != table.key:
            raise ValueError(f"{path}: the table {key!r} says of itself {table.key!r}; it was edited: measure again with `plan cost`")
    if len({table.model for table in tables.values()}) > 1:
        raise ValueError(f"{path}: holds tables of several models; remove the file and measure again with `plan cost`")
    return tables


def check_model(path: Path | str, tables: dict[str, Costs], model: str) -> None:
    """See that tables are of the model with this fingerprint.

    Raises:
        ValueError: they are of another.
    """
    for table in tables.values():
        if table.model != model:
            raise ValueError(
                f"{path}: field `model`: measured on other weights ({table.model[:12]}, these are {model[:12]}); remove the file, or "
                f"measure into another folder with --out"
            )


def add_costs(path: Path | str, costs: Costs) -> None:
    """Put a table into a file, beside those of other machines and batch sizes; one of the same name is replaced.

    Raises:
        ValueError: the file's tables are of another model, or it holds something else.
    """
    tables = read_costs(path) if Path(path).exists() else {}
    check_model(path, tables, costs.model)
    write_json(path, {"format": FORMAT, "tables": {key: to_dict(table) for key, table in {**tables, costs.key: costs}.items()}})


def find_costs(path: Path | str, model: str, place: dict[str, Any]) -> Costs:
    """The table of a file that was measured on this model and in this place.

    Args:
        place: device, torch, threads, batch, precision and compiled, as `Costs` names them.

    Raises:
        ValueError: there is none; the message says in what the nearest table differs.
    """
    tables = read_costs(path)
    check_model(path, tables, model)
    if not tables:
        raise ValueError(f"{path}: no tables; measure with `plan cost`")
    known = {field.name for field in fields(Costs)}
    assert place.keys() <= known
    wrong = {key: {name for name, value in place.items() if getattr(table, name) != value} for key, table in tables.items()}
    nearest = min(wrong, key=lambda key: ("device" in wrong[key], len(wrong[key])))
    if wrong[nearest]:
        said = ", ".join(
            f"`{name}` is {getattr(tables[nearest], name)} there and {place[name]} here" for name in place if name in wrong[nearest]
        )
        raise ValueError(f"{path}: measured elsewhere or otherwise: {said}; measure here with `plan cost`")
    return tables[nearest]
