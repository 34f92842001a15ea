"""Offsets inside a window, their coordinates, and tables that change size, against plain loops and other implementations."""

from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import log, mp, mpf
from scipy.interpolate import RectBivariateSpline

from manyscale.ops.positions import relative_coordinates, relative_index, resize_table

some = settings(max_examples=40, deadline=None)
windows = st.one_of(st.tuples(st.integers(1, 6), st.integers(1, 6)), st.tuples(*[st.integers(1, 3)] * 3))
METHODS = ["bicubic", "geometric"]


def offsets(window):
    """Every offset inside a window, in the order of the table."""
    return list(product(*(range(1 - w, w) for w in window)))


@some
@given(windows, st.data())
def test_index(table, data):
    """The index of a pair names the pair's own offset, in a window of the table's size or smaller."""
    window = tuple(data.draw(st.integers(1, w)) for w in table)
    index = relative_index(window, table)
    places = list(product(*map(range, window)))
    entries = offsets(table)
    for i, j in product(range(len(places)), repeat=2):
        assert entries[index[i, j]] == tuple(a - b for a, b in zip(places[i], places[j], strict=True))


# Largest coordinate by window and by the window it was learnt at: the official code's values.
LARGEST = [(8, 8, 1.0566), (16, 16, 1.0566), (16, 12, 1.1913), (24, 12, 1.3826), (8, 6, 1.2029), (12, 6, 1.4057), (16, 8, 1.3938)]


@pytest.mark.parametrize(("window", "pretrained", "largest"), LARGEST)
def test_largest_log_coordinate(window, pretrained, largest):
    coordinates = relative_coordinates((window, window), (pretrained, pretrained), "log")
    assert coordinates.max().item() == pytest.approx(largest, abs=5e-5)
    assert coordinates.min().item() == pytest.approx(-largest, abs=5e-5)


@some
@given(windows, st.data())
def test_coordinates_against_exact_arithmetic(window, data):
    """To a few roundings of float32, with each axis scaled by its own window."""
    mp.dps = 30
    pretrained = tuple(data.draw(st.integers(1, 24)) for _ in window)
    linear, logarithmic = (relative_coordinates(window, pretrained, spacing) for spacing in ("linear", "log"))
    assert linear.dtype == logarithmic.dtype == torch.float32
    for row, offset in enumerate(offsets(window)):
        for axis, (d, p) in enumerate(zip(offset, pretrained, strict=True)):
            exact = mpf(d) / max(p - 1, 1)
            spaced = mp.sign(exact) * log(1 + abs(8 * exact), 8)
            assert linear[row, axis].item() == pytest.approx(float(exact), rel=3e-7, abs=0)
            assert logarithmic[row, axis].item() == pytest.approx(float(spaced), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("spacing", ["linear", "log"])
def test_window_of_one_token_has_a_coordinate(spacing):
    assert relative_coordinates((1, 1), (1, 1), spacing).tolist() == [[0, 0]]
    assert relative_coordinates((1, 3), (1, 3), spacing).isfinite().all()


sizes = st.tuples(st.integers(1, 9), st.integers(1, 9))


@pytest.mark.parametrize("method", METHODS)
@some
@given(old=sizes, new=sizes)
def test_constants_stay(method, old, new):
    table = torch.tensor([[0.25, -3.0]]).repeat(torch.Size(2 * w - 1 for w in old).numel(), 1)
    resized = resize_table(table, old, new, method)
    assert resized.shape == (torch.Size(2 * w - 1 for w in new).numel(), 2)
    torch.testing.assert_close(resized, table[:1].expand_as(resized))


@pytest.mark.parametrize("method", METHODS)
@some
@given(old=sizes, new=sizes)
def test_symmetric_tables_stay_symmetric(method, old, new):
    """Offsets d and -d of equal bias keep equal biases."""
    table = torch.randn(torch.Size(2 * w - 1 for w in old).numel(), 3, dtype=torch.float64)
    resized = resize_table(table + table.flip(0), old, new, method)
    scale = resized.abs().max()
    assert (resized - resized.flip(0)).abs().max() <= 1e-6 * scale


@pytest.mark.parametrize("method", METHODS)
def test_same_window_same_table(method):
    table = torch.randn(15 * 15, 3)
    resized = resize_table(table, (8, 8), (8, 8), method)
    assert torch.equal(resized, table) and resized.data_ptr() != table.data_ptr()


@pytest.mark.parametrize(("old", "new"), [((7, 7), (12, 12)), ((8, 8), (5, 9)), ((12, 7), (6, 7))])
def test_bicubic_is_torchs(old, new):
    (h, w), (h2, w2) = ([2 * n - 1 for n in window] for window in (old, new))
    table = torch.randn(h * w, 3)
    expected = F.interpolate(table.T.reshape(1, 3, h, w).double(), size=(h2, w2), mode="bicubic", align_corners=False)
    torch.testing.assert_close(resize_table(table, old, new), expected.reshape(3, -1).T.float())


def knots(old, new):
    """Places of the old offsets on the new axis, by bisection (BEiT's beit/run_class_finetuning.py)."""
    near, far = old - 1, new - 1
    low, high = 1e-6, float(far) + 1
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**i for i in range(near)) < far else (low, middle)
    side = np.cumsum([low**i for i in range(near)])
    return np.concatenate([-side[::-1], [0], side])


