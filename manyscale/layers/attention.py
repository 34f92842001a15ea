"""Attention inside windows with either similarity (Swin V1 section 3.2, V2 section 3.2), over all tokens, and of a query on tokens."""

import math
from typing import Literal, Self

import torch
from torch import Tensor, nn

from manyscale.layers.kept import Kept, can_keep
from manyscale.layers.linear import project, project_with, watched
from manyscale.ops.attention import BUDGET, Path, attend, first_row, folded
from manyscale.ops.kernel import Tables, windowed
from manyscale.ops.linear import evaluated
from manyscale.ops.unit import unit_
from manyscale.ops.windows import Layout, enter, leave

FOLDED = 128 * 2**20  # bytes of a block's bias with its mask, at most, to be kept


class WindowAttention(nn.Module):
    """Multi-head attention inside windows, from a grid of tokens to the same grid.

    Dot: q k / sqrt(d), biases on q, k and v. Cosine: cos(q, k) exp(s) with one learnt s per head, capped at ln 100
    (temperature 0.01); no bias on k, which under cosine would be another function.
    """

    def __init__(self, width: int, heads: int, similarity: Literal["dot", "cosine"], bias: nn.Module, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.similarity, self.dropout = heads, similarity, dropout
        self.attention_path: Path = "auto"
        self.attention_budget = BUDGET
        self.qkv = nn.Linear(width, 3 * width, bias=similarity == "dot")
        if similarity == "cosine":
            self.q_bias = nn.Parameter(torch.empty(width))
            self.v_bias = nn.Parameter(torch.empty(width))
            self.logit_scale = nn.Parameter(torch.empty(heads, 1, 1))
        self.bias = bias
        self.kept = Kept()
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(dropout)
        self.initialise()

    def initialise(self) -> None:
        if self.similarity == "cosine":
            nn.init.zeros_(self.q_bias)
            nn.init.zeros_(self.v_bias)
            nn.init.constant_(self.logit_scale, math.log(10))

    def forward(self, x: Tensor, layout: Layout, index: Tensor, coordinates: Tensor | None, tables: Tables | None = None) -> Tensor:
        """(B, *grid, C) -> (B, *grid, C)

        Args:
            layout: how the grid is cut.
            index, coordinates: what the position bias reads.
            tables: the layout as the kernels read it, for that path.
        """
        scale = None
        if self.similarity == "cosine":  # float32 here: a half-precision exp(ln 100) is off by more than the logits' own rounding
            scale = self.logit_scale.to(torch.promote_types(self.logit_scale.dtype, torch.float32)).clamp(max=math.log(100)).exp()
        dropout = self.dropout if self.training else 0.0
        if tables is not None:
            if dropout:
                raise ValueError("field `attention`: kernel keeps no attention weights that it could drop; give dropout 0 or another path")
            qkv = self._qkv(x).flatten(1, -2).unflatten(-1, (3, self.heads, -1))  # (B, T, 3, H, d)
            added, _ = self._added(layout, index, coordinates, qkv)
            out = windowed(qkv, tables, added, scale)  # (B, T, H, d)
            return self.proj_drop(project(self.proj, out.flatten(-2).unflatten(1, layout.grid)))
        qkv = self._qkv(enter(x, layout))  # (B, W, N, 3C)
        qkv = qkv.unflatten(-1, (3, self.heads, -1))  # (B, W, N, 3, H, d)
        path, budget = self.attention_path, self.attention_budget
        normed = scale is not None and path != "sequential" and evaluated(qkv)
        if normed:  # as they lie, where nobody needs them as they were
            unit_(qkv[..., :2, :, :], torch.stack([scale, torch.ones_like(scale)])[..., 0])
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5)  # (B, W, H, N, d) each
        added, mask = self._added(layout, index, coordinates, v)
        out = attend(q, k, v, added, mask, scale=scale, normed=normed, dropout=dropout, path=path, budget=budget)
        out = out.transpose(2, 3).flatten(-2)  # (B, W, N, C)
        return self.proj_drop(leave(project(self.proj, out), layout))  # in this order what attention keeps is what the projection keeps

    def _qkv(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., 3C)"""
        if self.similarity == "dot":
            return project(self.qkv, x)
        return project_with(self.qkv, x, torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias]))

    def _added(self, layout: Layout, index: Tensor, coordinates: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """The position bias (H, N, N), and the mask.

        In evaluation the bias is computed once for each layout (the paper's "pre-computed and stored", section 3.3), in the type of `like`
        and with the mask laid into it where that is small enough to keep.
        """
        parts, parameters = tuple(self.bias.modules()), tuple(self.bias.parameters())
        if self.training or torch.is_grad_enabled() or watched(*parts) or not can_keep(like, parameters):
            return self.bias(index, coordinates), layout.mask

        def made() -> tuple[Tensor, Tensor | None]:
            bias = self.bias(index, coordinates).to(like.dtype).contiguous()
            windows = 0 if layout.mask is None else len(layout.mask)
            if not windows or self.attention_path in ("sequential", "kernel") or windows * bias.numel() * bias.itemsize > FOLDED:
                return bias, layout.mask
            return folded(bias, layout.mask), None

        key = (layout[:4], like.dtype, like.device, torch.is_autocast_enabled(like.device.type), self.attention_path, *map(type, parts))
        return self.kept.get(key, made, parameters)

    def train(self, mode: bool = True) -> Self:
        """As any module; and forget what was kept."""
        self.kept.forget()
        return super().train(mode)


class Attention(nn.Module):
    """Multi-head attention of all tokens on all (ViT, arXiv 2010.11929, appendix A)."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0, *, qkv_bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.attention_path: Path = "auto"
        self.attention_budget = BUDGET
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)"""
        return self._attend(*self._split(x))

    def with_scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and how much the first token looks at each, the mean over heads: (B, N, C) -> (B, N, C), (B, N)"""
        q, k, v = self._split(x)
        return self._attend(q, k, v), first_row(q, k)[:, 0].mean(dim=1)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = project(self.qkv, x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)[:, :, None]  # (B, 1, H, N, d) each
        return q, k, v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attend(q, k, v, path=self.attention_path, budget=self.attention_budget)
        return self.proj_drop(project(self.proj, out.squeeze(1).transpose(1, 2).flatten(-2)))


class CrossAttention(nn.Module):
    """Multi-head attention of queries on tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_path: Path = "auto"
        self.attention_budget = BUDGET
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, queries: Tensor, x: Tensor) -> Tensor:
        """Queries (B, M, C) on tokens (B, N, C) -> (B, M, C)"""
        q = project(self.q, queries).unflatten(-1, (self.heads, -1)).transpose(1, 2)[:, None]  # (B, 1, H, M, d)
        k, v = project(self.kv, x).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)[:, :, None]  # (B, 1, H, N, d) each
        out = attend(q, k, v, path=self.attention_path, budget=self.attention_budget)
        return project(self.proj, out.squeeze(1).transpose(1, 2).flatten(-2))
