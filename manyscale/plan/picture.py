"""The frontier and its law, and the costs of settings, as pictures."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from manyscale.plan.budget import Advice
from manyscale.plan.laws import Fit, Point
from manyscale.plan.switch import Cell, Costs, front
from manyscale.storage import write

INK, LINE, GREY = "#1f2933", "#2c6e9b", "#9aa5b1"


def draw(points: Sequence[Point], fit: Fit, unit: str, path: Path, advice: Advice | None = None) -> None:
    """Every run, those on the frontier, the law with its band, and the budget where one is given; both axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    scale, what = (1, "loss") if points[0].loss else (100, "error, %")
    axes.set(xscale="log", yscale="log", xlabel=f"compute, {unit}", ylabel=what, title=str(fit.law))
    axes.plot([p.compute for p in points], [scale * p.error for p in points], "o", color=GREY, ms=3, label=f"{len(points)} runs")
    last = max([p.compute for p in points] + ([advice.compute] if advice else []))
    compute = np.geomspace(min(p.compute for p in points), last, 100)
    if fit.resampled:
        low, high = np.quantile([law.error(compute) for law in fit.resampled], [0.025, 0.975], axis=0)
        axes.fill_between(compute, scale * low, scale * high, color=LINE, alpha=0.18, lw=0, label="95 % of the resampled laws")
    axes.plot(compute, scale * fit.law.error(compute), color=LINE, lw=1.6)
    axes.plot([p.compute for p in fit.frontier], [scale * p.error for p in fit.frontier], "o", color=LINE, ms=6, label="frontier")
    for point in fit.frontier:
        axes.annotate(point.model, (point.compute, scale * point.error), textcoords="offset points", xytext=(5, 5), fontsize=8, color=INK)
    if advice:
        axes.plot([advice.compute], [scale * advice.error], "D", color="#c0392b", ms=7, label="the budget")
    low, high = scale * min(p.error for p in points), scale * max(p.error for p in points)
    marks = [m * 10**e for e in range(-6, 7) for m in (1, 1.5, 2, 3, 5, 7)]
    ticks = [mark for mark in marks if 0.8 * low < mark < 1.2 * high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    write(path, lambda file: figure.savefig(file, dpi=110))


def draw_costs(
    costs: Costs,
    path: Path,
    cascades: Sequence[tuple[float, float]] = (),
    chosen: tuple[float, float] | None = None,
) -> None:
    """Every setting's accuracy over the median time of a batch, the front drawn; where accuracy was not measured, GFLOPs over it.

    Args:
        cascades: (seconds, accuracy) of what cascades reach; accuracies are then all of the pictures that nothing was chosen on.
        chosen: of the cascade that was chosen, likewise.
    """
    from matplotlib.figure import Figure

    known = costs.full.accuracy is not None

    def height(cell: Cell) -> float:
        if not known:
            return cell.macs / 1e9
        return 100 * (cell.reported if cascades and cell.reported is not None else cell.accuracy)

    figure = Figure(figsize=(8.2, 5.2), layout="constrained")
    axes = figure.subplots()
    axes.set_title(f"{costs.device}, {costs.threads} threads, {costs.place['precision']}, batch {costs.batch}", fontsize=9, color=INK)
    axes.set(xscale="log", xlabel="median time of a batch, ms" + (", of cascades the mean" if cascades else ""))
    axes.set_ylabel("top-1 on pictures nothing was chosen on, %" if cascades else "top-1, %" if known else "GFLOPs of an image")
    best = front([(cell.p50, height(cell)) for cell in costs.cells])
    corners = [1e3 * costs.cells[i].p50 for i in best], [height(costs.cells[i]) for i in best]
    axes.plot(*corners, color=LINE, lw=1.4, drawstyle="steps-post", zorder=1, label="front of the settings")
    for i, cell in enumerate(costs.cells):
        x, y = 1e3 * cell.p50, height(cell)
        axes.plot([x], [y], "o", color=LINE if i in best else GREY, ms=6, zorder=2)
        above = i in best
        place = {"xytext": (-3, 6) if above else (4, -11), "ha": "right" if above else "left"}
        axes.annotate(str(cell.setting), (x, y), textcoords="offset points", fontsize=8, color=INK if above else "#6b7680", **place)
    if cascades:
        seconds, right = zip(*cascades, strict=True)
        axes.plot([1e3 * x for x in seconds], [100 * y for y in right], "s--", color="#d99a2b", ms=4, lw=1, label="cascades of two")
    if chosen:
        axes.plot([1e3 * chosen[0]], [100 * chosen[1]], "D", color="#c0392b", ms=9, mfc="none", mew=1.6, label="the one chosen")
    low, high = axes.get_xlim()
    ticks = [m * 10**e for e in range(-4, 7) for m in (1, 1.5, 2, 3, 5, 7) if low <= m * 10**e <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.margins(x=0.08, y=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    write(path, lambda file: figure.savefig(file, dpi=110))