@pytest.mark.parametrize(("old", "new"), [((7, 7), (12, 12)), ((8, 8), (16, 16)), ((8, 6), (10, 9)), ((12, 12), (7, 7)), ((5, 7), (9, 4))])
def test_geometric_is_a_spline_through_stretched_places(old, new):
    h, w = (2 * n - 1 for n in old)
    table = torch.randn(h * w, 2, dtype=torch.float64)
    resized = resize_table(table, old, new, "geometric").numpy()
    axes = [np.arange(1 - n, n) for n in new]
    for head in range(2):
        spline = RectBivariateSpline(knots(old[0], new[0]), knots(old[1], new[1]), table[:, head].reshape(h, w).numpy(), s=0)
        np.testing.assert_allclose(resized[:, head], spline(*axes).ravel(), atol=1e-6)


def test_geometric_keeps_near_offsets_where_they_are():
    """Offsets up to one token keep their bias to rounding and the far ones theirs; bicubic moves all but the middle."""
    table = torch.randn(15 * 15, 1, dtype=torch.float64)
    old = table.reshape(15, 15)
    geometric, bicubic = (resize_table(table, (8, 8), (16, 16), method).reshape(31, 31) for method in METHODS[::-1])
    torch.testing.assert_close(geometric[14:17, 14:17], old[6:9, 6:9], rtol=0, atol=1e-8)
    torch.testing.assert_close(geometric[::30, ::30], old[::14, ::14], rtol=0, atol=1e-6)
    assert (bicubic[14:17, 14:17] - old[6:9, 6:9]).abs().max() > 0.1


@pytest.mark.parametrize("method", METHODS)
def test_three_axes(method):
    """A table that varies along one axis only is resized along that axis only."""
    for axis in range(3):
        table = torch.randn(5, dtype=torch.float64).reshape([5 if a == axis else 1 for a in range(3)]).expand(5, 5, 5)
        new = (4, 5, 6)
        resized = resize_table(table.reshape(-1, 1), (3, 3, 3), new, method).reshape(7, 9, 11)
        others = [a for a in range(3) if a != axis]
        line = resized.amax(dim=others)
        torch.testing.assert_close(resized.amin(dim=others), line, rtol=0, atol=1e-9)
        assert (line.diff().abs() > 1e-3).any()


def test_time_is_resized_linearly():
    table = torch.randn(3, 5, 5, 2, dtype=torch.float64)
    resized = resize_table(table.reshape(-1, 2), (2, 3, 3), (4, 3, 3)).reshape(7, 5, 5, 2)
    expected = F.interpolate(table.permute(1, 2, 3, 0).reshape(1, -1, 3), size=7, mode="linear").reshape(5, 5, 2, 7).permute(3, 0, 1, 2)
    torch.testing.assert_close(resized, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_dtype_stays(method, dtype):
    assert resize_table(torch.zeros(15 * 15, 2, dtype=dtype), (8, 8), (5, 5), method).dtype == dtype
