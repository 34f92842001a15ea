"""Where tokens are: positions on a grid (ViT), relative positions inside a window (Swin), and how their tables change size.

Swin V2 (arXiv 2111.09883) section 3.3. Letters: N tokens of a window or grid, C channels, T entries of a table, one for
each offset: T is the product of 2w - 1 over the axes, row-major, offset -(w - 1) first.
"""

from math import prod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def sincos2d(grid: tuple[int, int], width: int, temperature: float = 10_000.0, device: torch.device | None = None) -> Tensor:
    """Fixed positions of a grid (h, w): sine and cosine of x, then of y, a quarter of `width` each (MoCo v3, arXiv 2104.02057).

    Returns:
        (h·w, width) float32, row-major.
    """
    rates = temperature ** -(torch.arange(width // 4, dtype=torch.float64, device=device) / max(width / 4 - 1, 1))
    places = torch.meshgrid(*(torch.arange(n, dtype=torch.float64, device=device) for n in grid), indexing="ij")
    y, x = (axis.flatten()[:, None] * rates for axis in places)
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1).float()


def resize_positions(
    positions: Tensor, old: tuple[int, int], new: tuple[int, int], method: Literal["bilinear", "bicubic"] = "bilinear"
) -> Tensor:
    """Learnt positions of a grid `old`, (N, C), for a grid `new`: (N', C).

    Bilinear keeps the corners where they are (the original's scipy.ndimage.zoom of order 1). Bicubic aligns the edges of
    the outer tokens, with antialiasing, as timm does.
    """
    if old == new:
        return positions
    grid = positions.float().T.reshape(1, -1, *old)  # (1, C, h, w)
    if method == "bilinear":
        grid = F.interpolate(grid, size=new, mode="bilinear", align_corners=True)
    else:
        grid = F.interpolate(grid, size=new, mode="bicubic", align_corners=False, antialias=True)
    return grid.flatten(2)[0].T.to(positions.dtype)


@torch.compiler.assume_constant_result  # so that freezing a graph's weights computes position biases once
def relative_index(window: tuple[int, ...], table: tuple[int, ...], device: torch.device | None = None) -> Tensor:
    """For each pair of tokens of `window`, the entry of their offset in a table made for windows of `table` tokens.

    A smaller window reads the middle of the table: the same offset, the same entry.

    Returns:
        (N, N) int64; the row is the token that attends.
    """
    index = torch.zeros(prod(window), prod(window), dtype=torch.int64, device=device)
    places = torch.meshgrid(*(torch.arange(w, device=device) for w in window), indexing="ij")
    for place, size in zip(places, table, strict=True):
        place = place.flatten()
        index = index * (2 * size - 1) + place[:, None] - place[None, :] + size - 1
    return index


@torch.compiler.assume_constant_result  # so that freezing a graph's weights computes position biases once
def relative_coordinates(
    window: tuple[int, ...], pretrained: tuple[int, ...], spacing: Literal["linear", "log"], device: torch.device | None = None
) -> Tensor:
    """The offsets inside `window` as inputs of the bias network, scaled by the window it learnt at.

    Linear: 1 is the largest offset of the `pretrained` window. Log (equation 4, with the official code's scale):
    sign(x) log2(1 + |x|) / log2(8) of x = 8 times that. Computed in float32 as the official code does, whatever the
    model's dtype, so that float64 models agree to the last bit too.

    Returns:
        (T, axes) float32.
    """
    # A window of one token has offset 0 only: any scale will do, but not 0 / 0.
    scales = [max(p - 1, 1) for p in pretrained]
    axes = [torch.arange(-(w - 1), w, dtype=torch.float32, device=device) / s for w, s in zip(window, scales, strict=True)]
    x = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)  # (T, axes)
    if spacing == "linear":
        return x
    x = x * 8
    return torch.sign(x) * torch.log2(torch.abs(x) + 1.0) / 3.0


def resize_table(table: Tensor, old: tuple[int, ...], new: tuple[int, ...], method: Literal["bicubic", "geometric"] = "bicubic") -> Tensor:
    """A bias table learnt for windows of `old` tokens, (T, heads), for windows of `new` tokens: (T', heads).

    Bicubic is what Swin V1 does; a time axis is resized linearly. Geometric (BEiT, arXiv 2106.08254, as SimMIM fine-tuning
    uses it) keeps neighbouring offsets where they are and stretches the far ones in a geometric progression; along every
    axis, a cubic spline through the stretched places.
    """
    if old == new:
        return table.clone()
    grid = table.detach().double().reshape(*(2 * w - 1 for w in old), -1)  # (*offsets, heads)
    lengths = [2 * w - 1 for w in new]
    if method == "geometric":
        for axis, length in enumerate(lengths):
            grid = _stretch(grid, axis, length)
    else:
        heads_first = grid.movedim(-1, 0)  # (heads, [t,] h, w)
        if len(new) == 3:
            columns = heads_first.permute(0, 2, 3, 1).flatten(1, 2)  # (heads, h·w, t)
            columns = F.interpolate(columns, size=lengths[0], mode="linear", align_corners=False)
            heads_first = columns.unflatten(1, heads_first.shape[2:]).permute(0, 3, 1, 2)  # (heads, t', h, w)
        planes = heads_first.reshape(1, -1, *heads_first.shape[-2:])
        planes = F.interpolate(planes, size=lengths[-2:], mode="bicubic", align_corners=False)
        grid = planes.reshape(-1, *lengths).movedim(0, -1)
    return grid.reshape(prod(lengths), -1).to(table.dtype)


def _stretch(grid: Tensor, axis: int, length: int) -> Tensor:
    """Resize one axis of odd length to another by geometrically spaced places and a cubic spline."""
    from scipy.interpolate import make_interp_spline
    from scipy.optimize import brentq

    near, far = grid.shape[axis] // 2, length // 2  # offsets on one side, before and after
    if near == far:
        return grid
    if near == 0:
        return grid.expand([length if a == axis else n for a, n in enumerate(grid.shape)]).clone()
    if far < min(near, 2):  # the limit of ever smaller steps: the nearest offsets as they are
        return grid.narrow(axis, near - far, length).clone()
    powers = torch.arange(near, dtype=torch.float64)
    if near == 1:
        side = torch.tensor([float(far)], dtype=torch.float64)
    else:
        ratio = brentq(lambda q: float((q**powers).sum()) - far, 1e-9, float(far) + 1)  # 1 + q + ... + q^(near - 1) = far
        side = (ratio**powers).cumsum(0)
    places = torch.cat([-side.flip(0), side.new_zeros(1), side])
    spline = make_interp_spline(places.numpy(), grid.cpu().numpy(), k=min(3, len(places) - 1), axis=axis)
    return torch.from_numpy(spline(torch.arange(-far, far + 1).double().numpy())).to(grid.device)
