"""What ranks do in tests."""

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from manyscale.config import Parallel, Run, from_dict
from manyscale.ranks import joined
from manyscale.storage import read_json
from manyscale.tasks.classify import Classify
from manyscale.tasks.pictures import Pictures
from manyscale.train import loop
from manyscale.train.branches import train
from manyscale.train.log import Log
from manyscale.train.step import Step


def losses(folder: str) -> list[float]:
    """Of every step that a run wrote down, in order."""
    lines = (json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def train_all(runs: list[Run], draw: bool = False) -> list[dict[str, Any]]:
    """The summaries of several runs, one after the other; without pictures, which take longer than the runs."""
    if not draw:
        Log.curves = Pictures.draw = Classify.draw = lambda *arguments: None
    with joined("cpu", runs[0].parallel.timeout):
        return [train(run) for run in runs]


def twenty_steps(run: Run) -> Run:
    """Of a net of two blocks with drop path, mixing and a moving average, in 4 parts; an evaluation in the middle and one at the end."""
    schedule = replace(run.schedule, length="20-steps", warmup="5-steps", evaluate_every="10-steps")
    whole = replace(run, schedule=schedule, batch=32, accumulate=4)
    return replace(whole, input=replace(run.input, held_out=50), model=replace(run.model, depths=(2,), heads=(2,)))


def spread(run: Run, name: str, **how: Any) -> Run:
    return replace(run, out=f"{Path(run.out).parent}/{name}", parallel=Parallel(**({"timeout": 60.0} | how)))


def train_some(run: Run, until: int) -> dict[str, Any]:
    """One sitting, which ends after a step."""
    Log.curves = Pictures.draw = Classify.draw = lambda *arguments: None
    return loop.train(run, until=until)


def fall_asleep(step: int) -> None:
    if step == 3 and os.environ["RANK"] == "1":
        time.sleep(1000)


def train_with_one_asleep(run: Run) -> dict[str, Any]:
    """Rank 1 does not come to its fourth step."""
    real = Step.take
    Step.take = lambda self, batch, lr, step, parts: (fall_asleep(step), real(self, batch, lr, step, parts))[1]
    return train(run)


def train_with_other_data(run: Run) -> dict[str, Any]:
    """Rank 1 finds a file of another name."""
    Pictures.fingerprint = lambda self: os.environ["RANK"]
    return train(run)


if __name__ == "__main__":  # under torchrun
    whole = from_dict(Run, read_json(sys.argv[1]))
    Path(whole.out).mkdir(exist_ok=True)
    (Path(whole.out) / f"pid_{os.environ['RANK']}").write_text(str(os.getpid()))
    torch.set_num_threads(1)
    try:
        train_all([whole])
    except loop.Stopped as stopped:
        print(stopped, file=sys.stderr)
        raise SystemExit(stopped.exit_code) from None
