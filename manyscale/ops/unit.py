"""Vectors of a given length, for cosine attention."""

import torch
from torch import Tensor

LEAST = 1e-6  # a shorter vector counts as none


def unit(x: Tensor, length: Tensor | float = 1.0) -> Tensor:
    """`x` at `length` along its last axis, in float32 or wider. A zero vector stays zero, and so does its gradient.

    A padded token is one. In float16 the peers' epsilon of 1e-12 is zero, which makes it 0 / 0; and a larger epsilon
    still makes its gradient, 1 / epsilon, infinite. One product with the small tensor of factors: dividing, as the peers
    do, costs twice the passes over `x` in the backward pass.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
    found = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    if torch.compiler.is_exporting() and not torch.is_grad_enabled():
        # with a comparison between, OpenVINO lays all vectors out anew, and back again; and there is no gradient to make zero
        return x * (length / found.clamp(min=LEAST))
    return x * (length / found.masked_fill(found < LEAST, torch.inf))


def unit_(x: Tensor, length: Tensor | float = 1.0) -> None:
    """`unit` in place, rounded once to the type of `x`: no gradient, and no memory where that is float32 or wider.

    A narrower `x` is widened as it lies, which is quicker than a product of two types or copies of its parts.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    found = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    wide.mul_(length / found.masked_fill(found < LEAST, torch.inf))
    if wide is not x:
        x.copy_(wide)


def unit_gradient(x: Tensor, grad: Tensor, length: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """Back through `unit`: the gradient of its result -> that of `x`, and for each vector that of its length, (..., 1)."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    found = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    found = found.masked_fill(found < LEAST, torch.inf)
    direction = x / found
    along = (direction * grad).sum(dim=-1, keepdim=True)
    return (grad - direction * along) * (length / found), along
