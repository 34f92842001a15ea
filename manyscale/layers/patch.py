"""Pixels to tokens, and tokens to fewer tokens."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyscale.layers.linear import project


class PatchEmbed(nn.Module):
    """A strided convolution, then a norm (Swin V1 section 3.1). Pictures that do not divide are padded with zeros at the far ends."""

    def __init__(self, channels: int, width: int, patch: tuple[int, ...]) -> None:
        super().__init__()
        self.patch = patch
        conv = {2: nn.Conv2d, 3: nn.Conv3d}[len(patch)]
        self.proj = conv(channels, width, kernel_size=patch, stride=patch)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, [T,] H, W) -> (B, [t,] h, w, C)"""
        ends = [-size % patch for size, patch in zip(x.shape[2:], self.patch, strict=True)]
        if any(ends):
            x = F.pad(x, [n for end in reversed(ends) for n in (0, end)])
        return self.norm(self.proj(x).movedim(1, -1))


class MaskToken(nn.Module):
    """What stands for a patch that is hidden: one learnt token (SimMIM, arXiv 2111.09886, section 3.2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.empty(width))
        self.initialise()

    def initialise(self) -> None:
        nn.init.trunc_normal_(self.token, std=0.02)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Tokens (B, *grid, C) and a mask (B, *grid), True where hidden -> (B, *grid, C)"""
        return torch.where(mask[..., None], self.token.to(x.dtype), x)


class PatchMerge(nn.Module):
    """Each 2 x 2 neighbourhood becomes one token of twice the channels; time stays. Odd grids are padded with zeros.

    The norm comes before the linear layer in V1 and after it in V2.
    """

    def __init__(self, width: int, norm: Literal["before", "after"]) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)
        self.norm_in = nn.LayerNorm(4 * width) if norm == "before" else nn.Identity()
        self.norm_out = nn.LayerNorm(2 * width) if norm == "after" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, [t,] h, w, C) -> (B, [t,] h/2, w/2, 2C)"""
        height, width = x.shape[-3:-1]
        if height % 2 or width % 2:
            x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        x = x.unflatten(-2, (-1, 2)).unflatten(-4, (-1, 2))  # (B, [t,] h/2, 2, w/2, 2, C)
        x = x.movedim(-4, -2).flatten(-3)  # (B, [t,] h/2, w/2, 4C), the official order of the four: down the column first
        return self.norm_out(project(self.reduction, self.norm_in(x)))
