"""Scaling laws: E = a (C + d)^-b + c, fitted to the best that each compute budget gave (Scaling Vision Transformers, section 2.2).

C is compute, E the error; c is what no compute removes, d what even none has (smallest nets are better than a pure power
law). The paper gives no fitting method: here least squares on the frontier, from many starts, with bootstrap bands.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

LEAST = 4  # points on the frontier: as many as the law has numbers
STEEPEST = 2.0  # exponent; published ones are below one
RESAMPLING = 50  # evaluations that the law of a resampled frontier is looked for with, from the law of the whole
FLOOR = 0.99  # of the smallest error: an irreducible error that comes closer says that the points do not bend yet

Frontier = Literal["hull", "all"]


class Point(NamedTuple):
    """One finished run."""

    compute: float
    error: float
    model: str = ""
    images: float = 0.0
    label: str = ""  # where it came from
    loss: bool = False  # whether the error is a loss, which may exceed 1


class Law(NamedTuple):
    """E = a (C + d)^-b + c."""

    a: float
    b: float
    c: float
    d: float

    def error(self, compute: float | np.ndarray) -> np.ndarray:
        """The error the law gives for a compute."""
        return self.a * (np.asarray(compute, dtype=float) + self.d) ** -self.b + self.c

    def __str__(self) -> str:
        return f"E = {self.c:.3g} + {self.a:.3g} (C + {self.d:.3g})^-{self.b:.3f}"


class Fit(NamedTuple):
    """A law, what it was fitted to, and how sure it is."""

    law: Law
    frontier: list[Point]  # by growing compute
    residuals: list[float]  # of the frontier's points: measured - fitted
    rmse: float
    resampled: list[Law]  # one for each bootstrap sample that could be fitted
    mode: Frontier

    def band(self, compute: float, share: float = 0.95) -> tuple[float, float] | None:
        """Where the middle `share` of the bootstrap laws put the error at a compute; None where there are none."""
        if not self.resampled:
            return None
        found = [float(law.error(compute)) for law in self.resampled]
        low, high = np.quantile(found, [(1 - share) / 2, (1 + share) / 2])
        return float(low), float(high)

    def spread(self, name: str, share: float = 0.95) -> tuple[float, float]:
        """The same of one of the law's numbers."""
        low, high = np.quantile([getattr(law, name) for law in self.resampled], [(1 - share) / 2, (1 + share) / 2])
        return float(low), float(high)


def frontier(points: Sequence[Point], mode: Frontier = "hull") -> list[Point]:
    """The runs that no other beats, by growing compute.

    Args:
        mode: `all` that are not dominated (no run with less compute has a smaller error), or those of them on the lower convex
            `hull` in logarithms: the smooth envelope that the paper draws. On its own table the choice moves b from 0.33
            to 0.23, more than anything else does.
    """
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.compute, point.error)):
        if not best or point.error < best[-1].error:
            best.append(point)
    if mode == "all":
        return best
    hull: list[Point] = []
    for point in best:
        while len(hull) > 1 and _turn(hull[-2], hull[-1], point) <= 0:
            hull.pop()
        hull.append(point)
    return hull


def _turn(a: Point, b: Point, c: Point) -> float:
    """Positive where the line from a by b to c bends upwards, in logarithms."""
    (ax, ay), (bx, by), (cx, cy) = ((np.log(p.compute), np.log(p.error)) for p in (a, b, c))
    return float((bx - ax) * (cy - ay) - (by - ay) * (cx - ax))


