"""Runs side by side: what each reached, and their learning curves in one picture."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from manyscale.config import Run, from_dict
from manyscale.storage import read_json, write

COLOURS = ("#2c6e9b", "#c0392b", "#d99a2b", "#4b8b5a", "#7d5ba6", "#6b7680", "#3aa6a0", "#8c564b")


class Learnt(NamedTuple):
    """What is known of one run."""

    folder: str
    recipe: Run
    steps: list[dict[str, Any]]  # the training records, each with epoch, loss and lr
    evaluations: list[dict[str, Any]]

    @property
    def metric(self) -> str:
        """The metric that decides: what an evaluation's record names first."""
        return next(name for name in self.evaluations[0] if name not in ("step", "epoch"))

    @property
    def best(self) -> dict[str, Any]:
        """The best evaluation."""
        return (min if self.metric == "l1" else max)(self.evaluations, key=lambda record: record[self.metric])


def read_run(folder: str) -> Learnt:
    """The curves of a run, finished or not.

    Raises:
        ValueError: no run's folder, or one without an evaluation yet.
    """
    recipe, metrics = Path(folder) / "recipe.json", Path(folder) / "metrics.jsonl"
    if not recipe.exists() or not metrics.exists():
        raise ValueError(f"{folder}: no recipe.json and metrics.jsonl here; give the folder of a run")
    records = [json.loads(line) for line in metrics.read_text().splitlines() if line.endswith("}")]
    steps = [record for record in records if "lr" in record]
    evaluations = [record for record in records if "epoch" in record and "lr" not in record]
    if not evaluations:
        raise ValueError(f"{folder}: not evaluated yet; wait for its first evaluation")
    return Learnt(folder, from_dict(Run, read_json(recipe), str(recipe)), steps, evaluations)


def draw(runs: Sequence[Learnt], path: Path) -> None:
    """Training loss and every deciding metric against epochs, a line for each run."""
    from matplotlib.figure import Figure

    panels = [("loss", task) for task in dict.fromkeys(run.recipe.task for run in runs)]
    panels += [(metric, "") for metric in dict.fromkeys(run.metric for run in runs)]
    figure = Figure(figsize=(4.2 * len(panels), 3.6 + 0.18 * len(runs)), layout="constrained")
    names = {"accuracy": "held-out accuracy, %", "mean_accuracy": "held-out accuracy, mean of settings, %", "l1": "held-out masked L1"}
    for axes, (what, task) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.set(xlabel="epoch", title=names.get(what, f"training loss, {task}"))
        for number, run in enumerate(runs):
            records = run.steps if what == "loss" else run.evaluations
            if (what == "loss" and run.recipe.task != task) or (what != "loss" and run.metric != what):
                continue
            scale = 100 if what.endswith("accuracy") else 1
            style = {"color": COLOURS[number % len(COLOURS)], "marker": "" if what == "loss" else ".", "lw": 1.3}
            axes.plot([r["epoch"] for r in records], [scale * r[what] for r in records], **style)
    handles = [figure.axes[0].plot([], [], color=COLOURS[i % len(COLOURS)], lw=1.6)[0] for i in range(len(runs))]
    figure.legend(handles, [_name(run) for run in runs], loc="outside lower center", frameon=False, fontsize=8)
    write(path, lambda file: figure.savefig(file, dpi=110))


def _name(run: Learnt) -> str:
    return run.folder + (f", from {run.recipe.init}" if run.recipe.init else "")
