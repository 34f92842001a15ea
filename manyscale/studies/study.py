"""What every study has: its terms, a small net on few pictures, numbers with their doubt, and a table on disk."""

import math
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from rich.console import Console

from manyscale.config import Augment, Input, Optim, Run, Schedule, SwinConfig
from manyscale.data.sources import DIGITS, open_splits
from manyscale.storage import origin, read_json, write, write_json

INK, GRID = "#1f2933", 0.25
COLOURS = ("#2c6e9b", "#c0392b", "#d99a2b", "#4b8b5a", "#7d5ba6", "#6b7680", "#1f2933", "#b56576", "#3aa6a0", "#8c564b")


@dataclass(frozen=True)
class Terms:
    """How a study is asked for."""

    out: Path  # its folder; every run has one below it
    data: str = ""  # a set; empty: the study's own choice
    probe: str = ""  # another set, for few-shot evaluation where the study has one; empty: likewise
    seeds: int = 3
    quick: bool = False  # at most 15 minutes of two cores, for a first look
    compile: bool = False  # the nets: see `Run.compile`
    console: Console = field(default_factory=lambda: Console(highlight=False, soft_wrap=True))
    command: str = ""  # what to say the study was called with


def small(terms: Terms, *, pictures: int, shown: int, batch: int = 64) -> Run:
    """A net of 0.2 million parameters on at most `pictures` pictures of the set, until it was shown `shown` in all.

    Evaluated once, at the end: no weights are chosen by the held-out pictures.
    """
    held_out = 2_000 if terms.quick else 0
    data = Input(data=terms.data, held_out=held_out, statistics="half", crop_ratio=1.0, workers=0, cache=True, resident=True)
    count = len(open_splits(replace(data, cache=False), 0).train)
    share = min(1.0, pictures / count)
    epochs = max(1, round(shown / (share * count)))
    return Run(
        recipe="study",
        model=SwinConfig(image_size=32, patch=4, window=4, width=48, depths=(2, 2), heads=(3, 6), mlp_ratio=2.0, drop_path=0.05),
        input=replace(data, share=share),
        augment=Augment(scale=(0.5, 1.0), flip=0.0 if terms.data == DIGITS else 0.5),
        optim=Optim(lr=2e-3, min_lr=1e-5),
        schedule=Schedule(epochs=epochs, warmup=epochs / 12, evaluate_every=epochs, save_minutes=2.0, keep=1),
        batch=batch,
        precision="float32",
        compile=terms.compile,
        log_every=10,
    )


def describe(run: Run) -> str:
    """The run's net, data, length and optimiser in a few sentences."""
    model, data, optim, schedule = run.model, run.input, run.optim, run.schedule
    held_out = f"{data.held_out:,} " if data.held_out else ""
    return (
        f"Swin of width {model.width}, depths {', '.join(map(str, model.depths))}, patch {model.patch}, at {model.size[0]} px, window "
        f"{model.window}; but for what is compared it is V2: {model.norm} norm, {model.similarity} similarity, {model.bias} bias. "
        f"{data.data} with {data.share:.0%} of its training pictures, {schedule.epochs} epochs, batch {run.batch}, {run.precision}. "
        f"AdamW, rate {optim.lr:g} after a warm-up of {schedule.warmup:.2g} epochs, along a cosine to {optim.min_lr:g}, decay "
        f"{optim.weight_decay:g}, gradient norm clipped at {optim.clip:g}; crops of at least {run.augment.scale[0]:.0%} of the area"
        f"{', flips' if run.augment.flip else ''}. Evaluated once, at the end, on {held_out}held-out pictures."
    )


# -- numbers --------------------------------------------------------------------------------------------------------------
# One value per seed, None where the run came to nothing: it counts as fallen, never as a number.

Values = Sequence[float | None]


def half_width(values: Sequence[float]) -> float:
    """Half the 95 % confidence interval of the mean, by Student's t; infinite for a single value."""
    from scipy.stats import t as student  # slow to import, and every worker imports this file

    n = len(values)
    return float(student.ppf(0.975, n - 1)) * stdev(values) / n**0.5 if n > 1 else float("inf")


def cell(values: Values, *, scale: float = 100.0, digits: int = 1) -> str:
    """Mean ± standard deviation, the 95 % confidence interval of the mean, and who fell: `57.3 ± 0.8 [55.3, 59.3], 1 of 4 fell`."""
    found = [scale * value for value in values if value is not None]
    text = f"{fmean(found):.{digits}f}" if found else ""
    if len(found) > 1:
        mean, doubt = fmean(found), half_width(found)
        text += f" ± {stdev(found):.{digits}f} [{mean - doubt:.{digits}f}, {mean + doubt:.{digits}f}]"
    fallen = f"{len(values) - len(found)} of {len(values)} fell" if len(found) < len(values) else ""
    return ", ".join(filter(None, (text, fallen)))


