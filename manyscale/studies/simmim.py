"""Does SimMIM help where labels are few? From scratch against pre-trained, with 1, 10 and 100 % of the labels."""

from dataclasses import replace
from statistics import fmean

from matplotlib.figure import Figure

from manyscale.config import Augment, Optim, Run, SimMIM
from manyscale.data.sources import open_splits
from manyscale.studies.grid import run_grid
from manyscale.studies.study import COLOURS, Section, Terms, Values, band, cell, compare, conclude, describe, plain, small

SHARES = (0.01, 0.1, 1.0)
FULL, QUICK = (1e-3, 2e-3), (2e-3,)  # rates
PAPER = """With SimMIM the Swin V2 paper trains its largest nets on 40 times fewer labelled pictures than its rivals used. It has none of
this study's numbers; SimMIM's own zoo has Swin-B on ImageNet-1k at 83.5 % after 100 epochs of pre-training and 84.0 % after 800, both
fine-tuned at 224 px."""


def study(terms: Terms) -> dict:
    """Pre-train on all pictures without labels, then learn from few labels, and from scratch beside it."""
    base = small(terms, pictures=2_000, shown=6_000) if terms.quick else small(terms, pictures=20_000, shown=160_000)
    seeds, rates = range(terms.seeds), QUICK if terms.quick else FULL
    counts = {share: len(open_splits(replace(base.input, cache=False, share=base.input.share * share), 0).train) for share in SHARES}
    terms.console.print("pre-train without labels")
    begun = run_grid([pretrained(terms, base, seed) for seed in seeds], terms.console)
    whole = [outcome.summary is not None for outcome in begun]

    terms.console.print("learn from labels")
    cases = [(share, init, rate) for share in SHARES for init in (False, True) for rate in rates]
    asked = [(case, seed) for case in cases for seed in seeds if whole[seed] or not case[1]]
    outcomes = run_grid([labelled(terms, base, counts, *case, seed) for case, seed in asked], terms.console)
    found = {which: outcome.summary["last"]["accuracy"] for which, outcome in zip(asked, outcomes, strict=True) if outcome.summary}
    values: dict[tuple, Values] = {case: [found.get((case, seed)) for seed in seeds] for case in cases}
    best = {(share, init): max((values[share, init, rate] for rate in rates), key=_mean) for share in SHARES for init in (False, True)}

    terms.console.print("learn from all labels for as long as pre-training and learning take together")
    rate = max(rates, key=lambda rate: _mean(values[1.0, False, rate]))
    runs = [labelled(terms, base, counts, 1.0, False, rate, seed, longer=3) for seed in seeds]
    longer = [o.summary["last"]["accuracy"] if o.summary else None for o in run_grid(runs, terms.console)]

    rows = [(f"{counts[share]:,}", cell(best[share, False]), cell(best[share, True])) for share in SHARES]
    every = [(f"{counts[s]:,}", f"{rate:g}", cell(values[s, False, rate]), cell(values[s, True, rate])) for s in SHARES for rate in rates]
    findings = [
        compare(f"with {counts[share]:,} labels, pre-trained over from scratch", best[share, True], best[share, False], claim=1)
        for share in SHARES
    ]
    findings.append(compare("with all labels, pre-trained over from scratch for three times as long", best[1.0, True], longer))
    return conclude(
        terms,
        "SimMIM and few labels",
        sections=[
            Section("Top-1 %, each at its better rate", ("labels", "from scratch", "pre-trained with SimMIM"), rows),
            Section("Top-1 %, every rate", ("labels", "rate", "from scratch", "pre-trained with SimMIM"), every),
            Section("Top-1 %, from scratch, three times as long", ("labels", "rate", "from scratch"),
                    [(f"{counts[1.0]:,}", f"{rate:g}", cell(longer))]),
        ],
        findings=findings,
        paper=PAPER,
        method=f"{describe(base)} Pre-training differs in its length, {2 * base.schedule.epochs} epochs, and its crops, of at least 67 %; "
        f"it sees the {counts[1.0]:,} pictures without labels. With all labels learning takes {base.schedule.epochs} epochs, so the "
        "pre-trained net has seen three times as many pictures in all; runs with fewer labels see a third as many pictures over more "
        "epochs. Both arms have the same length, rates and augmentation (crops of at least 35 %); the pre-trained one a layer decay "
        "of 0.8. The better rate is that of the higher mean on the held-out pictures, for both arms; --quick has one. The seed also "
        "chooses the pictures.",
        values={f"{counts[s]}, {'pre-trained' if init else 'scratch'}, {rate:g}": found for (s, init, rate), found in values.items()}
        | {f"{counts[1.0]}, scratch, {rate:g}, three times as long": longer},
        picture=_draw(counts, best, longer),
    )  # fmt: skip


def pretrained(terms: Terms, base: Run, seed: int) -> Run:
    """The run without labels."""
    epochs = 2 * base.schedule.epochs
    return replace(
        base,
        recipe=f"pre-train seed {seed}",
        task="simmim",
        seed=seed,
        out=str(terms.out / f"pretrain-{seed}"),
        schedule=replace(base.schedule, epochs=epochs, warmup=epochs / 12, evaluate_every=epochs),
        simmim=SimMIM(mask_unit=8, target_window=15),
        augment=replace(base.augment, scale=(0.67, 1.0)),
    )


def labelled(terms: Terms, base: Run, counts: dict[float, int], share: float, init: bool, rate: float, seed: int, longer: int = 1) -> Run:
    """A run with a share of the labels: `longer` times the pictures of the whole set's run, a third of them where labels are few."""
    epochs = max(1, round(longer * base.schedule.epochs * (1 if share == 1 else counts[1.0] / counts[share] / 3)))
    name = f"{'tuned' if init else 'scratch'}-{share:g}-rate{rate:g}" + (f"-{longer}-times" if longer > 1 else "")
    return replace(
        base,
        recipe=f"{name} seed {seed}",
        seed=seed,
        init=pretrained(terms, base, seed).out if init else "",
        out=str(terms.out / f"{name}-{seed}"),
        input=replace(base.input, share=base.input.share * share),
        batch=min(base.batch, max(counts[share] // 2, 1)),
        augment=Augment(scale=(0.35, 1.0), flip=base.augment.flip),
        optim=Optim(lr=rate, min_lr=1e-5, layer_decay=0.8 if init else 1.0),
        schedule=replace(base.schedule, epochs=epochs, warmup=epochs / 10, evaluate_every=epochs),
    )


def _mean(values: Values) -> float:
    return fmean(value or 0.0 for value in values)


def _draw(counts: dict[float, int], best: dict[tuple[float, bool], Values], longer: Values) -> Figure:
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = plain(figure.subplots(), xlabel="labelled pictures", ylabel="top-1, %", xscale="log")
    x = list(counts.values())
    for init, colour, name in ((False, COLOURS[1], "from scratch"), (True, COLOURS[0], "pre-trained with SimMIM")):
        band(axes, x, [best[share, init] for share in counts], colour, name)
    band(axes, x[-1:], [longer], COLOURS[2], "from scratch, three times as long")
    axes.set_xticks(x, [f"{count:,}" for count in x])
    axes.minorticks_off()
    axes.legend(frameon=False)
    return figure
