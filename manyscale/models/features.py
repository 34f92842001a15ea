"""What every backbone gives."""

from typing import NamedTuple

from torch import Tensor


class Features(NamedTuple):
    """What a backbone sees."""

    stages: tuple[Tensor, ...]  # (B, D_i, [t_i,] h_i, w_i), finest first; a ViT has one
    pooled: Tensor  # (B, D): one vector of the whole, what the classifier reads
