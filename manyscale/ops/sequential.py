"""Attention in chunks of windows, samples or rows, one after another: nothing as large as all logits is ever made.

The forward pass keeps one number a row, the logarithm of its softmax's denominator; the backward pass computes each chunk's
weights from it anew (Dao et al., arXiv 2205.14135, algorithms 1 and 4, at the size of a budget instead of a cache). What Swin V2
calls sequential self-attention (section 4.1), and of which it gives no algorithm.

Letters: B batch, W windows, H heads, N tokens of a window, d channels of a head.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from manyscale.ops.unit import unit, unit_gradient

LIVE = 4  # tensors of a chunk's logits alive at once in the backward pass: weights, their gradient, and a copy of each in another type


class Chunk(NamedTuple):
    """How much is worked on at once."""

    samples: int
    windows: int
    rows: int


def chunk_of(shape: torch.Size, keys: int, itemsize: int, budget: int) -> Chunk:
    """The largest chunk whose logits take at most `budget` bytes: all rows of many windows, or some rows of one.

    Args:
        shape: of q, (B, W, H, N, d).
        keys: tokens that a row attends.
        itemsize: bytes of a logit.

    Raises:
        ValueError: a budget that one row exceeds.
    """
    batch, windows, heads, rows, _ = shape
    row = LIVE * itemsize * heads * keys
    if budget < row:
        raise ValueError(f"field `attention_memory`: {budget:,} bytes; a row of {keys} tokens in {heads} heads takes {row:,}, give more")
    if budget < row * rows:
        return Chunk(1, 1, budget // row)
    batch, fit = max(batch, 1), budget // (row * rows)  # windows of a sample
    return Chunk(fit, 1, rows) if fit < batch else Chunk(batch, min(fit // batch, windows), rows)


def sequential(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, scale: Tensor | None, budget: int) -> Tensor:
    """As `ops.attention.attend`, with at most `budget` bytes of logits at a time. Vectors at length one are not kept either.

    Raises:
        ValueError: as `chunk_of`.
    """
    return _forward(q, k, v, bias, mask, scale, budget)[0]


@torch.library.custom_op("manyscale::sequential_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, scale: Tensor | None, budget: int
) -> tuple[Tensor, Tensor]:
    """The result (B, W, H, N, d), and the logarithm of every row's denominator (B, W, H, N)."""
    out = _by_token(q, v)
    sums = torch.empty(q.shape[:-1], dtype=_wide(q), device=q.device)
    with torch.autocast(q.device.type, enabled=False):  # types are chosen here
        q, k = _ready(q, k, scale)
        for here, rows, logits in _logits(q, k, bias, mask, budget):
            total = logits.logsumexp(dim=-1, keepdim=True)
            sums[*here, :, rows] = total.squeeze(-1)
            out[*here, :, rows] = logits.sub_(total).exp_().to(v.dtype) @ v[here]
    return out, sums


@torch.library.custom_op("manyscale::sequential_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    out: Tensor,
    sums: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: Tensor | None,
    budget: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, and of bias and scale (empty without one)."""
    wide, raw = _wide(q), (q, k)
    q, k = _ready(q, k, scale)
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    grad_k, grad_v = (torch.zeros_like(t, dtype=wide, memory_format=torch.contiguous_format) for t in (k, v))  # sums over chunks of rows
    grad_bias = torch.zeros_like(bias, dtype=wide, memory_format=torch.contiguous_format) if bias is not None else q.new_empty(0)
    inner = (grad.to(wide) * out).sum(dim=-1, keepdim=True)  # (B, W, H, N, 1): what softmax's gradient takes off each row
    for here, rows, logits in _logits(q, k, bias, mask, budget):
        weights = logits.sub_(sums[*here, :, rows, None]).exp_()
        from_above = grad[*here, :, rows]
        grad_v[here] += weights.to(v.dtype).mT @ from_above
        grad_logits = (from_above @ v[here].mT).to(wide).sub_(inner[*here, :, rows]).mul_(weights)
        if bias is not None:
            grad_bias[..., rows, :] += grad_logits.sum(dim=(0, 1))
        grad_logits = grad_logits.to(q.dtype)
        grad_q[*here, :, rows] = grad_logits @ k[here]
        grad_k[here] += grad_logits.mT @ q[*here, :, rows]
    grad_bias = grad_bias if bias is None else grad_bias.to(bias.dtype)
    if scale is None:
        return grad_q.mul_(q.shape[-1] ** -0.5), grad_k.to(k.dtype), grad_v.to(v.dtype), grad_bias, q.new_empty(0)
    grad_q, along = unit_gradient(raw[0], grad_q, scale)
    grad_k, _ = unit_gradient(raw[1], grad_k)
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), grad_bias, along.sum(dim=(0, 1, 3)).view_as(scale)


def _logits(
    q: Tensor, k: Tensor, bias: Tensor | None, mask: Tensor | None, budget: int
) -> Iterator[tuple[tuple[slice, slice], slice, Tensor]]:
    """Chunk by chunk: where it lies in B and W, which rows, and its logits (b, w, H, n, N), in float32 or wider and free to write into."""
    wide = _wide(q)
    size = chunk_of(q.shape, k.shape[-2], wide.itemsize, budget)
    for windows in _slices(q.shape[1], size.windows):
        for rows in _slices(q.shape[3], size.rows):
            added = None if bias is None else bias[:, rows].to(wide)
            if mask is not None:  # made once for all samples
                added = added.masked_fill(~mask[windows, None, rows], float("-inf"))  # (w, H, n, N)
            for samples in _slices(q.shape[0], size.samples):
                here = samples, windows
                logits = (q[*here, :, rows] @ k[here].mT).to(wide)
                yield here, rows, logits if added is None else logits.add_(added)


def _ready(q: Tensor, k: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """q and k whose products are the logits."""
    if scale is None:
        return q * q.shape[-1] ** -0.5, k
    return unit(q, scale).to(q.dtype), unit(k).to(k.dtype)


def _by_token(q: Tensor, v: Tensor) -> Tensor:
    """Room for the result (B, W, H, N, d), the heads of a token side by side: as the projection behind attention reads it, uncopied."""
    batch, windows, heads, rows, _ = q.shape
    return v.new_empty(batch, windows, rows, heads, v.shape[-1]).transpose(2, 3)


def _slices(whole: int, part: int) -> list[slice]:
    return [slice(start, start + part) for start in range(0, whole, part)]


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, scale: Tensor | None, budget: int
) -> tuple[Tensor, Tensor]:
    return _by_token(q, v), q.new_empty(q.shape[:-1], dtype=_wide(q))


@_backward.register_fake
def _(
    grad: Tensor,
    out: Tensor,
    sums: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: Tensor | None,
    budget: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    found = [t.new_empty(t.shape) for t in (q, k, v)]
    return *found, *(q.new_empty(0) if t is None else t.new_empty(t.shape) for t in (bias, scale))


def _keep(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.budget = inputs
    ctx.save_for_backward(*output, *tensors)


def _gradients(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    out, sums, *inputs = ctx.saved_tensors
    with torch.autocast(grad.device.type, enabled=False):  # as forward, though a backward pass seldom is under it
        *grads, grad_bias, grad_scale = _backward(grad, out, sums, *inputs, ctx.budget)
    *_, bias, _, scale = inputs
    return *grads, None if bias is None else grad_bias, None, None if scale is None else grad_scale, None


_forward.register_autograd(_gradients, setup_context=_keep)
