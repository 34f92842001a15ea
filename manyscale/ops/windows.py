"""Windows on token grids of two (h, w) or three (t, h, w) axes, with one code: pad, then shift, then split; and back.

Letters: B batch, W windows, N tokens of a window, C channels; `grid` stands for h, w or t, h, w.
Swin V1 (arXiv 2103.14030) section 3.2; the order pad-shift-mask matters: shifting first lets tokens see across the border.
"""

from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

KNOWN = 2**24  # pairs of tokens in all windows of a grid; with more, a graph with frozen weights would hold masked biases of gigabytes


class Layout(NamedTuple):
    """How one grid is cut into windows."""

    grid: tuple[int, ...]
    padded: tuple[int, ...]  # the grid, grown to whole windows
    window: tuple[int, ...]
    shift: tuple[int, ...]
    mask: Tensor | None  # (W, N, N) bool, True where the row's token may attend the column's; None: everywhere
    order: tuple[Tensor, Tensor] | None = None  # (W·N,) int64 each, tokens of the grid by windows, and back: one copy in place of three


def layout(
    grid: tuple[int, ...],
    window: tuple[int, ...],
    *,
    shifted: bool,
    mask_padding: bool,
    masked: bool = True,
    ordered: bool = False,
    device: torch.device | None = None,
) -> Layout:
    """The layout of `grid` in windows of at most `window` tokens an axis.

    An axis no longer than its window takes one window and no shift (official code). A shifted axis moves by half a window.
    `masked=False` leaves the mask out, which at 1536 px in windows of 32 takes 150 MB, for who reads none. `ordered` has
    shifted tokens moved by an index, which in evaluation on a CPU and in engines is faster; its backward pass is not.
    """
    window = tuple(min(w, g) for w, g in zip(window, grid, strict=True))
    shift = tuple(w // 2 if shifted and g > w else 0 for w, g in zip(window, grid, strict=True))
    padded = tuple(-(-g // w) * w for w, g in zip(window, grid, strict=True))
    mask = None
    if masked and (any(shift) or (mask_padding and padded != grid)):
        pairs = prod(padded) * prod(window)
        label = (known_labels if pairs <= KNOWN else labels)(grid, padded, window, shift, mask_padding, device)  # (W, N)
        mask = label[:, :, None] == label[:, None, :]
    plain = Layout(grid, padded, window, shift, mask)
    if not ordered or padded != grid or not any(shift):
        return plain
    tokens = torch.arange(prod(grid), device=device)
    there, back = enter(tokens.view(1, *grid, 1), plain), leave(tokens.view(1, -1, prod(window), 1), plain)
    return plain._replace(order=(there.flatten(), back.flatten()))


def labels(
    grid: tuple[int, ...],
    padded: tuple[int, ...],
    window: tuple[int, ...],
    shift: tuple[int, ...],
    mask_padding: bool,
    device: torch.device | None,
) -> Tensor:
    """The region of every window's tokens, (W, N) int64."""
    label = regions(grid, padded, shift, mask_padding=mask_padding, device=device)
    return split(label[None, ..., None], window)[0, :, :, 0]


@torch.compiler.assume_constant_result
def known_labels(*given: Any) -> Tensor:
    """`labels`, which a graph of torch.compile holds ready: made in it, they would be made again for every logit."""
    return labels(*given)


def regions(
    grid: tuple[int, ...], padded: tuple[int, ...], shift: tuple[int, ...], *, mask_padding: bool, device: torch.device | None = None
) -> Tensor:
    """A label for every place of the padded, shifted grid; two tokens of a window may attend each other where labels agree.

    Along an axis the last `shift` places hold tokens that came round from the other border: a label of their own. Padding
    is a region too, so that no row is ever masked whole (its softmax would be NaN).

    Returns:
        (*padded) int64.
    """
    label = torch.zeros(padded, dtype=torch.int64, device=device)
    padding = torch.zeros(padded, dtype=torch.bool, device=device)
    for axis, (size, length, by) in enumerate(zip(grid, padded, shift, strict=True)):
        place = torch.arange(length, device=device).view([-1 if a == axis else 1 for a in range(len(grid))])
        label = 2 * label + (place >= length - by)
        padding = padding | ((place + by) % length >= size)
    return label.masked_fill(padding, -1) if mask_padding else label


def enter(x: Tensor, layout: Layout) -> Tensor:
    """Pad with zeros at the far ends, shift, split: (B, *grid, C) -> (B, W, N, C)."""
    if layout.order is not None:
        return x.flatten(1, -2).index_select(1, layout.order[0]).unflatten(1, (-1, prod(layout.window)))
    axes = range(1, len(layout.grid) + 1)
    if layout.padded != layout.grid:
        ends = [(0, p - g) for p, g in zip(layout.padded, layout.grid, strict=True)]
        x = F.pad(x, (0, 0, *(n for end in reversed(ends) for n in end)))
    if any(layout.shift):
        x = x.roll([-s for s in layout.shift], dims=list(axes))
    return split(x, layout.window)


def leave(windows: Tensor, layout: Layout) -> Tensor:
    """The inverse of `enter`: (B, W, N, C) -> (B, *grid, C)."""
    if layout.order is not None:
        return windows.flatten(1, 2).index_select(1, layout.order[1]).unflatten(1, layout.grid)
    x = merge(windows, layout.window, layout.padded)
    if any(layout.shift):
        x = x.roll(layout.shift, dims=list(range(1, len(layout.grid) + 1)))
    if layout.padded != layout.grid:
        x = x[(slice(None), *(slice(g) for g in layout.grid))]
    return x


def split(x: Tensor, window: tuple[int, ...]) -> Tensor:
    """(B, *grid, C) -> (B, W, N, C), windows and their tokens in row-major order. The grid must divide into windows."""
    batch, *grid, channels = x.shape
    axes, count = len(window), prod([g // w for g, w in zip(grid, window, strict=True)])
    x = x.reshape(batch, *(n for g, w in zip(grid, window, strict=True) for n in (g // w, w)), channels)  # (B, g/w, w, g/w, w, ..., C)
    x = x.permute(0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), 2 * axes + 1)  # (B, g/w, g/w, ..., w, w, ..., C)
    return x.reshape(batch, count, prod(window), channels)  # counted, as of no pictures -1 could be anything


def merge(windows: Tensor, window: tuple[int, ...], grid: tuple[int, ...]) -> Tensor:
    """The inverse of `split`: (B, W, N, C) -> (B, *grid, C)."""
    batch, axes = windows.shape[0], len(window)
    counts = [g // w for g, w in zip(grid, window, strict=True)]
    x = windows.reshape(batch, *counts, *window, windows.shape[-1])  # (B, g/w, g/w, ..., w, w, ..., C)
    x = x.permute(0, *(a for axis in range(axes) for a in (1 + axis, 1 + axes + axis)), 2 * axes + 1)  # (B, g/w, w, g/w, w, ..., C)
    return x.reshape(batch, *grid, windows.shape[-1])
