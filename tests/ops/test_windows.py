"""Cutting grids into windows and back, and who may attend whom, against plain loops over places."""

from itertools import product

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyscale.ops.windows import enter, layout, leave, merge, split

some = settings(max_examples=60, deadline=None)


@st.composite
def grids_and_windows(draw):
    """A grid of two or three axes, and a window that may be smaller, larger or no divisor."""
    axes = draw(st.sampled_from([2, 3]))
    largest = 11 if axes == 2 else 6
    sizes = st.tuples(*[st.integers(1, largest)] * axes)
    windows = st.tuples(*[st.integers(1, largest // 2 + 1)] * axes)
    return draw(sizes), draw(windows)


def numbered(grid):
    """Tokens (1, *grid, 2) that carry their own number, from 1, and its negative."""
    places = torch.arange(1, torch.Size(grid).numel() + 1).reshape(1, *grid, 1)
    return torch.cat([places, -places], dim=-1)


def origins(cut):
    """For every window and token of a layout, its place in the padded and shifted grid, and its place before the shift."""
    counts = [p // w for p, w in zip(cut.padded, cut.window, strict=True)]
    for corner in product(*map(range, counts)):
        now = [tuple(c * w + i for c, w, i in zip(corner, cut.window, inside, strict=True)) for inside in product(*map(range, cut.window))]
        yield now, [tuple((n + s) % p for n, s, p in zip(place, cut.shift, cut.padded, strict=True)) for place in now]


def distance(a, b):
    return tuple(x - y for x, y in zip(a, b, strict=True))


@some
@given(grids_and_windows(), st.booleans(), st.booleans())
def test_layout(case, shifted, mask_padding):
    grid, window = case
    cut = layout(grid, window, shifted=shifted, mask_padding=mask_padding)
    for g, w, own, padded, shift in zip(grid, window, cut.window, cut.padded, cut.shift, strict=True):
        assert own == min(w, g)
        assert padded % own == 0 and 0 <= padded - g < own
        assert shift == (own // 2 if shifted and own < g else 0)  # one window an axis: nothing to shift
    assert cut.grid == grid


@some
@given(grids_and_windows())
def test_split_and_merge_are_inverse(case):
    counts, window = case
    grid = tuple(c * w for c, w in zip(counts, window, strict=True))
    x = numbered(grid)
    windows = split(x, window)
    assert windows.shape == (1, torch.Size(counts).numel(), torch.Size(window).numel(), 2)
    assert torch.equal(merge(windows, window, grid), x)
    back = torch.randn(3, *windows.shape[1:])
    assert torch.equal(split(merge(back, window, grid), window), back)


@some
@given(grids_and_windows(), st.booleans())
def test_enter_puts_every_token_in_its_place(case, shifted):
    """Pad first, shift then: a token sits where plain arithmetic on the padded grid says."""
    grid, window = case
    cut = layout(grid, window, shifted=shifted, mask_padding=True)
    x = numbered(grid)
    expected = [
        [x[(0, *place, 0)].item() if all(p < g for p, g in zip(place, grid, strict=True)) else 0 for place in before]
        for _, before in origins(cut)
    ]
    assert enter(x, cut)[0, :, :, 0].tolist() == expected


@some
@given(grids_and_windows(), st.booleans())
def test_leave_undoes_enter(case, shifted):
    grid, window = case
    cut = layout(grid, window, shifted=shifted, mask_padding=False)
    x = torch.randn(2, *grid, 3)
    assert torch.equal(leave(enter(x, cut), cut), x)
    if cut.padded == grid:
        windows = torch.randn_like(enter(x, cut))
        assert torch.equal(enter(leave(windows, cut), cut), windows)


@some
@given(grids_and_windows(), st.booleans(), st.booleans())
def test_mask(case, shifted, mask_padding):
    """Two tokens of a window attend each other where the shift left them side by side; padding, where it is attended at all."""
    grid, window = case
    cut = layout(grid, window, shifted=shifted, mask_padding=mask_padding)
    for number, (now, before) in enumerate(origins(cut)):
        pads = [any(p >= g for p, g in zip(place, grid, strict=True)) for place in before]
        for i, j in product(range(len(now)), repeat=2):
            expected = distance(now[i], now[j]) == distance(before[i], before[j])
            if mask_padding and pads[i] != pads[j]:
                expected = False
            if mask_padding and pads[i] and pads[j]:
                continue  # what padding does among itself is thrown away
            assert (cut.mask is None or cut.mask[number, i, j].item()) == expected


@some
@given(grids_and_windows(), st.booleans(), st.booleans())
def test_no_row_is_masked_whole(case, shifted, mask_padding):
    mask = layout(*case, shifted=shifted, mask_padding=mask_padding).mask
    assert mask is None or mask.any(dim=-1).all()
    assert mask is None or not mask.all(), "a mask that hides nothing costs memory for nothing"


def test_first_stage_of_the_paper():
    """56 x 56 tokens in windows of 7, shifted by 3: figure 4 of Swin V1 has nine kinds of region."""
    cut = layout((56, 56), (7, 7), shifted=True, mask_padding=True)
    assert (cut.shift, cut.padded, cut.mask.shape) == ((3, 3), (56, 56), (64, 49, 49))
    assert cut.mask[:7].all() and not cut.mask[7].all()
    corner = cut.mask[-1].float()  # its tokens came from four corners of the image: 4x4, 4x3, 3x4 and 3x3
    assert corner.sum() == 16**2 + 12**2 + 12**2 + 9**2
    assert layout((56, 56), (7, 7), shifted=False, mask_padding=True).mask is None


def test_one_axis_shifts_alone():
    cut = layout((4, 8, 3), (4, 4, 4), shifted=True, mask_padding=True)
    assert (cut.window, cut.shift, cut.padded) == ((4, 4, 3), (0, 2, 0), (4, 8, 3))


@some
@given(grids_and_windows(), st.booleans())
def test_moving_by_an_index_is_shift_and_split(case, shifted):
    grid, window = case
    plain, ordered = (layout(grid, window, shifted=shifted, mask_padding=True, ordered=o) for o in (False, True))
    assert (ordered.order is not None) == (any(ordered.shift) and ordered.padded == ordered.grid)
    x = torch.cat([numbered(grid), -7 * numbered(grid)])  # (2, *grid, 2)
    windows = enter(x, ordered)
    assert torch.equal(windows, enter(x, plain)) and torch.equal(leave(windows, ordered), x)
