"""One door to every attention path.

Letters: B batch, W windows, H heads, N tokens of a window, d channels of a head.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from manyscale.config.memory import AttentionPath as Path
from manyscale.ops.sequential import sequential
from manyscale.ops.unit import unit

BUDGET = 64 * 2**20


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    normed: bool = False,
    dropout: float = 0.0,
    path: Path = "auto",
    budget: int = BUDGET,
) -> Tensor:
    """softmax(logits + bias, masked) v in every window.

    Args:
        q, k, v: (B, W, H, N, d); without a mask q may have other tokens than k and v.
        bias: (H, N, N), added to the logits, or (W, H, N, N) with the mask laid into it (`folded`); None: zero.
        mask: (W, N, N) bool, True where the row may attend the column; at least one True a row. Masked logits are -inf:
            the official -100 can be outbid by cosine logits that span up to 216.
        scale: (H, 1, 1) float32 or wider: logits are scale cos(q, k); None: they are q k / sqrt(d).
        normed: whether q and k have the lengths `scale` and 1 already (`unit_`); the path `sequential` gives them these itself.
        dropout: probability of dropping an attention weight.
        path: `reference` is plain; `fused` is torch's scaled_dot_product_attention; `sequential` works on one chunk after another,
            in either pass; `auto` is fused where the bias needs no gradient (with one, the fused kernels refuse or store its full
            size: pytorch#145208). The path `kernel` starts from tokens of a grid: `ops.kernel.windowed`.
        budget: bytes that the logits of a chunk may take, of the sequential path.

    Returns:
        (B, W, H, N, d)

    Raises:
        ValueError: sequential with dropout, or with a budget that one row exceeds.
    """
    if mask is not None and bias is None:  # every path lays the mask into a bias
        bias = q.new_zeros(q.shape[2], *mask.shape[1:])
    if path == "sequential":
        if dropout:
            raise ValueError("field `attention`: sequential keeps no attention weights that it could drop; give dropout 0 or another path")
        return sequential(q, k, v, bias, mask, scale, budget)
    if path == "auto":
        path = "reference" if bias is not None and bias.requires_grad and torch.is_grad_enabled() else "fused"
    if scale is not None and not normed:
        q, k = unit(q, scale).to(v.dtype), unit(k).to(v.dtype)
    return {"reference": _reference, "fused": _fused}[path](q, k, v, bias, mask, scale is not None, dropout)


def _reference(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, scaled: bool, dropout: float) -> Tensor:
    logits = (q if scaled else q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, W, H, N, N)
    if bias is not None:  # the mask is laid into it, not over the logits: in the backward pass too it is then read once, not once a picture
        logits = logits + (bias if mask is None else folded(bias, mask))
    weights = logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(v.dtype)
    return F.dropout(weights, dropout) @ v


def _fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, scaled: bool, dropout: float) -> Tensor:
    batch, windows, heads = q.shape[:3]
    if bias is not None:
        bias = (bias if mask is None else folded(bias, mask)).to(v.dtype)
    if bias is None or bias.dim() == 3:
        # one window goes without reshaping, which exported is one operation less for an engine
        q, k, v = (t.squeeze(1) if windows == 1 else t.flatten(0, 1) for t in (q, k, v))  # (B·W, H, N, d)
        bias = None if bias is None else bias[None]
    elif batch and q.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.jit.is_tracing():
        # a picture at a time its windows are a batch of their own, and nothing need be copied
        each = [_torchs(*one, bias, scaled, dropout) for one in zip(q, k, v, strict=True)]
        # in the order torch computes them, which is the one the caller wants to see heads side by side in
        return torch.stack([one.transpose(1, 2) for one in each]).transpose(2, 3)
    else:  # windows fold into heads, so that the mask is one copy for the whole batch
        q, k, v = (t.flatten(1, 2) for t in (q, k, v))  # (B, W·H, N, d)
        bias = bias.flatten(0, 1)[None]  # (1, W·H, N, N)
    out = _torchs(q, k, v, bias, scaled, dropout)
    return out.unsqueeze(1) if windows == 1 else out.reshape(batch, windows, heads, *out.shape[-2:])


def _torchs(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scaled: bool, dropout: float) -> Tensor:
    """torch's function, without cuDNN where a bias meets gradients: at 64 and 576 tokens those can be NaN (pytorch#196678)."""
    guarded = bias is not None and q.device.type == "cuda" and torch.is_grad_enabled()
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]) if guarded else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=1.0 if scaled else None)


def folded(bias: Tensor, mask: Tensor) -> Tensor:
    """The bias of every window, -inf where its mask (W, N, N) is False: (H, N, N) -> (W, H, N, N)."""
    return bias.masked_fill(~mask[:, None], float("-inf"))


def first_row(q: Tensor, k: Tensor) -> Tensor:
    """The first row of softmax(q k / sqrt(d)), without the others: q, k (B, W, H, N, d) -> (B, W, H, N), float32 or wider."""
    logits = ((q[..., :1, :] * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).squeeze(-2)  # (B, W, H, N)
    return logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
