"""Residual branches with every norm placement of the Swin V2 paper (Table 7), and the block made of two of them."""

from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from manyscale.layers.linear import project, watched, with_gelu
from manyscale.ops.linear import Gelu, evaluated

Norm = Literal["pre", "post", "sandwich", "res-post"]


ROWS = 8192  # tokens at a time, in evaluation on a CPU: 2,048 measured 4 to 7 % slower, all at once too


class Mlp(nn.Module):
    """Linear, GELU (exact, or its tanh approximation), linear."""

    def __init__(self, width: int, hidden: int, dropout: float = 0.0, *, gelu: Gelu = "exact") -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.drop = nn.Dropout(dropout)
        self.act = nn.GELU(approximate="none" if gelu == "exact" else "tanh")

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)"""
        if not evaluated(x) or x[..., 0].numel() <= ROWS or watched(*self.modules()):
            return self._layers(x)
        # a part of the tokens after another: what is hidden stays in the cache, and takes no fresh pages of memory
        return torch.cat([self._layers(part) for part in x.flatten(0, -2).split(ROWS)]).view(x.shape)

    def _layers(self, x: Tensor) -> Tensor:
        return self.drop(project(self.fc2, self.drop(with_gelu(self.fc1, self.act, x))))


class Residual(nn.Module):
    """x + branch(x) with its norm: before the branch (pre), at its end (res-post), both (sandwich), or after the sum (post).

    `zero_init` starts the norm at a branch's end at zero, weight and bias: the block begins as the identity.
    """

    def __init__(
        self, branch: nn.Module, width: int, norm: Norm, drop_path: float = 0.0, zero_init: bool = False, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.branch, self.zero_init = branch, zero_init
        self.norm_in = nn.LayerNorm(width, eps=eps) if norm in ("pre", "sandwich") else nn.Identity()
        self.norm_out = nn.LayerNorm(width, eps=eps) if norm in ("res-post", "sandwich") else nn.Identity()
        self.norm_sum = nn.LayerNorm(width, eps=eps) if norm == "post" else nn.Identity()
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def initialise(self) -> None:
        if self.zero_init and isinstance(self.norm_out, nn.LayerNorm):
            nn.init.zeros_(self.norm_out.weight)
            nn.init.zeros_(self.norm_out.bias)

    def forward(self, x: Tensor, *context: object) -> Tensor:
        """(..., C) -> (..., C); `context` goes to the branch."""
        return self.norm_sum(x + self.drop_path(self.norm_out(self.branch(self.norm_in(x), *context))))


class Block(nn.Module):
    """Attention and MLP, each a residual branch; in the largest nets a norm on the main branch after them."""

    def __init__(
        self,
        width: int,
        attention: nn.Module,
        mlp: nn.Module,
        norm: Norm,
        *,
        drop_path: float,
        zero_init: bool = False,
        extra_norm: bool = False,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.attention = Residual(attention, width, norm, drop_path, zero_init, eps)
        self.mlp = Residual(mlp, width, norm, drop_path, zero_init, eps)
        self.extra_norm = nn.LayerNorm(width) if extra_norm else nn.Identity()

    def forward(self, x: Tensor, *context: object) -> Tensor:
        """(..., C) -> (..., C); `context` goes to the attention."""
        return self.extra_norm(self.mlp(self.attention(x, *context)))
