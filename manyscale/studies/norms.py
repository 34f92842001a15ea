"""Tables 6 and 7 of Swin V2 in miniature: where the norm stands, and which similarity; accuracy and what breaks."""

from dataclasses import replace
from statistics import fmean
from typing import NamedTuple

from matplotlib.figure import Figure

from manyscale.config import Run
from manyscale.studies.fate import FATES, fate, fate_cell, guessed_accuracy
from manyscale.studies.grid import run_grid
from manyscale.studies.study import COLOURS, Section, Terms, Values, compare, conclude, describe, plain, small

SIMILARITIES = ("dot", "cosine")
PAPER = """Top-1 % on ImageNet-1k. Table 7 (the last column is res-post-norm and cosine):

| | pre | sandwich | post | ours |
|---|---|---|---|---|
| Swin-S | 83.2 | 82.6 | 83.3 | 83.6 |
| Swin-B | 83.6 | - | 83.6 | 84.1 |

Table 6: none / + res-post-norm / + cosine: T 81.5 / 81.6 / 81.7, S 83.2 / 83.3 / 83.6, B 83.6 / 83.8 / 84.1. Post-norm diverged at the
default learning rate and was run at a quarter of it."""


class Placement(NamedTuple):
    """A row of the table."""

    norm: str
    rate: float = 1.0  # of the learning rate
    zero_init: bool = True

    def __str__(self) -> str:
        extra = {0.25: ", a quarter of the rate"}.get(self.rate, "") + ("" if self.zero_init else ", started at one")
        return self.norm + extra


PLACEMENTS = (
    Placement("pre"),
    Placement("sandwich"),
    Placement("post", rate=0.25),
    Placement("post"),
    Placement("res-post"),
    Placement("res-post", zero_init=False),
)
OURS = Placement("res-post"), "cosine"


def study(terms: Terms) -> dict:
    """Every norm placement with either similarity, on a deeper net; post-norm at a quarter of the rate, and at the whole."""
    base = small(terms, pictures=3_000, shown=9_000) if terms.quick else small(terms, pictures=10_000, shown=60_000)
    base = replace(base, model=replace(base.model, depths=(2, 4) if terms.quick else (2, 10)))
    cases = [(placement, similarity) for placement in PLACEMENTS for similarity in SIMILARITIES]
    outcomes = iter(run_grid([run(terms, base, *case, seed) for case in cases for seed in range(terms.seeds)], terms.console))
    ended = {case: [next(outcomes) for _ in range(terms.seeds)] for case in cases}
    guess = guessed_accuracy(base)
    fates = {case: [fate(outcome, guess) for outcome in members] for case, members in ended.items()}
    values: dict[tuple[Placement, str], Values] = {
        case: [o.summary["last"]["accuracy"] if o.summary and f == "learns" else None for o, f in zip(members, fates[case], strict=True)]
        for case, members in ended.items()
    }

    rows = [(str(placement), *(fate_cell(values[placement, s], fates[placement, s]) for s in SIMILARITIES)) for placement in PLACEMENTS]
    findings = [
        compare(f"res-post norm with cosine over {placement} with {s}", values[OURS], values[placement, s], claim=1)
        for placement, s in [
            (Placement("pre"), "dot"),
            (Placement("res-post"), "dot"),
            (Placement("sandwich"), "dot"),
            (Placement("post", rate=0.25), "dot"),
        ]
    ]
    fallen = {case: [each for each in found if each != "learns"] for case, found in fates.items()}
    bad = [f"{placement} with {s}: {', '.join(found)}" for (placement, s), found in fallen.items() if found]
    findings.append("runs that did not learn: " + ("; ".join(bad) or "none, post-norm at the whole rate included"))
    return conclude(
        terms,
        "Norm placement and similarity: Tables 6 and 7 of Swin V2 in miniature",
        sections=[Section("Top-1 %", ("norm", "dot product", "cosine"), rows)],
        findings=findings,
        paper=PAPER,
        method=f"{describe(base)} The norms that close a residual branch (sandwich, res-post) start at zero, as in the official code; the "
        "paper does not say so, and `started at one` is without it. Pre-norm here has V2's bias and patch merging: it is not V1. "
        f"{FATES}",
        values={f"{placement}, {s}": {"accuracy": values[placement, s], "fates": fates[placement, s]} for placement, s in cases},
        picture=_draw(values),
    )


def run(terms: Terms, base: Run, placement: Placement, similarity: str, seed: int) -> Run:
    """One run of the grid."""
    name = f"{placement.norm}-{similarity}" + (f"-rate{placement.rate:g}" if placement.norm == "post" else "")
    name += "" if placement.zero_init else "-from-one"
    return replace(
        base,
        recipe=f"{name} seed {seed}",
        model=replace(base.model, norm=placement.norm, similarity=similarity, zero_init=placement.zero_init),
        optim=replace(base.optim, lr=base.optim.lr * placement.rate, min_lr=base.optim.min_lr * placement.rate),
        seed=seed,
        out=str(terms.out / f"{name}-{seed}"),
    )


def _draw(values: dict[tuple[Placement, str], Values]) -> Figure:
    figure = Figure(figsize=(9.5, 3.4), layout="constrained")
    axes = plain(figure.subplots(), ylabel="top-1, %")
    for shift, similarity, colour in ((-0.1, "dot", COLOURS[1]), (0.1, "cosine", COLOURS[0])):
        for place, placement in enumerate(PLACEMENTS):
            found = [100 * value for value in values[placement, similarity] if value is not None]
            label = None if place else similarity
            axes.plot([place + shift] * len(found), found, "o", color=colour, alpha=0.6, ms=5, label=label)
            if found:
                axes.hlines(fmean(found), place + shift - 0.08, place + shift + 0.08, color=colour, lw=2)
    axes.set_xticks(range(len(PLACEMENTS)), [str(placement).replace(", ", "\n") for placement in PLACEMENTS])
    axes.legend(frameon=False)
    return figure
