"""Figure 5 left of "Scaling Vision Transformers" in miniature: weight decay of the head against that of the body."""

from dataclasses import replace
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from manyscale.config import Run
from manyscale.studies.grid import run_grid
from manyscale.studies.study import Section, Terms, Values, cell, compare, conclude
from manyscale.studies.vits import SHOTS, Upstream, decayed, describe_vit, shot, upstream, vit

BODIES, HEADS = (0.3, 1.0, 4.0, 12.0), (0.3, 4.0, 40.0, 400.0)
QUICK_BODIES, QUICK_HEADS = (0.3, 4.0), (0.3, 4.0, 40.0)
PAPER = """Figure 5, ViT-B/32 on JFT-300M: few-shot transfer is best far off the diagonal, with a strong decay of the head and a weak one of
the body; a strong decay of the head lowers the accuracy upstream. Chosen: 3.0 and 0.03. The paper prints no numbers of the figure."""


def study(terms: Terms) -> dict[str, Any]:
    """A grid of decays, given as exponents: what the sum of rate x decay over the run is."""
    sets = upstream(terms)
    bodies, heads = (QUICK_BODIES, QUICK_HEADS) if terms.quick else (BODIES, HEADS)
    cells = [(body, head) for body in bodies for head in heads]
    asked = [(which, seed) for which in cells for seed in range(terms.seeds)]
    runs = [run(terms, sets, *which, seed) for which, seed in asked]
    ended = dict(zip(asked, run_grid(runs, terms.console), strict=True))

    def values(which: tuple[float, float], metric: str) -> Values:
        records = [o.summary["last"] if (o := ended[which, seed]).summary else None for seed in range(terms.seeds)]
        return [None if r is None else r["accuracy"] if metric == "upstream" else shot(r, int(metric)) for r in records]

    metrics = {"upstream": f"{sets.data}, held-out top-1 %", **{str(n): f"{sets.probe}, {n}-shot top-1 %" for n in SHOTS[1:]}}
    table = {metric: {which: values(which, metric) for which in cells} for metric in metrics}
    strong, weak = heads[-1] if terms.quick else 40.0, heads[0]
    findings = []
    for metric in ("10", "25"):
        found = table[metric]
        findings.append(
            compare(
                f"{metric}-shot, body {bodies[0]:g}: head {strong:g} over head {weak:g}",
                found[bodies[0], strong],
                found[bodies[0], weak],
                claim=1,
            )
        )
        diagonal = max((which for which in cells if which[0] == which[1]), key=lambda which: _mean(found[which]))
        off = max((which for which in cells if which[1] > which[0]), key=lambda which: _mean(found[which]))
        findings.append(
            compare(
                f"{metric}-shot, best with more on the head (body {off[0]:g}, head {off[1]:g}) over best on the diagonal ({diagonal[0]:g})",
                found[off],
                found[diagonal],
                claim=1,
            )
            + ". The best of several flatters the side that has more of them"
        )
    findings.append(
        compare(
            f"upstream, body {bodies[0]:g}: head {strong:g} over head {weak:g}",
            table["upstream"][bodies[0], strong],
            table["upstream"][bodies[0], weak],
            claim=-1,
        )
    )
    return conclude(
        terms,
        "Decay of head and body: Figure 5 (left) of Scaling Vision Transformers in miniature",
        sections=[
            Section(
                title,
                ("body \\ head", *(f"{head:g}" for head in heads)),
                [(f"{body:g}", *(cell(table[metric][body, head]) for head in heads)) for body in bodies],
            )
            for metric, title in metrics.items()
        ],
        findings=findings,
        paper=PAPER,
        method=f"{describe_vit(runs[0], sets)} Rows and columns are exponents, the sum of rate x weight decay over the run: decay alone "
        "would shrink a weight by e to minus that. The paper's 0.03 and 3.0 are 4.4 and 438.",
        values={f"body {body:g}, head {head:g}": {metric: table[metric][body, head] for metric in metrics} for body, head in cells},
        picture=_draw(bodies, heads, table, metrics),
    )


def run(terms: Terms, sets: Upstream, body: float, head: float, seed: int) -> Run:
    """One cell, one seed."""
    made = vit(terms, sets, "w64", seed=seed, length="20k-images" if terms.quick else "100k-images")
    name = f"body{body:g}-head{head:g}"
    return replace(decayed(made, sets, body=body, head=head), recipe=f"{name} seed {seed}", out=str(terms.out / f"{name}-{seed}"))


def _mean(values: Values) -> float:
    found = [value for value in values if value is not None]
    return fmean(found) if found else -1.0


def _draw(
    bodies: tuple[float, ...], heads: tuple[float, ...], table: dict[str, dict[tuple[float, float], Values]], titles: dict[str, str]
) -> Figure:
    shown = ("upstream", "10", "25")
    figure = Figure(figsize=(4.2 * len(shown), 3.9), layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(shown)), shown, strict=True):
        means = np.array([[_mean(table[metric][body, head]) for head in heads] for body in bodies])
        means = np.where(means < 0, np.nan, 100 * means)
        axes.imshow(means, cmap="viridis", origin="lower", aspect="auto")
        middle = np.nanmean([np.nanmin(means), np.nanmax(means)]) if np.isfinite(means).any() else 0.0
        for y, x in np.ndindex(means.shape):
            text = f"{means[y, x]:.1f}" if np.isfinite(means[y, x]) else "fell"
            axes.text(x, y, text, ha="center", va="center", color="#1f2933" if means[y, x] > middle else "white")
        axes.set(title=titles[metric], xlabel="head decay, exponent", ylabel="body decay, exponent")
        axes.set_xticks(range(len(heads)), [f"{head:g}" for head in heads])
        axes.set_yticks(range(len(bodies)), [f"{body:g}" for body in bodies])
    return figure
