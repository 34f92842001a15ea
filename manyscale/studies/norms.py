"""Tables 6 and 7 of Swin V2 in miniature: where the norm stands, and which similarity; accuracy and divergence."""

from dataclasses import replace

from matplotlib.figure import Figure

from manyscale.config import Run
from manyscale.studies.grid import run_grid
from manyscale.studies.study import COLOURS, Section, Terms, cell, compare, conclude, describe, plain, small

NORMS = ("pre", "sandwich", "post", "res-post")
SIMILARITIES = ("dot", "cosine")
PAPER = """Top-1 % on ImageNet-1k. Table 7 (with dot-product attention but in the last column, which is res-post-norm and cosine):

| | pre | sandwich | post | ours |
|---|---|---|---|---|
| Swin-S | 83.2 | 82.6 | 83.3 | 83.6 |
| Swin-B | 83.6 | - | 83.6 | 84.1 |

Table 6: none / + res-post-norm / + cosine: T 81.5 / 81.6 / 81.7, S 83.2 / 83.3 / 83.6, B 83.6 / 83.8 / 84.1. Post-norm diverged at the
default learning rate and was run at a quarter of it."""


def study(terms: Terms) -> dict:
    """Every norm placement with either similarity, on a deeper net; post-norm at a quarter of the rate, and at the whole."""
    base = small(terms, pictures=3_000, shown=9_000) if terms.quick else small(terms, pictures=10_000, shown=60_000)
    base = replace(base, model=replace(base.model, depths=(2, 4) if terms.quick else (2, 10)))
    cases = {(norm, similarity): 0.25 if norm == "post" else 1.0 for norm in NORMS for similarity in SIMILARITIES}
    runs = {
        (norm, similarity, factor): [_run(terms, base, norm, similarity, factor, seed) for seed in range(terms.seeds)]
        for (norm, similarity), share in cases.items()
        for factor in dict.fromkeys((share, 1.0))
    }
    outcomes = iter(run_grid([run for members in runs.values() for run in members], terms.console))
    ended = {case: [next(outcomes) for _ in members] for case, members in runs.items()}
    values = {case: [o.summary["last"]["accuracy"] for o in members if o.summary] for case, members in ended.items()}
    diverged = {case: sum(not o.summary for o in members) for case, members in ended.items()}

    rows = []
    for norm in NORMS:
        for factor in (1.0, 0.25) if norm == "post" else (1.0,):
            cells = (_shown(values[norm, s, factor], diverged[norm, s, factor], terms.seeds) for s in SIMILARITIES)
            rows.append((norm + (" at a quarter of the rate" if factor < 1 else ""), *cells))
    findings = []
    whole = {case: found for case, found in values.items() if len(found) == terms.seeds}
    ours = whole.get(("res-post", "cosine", 1.0))
    if ours:
        for name, case in {
            "V1's pre-norm and dot product": ("pre", "dot", 1.0),
            "res-post-norm with dot product": ("res-post", "dot", 1.0),
            "sandwich norm with dot product": ("sandwich", "dot", 1.0),
            "post-norm at a quarter of the rate with dot product": ("post", "dot", 0.25),
        }.items():
            if case in whole:
                findings.append(compare(f"res-post-norm and cosine over {name}", ours, whole[case]))
    fallen = [f"{norm} with {similarity} ({n} of {terms.seeds})" for (norm, similarity, factor), n in diverged.items() if n]
    findings.append(f"diverged: {', '.join(fallen) or 'none, post-norm at the whole rate included'}")
    return conclude(
        terms,
        "Norm placement and similarity: Tables 6 and 7 of Swin V2 in miniature",
        sections=[Section("Top-1 %", ("norm", "dot product", "cosine"), rows)],
        findings=findings,
        paper=PAPER,
        method=f"{describe(base)} The norms that close a residual branch start at zero, as the official code has it. {terms.seeds} seeds; "
        "mean ± standard deviation [95 % confidence interval of the mean].",
        values={" ".join(map(str, case)): {"accuracy": values[case], "diverged": diverged[case]} for case in runs},
        picture=_draw(values),
    )


def _run(terms: Terms, base: Run, norm: str, similarity: str, factor: float, seed: int) -> Run:
    name = f"{norm}-{similarity}" + (f"-rate{factor:g}" if norm == "post" else "")
    return replace(
        base,
        recipe=f"{name} seed {seed}",
        model=replace(base.model, norm=norm, similarity=similarity),
        optim=replace(base.optim, lr=base.optim.lr * factor),
        seed=seed,
        out=str(terms.out / f"{name}-{seed}"),
    )


def _shown(values: list[float], diverged: int, seeds: int) -> str:
    fallen = f"{diverged} of {seeds} diverged" if diverged else ""
    return ", ".join(filter(None, (cell(values), fallen)))


def _draw(values: dict[tuple[str, str, float], list[float]]) -> Figure:
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = plain(figure.subplots(), ylabel="top-1, %")
    names = {case: case[0] + ("\nquarter rate" if case[2] < 1 else "\nwhole rate" if case[0] == "post" else "") for case in values}
    places = {name: place for place, name in enumerate(dict.fromkeys(names.values()))}
    for shift, similarity, colour in ((-0.12, "dot", COLOURS[1]), (0.12, "cosine", COLOURS[0])):
        points = [(places[names[case]] + shift, 100 * value) for case, found in values.items() if case[1] == similarity for value in found]
        axes.plot([x for x, _ in points], [y for _, y in points], "o", color=colour, alpha=0.75, label=similarity)
    axes.set_xticks(list(places.values()), list(places))
    axes.legend(frameon=False)
    return figure
