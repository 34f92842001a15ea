"""Choosing tokens: which patches are hidden. Letters: B batch, grid = (h, w) tokens."""

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