def fit(points: Sequence[Point], mode: Frontier = "hull", *, bootstrap: int = 200, seed: int = 0, near: Law | None = None) -> Fit:
    """The law of the runs' frontier.

    Least squares on the error itself. Bands: the runs are drawn again with replacement, and frontier and law found anew.

    Args:
        near: look from this law on only, quickly: for other draws of the same runs.

    Raises:
        ValueError: points that cannot support a fit, with the reason; fewer than no samples.
    """
    if bootstrap < 0:
        raise ValueError(f"field `bootstrap`: {bootstrap} must be at least 0, which draws no bands")
    check(points)
    front = frontier(points, mode)
    if len(front) < LEAST:
        enough = mode == "hull" and len(frontier(points, "all")) >= LEAST
        raise ValueError(
            f"{len(front)} of {len(points)} runs are on the frontier ({mode}); a law of four numbers needs at least {LEAST}: "
            "train more sizes and durations" + (", or take every run that is not dominated: --frontier all" if enough else "")
        )
    law = _least_squares(front, [near], RESAMPLING) if near else _least_squares(front, _starts(front))
    smallest = min(point.error for point in front)
    if law.c >= FLOOR * smallest * 0.999:
        raise ValueError(
            f"the fit puts the irreducible error at its bound, {law.c:.4g} of a smallest error of {smallest:.4g}: the points flatten "
            "too soon to tell it from the power law; train longer or larger, or leave out runs that over-fit"
        )
    if law.b > STEEPEST:
        raise ValueError(
            f"the fit's exponent is {law.b:.1f}: these errors fall faster the later it is, which no power law does; the small runs are "
            "too short or badly set, or a run is missing; look at --metric and at each size's own curve"
        )
    residuals = [point.error - float(law.error(point.compute)) for point in front]
    random, resampled = np.random.default_rng(seed), []
    for _ in range(bootstrap):
        drawn = frontier([points[index] for index in random.integers(0, len(points), len(points))], mode)
        if len(drawn) >= LEAST:
            resampled.append(_least_squares(drawn, [law], RESAMPLING))
    if bootstrap and len(resampled) < bootstrap / 4:
        raise ValueError(
            f"only {len(resampled)} of {bootstrap} bootstrap samples have {LEAST} points on the frontier: too few runs carry it for a "
            "band; train more" + (", or take --frontier all" if mode == "hull" else ", or ask for no bands: --bootstrap 0")
        )
    rmse = float(np.sqrt(np.mean(np.square(residuals))))
    return Fit(law, front, residuals, rmse, resampled, mode)


def check(points: Sequence[Point]) -> None:
    """See that points are such.

    Raises:
        ValueError: compute that is not positive and finite, an error outside (0, 1], a loss that is not positive and finite.
    """
    for place, point in enumerate(points, 1):
        name = point.label or f"point {place}"
        if not (np.isfinite(point.compute) and point.compute > 0):
            raise ValueError(f"{name}: a compute of {point.compute:g} is not positive; leave the row out or mend it")
        if point.loss and not (np.isfinite(point.error) and point.error > 0):
            raise ValueError(f"{name}: a loss of {point.error:g} is not positive; leave the row out or mend it")
        if not point.loss and not 0 < point.error <= 1:
            raise ValueError(f"{name}: an error of {point.error:g} is not in (0, 1]; give accuracies in per cent or as fractions")


def _starts(front: Sequence[Point]) -> list[Law]:
    """A grid of exponents, floors and shifts, each with the best factor."""
    compute, error = np.array([p.compute for p in front]), np.array([p.error for p in front])
    starts = []
    for b in (0.1, 0.2, 0.35, 0.6, 1.0):
        for share in (0.05, 0.5, 0.9):
            for d in (1e-3, 0.3, 3.0):
                shift, c = d * compute[0], share * error.min()
                base = (compute + shift) ** -b
                starts.append(Law(max(float(base @ (error - c) / (base @ base)), 1e-12), b, c, shift))
    return starts


def _least_squares(front: Sequence[Point], starts: Sequence[Law], patience: int = 400) -> Law:
    """The law with the smallest squares, of all starts.

    Levenberg-Marquardt in coordinates without bounds: the logarithms of a, b and d, and c as a share of the most it may be.
    """
    from scipy.optimize import least_squares  # takes a third of a second to import

    scale = front[0].compute  # so that numbers are near one, whatever the unit
    compute, error = np.array([p.compute for p in front]) / scale, np.array([p.error for p in front])
    most = FLOOR * error.min()

    def law(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, float, float, float]:
        b, d, share = np.exp(min(x[1], 3.0)), np.exp(np.clip(x[3], -40.0, 20.0)), 1 / (1 + np.exp(-np.clip(x[2], -40.0, 40.0)))
        logs = np.log(compute + d)
        return np.exp(np.clip(x[0] - b * logs, -700, 700)), logs, b, d, share

    def residuals(x: np.ndarray) -> np.ndarray:
        power, _, _, _, share = law(x)
        return power + most * share - error

    def slopes(x: np.ndarray) -> np.ndarray:
        power, logs, b, d, share = law(x)
        return np.stack([power, -power * b * logs, np.full_like(power, most * share * (1 - share)), -b * power * d / (compute + d)], 1)

    best = None
    for start in starts:
        share = np.clip(start.c / most, 1e-6, 1 - 1e-6)
        first = [np.log(start.a * scale**-start.b), np.log(start.b), np.log(share / (1 - share)), np.log(max(start.d / scale, 1e-12))]
        found = least_squares(residuals, first, slopes, method="lm", max_nfev=patience, xtol=1e-12, ftol=1e-12, gtol=1e-12)
        if best is None or found.cost < best.cost:
            best = found
    assert best is not None
    _, _, b, d, share = law(best.x)
    return Law(float(np.exp(best.x[0]) * scale**b), float(b), float(most * share), float(d * scale))
