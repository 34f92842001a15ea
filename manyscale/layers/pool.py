"""From the tokens of a picture to one vector. Letters: B batch, N tokens, C channels."""

import torch
from torch import Tensor, nn

from manyscale.layers.attention import CrossAttention
from manyscale.layers.block import Mlp
from manyscale.ops.linear import Gelu


class AttentionPool(nn.Module):
    """One learnt query attends the tokens, then a residual MLP: the MAP head (arXiv 1810.00825, as ViT's code has it).

    The query has no norm and no residual: what attention returns takes its place. The tokens come normalised.
    """

    def __init__(self, width: int, heads: int, mlp_width: int, *, gelu: Gelu, eps: float) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.empty(1, width))
        self.attention = CrossAttention(width, heads)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, mlp_width, gelu=gelu)
        self.initialise()

    def initialise(self) -> None:
        nn.init.xavier_uniform_(self.probe)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, C)"""
        x = self.attention(self.probe.to(x.dtype).expand(x.shape[0], -1, -1), x)  # (B, 1, C)
        return (x + self.mlp(self.norm(x)))[:, 0]
