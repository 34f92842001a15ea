"""What a run says: a live line, `metrics.jsonl`, `bad_files.jsonl`, `curves.png`, and TensorBoard on request."""

import json
import resource
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from manyscale.storage import write

COLOURS = ("#4a8c5c", "#c0392b", "#e5a04b")  # of the accuracies in a picture
PLAIN_SECONDS = 10.0  # between progress lines where the output is not a terminal


class Log:
    """The voice of one run. Use as a context manager: the live line is cleared however the run ends."""

    def __init__(self, folder: Path, name: str, *, step: int, tensorboard: bool = False) -> None:
        self.folder, self.name = folder, name
        self.metrics, listed = folder / "metrics.jsonl", folder / "bad_files.jsonl"
        self.bad_files = {json.loads(line)["path"] for line in listed.read_text().splitlines()} if listed.exists() else set()
        self._rewind(step)
        self.console = Console(highlight=False, soft_wrap=True)
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("{task.fields[line]}"))
        self.progress = Progress(*columns, console=self.console, transient=True) if self.console.is_terminal else None
        self.spoke = time.monotonic()
        self.writer = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ValueError("field `tensorboard`: the package is not installed; pip install 'manyscale[log]'") from None
            self.writer = SummaryWriter(folder / "tensorboard", purge_step=step)

    def __enter__(self) -> "Log":
        if self.progress:
            self.progress.start()
            self.progress.add_task(self.name, total=None, line="")
        return self

    def __exit__(self, *error: object) -> None:
        if self.progress:
            self.progress.stop()
        if self.writer:
            self.writer.close()

    def _rewind(self, step: int) -> None:
        """Drop what a killed run wrote beyond its last checkpoint: those steps will be run, and written, again."""
        if not self.metrics.exists():
            return
        lines = self.metrics.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        if kept != lines:
            write(self.metrics, "".join(kept))

    def note(self, text: str) -> None:
        """A sentence for the person watching."""
        self.console.print(text, markup=False)

    def step(self, step: int, steps: int, *, loss: float, lr: float, speed: float, left: float) -> None:
        """One optimiser step. `speed` is in images/s, `left` in seconds."""
        line = f"step {step}/{steps} {step / steps:4.0%}  loss {loss:.4f}  lr {lr:.2e}  {speed:,.0f} images/s"
        line += f"  {memory_gib():.1f} GiB  {_clock(left)} left"
        if self.progress:
            self.progress.update(self.progress.task_ids[0], total=steps, completed=step, line=line)
        elif time.monotonic() - self.spoke >= PLAIN_SECONDS or step == steps:
            self.spoke = time.monotonic()
            self.note(f"{self.name}  {line}")

    def record(self, values: dict[str, Any]) -> None:
        """One line of `metrics.jsonl`; it must have a `step`."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(values) + "\n")
        if self.writer:
            for name, value in values.items():
                if isinstance(value, (int, float)) and name != "step":
                    self.writer.add_scalar(name, value, values["step"])

    def bad_file(self, path: str, reason: str) -> None:
        """Say that a file was left out, and write it to `bad_files.jsonl`: once, however often it is met."""
        if path not in self.bad_files:
            self.bad_files.add(path)
            with (self.folder / "bad_files.jsonl").open("a") as file:
                file.write(json.dumps({"path": path, "reason": reason}) + "\n")
            self.note(f"left out {path}: {reason}")

    def curves(self) -> None:
        """`curves.png` from `metrics.jsonl`."""
        records = [json.loads(line) for line in self.metrics.read_text().splitlines()] if self.metrics.exists() else []
        write(self.folder / "curves.png", lambda path: draw_curves(records, path))


class Silence(Log):
    """The voice of a rank that does not lead: none."""

    def __init__(self, folder: Path, name: str, *, step: int, tensorboard: bool = False) -> None:
        self.folder, self.name, self.bad_files = folder, name, set()

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def step(self, step: int, steps: int, **numbers: float) -> None:
        pass

    def record(self, values: dict[str, Any]) -> None:
        pass

    def bad_file(self, path: str, reason: str) -> None:
        self.bad_files.add(path)

    def curves(self) -> None:
        pass


def memory_gib() -> float:
    """Peak memory so far: of the accelerator where there is one, else of this process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def draw_curves(records: list[dict[str, Any]], path: Path | str) -> None:
    """Loss, learning rate and the evaluations' metrics against the step, as a picture."""
    from matplotlib.figure import Figure

    steps = [r for r in records if "loss" in r]
    evaluations = [r for r in records if "epoch" in r and "lr" not in r]
    held_out = "l1" if evaluations and "l1" in evaluations[-1] else "val_loss"
    shown = [name for name in ("mean_accuracy", "accuracy", "top5") if evaluations and name in evaluations[-1]]
    figure = Figure(figsize=(11, 3.2) if shown else (7.4, 3.2), layout="constrained")
    loss, *metrics, rate = figure.subplots(1, 3 if shown else 2)
    loss.plot([r["step"] for r in steps], [r["loss"] for r in steps], color="#7aa6c2", lw=1, label="training")
    loss.plot([r["step"] for r in evaluations], [r[held_out] for r in evaluations], color="#c0392b", marker=".", label="held out")
    loss.set_title("loss")
    if steps or evaluations:
        loss.legend(frameon=False)
    for metric in metrics:
        for name, colour in zip(shown, COLOURS[-len(shown) :], strict=True):
            values = [r[name] for r in evaluations]
            metric.plot([r["step"] for r in evaluations], values, marker=".", color=colour, label=name)
            metric.annotate(f"{values[-1]:.1%}", (evaluations[-1]["step"], values[-1]), ha="right", va="top", fontsize=9)
        metric.set_title("held-out accuracy")
        metric.legend(frameon=False, loc="lower right")
    rate.plot([r["step"] for r in steps], [r["lr"] for r in steps], color="#555555", lw=1)
    rate.set_title("learning rate")
    for axes in (loss, *metrics, rate):
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=110)
