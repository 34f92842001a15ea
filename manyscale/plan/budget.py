"""From a compute budget to what to train: the model that the frontier's trend asks for, and how many images it can see."""

from typing import NamedTuple

import numpy as np

from manyscale.plan.laws import Fit
from manyscale.plan.runs import training_flops
from manyscale.presets import PAPER_NAMES, VIT, model_config


class Advice(NamedTuple):
    """What a budget buys."""

    compute: float  # the budget, in the fit's unit
    error: float
    band: tuple[float, float] | None  # 95 %, of the bootstrap
    model: str  # empty where the runs do not say which model they were
    images: float
    extrapolated: str  # empty, or by how much the budget lies outside the runs
    larger: float  # how many times as dear an image the trend asks for as the model, where that is the dearest there is; else 1


def advise(fit: Fit, compute: float, flops_per_unit: float) -> Advice:
    """The expected error at a budget, and a model for it.

    The training cost of one image grows along the frontier as a power of compute; the model is the one whose cost is
    nearest to that trend at the budget, of those in the runs and, where tables name all of these as the paper or the presets
    do, of the paper's. A folder's runs are of sizes of their own: where the trend asks for more than all, `larger` says so.

    Raises:
        ValueError: a budget that is not positive.
    """
    if not (np.isfinite(compute) and compute > 0):
        raise ValueError(f"field `budget`: {compute:g} must be positive")
    low, high = fit.frontier[0].compute, fit.frontier[-1].compute
    outside = compute / high if compute > high else low / compute if compute < low else 0.0
    extrapolated = f"{outside:.3g} times {'above' if compute > high else 'below'} the frontier's runs" if outside else ""
    model, images, larger = _model(fit, compute, flops_per_unit)
    return Advice(compute, float(fit.law.error(compute)), fit.band(compute), model, images, extrapolated, larger)


def _model(fit: Fit, compute: float, flops_per_unit: float) -> tuple[str, float, float]:
    named = [point for point in fit.frontier if point.model and point.images]
    if not named:
        return "", 0.0, 1.0
    # what an image cost in the run itself: the table may know better than the preset (resolution, token dropping)
    cost = {point.model: point.compute * flops_per_unit / point.images for point in named}
    candidates = dict(cost)
    if all(name in VIT or name in PAPER_NAMES for name in cost):
        candidates |= {
            name: training_flops(model_config(name), 1) for name in PAPER_NAMES if PAPER_NAMES[name] not in cost and name not in cost
        }
    if len(cost) > 1:
        slope, offset = np.polyfit(np.log([p.compute for p in named]), np.log([cost[p.model] for p in named]), 1)
        wanted = float(np.exp(offset + slope * np.log(compute)))
    else:
        wanted = next(iter(cost.values()))
    name = min(candidates, key=lambda name: abs(np.log(candidates[name] / wanted)))
    larger = max(1.0, wanted / candidates[name]) if name == max(candidates, key=candidates.__getitem__) else 1.0
    return name, compute * flops_per_unit / candidates[name], larger