def compare(name: str, left: Values, right: Values, *, claim: int = 0, scale: float = 100.0, digits: int = 1, unit: str = "points") -> str:
    """A sentence on left - right, paired by seed: the difference, its 95 % interval, and what becomes of the claim.

    Args:
        claim: the sign that the paper gives the difference; 0: none.
    """
    differences = [scale * (a - b) for a, b in _pairs(left, right)]
    return _judged(name, differences, len(left), claim, lambda x: f"{x:+.{digits}f}", f" {unit}")


def compare_ratio(name: str, left: Values, right: Values, *, claim: int = 0) -> str:
    """As `compare`, on left / right: the geometric mean over seeds; the claim is that it lies above (1) or below (-1) one."""
    logs = [math.log(a / b) for a, b in _pairs(left, right)]
    return _judged(name, logs, len(left), claim, lambda x: f"{math.exp(x):.2f}", " times")


def _pairs(left: Values, right: Values) -> list[tuple[float, float]]:
    return [(a, b) for a, b in zip(left, right, strict=True) if a is not None and b is not None]


def _judged(name: str, values: list[float], seeds: int, claim: int, shown: Callable[[float], str], unit: str) -> str:
    if not values:
        return f"{name}: no pair of runs to compare"
    mean, doubt = fmean(values), half_width(values)
    if len(values) == 1:
        return f"{name}: {shown(mean)}{unit} (one pair of runs, no telling)"
    if abs(mean) <= doubt:
        verdict = "does not appear at this scale" if claim else "not clear"
    else:
        verdict = {0: "clear", 1: "appears"}.get(claim * (1 if mean > 0 else -1), "the opposite, clearly")
    some = f" ({len(values)} of {seeds} seeds)" if len(values) < seeds else ""
    return f"{name}: {shown(mean)}{unit} [{shown(mean - doubt)}, {shown(mean + doubt)}]{some}: {verdict}"


# -- what is left on disk -------------------------------------------------------------------------------------------------


class Section(NamedTuple):
    """One table of a study."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


def conclude(
    terms: Terms, title: str, *, sections: list[Section], findings: list[str], paper: str, method: str, values: Any, picture: Figure
) -> dict[str, Any]:
    """Write `table.md`, `table.json` and `picture.png`, say the findings, and return what `table.json` holds."""
    lines = [f"# {title}", "", *(f"- {finding}" for finding in findings), ""]
    for section in sections:
        lines += [f"## {section.title}", "", _row(section.header), _row(["---"] * len(section.header)), *map(_row, section.rows), ""]
    lines += [
        "![picture](picture.png)",
        "",
        "## The paper",
        "",
        paper,
        "",
        "## How",
        "",
        method,
        "",
        *(f"- {line}" for line in provenance(terms)),
    ]
    result = {
        "title": title,
        "findings": findings,
        "values": values,
        "tables": [section._asdict() for section in sections],
        "method": method,
        "provenance": provenance(terms),
    }
    write(terms.out / "table.md", "\n".join(lines) + "\n")
    write_json(terms.out / "table.json", result)
    write(terms.out / "picture.png", lambda path: picture.savefig(path, dpi=110))
    for section in sections:
        widths = [max(len(row[i]) for row in (section.header, *section.rows)) for i in range(len(section.header))]
        terms.console.print(f"\n[bold]{section.title}[/bold]")
        for row in (section.header, *section.rows):
            terms.console.print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip(), markup=False)
    terms.console.print()
    for finding in findings:
        terms.console.print(f"- {finding}", markup=False)
    terms.console.print(f"\nwrote {terms.out}/table.md, table.json and picture.png")
    return result


def begin(terms: Terms) -> None:
    """Note who computes, in `sittings.json`: a study that goes on may do so on another day, machine or commit."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cores} CPU cores ({platform.machine()})"
    sitting = {**origin(terms.command), "torch": torch.__version__, "device": device}
    file = terms.out / "sittings.json"
    before = read_json(file)["sittings"] if file.exists() else []
    if sitting not in before:
        write_json(file, {"sittings": [*before, sitting]})


def provenance(terms: Terms) -> list[str]:
    """Where the numbers come from: a line for every sitting."""
    return [
        f"`{one['command']}`: manyscale {one['manyscale']}, torch {one['torch']}, Python {one['python']}, {one['device']}, {one['date']}"
        for one in read_json(terms.out / "sittings.json")["sittings"]
    ]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def plain(axes: Any, **settings: Any) -> Any:
    """Axes without ornament."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=GRID)
    axes.set(**settings)
    return axes


def band(axes: Any, x: Sequence[Any], values: Sequence[Values], colour: str, label: str, *, scale: float = 100.0) -> None:
    """A line through the means, and a band of one standard deviation; a gap where every run fell."""
    found = [[scale * value for value in each if value is not None] for each in values]
    means = [fmean(each) if each else math.nan for each in found]
    spread = [stdev(each) if len(each) > 1 else 0.0 for each in found]
    axes.plot(x, means, color=colour, marker="o", ms=4, lw=1.6, label=label)
    axes.fill_between(x, [m - s for m, s in zip(means, spread, strict=True)], [m + s for m, s in zip(means, spread, strict=True)],
                      color=colour, alpha=0.15, lw=0)  # fmt: skip
