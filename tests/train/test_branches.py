"""Trunk and cooldowns: each branch is the run of its length."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import manyscale as ms
from manyscale.train import branches as module
from manyscale.train import loop
from manyscale.train.branches import train
from manyscale.train.loop import Stopped
from tests.conftest import shorter
from tests.train.test_loop import fingerprint, interrupt

SCHEDULE = {"curve": "rsqrt", "warmup": "1-step", "cooldown": "40%", "evaluate_every": "3-steps", "timescale": "2 steps"}


def family(run, tmp_path, **fields):
    return shorter(replace(run, out=str(tmp_path / "family")), **{**SCHEDULE, "branches": ("10 steps", "15-steps", 4), **fields})


def pieces(run, monkeypatch, at):
    for sittings in range(1, 100):
        with monkeypatch.context() as patch:
            interrupt(patch, at)
            try:
                return train(run), sittings
            except Stopped as stopped:
                assert stopped.exit_code == 143
    raise AssertionError("it never ended")


@pytest.mark.slow
def test_a_branch_is_the_run_of_its_length_also_in_pieces(micro, tmp_path, monkeypatch):
    run = family(micro, tmp_path)
    epoch = 5  # steps of the micro run
    summary, sittings = pieces(run, monkeypatch, 4)
    assert sittings >= 5 and list(summary["branches"]) == ["10-steps", "15-steps", "4-epochs"]
    assert summary["steps"] == 12 + (4 + 6 + 8) and summary["steps_alone"] == 10 + 15 + 4 * epoch
    for name in summary["branches"]:
        alone = shorter(replace(micro, out=str(tmp_path / f"alone-{name}")), **SCHEDULE, length=name)
        last = loop.train(alone)["last"]
        assert fingerprint(alone.out)["state"] == fingerprint(f"{run.out}/{name}")["state"], name
        assert summary["branches"][name]["last"] == last
        lines = [json.loads(line) for line in (Path(run.out) / name / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "loss" in line] == list(range(1, last["step"] + 1))
    before = {name: (Path(run.out) / name / "summary.json").stat().st_mtime_ns for name in summary["branches"]}
    monkeypatch.setattr(loop._Training, "_step", None)  # all is there: nothing is computed again
    assert train(run) == summary
    assert before == {name: (Path(run.out) / name / "summary.json").stat().st_mtime_ns for name in summary["branches"]}


def test_a_seeding_that_was_killed_is_done_again(micro, tmp_path, monkeypatch):
    run = family(micro, tmp_path, branches=("10-steps",))
    with monkeypatch.context() as patch:
        patch.setattr(module, "copy_checkpoint", lambda *arguments: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            train(run)
    assert train(run)["branches"]["10-steps"]["steps"] == 10
    with pytest.raises(ValueError, match=r"family: no config.json here or in best/; .* it holds .*family/10-steps.*: give one of these"):
        ms.load(run.folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"branches": ("10-steps", "2-epochs")}, "field `branches`: .* one length of 10 steps twice"),
        ({"branches": ("10-steps",), "cooldown": "10-steps"}, "10 are cooldown: that leaves no trunk"),
        ({"branches": ("10-steps",), "cooldown": "30-steps"}, "field `cooldown`: '30-steps' are 30 steps, longer than the run of 10"),
        ({"warmup": "2-steps"}, "field `warmup`: .* more than a fifth of the 6 steps"),
    ],
)
def test_branches_that_leave_no_trunk(micro, tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        train(family(micro, tmp_path, **fields))


def test_a_folder_of_another_family(micro, tmp_path):
    run = family(micro, tmp_path, branches=("6-steps",), warmup=0)
    train(run)
    with pytest.raises(ValueError, match=r"holds another run(.|\n)*branches"):
        train(family(micro, tmp_path, branches=("8-steps",), warmup=0))


def test_a_cooldown_longer_than_the_run(micro):
    with pytest.raises(ValueError, match=r"field `cooldown`: '3-epochs' are 15 steps, longer than the run of 10; shorten it"):
        loop.train(shorter(micro, curve="rsqrt", cooldown="3-epochs"))
