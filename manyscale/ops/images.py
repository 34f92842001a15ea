"""Whole images as tensors."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor


def resized(x: Tensor, size: tuple[int, int], how: Literal["corners", "antialias"] = "antialias") -> Tensor:
    """Images (B, C, H, W) at another size, bilinearly; those of that size as they are.

    Args:
        how: `corners` keeps the centres of the outer pixels where they are and takes no account of what lies between the
            pixels it looks at, as SuperViT does; `antialias` filters.
    """
    if tuple(x.shape[2:]) == tuple(size):
        return x
    corners = how == "corners"
    return F.interpolate(x, size, mode="bilinear", align_corners=corners or None, antialias=not corners)
