"""Table 1 of Swin V2 in miniature: three position biases, trained at one window, used at four larger ones."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from manyscale.config import Run
from manyscale.data.loader import eval_batches
from manyscale.data.sources import Part, open_split
from manyscale.data.transforms import eval_transform
from manyscale.models import load, transfer
from manyscale.storage import read_json, write_json
from manyscale.studies.grid import Outcome, run_grid
from manyscale.studies.study import COLOURS, Section, Terms, Values, band, cell, compare, conclude, describe, plain, small
from manyscale.tasks.classify import score
from manyscale.train.state import pick_device, pick_precision

BIASES = {"table": "table, bicubic", "linear-cpb": "linear CPB", "log-cpb": "log CPB"}
SIZES = ((32, 4), (48, 6), (64, 8), (80, 10), (96, 12))  # image and window; the paper's ratios: 1, 1.5, 2, 2.5, 3
PAPER = """Swin-T trained at 256 px, window 8; top-1 % on ImageNet-1k without / with fine-tuning:

| | W8 | W12 | W16 | W20 | W24 |
|---|---|---|---|---|---|
| table, bicubic | 81.7 | 79.4 / 82.7 | 77.2 / 83.0 | 73.2 / 83.2 | 68.7 / 83.2 |
| linear CPB | 81.7 | 82.0 / 82.9 | 81.2 / 83.3 | 79.8 / 83.6 | 77.6 / 83.7 |
| log CPB | 81.8 | 82.4 / 83.2 | 81.7 / 83.8 | 80.4 / 84.0 | 79.1 / 84.2 |

Its claim: without fine-tuning log > linear >> table, and the gap grows with the window. The three start alike, so its gaps are losses;
here what each net had at its own window is taken off first."""

Table = dict[str, list[Values]]  # bias -> size -> seed


def study(terms: Terms) -> dict:
    """Train with each bias, apply untouched at larger windows, then fine-tune there."""
    base = small(terms, pictures=2_000, shown=30_000) if terms.quick else small(terms, pictures=10_000, shown=200_000)
    sizes = (SIZES[0], SIZES[2]) if terms.quick else SIZES
    limit = 2_000 if terms.quick else 10_000
    seeds, console = range(terms.seeds), terms.console

    console.print(f"train {len(BIASES)} biases from {terms.seeds} seeds at {sizes[0][0]} px, window {sizes[0][1]}")
    cases = [(bias, seed) for seed in seeds for bias in BIASES]
    outcomes = run_grid([trained(terms, base, *case) for case in cases], console)
    ended = {(*case, *sizes[0]): _last(outcome) for case, outcome in zip(cases, outcomes, strict=True)}
    whole = [(bias, seed) for (bias, seed, *_), value in ended.items() if value is not None]
    console.print("apply them, untouched, at larger images and windows")
    found = {(*case, *size): accuracy(trained(terms, base, *case), limit, *size) for case in whole for size in sizes}
    console.print("fine-tune them there")
    further = [(*case, *size) for size in sizes[1:] for case in whole]
    outcomes = run_grid([tuned(terms, base, *case) for case in further], console)
    ended |= {case: _last(outcome) for case, outcome in zip(further, outcomes, strict=True)}
    untouched, after = (
        {bias: [[by.get((bias, seed, *size)) for seed in seeds] for size in sizes] for bias in BIASES} for by in (found, ended)
    )

    header = ("bias", *(f"{size} px, W{window}" for size, window in sizes))
    first = tuned(terms, base, "table", 0, *sizes[-1])
    return conclude(
        terms,
        "Position bias: Table 1 of Swin V2 in miniature",
        sections=[
            Section("Untouched, top-1 %", header, [(BIASES[b], *map(cell, untouched[b])) for b in BIASES]),
            Section("Fine-tuned at each window, top-1 %", header, [(BIASES[b], *map(cell, after[b])) for b in BIASES]),
        ],
        findings=_findings(untouched, after, sizes),
        paper=PAPER,
        method=f"{describe(base)} Fine-tuned for {first.schedule.epochs} epochs at a peak rate of {first.optim.lr:g} and no decay: a tenth "
        "of the epochs and a twenty-fifth of the rate, as the paper (30 of 300, 4e-5 of 1e-3). Larger pictures are the same ones enlarged: "
        f"they show no more detail, where the paper's do. Untouched nets are scored on {limit:,} held-out pictures at most, "
        "fine-tuned ones on all.",
        values={"untouched": untouched, "fine-tuned": after, "sizes": sizes},
        picture=_draw(untouched, after, sizes),
    )


def trained(terms: Terms, base: Run, bias: str, seed: int) -> Run:
    """The run at the first window."""
    out = terms.out / f"{bias}-{seed}"
    return replace(base, recipe=f"{bias} seed {seed}", model=replace(base.model, bias=bias), seed=seed, out=str(out))


def tuned(terms: Terms, base: Run, bias: str, seed: int, size: int, window: int) -> Run:
    """The run that goes on from it at a larger one, as the paper's section A1.2 has it."""
    first = trained(terms, base, bias, seed)
    epochs = max(1, round(base.schedule.epochs / 10))
    return replace(
        first,
        recipe=f"{bias} seed {seed} at {size} px",
        model=replace(first.model, image_size=size, window=window),
        init=first.out,
        out=f"{first.out}-tuned{size}",
        optim=replace(base.optim, lr=base.optim.lr / 25, min_lr=base.optim.min_lr / 25, weight_decay=1e-8),
        schedule=replace(base.schedule, epochs=epochs, warmup=0.0, evaluate_every=epochs),
    )


