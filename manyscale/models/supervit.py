"""Super Vision Transformer: one weight set for many image sizes and numbers of tokens (arXiv 2205.11397).

    image at the setting's size -> patches + that size's positions -> pre-norm blocks, some of which drop the patches that
    the class token looks at least -> norm -> head on the class token

A setting is one static graph: its size decides the grid, its keep rate how many patches leave each dropping block.
Letters: B batch, (h, w) patches, P tokens that are no patches (class token first, then registers), N patches, C channels.
"""

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from manyscale.config import Preprocess, Setting, SuperViTConfig
from manyscale.layers.attention import Attention
from manyscale.layers.block import Mlp
from manyscale.models.features import Features
from manyscale.ops.images import resized
from manyscale.ops.positions import resize_positions
from manyscale.ops.tokens import by_score, put_back, take


class Stem(nn.Module):
    """Three convolutions that halve the picture, LV-ViT's (arXiv 2104.10858, section 4.1).

    Their batch norms share weights between image sizes and keep statistics for all sizes together or one set for each.
    """

    def __init__(self, channels: int, width: int, statistics: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 7, stride=2, padding=3, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1, self.norm2, self.norm3 = (SizedBatchNorm(width, statistics) for _ in range(3))

    def forward(self, x: Tensor, size: int) -> Tensor:
        """(B, 3, H, W) -> (B, C, H/2, W/2); `size` is the index of the statistics."""
        for conv, norm in ((self.conv1, self.norm1), (self.conv2, self.norm2), (self.conv3, self.norm3)):
            x = F.relu(norm(conv(x), size))
        return x


class SizedBatchNorm(nn.Module):
    """Batch norm with one weight and bias, and running statistics for each of several image sizes."""

    momentum, eps = 0.1, 1e-5

    def __init__(self, width: int, statistics: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))
        self.register_buffer("mean", torch.empty(statistics, width))
        self.register_buffer("variance", torch.empty(statistics, width))
        self.initialise()

    def initialise(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        nn.init.zeros_(self.mean)
        nn.init.ones_(self.variance)

    def forward(self, x: Tensor, size: int) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W), by the batch while training, else by the running statistics of `size`."""
        return F.batch_norm(x, self.mean[size], self.variance[size], self.weight, self.bias, self.training, self.momentum, self.eps)


class Gone(NamedTuple):
    """Patches that left."""

    tokens: Tensor  # (B, L, C), as they were after the attention of the block they left
    places: Tensor  # (B, L)


class Block(nn.Module):
    """A pre-norm block that can let patches go between its attention and its MLP."""

    def __init__(self, config: SuperViTConfig, drop_path: float) -> None:
        super().__init__()
        self.skip, self.fuse, self.prefix = config.skip, config.fuse, 1 + config.registers
        self.norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attention = Attention(config.width, config.heads, qkv_bias=config.qkv_bias)
        self.norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = Mlp(config.width, config.mlp_width, gelu=config.gelu)
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def forward(self, x: Tensor, places: Tensor, keep: int) -> tuple[Tensor, Tensor, Gone | None]:
        """Attention on all tokens, then the MLP on the `keep` patches that the class token looked at most.

        Args:
            x: (B, P + N, C).
            places: (B, N), where the patches are on the grid.

        Returns:
            (B, P + K, C), and the places (B, K) of the patches in it: best first, behind them the fused token, of place -1, where
            the net has one. And the patches that left; None where all stay, and then no score is computed.
        """
        gone = None
        if keep >= places.shape[1]:
            x = self._add(x, self.attention(self.norm1(x)))
        else:
            attended, scores = self.attention.with_scores(self.norm1(x))
            x = self._add(x, attended)
            x, places, gone = self._choose(x, places, scores[:, self.prefix :], keep)
        return self._add(x, self.mlp(self.norm2(x))), places, gone

    def _add(self, x: Tensor, branch: Tensor) -> Tensor:
        return torch.add(x, self.drop_path(branch), alpha=1 / self.skip)  # in one pass: a division of its own costs another

    def _choose(self, x: Tensor, places: Tensor, scores: Tensor, keep: int) -> tuple[Tensor, Tensor, Gone]:
        first, patches = x[:, : self.prefix], x[:, self.prefix :]
        stay, go = by_score(scores, keep)
        kept, here = take(patches, stay), places.gather(1, stay)
        gone = Gone(take(patches, go), places.gather(1, go))
        if self.fuse:
            weights = scores.gather(1, go)[..., None].to(x.dtype)
            kept = torch.cat([kept, (weights * gone.tokens).sum(dim=1, keepdim=True)], dim=1)
            here = F.pad(here, (0, 1), value=-1)
        return torch.cat([first, kept], dim=1), here, gone


class Seen(NamedTuple):
    """What the blocks make of an image."""

    tokens: Tensor  # (B, P + K, C) behind the last norm: class token, registers, and the patches that stayed
    places: Tensor  # (B, K) int64, where on the grid each of these is, row-major; -1: the fused token, which is nowhere
    kept: tuple[Tensor, ...]  # (B, K_i), the places left behind each block that dropped
    left: tuple[Gone, ...]  # the patches that each of them dropped
    grid: tuple[int, int]  # (h, w)


class Answers(NamedTuple):
    """The logits of both heads, for training."""

    whole: Tensor  # (B, classes), of the class token
    patches: Tensor | None  # (B, K, classes), of every patch that stayed; None: no such head


class SuperViT(nn.Module):
    """Super Vision Transformer: `model(images, setting=Setting(size=160, keep=0.7))`.

    Without a setting, images are taken at the size they have and every token is kept.

    Args:
        config: every number of the net; see `SuperViTConfig`.
    """

    def __init__(self, config: SuperViTConfig) -> None:
        super().__init__()
        self.config = config
        self.preprocess: Preprocess | None = None  # how its pictures are prepared, where the weights came with it
        self.labels: tuple[str, ...] = ()  # names of the classes, likewise
        width, conv = config.width, config.stem == "conv"
        statistics = len(config.sizes) if config.stem_statistics == "per-size" else 1
        patch = config.patch // 2 if conv else config.patch
        self.stem = Stem(config.channels, config.stem_width, statistics) if conv else None
        self.patch = nn.Conv2d(config.stem_width if conv else config.channels, width, kernel_size=patch, stride=patch)
        self.token = nn.Parameter(torch.empty(width))
        self.registers = nn.Parameter(torch.empty(config.registers, width)) if config.registers else None
        grids = config.grids if config.positions == "per-size" else (config.grid_of(config.size),)
        self.positions = nn.ParameterList(nn.Parameter(torch.empty(1 + prod(grid), width)) for grid in grids)  # the class token's first
        self.blocks = nn.ModuleList(Block(config, p) for p in torch.linspace(0, config.drop_path, config.depth, device="cpu").tolist())
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.head = nn.Linear(width, config.classes) if config.classes else nn.Identity()
        self.token_head = nn.Linear(width, config.classes) if config.classes and config.token_head is not None else None
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Set every parameter as DeiT does: linear layers, tokens and positions truncated normal 0.02, convolutions torch's own."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif hasattr(module, "reset_parameters"):
                module.reset_parameters()
            elif module is not self and hasattr(module, "initialise"):
                module.initialise()
        for parameter in (self.token, self.registers, *self.positions):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02)

    @property
    def layers(self) -> int:
        """Layers for layer-wise learning rates: what comes before the blocks, every block, and what follows the last."""
        return self.config.depth + 2

    def layer(self, name: str) -> int:
        """The layer of a parameter, 0 nearest the pixels."""
        part, *rest = name.split(".")
        if part == "blocks":
            return int(rest[0]) + 1
        return 0 if part in ("stem", "patch", "token", "registers", "positions") else self.layers - 1

    def tokens(self, x: Tensor, setting: Setting | None = None, mirrored: Tensor | None = None) -> Seen:
        """Images (B, 3, H, W) through the blocks.

        Args:
            setting: at which size, and how many tokens stay; images of another size are resized.
            mirrored: (h, w) bool: where it is True each image has the patches of its mirror image in the batch, the first those of
                the last, the second of the last but one (MixToken, arXiv 2104.10858, section 3.3).

        Raises:
            ValueError: images of another shape, or a setting that does not fit; see `SuperViTConfig.counts`.
        """
        config, setting = self.config, setting or Setting()
        if x.dim() != 4 or x.shape[1] != config.channels:
            raise ValueError(f"the model takes a batch of shape (B, {config.channels}, H, W), not {tuple(x.shape)}")
        size = setting.size or tuple(x.shape[2:])
        size = size if isinstance(size, tuple) else (size, size)
        keeps = dict(zip(config.drop_blocks, config.counts(setting, size), strict=True))
        x, grid = self._embed(resized(x, size, config.resize), size, mirrored)  # (B, 1 + h·w, C)
        if self.registers is not None:
            x = torch.cat([x[:, :1], self.registers.to(x.dtype).expand(x.shape[0], -1, -1), x[:, 1:]], dim=1)
        places = torch.arange(prod(grid), device=x.device).expand(x.shape[0], -1)
        kept, left = [], []
        for i, block in enumerate(self.blocks):
            x, places, gone = block(x, places, keeps.get(i, x.shape[1]))
            if gone is not None:
                kept.append(places)
                left.append(gone)
        return Seen(self.norm(x), places, tuple(kept), tuple(left), grid)

    def _embed(self, x: Tensor, size: tuple[int, int], mirrored: Tensor | None) -> tuple[Tensor, tuple[int, int]]:
        """Patches with their positions, behind the class token with its own: (B, 3, H, W) -> (B, 1 + h·w, C) and (h, w)."""
        sizes = [self.config.grid_of(s) for s in self.config.sizes]
        grid = self.config.grid_of(size)
        if self.stem is not None:  # of a size that has no statistics, those of the nearest
            nearest = min(range(len(sizes)), key=lambda i: abs(prod(sizes[i]) - prod(grid)))
            x = self.stem(x, nearest if self.config.stem_statistics == "per-size" else 0)
        x = self.patch(x)  # (B, C, h, w)
        if mirrored is not None:
            x = torch.where(mirrored, x.flip(0), x)
        if self.config.positions == "per-size":
            positions = self.positions[sizes.index(grid)]
        else:
            table, largest = self.positions[0], self.config.grid_of(self.config.size)
            positions = torch.cat([table[:1], resize_positions(table[1:], largest, grid, "bicubic")])
        x = torch.cat([self.token.to(x.dtype).expand(x.shape[0], 1, -1), x.flatten(2).transpose(1, 2)], dim=1)
        return x + positions, grid

    def features(self, x: Tensor, setting: Setting | None = None) -> Features:
        """Images (B, 3, H, W) -> the map of the last layer (B, C, h, w), and the class token (B, C), which the head reads.

        A patch that was dropped stands in the map as it was when it left. `setting` as in `tokens`.
        """
        seen = self.tokens(x, setting)
        prefix = 1 + self.config.registers
        stayed = put_back(seen.tokens[:, prefix:], seen.places, seen.grid)
        for gone, places in seen.left:
            stayed = stayed + put_back(self.norm(gone), places, seen.grid)
        return Features((stayed,), seen.tokens[:, 0])

    def answers(self, seen: Seen) -> Answers:
        """The logits of both heads on what `tokens` gave."""
        patches = None if self.token_head is None else self.token_head(seen.tokens[:, 1 + self.config.registers :])
        return Answers(self.head(seen.tokens[:, 0]), patches)

    def forward(self, x: Tensor, setting: Setting | None = None, *, mirrored: Tensor | None = None, both: bool = False) -> Tensor | Answers:
        """Images (B, 3, H, W) -> logits (B, classes); `setting` and `mirrored` as in `tokens`. `both`: the logits of both heads, `Answers`.

        Where the net has a second head, the largest logit of every class over the patches that stayed is added, times `token_head`.
        """
        answers = self.answers(self.tokens(x, setting, mirrored))
        if both:
            return answers
        if answers.patches is None:
            return answers.whole
        return answers.whole + self.config.token_head * answers.patches.amax(dim=1)

    def sized_norms(self) -> Iterator[SizedBatchNorm]:
        """The batch norms of a conv stem."""
        return (module for module in self.modules() if isinstance(module, SizedBatchNorm))
