"""The same run on 1, 2 and 4 ranks, however the net lies on them."""

from dataclasses import replace
from pathlib import Path

import pytest

from manyscale.config import Run
from tests.conftest import shorter
from tests.ranks.jobs import losses, spread, train_all, twenty_steps
from tests.ranks.team import together

pytestmark = pytest.mark.distributed
CLOSE = 2e-6  # relative, of the losses of 20 steps in float32


def same_steps(alone: Run, folder: Path, plan: dict[int, tuple[dict, ...]]) -> None:
    """See that the process that trained alone and all ranks of the plan, {number of ranks: how their nets lie}, lose alike."""
    expected = losses(alone.out)
    assert len(expected) == 20
    for count, ways in plan.items():
        runs = [spread(replace(alone, out=str(folder / "run")), f"{count}_{how['shard']}", **how) for how in ways]
        together(folder / str(count), count, train_all, runs)
        for one in runs:
            assert losses(one.out) == pytest.approx(expected, rel=CLOSE), one.out


def test_two_ranks_take_the_steps_of_one(alone, tmp_path):
    same_steps(alone, tmp_path, {2: ({"shard": "ddp"}, {"shard": "zero3"})})


@pytest.mark.slow
def test_all_ways_and_numbers_of_ranks_take_the_same_steps(alone, tmp_path):
    two = ({"shard": "zero1"}, {"shard": "zero2"}, {"shard": "zero3", "offload": True})
    four = ({"shard": "ddp"}, {"shard": "hsdp", "shard_group": 2})
    same_steps(alone, tmp_path, {2: two, 4: four})


@pytest.mark.slow
def test_bfloat16_is_close_on_ranks_too(micro, tmp_path):
    """Weights are gathered in bfloat16, which autocast rounds them to anyway; sums of gradients are rounded in another order."""
    run = replace(shorter(twenty_steps(micro), length="6-steps", warmup="1-steps", evaluate_every="6-steps"), precision="bfloat16")
    run = replace(run, model=replace(run.model, depths=(1, 1), heads=(2, 4)))  # two stages, as no other run of these has
    runs = [spread(run, "two_ddp"), spread(run, "two_zero3", shard="zero3")]
    together(tmp_path / "1", 1, train_all, [spread(run, "alone")])
    together(tmp_path / "2", 2, train_all, runs)
    for one in runs:
        assert losses(one.out) == pytest.approx(losses(f"{tmp_path}/alone"), rel=2e-3), one.out
