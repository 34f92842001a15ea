"""What every study has: its terms, a small net on few pictures, numbers with their doubt, and a table on disk."""

import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from rich.console import Console

import manyscale
from manyscale.config import Augment, Input, Optim, Run, Schedule, SwinConfig
from manyscale.data.sources import DIGITS, open_splits
from manyscale.storage import write, write_json

INK, GRID = "#1f2933", 0.25
COLOURS = ("#2c6e9b", "#c0392b", "#d99a2b", "#4b8b5a", "#7d5ba6", "#6b7680", "#1f2933", "#b56576", "#3aa6a0", "#8c564b")


@dataclass(frozen=True)
class Terms:
    """How a study is asked for."""

    out: Path  # its folder; every run has one below it
    data: str = "cifar10"
    seeds: int = 3
    quick: bool = False  # at most 15 minutes of two cores, for a first look
    console: Console = field(default_factory=lambda: Console(highlight=False, soft_wrap=True))
    command: str = ""  # what to say the study was called with


def small(terms: Terms, *, pictures: int, shown: int, batch: int = 64) -> Run:
    """A net of 0.2 million parameters on at most `pictures` pictures of the set, until it was shown `shown` in all.

    Evaluated once, at the end: no weights are chosen by the held-out pictures.
    """
    data = Input(data=terms.data, statistics="half", crop_ratio=1.0, workers=0, cache=True)
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
        log_every=10,
    )


def describe(run: Run) -> str:
    """The run's net, data and length in a sentence."""
    model, shown = run.model, run.schedule.epochs
    return (
        f"Swin of width {model.width}, depths {', '.join(map(str, model.depths))}, patch {model.patch}, at {model.size[0]} px, window "
        f"{model.window}; {run.input.data} with {run.input.share:.0%} of its training pictures, {shown} epochs, batch {run.batch}, "
        f"{run.precision}."
    )


# -- numbers --------------------------------------------------------------------------------------------------------------


def half_width(values: Sequence[float]) -> float:
    """Half the 95 % confidence interval of the mean, by Student's t; infinite for a single value."""
    from scipy.stats import t as student  # slow to import, and every worker imports this file

    n = len(values)
    return float(student.ppf(0.975, n - 1)) * stdev(values) / n**0.5 if n > 1 else float("inf")


def cell(values: Sequence[float], *, scale: float = 100.0, digits: int = 1) -> str:
    """Mean ± standard deviation, and the 95 % confidence interval of the mean: `57.3 ± 0.8 [55.3, 59.3]`."""
    if not values:
        return ""
    values = [scale * value for value in values]
    mean = fmean(values)
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    doubt = half_width(values)
    return f"{mean:.{digits}f} ± {stdev(values):.{digits}f} [{mean - doubt:.{digits}f}, {mean + doubt:.{digits}f}]"


def compare(
    name: str, left: Sequence[float], right: Sequence[float], *, scale: float = 100.0, digits: int = 1, unit: str = "points"
) -> str:
    """A sentence on left - right, paired by seed: the difference, its interval, and whether that leaves out 0."""
    differences = [scale * (a - b) for a, b in zip(left, right, strict=True)]
    mean, doubt = fmean(differences), half_width(differences)
    if len(differences) < 2:
        return f"{name}: {mean:+.{digits}f} {unit} (one seed, no telling)"
    sure = "clear" if abs(mean) > doubt else "not clear"
    return f"{name}: {mean:+.{digits}f} {unit} [{mean - doubt:+.{digits}f}, {mean + doubt:+.{digits}f}], {sure} at 95 %"


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
        *(f"- {x}" for x in provenance(terms)),
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


def provenance(terms: Terms) -> list[str]:
    """Where the numbers come from."""
    here = Path(__file__).parent
    asked = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=10"], cwd=here, capture_output=True, text=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads, {platform.machine()}"
    return [
        f"command: `{terms.command or ' '.join(sys.argv)}`",
        f"manyscale {manyscale.__version__}{f', commit {asked.stdout.strip()}' if asked.returncode == 0 else ''}",
        f"torch {torch.__version__}, Python {platform.python_version()}, {device}",
        time.strftime("%Y-%m-%d", time.gmtime()),
    ]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def plain(axes: Any, **settings: Any) -> Any:
    """Axes without ornament."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=GRID)
    axes.set(**settings)
    return axes


def band(axes: Any, x: Sequence[Any], values: Sequence[Sequence[float]], colour: str, label: str, *, scale: float = 100.0) -> None:
    """A line through the means, and a band of one standard deviation."""
    means = [scale * fmean(v) for v in values]
    spread = [scale * stdev(v) if len(v) > 1 else 0.0 for v in values]
    axes.plot(x, means, color=colour, marker="o", ms=4, lw=1.6, label=label)
    axes.fill_between(x, [m - s for m, s in zip(means, spread, strict=True)], [m + s for m, s in zip(means, spread, strict=True)],
                      color=colour, alpha=0.15, lw=0)  # fmt: skip
