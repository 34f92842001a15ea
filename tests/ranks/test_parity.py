"""The same run on 1, 2 and 4 ranks, however the net lies on them."""

from dataclasses import replace

import pytest

from manyscale.config import Run
from tests.conftest import shorter
from tests.ranks.jobs import losses, spread, train_all
from tests.ranks.team import together

pytestmark = pytest.mark.distributed
CLOSE = 2e-6  # relative, of the losses of 20 steps in float32


def twenty_steps(run: Run) -> Run:
    """Of a net with drop path, mixing and a moving average, in 4 parts; an evaluation in the middle and one at the end."""
    run = shorter(run, length="20-steps", warmup="5-steps", evaluate_every="10-steps")
    return replace(run, batch=32, accumulate=4, input=replace(run.input, held_out=50))


def test_all_ways_and_numbers_of_ranks_take_the_same_steps(micro, tmp_path):
    twenty = twenty_steps(micro)
    alone = spread(twenty, "alone")
    together(tmp_path / "1", 1, train_all, [alone])
    two = [spread(twenty, f"two_{shard}", shard=shard) for shard in ("ddp", "zero1", "zero2", "zero3")]
    four = [spread(twenty, "four_ddp"), spread(twenty, "four_hsdp", shard="hsdp", shard_group=2)]
    together(tmp_path / "2", 2, train_all, two)
    together(tmp_path / "4", 4, train_all, four)
    expected = losses(alone.out)
    assert len(expected) == 20 and expected[-1] < expected[0]
    for run in (*two, *four):
        assert losses(run.out) == pytest.approx(expected, rel=CLOSE), run.out
