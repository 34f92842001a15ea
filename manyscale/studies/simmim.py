"""Does SimMIM help where labels are few? From scratch against pre-trained, with 1, 10 and 100 % of the labels."""

from dataclasses import replace

from matplotlib.figure import Figure

from manyscale.config import Augment, Optim, Run, SimMIM
from manyscale.studies.grid import run_grid
from manyscale.studies.study import COLOURS, Section, Terms, band, cell, compare, conclude, describe, plain, small

SHARES = (0.01, 0.1, 1.0)
PAPER = """With SimMIM the paper trains its largest nets on 40 times fewer labelled pictures than its rivals used. Neither it nor the SimMIM
paper has this study's numbers; SimMIM's Swin-B goes from 82.8 to 84.0 % between 100 and 800 epochs of pre-training on ImageNet-1k."""


def study(terms: Terms) -> dict:
    """Pre-train on all pictures without labels, then learn from few labels, and from scratch beside it."""
    base = small(terms, pictures=4_000, shown=24_000) if terms.quick else small(terms, pictures=20_000, shown=200_000)
    seeds = range(terms.seeds)

    def pretrained(seed: int) -> Run:
        longer = replace(base.schedule, epochs=2 * base.schedule.epochs, evaluate_every=2 * base.schedule.epochs)
        return replace(
            base, recipe=f"pre-train seed {seed}", task="simmim", seed=seed, out=str(terms.out / f"pretrain-{seed}"), schedule=longer,
            simmim=SimMIM(mask_unit=8, target_window=15), augment=replace(base.augment, scale=(0.67, 1.0)),
        )  # fmt: skip

    def labelled(share: float, seed: int, init: str) -> Run:
        pictures = base.input.share * share
        epochs = round(base.schedule.epochs * (1 / 3 / share if share < 1 else 1))
        name = f"{'tuned' if init else 'scratch'}-{share:g}"
        return replace(
            base, recipe=f"{name} seed {seed}", seed=seed, init=init, out=str(terms.out / f"{name}-{seed}"),
            input=replace(base.input, share=pictures), batch=min(base.batch, 32) if share < 0.1 else base.batch,
            augment=Augment(scale=(0.35, 1.0), flip=base.augment.flip),
            optim=Optim(lr=1e-3, min_lr=1e-5, layer_decay=0.8 if init else 1.0),
            schedule=replace(base.schedule, epochs=epochs, warmup=epochs / 10, evaluate_every=epochs),
        )  # fmt: skip

    terms.console.print("pre-train without labels")
    run_grid([pretrained(seed) for seed in seeds], terms.console)
    terms.console.print("learn from labels")
    cases = [(share, init) for share in SHARES for init in (False, True)]
    runs = [labelled(share, seed, pretrained(seed).out if init else "") for share, init in cases for seed in seeds]
    outcomes = iter(run_grid(runs, terms.console))
    values = {case: [o.summary["last"]["accuracy"] if (o := next(outcomes)).summary else 0.0 for _ in seeds] for case in cases}

    rows = [(f"{share:.0%}", cell(values[share, False]), cell(values[share, True])) for share in SHARES]
    findings = [
        compare(f"with {share:.0%} of the labels, pre-trained over from scratch", values[share, True], values[share, False])
        for share in SHARES
    ]
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = plain(figure.subplots(), xlabel="labels", ylabel="top-1, %", xscale="log")
    for init, colour, name in ((False, COLOURS[1], "from scratch"), (True, COLOURS[0], "pre-trained with SimMIM")):
        band(axes, SHARES, [values[share, init] for share in SHARES], colour, name)
    axes.set_xticks(SHARES, [f"{share:.0%}" for share in SHARES])
    axes.legend(frameon=False)
    return conclude(
        terms,
        "SimMIM and few labels",
        sections=[Section("Top-1 %", ("labels", "from scratch", "pre-trained with SimMIM"), rows)],
        findings=findings,
        paper=PAPER,
        method=f"{describe(base)} That is the whole, 100 %; pre-training sees as many, drawn without their labels, for "
        f"{2 * base.schedule.epochs} epochs. Runs with fewer labels see a third as many pictures in all, over more epochs. Both arms have "
        f"the same length and augmentation; the pre-trained one a layer decay of 0.8. {terms.seeds} seeds, which also choose the "
        "pictures; mean ± standard deviation [95 % confidence interval of the mean].",
        values={f"{share:g} {'pre-trained' if init else 'scratch'}": found for (share, init), found in values.items()},
        picture=figure,
    )
