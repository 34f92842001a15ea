"""A grid of ordinary runs, several at a time: what every study is made of.

Each run has a process and a folder of its own. The same grid again goes on where it stopped: finished runs are read, the
others resume from their checkpoints.
"""

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from manyscale.config import Run, to_dict
from manyscale.storage import read_json, write_json
from manyscale.train.branches import train
from manyscale.train.folder import check_same
from manyscale.train.loop import Stopped

PLAIN_SECONDS = 20.0  # between progress lines where the output is not a terminal


class Outcome(NamedTuple):
    """What became of a run."""

    run: Run
    summary: dict[str, Any] | None  # as `train` returns it; None where the run diverged
    diverged: str = ""  # where the loss or a gradient stopped being finite


def run_grid(runs: Sequence[Run], console: Console, *, jobs: int = 0) -> list[Outcome]:
    """Train every run, in the order given, and say what became of each, in the same order.

    Args:
        jobs: runs at a time; 0: one per core, at most 8, or on an accelerator one per two cores, at most 4, since nets this
            small keep the host busier than the device. They share the cores evenly.

    Raises:
        ValueError: a run that cannot be started, by its folder and reason; a folder that holds another run, before any starts.
        Stopped: a run was stopped by a signal; it was saved, and so were the others.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = jobs or (min(max(cores // 2, 1), 4) if torch.accelerator.is_available() else min(cores, 8))
    ended = {run.folder: outcome for run in runs if (outcome := _outcome(run))}
    waiting = [run for run in runs if run.folder not in ended]
    if len(waiting) < len(runs):
        console.print(f"  {len(runs) - len(waiting)} of {len(runs)} runs were finished before")
    jobs = max(1, min(jobs, len(waiting)))
    with _Board(console) as board, _workers() as active:
        while waiting or active:
            while waiting and len(active) < jobs:
                run = waiting.pop(0)
                active.append(_Worker(run, max(1, cores // jobs)))
                board.begin(run)
            wait([worker.process.sentinel for worker in active], timeout=0.5)
            for worker in list(active):
                board.show(worker.run)
                if not worker.process.is_alive():
                    active.remove(worker)
                    ended[worker.run.folder] = worker.finish()
                    board.end(ended[worker.run.folder])
    return [ended[run.folder] for run in runs]


def _outcome(run: Run) -> Outcome | None:
    """What became of a run in an earlier sitting, if it ended.

    Raises:
        ValueError: the folder holds another run, or one that no grid asked for.
    """
    folder = Path(run.folder)
    asked = folder / "asked.json"
    if not asked.exists():
        if (folder / "recipe.json").exists():
            raise ValueError(f"{folder} holds another run, not of a study; give --out another folder")
        return None
    check_same(asked, run)
    if (folder / "diverged.json").exists():
        return Outcome(run, None, read_json(folder / "diverged.json")["reason"])
    if (folder / "summary.json").exists():
        return Outcome(run, read_json(folder / "summary.json"))
    return None


class _Worker:
    """A process that trains one run."""

    def __init__(self, run: Run, threads: int) -> None:
        self.run = run
        context = multiprocessing.get_context("spawn")  # a forked child could not use an accelerator, nor torch's threads
        self.process = context.Process(target=_work, args=(run, threads))
        self.process.start()

    def finish(self) -> Outcome:
        """What became of the run; the process has ended.

        Raises:
            ValueError, Stopped: as `run_grid`.
        """
        self.process.join()
        folder, code = Path(self.run.folder), self.process.exitcode
        if code == 0 and (outcome := _outcome(self.run)):
            return outcome
        log = folder / "log.txt"
        last = log.read_text().splitlines()[-1:] if log.exists() else []
        reason = f"{folder}: {''.join(last)} (exit code {code}; {log} has it all)"
        if code in (130, 143):
            raise Stopped(reason, code)
        raise ValueError(reason)


def _work(run: Run, threads: int) -> None:
    """The life of a worker: `train`, with its words in log.txt; the last line says why it failed, if it did."""
    folder = Path(run.folder)
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout = sys.stderr = (folder / "log.txt").open("a", buffering=1)
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        if not (folder / "asked.json").exists():
            write_json(folder / "asked.json", to_dict(run))
        train(run)
    except Stopped as stopped:
        print(stopped)
        if not stopped.diverged:
            raise SystemExit(stopped.exit_code) from None
        write_json(folder / "diverged.json", {"reason": str(stopped)})
    except (ValueError, OSError) as error:
        print(" ".join(str(error).splitlines()))
        raise SystemExit(2) from None


def _end_with_parent() -> None:
    """Save and leave when the grid's process is gone, however it went: its next call wants the folder."""
    wait([multiprocessing.parent_process().sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def _workers() -> Iterator[list[_Worker]]:
    """The list of workers at work. However the block ends, they are told to save and leave, and waited for."""
    active: list[_Worker] = []
    here = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number)) if here else None
    try:
        yield active
    finally:
        for worker in active:
            worker.process.terminate()
        for worker in active:
            worker.process.join()
        if here:
            signal.signal(signal.SIGTERM, before)


