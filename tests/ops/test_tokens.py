"""Block masks against counting by hand."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyscale.ops.tokens import block_mask


@settings(max_examples=60, deadline=None)
@given(
    blocks=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    unit=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    percent=st.integers(1, 100),
    seed=st.integers(0, 2**32),
)
def test_every_sample_hides_so_many_whole_blocks(blocks, unit, percent, seed):
    grid = tuple(b * u for b, u in zip(blocks, unit, strict=True))
    mask = block_mask(3, grid, unit, percent / 100, generator=torch.Generator().manual_seed(seed))
    assert mask.shape == (3, *grid) and mask.dtype == torch.bool
    cut = mask.reshape(3, blocks[0], unit[0], blocks[1], unit[1]).transpose(2, 3).flatten(3)  # (3, blocks, tokens of one)
    assert (cut.all(-1) | ~cut.any(-1)).all()
    wanted = math.ceil(Fraction(percent, 100) * math.prod(blocks))  # exact: 7 % of 100 is 7, and floats say 7.000000000000001
    assert cut.any(-1).sum((1, 2)).tolist() == [wanted] * 3


def test_the_papers_mask():
    """192 px in blocks of 32: 22 of 36, the ceiling of 21.6; a block is 8 x 8 patches of 4 pixels."""
    mask = block_mask(5, (48, 48), (8, 8), 0.6)
    assert mask.sum((1, 2)).tolist() == [22 * 64] * 5


def test_the_generator_decides():

    def draw(seed):
        return block_mask(8, (6, 6), (1, 1), 0.5, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert len({tuple(mask.flatten().tolist()) for mask in draw(1)}) == 8  # every sample its own
    hidden = block_mask(4000, (3, 3), (1, 1), 1 / 3, generator=torch.Generator().manual_seed(0)).float().mean(0)
    assert (hidden - 1 / 3).abs().max() < 0.04  # five standard deviations of a fair draw


def test_golden_masks():
    """Stored: the hidden blocks of two samples from seed 0. A resumed or repeated run relies on them."""
    mask = block_mask(2, (8, 8), (2, 2), 0.6, generator=torch.Generator().manual_seed(0))
    hidden = [sample.nonzero().flatten().tolist() for sample in mask[:, ::2, ::2].flatten(1)]
    assert hidden == [[2, 3, 4, 6, 8, 10, 11, 12, 13, 14], [2, 3, 4, 6, 8, 9, 11, 12, 13, 14]]


def test_clips_are_masked_with_the_same_code():
    mask = block_mask(2, (4, 6, 6), (2, 3, 3), 0.5)
    assert mask.shape == (2, 4, 6, 6) and mask.sum((1, 2, 3)).tolist() == [4 * 18] * 2


def test_blocks_that_do_not_divide_the_grid():
    with pytest.raises(ValueError, match=r"blocks of \(4, 4\) tokens do not divide the grid of \(6, 8\)"):
        block_mask(1, (6, 8), (4, 4), 0.5)
