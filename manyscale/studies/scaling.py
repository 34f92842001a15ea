"""Figures 2 and 3 of "Scaling Vision Transformers" in miniature: sizes x data x durations, their frontier, and its law."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from manyscale.config import Run
from manyscale.plan import laws
from manyscale.plan.laws import Fit, Point
from manyscale.plan.runs import training_flops
from manyscale.recipes.vit_ladder import rung
from manyscale.studies.grid import run_grid
from manyscale.studies.study import COLOURS, Section, Terms, Values, band, cell, compare, conclude, plain
from manyscale.studies.vits import Upstream, describe_vit, shot, trained, upstream, vit

SHARES = (0.25, 1.0)
LENGTHS = ("20k-images", "60k-images", "200k-images", "600k-images")
# What each size is trained for, at most: compute is spent where a frontier may be.
FULL = {"w32": LENGTHS, "w64": LENGTHS, "w128": LENGTHS[:3], "w192": LENGTHS[:3]}
QUICK = {"w32": ("10k-images", "24k-images"), "w64": ("10k-images", "24k-images"), "w128": ("10k-images",)}
RESAMPLED = 200
PAPER = """10-shot ImageNet error of the frontier: 0.12 + 0.63 (C + 0.52)^-0.32, fine-tuned 0.09 + 0.26 (C + 0.01)^-0.35, C in TPUv3
core-days (as quoted of its Figure 2, which we did not read ourselves; its table fitted here: 0.127 + 0.649 (C + 0.78)^-0.332).
Its findings: scale model, data and compute together; small models gain nothing from more data (Ti/16: 51.6 % with 30M
pictures, 52.1 % with 3B) where large ones do (L/16: 72.2, 81.5); larger models need fewer pictures for the same error (Figure 3)."""


class Case(NamedTuple):
    """One net on one share of the data, for one duration."""

    size: str
    share: float
    length: str


def study(terms: Terms) -> dict[str, Any]:
    """Trunks with branches for every size, share and seed; then tables, law and pictures."""
    sets, plan = upstream(terms), QUICK if terms.quick else FULL
    seeds = range(terms.seeds)
    families = [(size, share) for size in plan for share in SHARES if share == 1.0 or size != _largest(plan)]
    asked = [(family, seed) for family in families for seed in seeds]
    runs = [run(terms, sets, plan, *family, seed) for family, seed in asked]
    outcomes = dict(zip(asked, run_grid(runs, terms.console), strict=True))
    cases = [Case(size, share, length) for size, share in families for length in plan[size]]

    def values(case: Case, metric: str) -> Values:
        found = [outcomes[case[:2], seed].summary for seed in seeds]
        records = [summary["branches"][case.length]["last"] if summary else None for summary in found]
        return [None if record is None else record["accuracy"] if metric == "upstream" else shot(record, 10) for record in records]

    top1 = {case: values(case, "upstream") for case in cases}
    ten = {case: values(case, "10-shot") for case in cases}
    compute = {case: training_flops(trained(runs[asked.index((case[:2], 0))], sets), _images(case.length)) / 1e12 for case in cases}
    fits = {name: fit(found, compute) for name, found in (("upstream", top1), ("10-shot", ten))}
    shapes = [(made.width, made.depth) for size in plan if (made := rung(size).model)]
    longest = max(_images(lengths[-1]) for lengths in plan.values())
    computed, alone = (sum(o.summary[key] for o in outcomes.values() if o.summary) for key in ("steps", "steps_alone"))
    return conclude(
        terms,
        "Scaling: Figures 2 and 3 of Scaling Vision Transformers in miniature",
        sections=[
            _section(f"{sets.data}, held-out top-1 %", plan, families, top1),
            _section(f"{sets.probe}, 10-shot top-1 %", plan, families, ten),
            Section(
                "Laws",
                ("error of", "frontier", "law, C in 10^12 FLOPs", "rmse", "b, 95 % over seeds"),
                [_law_row(*item) for item in fits.items()],
            ),
        ],
        findings=[
            *_claims(plan, top1, "top-1"),
            *_claims(plan, ten, "10-shot"),
            f"branches from trunks took {computed:,} steps, alone they would have taken {alone:,}: {alone / computed:.2f} times as many",
        ],
        paper=PAPER,
        method=f"{describe_vit(runs[0], sets)} Widths and blocks: {', '.join(f'{width} x {depth}' for width, depth in shapes)}. Compute is "
        "counted, 6 FLOPs per multiply-add of the forward pass and image. Durations are branches of one trunk. Laws are fitted to "
        "the means over seeds, on the lower hull where that supports one and else on all that no other beats; the bands come from drawing "
        f"seeds again. The largest net is trained on all pictures only. The longest run sees each of them {longest / sets.pictures:.3g} "
        "times; the paper's saw its largest set 7 times.",
        values={
            f"{case.size}, {case.share:g}, {case.length}": {"compute": compute[case], "top1": top1[case], "10-shot": ten[case]}
            for case in cases
        },
        picture=_draw(plan, sets, top1, ten, compute, fits),
    )


def run(terms: Terms, sets: Upstream, plan: dict[str, tuple[str, ...]], size: str, share: float, seed: int) -> Run:
    """A trunk with its branches."""
    made = vit(terms, sets, size, share=share, seed=seed, branches=plan[size], warmup="500-images" if terms.quick else "2k-images")
    return replace(made, recipe=f"{size} on {share:.0%} seed {seed}", out=str(terms.out / f"{size}-{share:g}-{seed}"))


def _largest(plan: dict[str, Any]) -> str:
    return list(plan)[-1]


def _images(length: str) -> float:
    return float(length.removesuffix("k-images")) * 1000


def fit(values: dict[Case, Values], compute: dict[Case, float]) -> Fit | str:
    """The law of the means over seeds, its bands from drawing seeds again; or why there is none."""
    rows = {case: found for case, found in values.items() if all(value is not None for value in found)}
    seeds = len(next(iter(rows.values()), ()))

    def points(chosen: Sequence[int]) -> list[Point]:
        return [
            Point(compute[case], 1 - fmean(found[seed] for seed in chosen), case.size, _images(case.length)) for case, found in rows.items()
        ]

    reasons = []
    for mode in ("hull", "all"):
        try:
            law = laws.fit(points(range(seeds)), mode, bootstrap=0)
        except ValueError as error:
            reasons.append(str(error))
            continue
        random, resampled = np.random.default_rng(0), []
        for _ in range(RESAMPLED if seeds > 1 else 0):
            try:
                resampled.append(laws.fit(points(random.integers(0, seeds, seeds).tolist()), mode, bootstrap=0, near=law.law).law)
            except ValueError:
                continue
        return law._replace(resampled=resampled)
    return reasons[-1] if reasons else "no run to fit"


def _law_row(name: str, found: Fit | str) -> tuple[str, ...]:
    if isinstance(found, str):
        return name, "", f"none: {found}", "", ""
    spread = "{:.2f} to {:.2f} ({} of {} draws)".format(*found.spread("b"), len(found.resampled), RESAMPLED) if found.resampled else ""
    few = ": as many points as numbers, so no test of the law" if len(found.frontier) == laws.LEAST else ""
    return name, f"{len(found.frontier)} points, {found.mode}{few}", str(found.law), f"{100 * found.rmse:.2f} points", spread


def _section(title: str, plan: dict[str, Any], families: list[tuple[str, float]], values: dict[Case, Values]) -> Section:
    lengths = max(plan.values(), key=len)
    rows = [
        (size, f"{share:.0%}", *(cell(values[case]) if (case := Case(size, share, length)) in values else "" for length in lengths))
        for size, share in families
    ]
    return Section(title, ("net", "data", *(length.replace("-", " ") for length in lengths)), rows)


def _claims(plan: dict[str, tuple[str, ...]], values: dict[Case, Values], name: str) -> list[str]:
    small, large = next(iter(plan)), _largest(plan)
    common = _common(plan, small, large)
    found = [
        compare(
            f"{name} after {length.replace('-', ' ')}, {large} over {small}",
            values[Case(large, 1.0, length)],
            values[Case(small, 1.0, length)],
            claim=1,
        )
        for length in dict.fromkeys((common[0], common[-1]))
    ]
    for size in list(plan)[1:-1]:  # at as many images each, the most that both have seen: longer runs gain more from more pictures
        length = _common(plan, small, size)[-1]
        gains = [_differences(values[Case(net, 1.0, length)], values[Case(net, SHARES[0], length)]) for net in (size, small)]
        asked = f"{name} after {length.replace('-', ' ')}, what four times the pictures give {size} over what they give {small}"
        found.append(compare(asked, *gains, claim=1))
    return [*found, _efficiency(plan, values, name, small, large)]


def _common(plan: dict[str, tuple[str, ...]], *sizes: str) -> list[str]:
    """The durations that all of some nets have, shortest first."""
    return [length for length in plan[sizes[0]] if all(length in plan[size] for size in sizes)]


def _differences(left: Values, right: Values) -> Values:
    return [None if a is None or b is None else a - b for a, b in zip(left, right, strict=True)]


def _efficiency(plan: dict[str, tuple[str, ...]], values: dict[Case, Values], name: str, small: str, large: str) -> str:
    """How many images the large net needs for what the small one reached at its end."""
    curves = {}
    for size in (small, large):
        found = [[value for value in values[Case(size, 1.0, length)] if value is not None] for length in plan[size]]
        curves[size] = [fmean(each) if each else float("nan") for each in found]
    level, images = curves[small][-1], [np.log(_images(length)) for length in plan[large]]
    if not np.isfinite([level, *curves[large]]).all():
        return f"images for equal {name}: runs fell"
    if not (curves[large][0] <= level <= curves[large][-1]) or (np.diff(curves[large]) <= 0).any():
        where = "below" if level < curves[large][0] else "above"
        why = f"{where} all that {large} was measured at, or {large} does not rise: no ratio of images"
        return f"{small} ended at a {name} of {level:.1%}, {why}"
    needed, took = float(np.exp(np.interp(level, curves[large], images))), _images(plan[small][-1])
    return f"for a {name} of {level:.1%}, {small} took {took:,.0f} images, {large} about {needed:,.0f}: {took / needed:.1f} times fewer"


def _draw(
    plan: dict[str, tuple[str, ...]],
    sets: Upstream,
    top1: dict[Case, Values],
    ten: dict[Case, Values],
    compute: dict[Case, float],
    fits: dict[str, Fit | str],
) -> Figure:
    figure, shared = Figure(figsize=(13, 7.4), layout="constrained"), _common(plan, *plan)[-1]
    for row, (name, title, values) in enumerate((("upstream", f"{sets.data}, top-1", top1), ("10-shot", f"{sets.probe}, 10-shot", ten))):
        frontier, efficiency, data = (figure.add_subplot(2, 3, 3 * row + place) for place in (1, 2, 3))
        plain(frontier, title=f"{title}: compute", xlabel="10^12 FLOPs", ylabel="error, %", xscale="log")
        plain(efficiency, title="images seen, all data", xlabel="images", xscale="log")
        plain(data, title=f"after {shared.replace('-', ' ')}", xlabel="of the pictures", ylabel="error, %", xlim=(-0.3, len(SHARES) - 0.7))
        for size, colour in zip(plan, COLOURS, strict=False):
            cases = [Case(size, 1.0, length) for length in plan[size]]
            errors = [_errors(values[case]) for case in cases]
            band(frontier, [compute[case] for case in cases], errors, colour, size)
            band(efficiency, [_images(case.length) for case in cases], errors, colour, size)
            shares = [_errors(values.get(Case(size, share, shared), [])) for share in SHARES]
            band(data, range(len(SHARES)), shares, colour, size)
        data.set_xticks(range(len(SHARES)), [f"{share:.0%}" for share in SHARES])
        lengths = max(plan.values(), key=len)
        efficiency.set_xticks([_images(length) for length in lengths], [length.removesuffix("-images") for length in lengths])
        efficiency.minorticks_off()
        found = fits[name]
        if isinstance(found, Fit):
            x = np.geomspace(found.frontier[0].compute, found.frontier[-1].compute, 60)
            line = frontier.plot(x, 100 * found.law.error(x), color="#1f2933", lw=1.2, ls="--", label=str(found.law))
            frontier.legend(handles=line, frameon=False, fontsize=8, loc="lower left")
        efficiency.legend(frameon=False, fontsize=8, loc="lower left")  # errors fall from the left: that corner is free
    return figure


def _errors(values: Values) -> Values:
    return [None if value is None else 1 - value for value in values]