class _Board:
    """The state of the runs at work: a bar each on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console, self.spoke = console, time.monotonic()
        columns = (TextColumn("  {task.description}"), BarColumn(bar_width=20), TextColumn("{task.fields[line]}"))
        self.progress = Progress(*columns, console=console, transient=True) if console.is_terminal else None
        self.bars: dict[str, Any] = {}  # by the run's folder
        self.lines: dict[str, str] = {}

    def __enter__(self) -> "_Board":
        if self.progress:
            self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.progress:
            self.progress.stop()

    def begin(self, run: Run) -> None:
        if self.progress:
            self.bars[run.folder] = self.progress.add_task(run.recipe, total=_epochs(run), line="starting")

    def show(self, run: Run) -> None:
        """What the run's metrics say it is doing; of branches those of the one at work."""
        folder, epochs = Path(run.folder), _epochs(run)
        files = sorted(folder.glob("*/metrics.jsonl" if run.schedule.branches else "metrics.jsonl"), key=lambda file: file.stat().st_mtime)
        lines = files[-1].read_text().splitlines() if files else []
        records = [json.loads(line) for line in lines if line.endswith("}")]
        steps, evaluations = [r for r in records if "lr" in r], [r for r in records if "epoch" in r and "lr" not in r]
        if not steps:
            return
        line = f"{files[-1].parent.name}  " if run.schedule.branches else ""
        line += f"epoch {steps[-1]['epoch']:.1f}{f' of {epochs}' if epochs else ''}  loss {steps[-1]['loss']:.3f}"
        line += f"  {_first_metric(evaluations[-1])}" if evaluations else ""
        self.lines[run.folder] = f"{run.recipe}  {line}"
        if self.progress:
            self.progress.update(self.bars[run.folder], completed=steps[-1]["epoch"], line=line)
        elif time.monotonic() - self.spoke >= PLAIN_SECONDS:
            self.spoke = time.monotonic()
            for said in self.lines.values():
                self.console.print(f"  {said}", markup=False)

    def end(self, outcome: Outcome) -> None:
        run, summary = outcome.run, outcome.summary
        self.lines.pop(run.folder, None)
        if self.progress:
            self.progress.remove_task(self.bars.pop(run.folder))
        said = f"{_first_metric(summary['best'])}  {summary['seconds']:.0f} s" if summary else f"diverged: {outcome.diverged}"
        self.console.print(f"  {run.recipe}  {said}", markup=False)


def _epochs(run: Run) -> float | None:
    """The run's length where it is counted in epochs."""
    return None if run.schedule.length or run.schedule.branches else run.schedule.epochs


def _first_metric(evaluation: dict[str, Any]) -> str:
    """The metric that decides, which an evaluation's record names first."""
    name = next(name for name in evaluation if name not in ("step", "epoch"))
    return f"{name} {evaluation[name]:.4f}"