def accuracy(run: Run, limit: int, size: int, window: int) -> float:
    """Top-1 of a finished run at another size and window, untouched, on `limit` held-out pictures at most; kept in its folder."""
    file = Path(run.out) / f"at_{size}_{window}_{limit}.json"
    if not file.exists():
        val = open_split(replace(run.input, cache=False), "val", run.seed).source
        if len(val) > limit:
            val = Part(val, np.linspace(0, len(val) - 1, limit).round().astype(int))
        device = pick_device(run.device)
        model = transfer(load(run.out), size, window).to(device).eval()
        batches = eval_batches(val, eval_transform(model.preprocess), batch=run.batch, workers=0)
        write_json(file, score(model, batches, device, pick_precision(run.precision, device), lambda path, reason: None))
    return read_json(file)["accuracy"]


def _last(outcome: Outcome) -> float | None:
    return outcome.summary["last"]["accuracy"] if outcome.summary else None


def _change(table: Table, bias: str, number: int) -> Values:
    """What each seed's net gains over its own window, before any fine-tuning."""
    pairs = zip(table[bias][number], table[bias][0], strict=True)
    return [None if a is None or b is None else a - b for a, b in pairs]


def _findings(untouched: Table, after: Table, sizes: tuple[tuple[int, int], ...]) -> list[str]:
    others = [bias for bias in BIASES if bias != "log-cpb"]
    at_home = partial(compare, left=untouched["log-cpb"][0])
    findings = [at_home(f"at the trained window, log CPB over {BIASES[other]}", right=untouched[other][0]) for other in others]
    for number, (size, window) in enumerate(sizes[1:], 1):
        for other in others:
            name = f"untouched at {size} px, window {window}, the change of log CPB over that of {BIASES[other]}"
            findings.append(compare(name, _change(untouched, "log-cpb", number), _change(untouched, other, number), claim=1))
    if len(sizes) > 2:
        gaps = [
            [None if a is None or b is None else a - b for a, b in zip(untouched["log-cpb"][n], untouched["table"][n], strict=True)]
            for n in (1, -1)
        ]
        name = f"the gap to the table at window {sizes[-1][1]} over that at window {sizes[1][1]}"
        findings.append(compare(name, gaps[1], gaps[0], claim=1))
    size, window = sizes[-1]
    name = f"fine-tuned at {size} px, window {window}, log CPB over the table"
    return [*findings, compare(name, after["log-cpb"][-1], after["table"][-1], claim=1)]


def _draw(untouched: Table, after: Table, sizes: tuple[tuple[int, int], ...]) -> Figure:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    windows = [window for _, window in sizes]
    for axes, (name, values) in zip(figure.subplots(1, 2, sharey=True), (("untouched", untouched), ("fine-tuned", after)), strict=True):
        plain(axes, title=name, xlabel="window", xticks=windows)
        for bias, colour in zip(BIASES, (COLOURS[1], COLOURS[2], COLOURS[0]), strict=True):
            band(axes, windows, values[bias], colour, BIASES[bias])
    figure.axes[0].set_ylabel("top-1, %")
    figure.axes[0].legend(frameon=False, loc="best")
    return figure
