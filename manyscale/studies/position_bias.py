"""Table 1 of Swin V2 in miniature: three position biases, trained at one window, used at four larger ones."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from manyscale.config import Run
from manyscale.data.loader import eval_batches
from manyscale.data.sources import Part, open_splits
from manyscale.data.transforms import eval_transform
from manyscale.models import load, transfer
from manyscale.storage import read_json, write_json
from manyscale.studies.grid import run_grid
from manyscale.studies.study import COLOURS, Section, Terms, band, cell, compare, conclude, describe, plain, small
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

Its claim: without fine-tuning log > linear >> table, and the gap grows with the window."""


def study(terms: Terms) -> dict:
    """Train with each bias, apply untouched at larger windows, then fine-tune there."""
    base = small(terms, pictures=2_000, shown=30_000) if terms.quick else small(terms, pictures=10_000, shown=200_000)
    sizes = (SIZES[0], SIZES[2]) if terms.quick else SIZES
    seeds, console = range(terms.seeds), terms.console

    def trained(bias: str, seed: int) -> Run:
        out = terms.out / f"{bias}-{seed}"
        return replace(base, recipe=f"{bias} seed {seed}", model=replace(base.model, bias=bias), seed=seed, out=str(out))

    def tuned(bias: str, seed: int, size: int, window: int) -> Run:
        first = trained(bias, seed)
        out = Path(f"{first.out}-tuned{size}")
        model = replace(first.model, image_size=size, window=window)
        # a twentieth of the training, its rate a tenth, hardly any decay, as the paper's fine-tuning
        epochs = max(1, round(first.schedule.epochs / 20))
        return replace(
            first, recipe=f"{bias} seed {seed} at {size} px", model=model, init=first.out, out=str(out),
            optim=replace(first.optim, lr=first.optim.lr / 10, weight_decay=1e-8),
            schedule=replace(first.schedule, epochs=epochs, warmup=0.0, evaluate_every=epochs),
        )  # fmt: skip

    console.print(f"train {len(BIASES)} biases from {terms.seeds} seeds at {sizes[0][0]} px, window {sizes[0][1]}")
    run_grid([trained(bias, seed) for seed in seeds for bias in BIASES], console)
    console.print("apply them, untouched, at larger images and windows")
    limit = 2_000 if terms.quick else 10_000
    untouched = {bias: [[accuracy(trained(bias, seed), limit, *size) for seed in seeds] for size in sizes] for bias in BIASES}
    console.print("fine-tune them there")
    outcomes = iter(run_grid([tuned(bias, seed, *size) for bias in BIASES for size in sizes[1:] for seed in seeds], console))
    after = {bias: [untouched[bias][0], *([_best(next(outcomes)) for _ in seeds] for _ in sizes[1:])] for bias in BIASES}

    header = ("bias", *(f"{size} px, W{window}" for size, window in sizes))
    findings = []
    for number, (size, window) in enumerate(sizes[1:], 1):
        for other in ("table", "linear-cpb"):
            left, right = untouched["log-cpb"][number], untouched[other][number]
            findings.append(compare(f"untouched at {size} px, window {window}, log CPB over {BIASES[other]}", left, right))
    if len(sizes) > 2:
        gaps = [[a - b for a, b in zip(untouched["log-cpb"][n], untouched["table"][n], strict=True)] for n in (1, -1)]
        findings.append(compare(f"the gap to the table at window {sizes[-1][1]} over that at window {sizes[1][1]}", gaps[1], gaps[0]))
    size, window = sizes[-1]
    findings.append(compare(f"fine-tuned at {size} px, window {window}, log CPB over table", after["log-cpb"][-1], after["table"][-1]))
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, (name, values) in zip(figure.subplots(1, 2, sharey=True), (("untouched", untouched), ("fine-tuned", after)), strict=True):
        plain(axes, title=name, xlabel="window", xticks=[window for _, window in sizes])
        for bias, colour in zip(BIASES, (COLOURS[1], COLOURS[2], COLOURS[0]), strict=True):
            band(axes, [window for _, window in sizes], values[bias], colour, BIASES[bias])
    figure.axes[0].set_ylabel("top-1, %")
    figure.axes[0].legend(frameon=False, loc="lower left")
    return conclude(
        terms,
        "Position bias: Table 1 of Swin V2 in miniature",
        sections=[
            Section("Untouched, top-1 %", header, [(BIASES[b], *(cell(v) for v in untouched[b])) for b in BIASES]),
            Section("Fine-tuned at each window, top-1 %", header, [(BIASES[b], *(cell(v) for v in after[b])) for b in BIASES]),
        ],
        findings=findings,
        paper=PAPER,
        method=f"{describe(base)} Trained {base.schedule.epochs} epochs at {sizes[0][0]} px, window {sizes[0][1]}; fine-tuned "
        f"{max(1, round(base.schedule.epochs / 20))} at a tenth of the rate. Untouched nets are scored on at most {limit:,} held-out "
        f"pictures, fine-tuned ones on all. {terms.seeds} seeds; mean ± standard deviation [95 % confidence interval of the mean].",
        values={"untouched": untouched, "fine-tuned": after, "sizes": sizes},
        picture=figure,
    )


def accuracy(run: Run, limit: int, size: int, window: int) -> float:
    """Top-1 of a finished run at another size and window, untouched, on `limit` held-out pictures at most; kept in its folder."""
    file = Path(run.out) / f"at_{size}_{window}_{limit}.json"
    if not file.exists():
        val = open_splits(run.input, run.seed).val  # its own: where the set brings none, the seed chooses them
        if len(val) > limit:
            val = Part(val, np.linspace(0, len(val) - 1, limit).round().astype(int))
        device = pick_device(run.device)
        model = transfer(load(run.out), size, window).to(device).eval()
        batches = eval_batches(val, eval_transform(model.preprocess), batch=run.batch, workers=0)
        metrics = score(model, batches, device, pick_precision(run.precision, device), lambda path, reason: None)
        write_json(file, metrics)
    return read_json(file)["accuracy"]


def _best(outcome) -> float:
    return outcome.summary["last"]["accuracy"] if outcome.summary else 0.0
