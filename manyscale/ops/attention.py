"""One door to every attention path.

Letters: B batch, W windows, H heads, N tokens of a window, d channels of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from manyscale.config.memory import AttentionPath as Path
from manyscale.ops.sequential import sequential

BUDGET = 64 * 2**20


def unit(x: Tensor, length: Tensor | float = 1.0) -> Tensor:
    """`x` at `length` along its last axis, in float32 or wider. A zero vector stays zero, and so does its gradient.

    A padded token is one. In float16 the peers' epsilon of 1e-12 is zero, which makes it 0 / 0; and a larger epsilon
    still makes its gradient, 1 / epsilon, infinite. One product with the small tensor of factors: dividing, as the peers
    do, costs twice the passes over `x` in the backward pass.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
    found = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * (length / found.masked_fill(found < 1e-6, torch.inf))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    dropout: float = 0.0,
    path: Path = "auto",
    budget: int = BUDGET,
) -> Tensor:
    """softmax(q k^T + bias, masked) v in every window.

    Args:
        q, k, v: (B, W, H, N, d); q carries the scale of the logits, and without a mask may have other tokens than k and v.
        bias: (H, N, N), added to the logits, or (W, H, N, N) with the mask laid into it (`folded`); None: none, and then no mask either.
        mask: (W, N, N) bool, True where the row may attend the column; at least one True a row. Masked logits are -inf:
            the official -100 can be outbid by cosine logits that span up to 216.
        dropout: probability of dropping an attention weight.
        path: `reference` is plain; `fused` is torch's scaled_dot_product_attention; `sequential` works on one chunk after another,
            in either pass; `auto` is fused where the bias needs no gradient (with one, the fused kernels refuse or store its full
            size: pytorch#145208).
        budget: bytes that the logits of a chunk may take, of the sequential path.

    Returns:
        (B, W, H, N, d)

    Raises:
        ValueError: sequential with dropout, or with a budget that one row exceeds.
    """
    if path == "sequential":
        if dropout:
            raise ValueError("field `attention`: sequential keeps no attention weights that it could drop; give dropout 0 or another path")
        return sequential(q.to(v.dtype), k.to(v.dtype), v, bias, mask, budget)
    if path == "auto":
        path = "reference" if bias is not None and bias.requires_grad and torch.is_grad_enabled() else "fused"
    return {"reference": _reference, "fused": _fused}[path](q, k, v, bias, mask, dropout)


def _reference(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, dropout: float) -> Tensor:
    logits = q @ k.transpose(-2, -1)  # (B, W, H, N, N)
    if bias is not None:
        logits = logits + bias
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None], float("-inf"))
    weights = logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(v.dtype)
    return F.dropout(weights, dropout) @ v


def _fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, dropout: float) -> Tensor:
    batch, windows, heads = q.shape[:3]
    q, k, bias = q.to(v.dtype), k.to(v.dtype), None if bias is None else bias.to(v.dtype)
    if mask is not None and bias is not None:
        bias = folded(bias, mask)
    if bias is None or bias.dim() == 3:
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))  # (B·W, H, N, d)
        bias = None if bias is None else bias[None]
    else:  # windows fold into heads, so that the mask is one copy for the whole batch
        q, k, v = (t.flatten(1, 2) for t in (q, k, v))  # (B, W·H, N, d)
        bias = bias.flatten(0, 1)[None]  # (1, W·H, N, N)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=1.0)
    return out.reshape(batch, windows, heads, *out.shape[-2:])


def folded(bias: Tensor, mask: Tensor) -> Tensor:
    """The bias of every window, -inf where its mask (W, N, N) is False: (H, N, N) -> (W, H, N, N)."""
    return bias.masked_fill(~mask[:, None], float("-inf"))


def first_row(q: Tensor, k: Tensor) -> Tensor:
    """The first row of softmax(q k^T), without the others: q, k (B, W, H, N, d) -> (B, W, H, N), float32 or wider."""
    logits = (q[..., :1, :] @ k.transpose(-2, -1)).squeeze(-2)  # (B, W, H, N)
    return logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
