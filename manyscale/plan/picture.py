"""The frontier and its law as a picture."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from manyscale.plan.budget import Advice
from manyscale.plan.laws import Fit, Point
from manyscale.storage import write

INK, LINE, GREY = "#1f2933", "#2c6e9b", "#9aa5b1"


def draw(points: Sequence[Point], fit: Fit, unit: str, path: Path, advice: Advice | None = None) -> None:
    """Every run, those on the frontier, the law with its band, and the budget where one is given; both axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.set(xscale="log", yscale="log", xlabel=f"compute, {unit}", ylabel="error, %", title=str(fit.law))
    axes.plot([p.compute for p in points], [100 * p.error for p in points], "o", color=GREY, ms=3, label=f"{len(points)} runs")
    last = max([p.compute for p in points] + ([advice.compute] if advice else []))
    compute = np.geomspace(min(p.compute for p in points), last, 100)
    if fit.resampled:
        low, high = np.quantile([law.error(compute) for law in fit.resampled], [0.025, 0.975], axis=0)
        axes.fill_between(compute, 100 * low, 100 * high, color=LINE, alpha=0.18, lw=0, label="95 % of the resampled laws")
    axes.plot(compute, 100 * fit.law.error(compute), color=LINE, lw=1.6)
    axes.plot([p.compute for p in fit.frontier], [100 * p.error for p in fit.frontier], "o", color=LINE, ms=6, label="frontier")
    for point in fit.frontier:
        axes.annotate(point.model, (point.compute, 100 * point.error), textcoords="offset points", xytext=(5, 5), fontsize=8, color=INK)
    if advice:
        axes.plot([advice.compute], [100 * advice.error], "D", color="#c0392b", ms=7, label="the budget")
    ticks = [tick for tick in (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100) if 0.8 * _least(points) < tick < 1.2 * _most(points)]
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    write(path, lambda file: figure.savefig(file, dpi=110))


def _least(points: Sequence[Point]) -> float:
    return 100 * min(p.error for p in points)


def _most(points: Sequence[Point]) -> float:
    return 100 * max(p.error for p in points)
