"""The kernels compute what the plain path does, on the CPU as Triton interprets them; and they compile, which needs no GPU either."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyscale.ops import kernel
from manyscale.ops.windows import enter, layout

pytestmark = pytest.mark.attention
LIMITS = {"float32": 1e-5, "bfloat16": 0.02, "float16": 0.0025}  # as of the other paths; interpreted, bfloat16 is cut, not rounded


def child(part: str, **environment: str) -> list:
    """What a process of `kernel_cases` prints."""
    command = [sys.executable, str(Path(__file__).parent / "kernel_cases.py"), part]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_results_and_gradients_are_those_of_float64():
    """And torch's own checks of the two nodes pass: here, as a process that interprets takes seconds to start."""
    pytest.importorskip("triton")
    *found, one, two, three, last = child("interpret", TRITON_INTERPRET="1")
    assert last == "two nodes of a graph"
    for net in (one, two, three):
        assert net["error"] < 2e-5 and net["evaluated"] < 2e-5, net
    assert len(found) == 18 and {case["dtype"] for case in found} == LIMITS.keys()
    for case in found:
        assert case["same"], f"two runs differ: {case}"
        assert all(error < LIMITS[case["dtype"]] for error in case["errors"].values()), case


@pytest.mark.slow
@pytest.mark.parametrize("part", ["compile", pytest.param("compile-all", marks=pytest.mark.timeout(1200))])
def test_the_kernels_compile_for_a_gpu(part):
    """What the interpreter takes and the compiler does not: types that change in a loop, shapes that are no power of two."""
    pytest.importorskip("triton.backends.nvidia")
    for case in child(part, TRITON_INTERPRET="0"):
        assert len(case["kernels"]) in (2, 3, 4), case
        assert all(built["code"] for built in case["kernels"].values())
        assert all(built["shared"] <= 99 * 2**10 for built in case["kernels"].values()), "more than a block may have on small GPUs"


# --- Tables --------------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 7), st.integers(1, 5)), min_size=2, max_size=3), st.booleans())
def test_tables_are_the_layout(axes, shifted):
    """Each token has one place, the one that `enter` gives it; labels agree exactly where the mask is True."""
    grid, window = zip(*axes, strict=True)
    cut = layout(grid, window, shifted=shifted, mask_padding=True)
    places, labels, tokens = kernel.tables(cut, mask_padding=True)
    there = places >= 0
    assert sorted(places[there].tolist()) == list(range(tokens))
    marks = torch.randn(1, *grid, 1)
    assert torch.equal(torch.where(there, marks.flatten()[places], 0), enter(marks, cut)[0, :, :, 0])
    assert (labels is None) == (cut.mask is None)
    if labels is not None:
        assert torch.equal(labels < 0, ~there)
        assert torch.equal(labels[:, :, None] == labels[:, None, :], cut.mask)


def test_padding_is_never_attended():
    cut = layout((5, 8), (4, 4), shifted=True, mask_padding=False)
    with pytest.raises(
        ValueError, match=r"field `attention`: kernel never attends padding, and 5 x 8 tokens in windows of 4 x 4 have some"
    ):
        kernel.tables(cut, mask_padding=False)
    whole = layout((8, 8), (4, 4), shifted=True, mask_padding=False)
    assert torch.equal(kernel.tables(whole, mask_padding=False).places, kernel.tables(whole, mask_padding=True).places)


# --- Where there are no kernels ------------------------------------------------------------------------------------------------


def call(dtype=torch.float32, width=16):
    cut = layout((4, 4), (4, 4), shifted=False, mask_padding=True)
    return kernel.windowed(torch.randn(1, 16, 3, 2, width).to(dtype), kernel.tables(cut, mask_padding=True))


def test_a_cpu_has_no_kernels():
    assert not kernel.available(torch.device("cpu"))
    with pytest.raises(
        ValueError, match="field `attention`: kernel needs Triton and a CUDA device, and these tokens are on cpu; give auto"
    ):
        call()


@pytest.mark.parametrize(("dtype", "width"), [(torch.float64, 16), (torch.float32, 129)])
def test_other_types_and_wider_heads_are_refused(dtype, width, monkeypatch):
    monkeypatch.setattr(kernel, "available", lambda device: True)
    with pytest.raises(ValueError, match=rf"field `attention`: kernel takes .* not {dtype} and {width}; give auto"):
        call(dtype, width)


def test_without_triton():
    code = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch
from manyscale.ops import kernel
from manyscale.ops.windows import layout
assert not kernel.available(torch.device("cuda"))
try:
    kernel.windowed(torch.randn(1, 4, 3, 1, 16), kernel.tables(layout((2, 2), (2, 2), shifted=False, mask_padding=True), mask_padding=True))
except ValueError as error:
    print(error)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=root, timeout=280)
    assert done.stdout.startswith("field `attention`: kernel needs Triton and a CUDA device, and Triton is not installed; give"), (
        done.stderr
    )
