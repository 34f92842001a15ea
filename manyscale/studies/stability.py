"""Figure 3 of Swin V2 in miniature: SimMIM with V1 and V2, deep and narrow, at growing learning rates; where each breaks down."""

from dataclasses import replace

from matplotlib.figure import Figure

from manyscale.config import Run, SimMIM
from manyscale.studies.amplitudes import VERSIONS
from manyscale.studies.fate import FATES, curve, fate, fate_cell, guessed_painting
from manyscale.studies.grid import Outcome, run_grid
from manyscale.studies.study import COLOURS, Section, Terms, conclude, describe, plain, small

RATES = (1e-3, 4e-3, 1.6e-2, 6.4e-2, 2.56e-1)
PAPER = """SimMIM with the huge net: V1's loss breaks down, V2's goes on falling (Figure 3). No learning rates are compared there; this
study raises the rate instead of the size, on a net deep for its width."""


def study(terms: Terms) -> dict:
    """Pre-train both versions at every rate; say which runs learnt, what became of the others, and the loss."""
    base = small(terms, pictures=3_000, shown=6_000) if terms.quick else small(terms, pictures=10_000, shown=30_000)
    net = replace(base.model, width=32, depths=(2, 10) if terms.quick else (2, 22), heads=(2, 4), drop_path=0.0)
    # targets as they are for both, so that their losses compare
    base = replace(base, task="simmim", model=net, simmim=SimMIM(mask_unit=8, target_window=0))
    rates = RATES[1::2] if terms.quick else RATES

    def run(version: str, rate: float, seed: int) -> Run:
        return replace(
            base,
            recipe=f"{version} at {rate:g} seed {seed}",
            model=replace(base.model, **VERSIONS[version]),
            optim=replace(base.optim, lr=rate, min_lr=rate / 100),
            seed=seed,
            out=str(terms.out / f"{version}-{rate:g}-{seed}"),
        )

    cases = [(version, rate) for rate in rates for version in VERSIONS]
    outcomes = iter(run_grid([run(*case, seed) for case in cases for seed in range(terms.seeds)], terms.console))
    ended = {case: [next(outcomes) for _ in range(terms.seeds)] for case in cases}
    guess = guessed_painting(base)
    fates = {case: [fate(outcome, guess) for outcome in members] for case, members in ended.items()}
    losses = {
        case: [o.summary["last"]["l1"] for o, fate in zip(ended[case], fates[case], strict=True) if fate == "learns" and o.summary]
        for case in cases
    }
    rows = [
        (f"{rate:g}", *(fate_cell(losses[version, rate], fates[version, rate], scale=1, digits=3) for version in VERSIONS))
        for rate in rates
    ]
    findings = []
    for version in VERSIONS:
        well = [rate for rate in rates if all(fate == "learns" for fate in fates[version, rate])]
        findings.append(
            f"{version} learns with every seed up to a rate of {max(well):g}" if well else f"{version} learns at no rate with every seed"
        )
    highest = [max((r for r in rates if set(fates[v, r]) == {"learns"}), default=0.0) for v in ("V1", "V2")]
    findings.append(
        "V2 stands higher rates than V1, as the paper claims of its size"
        if highest[1] > highest[0]
        else "that V2 stands higher rates does not appear at this scale"
    )
    return conclude(
        terms,
        "Stability: Figure 3 of Swin V2 in miniature",
        sections=[Section("Masked L1 at the end, held-out pictures", ("learning rate", "V1", "V2"), rows)],
        findings=findings,
        paper=PAPER,
        method=f"{describe(base)} SimMIM with raw targets for both, at the rates of the table. {FATES} That "
        f"guess has a loss of {guess:.3f}.",
        values={"guess": guess}
        | {f"{version} {rate:g}": {"l1": losses[version, rate], "fates": fates[version, rate]} for version, rate in cases},
        picture=_draw(ended, rates),
    )


def _draw(ended: dict[tuple[str, float], list[Outcome]], rates: tuple[float, ...]) -> Figure:
    figure = Figure(figsize=(2.4 * len(rates) + 1, 3.0), layout="constrained")
    for axes, rate in zip(figure.subplots(1, len(rates), sharey=True, squeeze=False)[0], rates, strict=True):
        plain(axes, title=f"rate {rate:g}", xlabel="step", yscale="log")
        for version, colour in (("V1", COLOURS[1]), ("V2", COLOURS[0])):
            for number, outcome in enumerate(ended[version, rate]):
                points = curve(outcome.run)
                axes.plot(*zip(*points, strict=True), color=colour, lw=1, alpha=0.8, label=None if number else version)
                if outcome.diverged and points:
                    axes.plot(*points[-1], "x", color=colour)
    figure.axes[0].set_ylabel("training loss")
    figure.axes[0].legend(frameon=False)
    return figure
