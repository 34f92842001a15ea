"""Choosing tokens: which patches are hidden, which stay, and back to the grid.

Letters: B batch, grid = (h, w) tokens, N tokens, K of them that stay, C channels.
"""

import math

import torch
from torch import Tensor


def block_mask(
    batch: int, grid: tuple[int, ...], unit: tuple[int, ...], ratio: float, *, generator: torch.Generator | None = None
) -> Tensor:
    """Masks of random blocks: in every sample ceil(ratio n) of its n blocks are hidden (SimMIM section 3.2).

    Args:
        grid: tokens per axis.
        unit: tokens of a block per axis; it must divide the grid.
        generator: of the CPU; None takes torch's own. The same state, the same masks, on any device.

    Returns:
        (B, *grid) bool on the CPU, True where hidden.

    Raises:
        ValueError: blocks that do not divide the grid.
    """
    if len(grid) != len(unit) or any(g % u for g, u in zip(grid, unit, strict=True)):
        raise ValueError(f"blocks of {unit} tokens do not divide the grid of {grid}")
    blocks = [g // u for g, u in zip(grid, unit, strict=True)]
    count = math.prod(blocks)
    hidden = math.ceil(round(ratio * count, 9))  # rounded: 0.07 x 100 is 7, not 7.000000000000001
    order = torch.rand(batch, count, generator=generator).argsort(dim=1)
    mask = torch.zeros(batch, count, dtype=torch.bool).scatter_(1, order[:, :hidden], True).unflatten(1, blocks)
    for axis, u in enumerate(unit, 1):
        mask = mask.repeat_interleave(u, dim=axis)
    return mask


def by_score(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Which `count` tokens score highest, and the rest, both highest first; of equals the earlier: (B, N) -> (B, K), (B, N - K) int64."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    return order[:, :count], order[:, count:]


def take(x: Tensor, index: Tensor) -> Tensor:
    """The tokens of every sample that `index` names: (B, N, C), (B, K) -> (B, K, C)"""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def put_back(x: Tensor, places: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens (B, K, C) to their places (B, K), row-major on the grid: a map (B, C, h, w), 0 where none is.

    A token of place -1, which has none, is left out.
    """
    cells = math.prod(grid)
    canvas = x.new_zeros(len(x), cells + 1, x.shape[-1])  # the last for those without a place
    index = torch.where(places < 0, cells, places)[..., None].expand_as(x)
    return canvas.scatter(1, index, x)[:, :-1].transpose(1, 2).unflatten(2, grid)
