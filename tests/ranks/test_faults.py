"""Ranks that are told to stop, die, or hang."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from manyscale.config import to_dict
from manyscale.storage import write_json
from manyscale.train.checkpoint import checkpoints, load_checkpoint, read_values
from tests.conftest import shorter
from tests.ranks.jobs import spread, train_all, train_with_one_asleep, twenty_steps
from tests.ranks.team import Team, free_port
from tests.ranks.test_resume import digest

pytestmark = pytest.mark.distributed


@pytest.fixture
def team(tmp_path):
    """Makes a team of two, and kills what is left of it in the end: pytest would wait for one that hangs."""
    with ExitStack() as teams:
        yield lambda job, *arguments: teams.enter_context(Team(tmp_path / "ranks", 2, job, *arguments))


def steps(folder: str) -> int:
    file = Path(folder) / "metrics.jsonl"
    return sum('"loss"' in line for line in file.read_text().splitlines()) if file.exists() else 0


def until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def endless(micro, name: str, **how):
    return spread(shorter(twenty_steps(micro), length="100k-steps", save_steps=5), name, **how)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_sigterm_on_one_rank_ends_all_at_the_same_step(rank, micro, team):
    run = endless(micro, "run", shard="zero3")
    ranks = team(train_all, [run])
    until(lambda: steps(run.out) >= 3)
    os.kill(ranks.members[rank].pid, signal.SIGTERM)
    began = time.monotonic()
    assert ranks.wait() == [143, 143], ranks.said()
    assert time.monotonic() - began < 20
    texts = {said["error"] for said in ranks.said()}
    assert len(texts) == 1 and "SIGTERM: saved step" in texts.pop()
    newest = checkpoints(Path(run.out))[-1]
    assert read_values(newest)["step"] == steps(run.out) == int(newest.name.removeprefix("step_"))


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_who_is_killed_is_named_by_the_other(rank, micro, team):
    run = endless(micro, "run")
    ranks = team(train_all, [run])
    until(lambda: steps(run.out) >= 6 and checkpoints(Path(run.out)))  # it is written beside the training
    os.kill(ranks.members[rank].pid, signal.SIGKILL)
    began = time.monotonic()
    codes = ranks.wait()
    assert codes[rank] == -9 and codes[1 - rank] == 1 and time.monotonic() - began < 10
    error = ranks.said()[1 - rank]["error"]
    named = "the launcher, or rank 0, does not answer" if rank == 0 else "rank 1 gives no sign of life; it was last at step"
    assert f"rank {1 - rank}, step" in error and named in error, error
    assert load_checkpoint(Path(run.out), print)[1]["step"] >= 5


@pytest.mark.slow
def test_who_hangs_is_named_after_the_time_limit_and_stacks_are_written(micro, team):
    run = endless(micro, "run", timeout=4.0)
    ranks = team(train_all, [run])
    until(lambda: steps(run.out) >= 3)
    os.kill(ranks.members[1].pid, signal.SIGSTOP)
    began = time.monotonic()
    ranks.members[0].join(30)
    assert ranks.members[0].exitcode == 1 and 4 <= time.monotonic() - began < 4 + 10
    error = ranks.said()[0]["error"]
    assert "rank 1 gives no sign of life; it was last at step" in error and "Timed out" in error, error
    assert "train/loop.py" in (Path(run.out) / "stacks" / "rank_0.txt").read_text()


@pytest.mark.slow
def test_who_waits_elsewhere_writes_down_where(micro, team):
    run = endless(micro, "run", timeout=4.0)
    ranks = team(train_with_one_asleep, run)
    ranks.members[0].join(60)
    assert "all ranks live, and are at step 4" in ranks.said()[0]["error"]
    assert "in fall_asleep" in (Path(run.out) / "stacks" / "rank_1.txt").read_text()


@pytest.mark.slow
def test_torchrun_starts_again_and_the_run_goes_on(micro, team, tmp_path):
    """A rank is killed; the end is, bit by bit, that of a run that was left alone."""
    for number in range(60):  # not of the digits: every process would wait for scikit-learn
        picture = Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8), dtype=np.uint8))
        file = tmp_path / "pictures" / str(number % 3) / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture.save(file)
    run = spread(shorter(twenty_steps(micro), length="20-steps", save_steps=5), "left_alone")
    run = replace(run, input=replace(run.input, data=str(tmp_path / "pictures")))
    assert team(train_all, [run]).wait() == [0, 0]
    killed = spread(run, "killed")
    write_json(tmp_path / "run.json", to_dict(killed))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "3", "--monitor-interval", "0.2",
                "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]  # fmt: skip
    process = subprocess.Popen(
        [*torchrun, "-m", "tests.ranks.jobs", str(tmp_path / "run.json")], cwd=Path(__file__).parents[2], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    until(lambda: steps(killed.out) >= 12 or process.poll() is not None, 90)  # a checkpoint is whole when the next is begun
    os.kill(int((Path(killed.out) / "pid_1").read_text()), signal.SIGKILL)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert said.count("going on from step") == 1
    assert digest(killed.out) == digest(run.out)
    assert json.loads((Path(killed.out) / "summary.json").read_text())["steps"] == 20
