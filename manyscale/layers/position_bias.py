"""Relative position bias of a window: a learnt table, or a small network on coordinates (Swin V2 section 3.3)."""

from math import prod

import torch
from torch import Tensor, nn


class TableBias(nn.Module):
    """One learnt number per offset and head (Swin V1 equation 4)."""

    def __init__(self, window: tuple[int, ...], heads: int) -> None:
        super().__init__()
        self.window = window  # the table's; a smaller one reads its middle
        self.table = nn.Parameter(torch.empty(prod(2 * w - 1 for w in window), heads))
        self.initialise()

    def initialise(self) -> None:
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, index: Tensor, coordinates: Tensor | None) -> Tensor:
        """(N, N) index into the table -> (heads, N, N)."""
        return self.table.T[:, index]  # read in this order, rows of logits meet rows of bias: what is added to them all vectorises


class ContinuousBias(nn.Module):
    """A two-layer network from offset to bias, so that a window never seen has one too (equation 3).

    The result is 16 sigmoid(.), which the paper leaves out and every official model has.
    """

    def __init__(self, axes: int, heads: int, hidden: int = 512) -> None:
        super().__init__()
        self.fc1 = nn.Linear(axes, hidden)
        self.fc2 = nn.Linear(hidden, heads, bias=False)

    def forward(self, index: Tensor, coordinates: Tensor) -> Tensor:
        """(N, N) index into (T, axes) coordinates -> (heads, N, N)."""
        table = self.fc2(torch.relu(self.fc1(coordinates.to(self.fc1.weight.dtype))))  # (T, heads)
        return (16 * torch.sigmoid(table)).T[:, index]
