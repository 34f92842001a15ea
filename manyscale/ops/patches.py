"""Patch kernels of another size. Letters: p pixels across a patch, C channels out, c channels in."""

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_kernel(kernel: Tensor, size: tuple[int, ...]) -> Tensor:
    """A patch embedding for patches of another size that gives enlarged pictures the tokens they had (FlexiViT, arXiv 2212.08013, eq. 4).

    With B the bilinear resizing of a patch, the pseudo-inverse of its transpose: <B x, new> = <x, old> for every patch x
    that grows; of patches that shrink, the closest. Computed in float64.

    Args:
        kernel: (C, c, p, q).
        size: (p', q').

    Returns:
        (C, c, p', q')
    """
    old = tuple(kernel.shape[-2:])
    if old == tuple(size):
        return kernel.clone()
    pixels = torch.eye(old[0] * old[1], dtype=torch.float64).unflatten(1, (1, *old))  # (p·q, 1, p, q): every one-pixel patch
    resizing = F.interpolate(pixels, size=tuple(size), mode="bilinear", align_corners=False, antialias=True).flatten(1)  # (p·q, p'·q')
    new = torch.linalg.pinv(resizing) @ kernel.detach().double().cpu().flatten(2).unsqueeze(-1)  # (C, c, p'·q', 1)
    return new.squeeze(-1).unflatten(-1, tuple(size)).to(kernel)
