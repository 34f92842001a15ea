"""Swin Transformer V1 and V2 on images and clips: one file, three switches.

    similarity {dot, cosine} x norm {pre, post, sandwich, res-post} x bias {table, linear-cpb, log-cpb}

V1 (arXiv 2103.14030) is dot, pre, table; V2 (arXiv 2111.09883) is cosine, res-post, log-cpb.
Letters: B batch, grid = (h, w) or (t, h, w) tokens, C channels, D_i channels of stage i, N tokens of a window.
"""

from functools import partial
from math import prod
from operator import index

import torch
from torch import Tensor, nn

from manyscale.config import Preprocess, Setting, SwinConfig
from manyscale.layers.attention import WindowAttention
from manyscale.layers.block import Block, Mlp
from manyscale.layers.kept import Kept, can_keep
from manyscale.layers.linear import watched
from manyscale.layers.patch import MaskToken, PatchEmbed, PatchMerge
from manyscale.layers.position_bias import ContinuousBias, TableBias
from manyscale.models.features import Features
from manyscale.ops.attention import Path
from manyscale.ops.images import resized
from manyscale.ops.kernel import Tables, tables
from manyscale.ops.linear import evaluated
from manyscale.ops.positions import relative_coordinates, relative_index
from manyscale.ops.windows import Layout, layout

TOKENS = 8192  # at a time, in evaluation on a CPU


class Stage(nn.Module):
    """Blocks on one grid, every second one with shifted windows, then the merging to the next grid."""

    def __init__(self, config: SwinConfig, stage: int, drop_path: list[float]) -> None:
        super().__init__()
        first, width, heads = sum(config.depths[:stage]), config.width * 2**stage, config.heads[stage]
        self.window, self.pretrained = config.windows[stage], config.pretrained_windows[stage]
        self.spacing = {"table": None, "linear-cpb": "linear", "log-cpb": "log"}[config.bias]
        self.mask_padding = config.padding == "mask"
        self.attention_path: Path = "auto"  # of its blocks; the kernels read tables, which are made here, once for all
        self.kept = Kept()
        self.blocks = nn.ModuleList()
        for i in range(config.depths[stage]):
            bias = ContinuousBias(config.axes, heads) if self.spacing else TableBias(self.window, heads)
            count = i + 1 if config.extra_norm_scope == "stage" else first + i + 1
            block = Block(
                width,
                WindowAttention(width, heads, config.similarity, bias, config.dropout),
                Mlp(width, int(width * config.mlp_ratio), config.dropout),
                config.norm,
                drop_path=drop_path[first + i],
                zero_init=config.zero_init,
                extra_norm=config.extra_norm_every > 0 and count % config.extra_norm_every == 0,
            )
            self.blocks.append(block)
        last = stage == len(config.depths) - 1
        self.merge = nn.Identity() if last else PatchMerge(width, config.merge_norm)

    def forward(self, x: Tensor, window: tuple[int, ...] | None = None) -> Tensor:
        """(B, *grid, C) -> (B, *grid, C), before the merging; `window`: another than the one the stage was built with."""
        grid, window = tuple(x.shape[1:-1]), window or self.window
        keep = can_keep(x)
        ordered = x.device.type == "cpu" and not torch.is_grad_enabled() and (keep or torch.compiler.is_exporting())
        made = partial(self._places, grid, window, x.device, ordered)
        key = (grid, window, x.device, ordered, self.attention_path)
        layouts, *places, cuts = self.kept.get(key, made) if keep else made()
        at_once = max(1, TOKENS // prod(grid))
        if not evaluated(x) or len(x) <= at_once or watched(*self.modules()):
            return self._through(x, layouts, places, cuts)
        # some pictures after others, whose tokens stay in the cache from block to block
        return torch.cat([self._through(part, layouts, places, cuts) for part in x.split(at_once)])

    def _through(self, x: Tensor, layouts: tuple[Layout, ...], places: list[Tensor | None], cuts: tuple[Tables | None, ...]) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x, layouts[i % 2], *places, cuts[i % 2])
        return x

    def _places(
        self, grid: tuple[int, ...], window: tuple[int, ...], device: torch.device, ordered: bool
    ) -> tuple[tuple[Layout, ...], Tensor, Tensor | None, tuple[Tables | None, ...]]:
        """What depends on the grid alone, for all blocks: both layouts, what a position bias reads, and for the kernels tables."""
        kernel = self.attention_path == "kernel"
        made = partial(layout, grid, window, mask_padding=self.mask_padding, masked=not kernel, ordered=ordered, device=device)
        layouts = plain, _ = made(shifted=False), made(shifted=True)
        cuts = tuple(tables(each, mask_padding=self.mask_padding, device=device) if kernel else None for each in layouts)
        index = relative_index(plain.window, plain.window if self.spacing else self.window, device)
        coordinates = relative_coordinates(plain.window, self.pretrained, self.spacing, device) if self.spacing else None
        return layouts, index, coordinates, cuts


class Swin(nn.Module):
    """Swin Transformer. Any image size goes in; `config.image_size` only decides the windows that are built.

    Args:
        config: every number of the net; see `SwinConfig`.
    """

    def __init__(self, config: SwinConfig) -> None:
        super().__init__()
        self.config = config
        self.preprocess: Preprocess | None = None  # how its pictures are prepared, where the weights came with it
        self.labels: tuple[str, ...] = ()  # names of the classes, likewise
        drop_path = torch.linspace(0, config.drop_path, sum(config.depths), device="cpu").tolist()
        widths = [config.width * 2**stage for stage in range(len(config.depths))]
        self.patch = PatchEmbed(config.channels, config.width, config.patches)
        self.mask_token = MaskToken(config.width) if config.mask_token else None
        self.drop = nn.Dropout(config.dropout)
        self.stages = nn.ModuleList(Stage(config, stage, drop_path) for stage in range(len(config.depths)))
        self.level_norms = nn.ModuleList(nn.LayerNorm(width) for width in widths) if config.level_norms else None
        self.norm = nn.LayerNorm(widths[-1])
        self.head = nn.Linear(widths[-1], config.classes) if config.classes else nn.Identity()
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Set every parameter as the official code does: linear layers truncated normal 0.02 with bias 0, residual norms 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif hasattr(module, "reset_parameters"):
                module.reset_parameters()
        for module in self.modules():  # what a layer says of its own parameters holds over the rule above
            if module is not self and hasattr(module, "initialise"):
                module.initialise()

    @property
    def layers(self) -> int:
        """Layers for layer-wise learning rates: the patches, every block, and what follows the last."""
        return sum(self.config.depths) + 2

    def layer(self, name: str) -> int:
        """The layer of a parameter, 0 nearest the pixels (official SimMIM fine-tuning): a merging goes with the block before it."""
        part, *rest = name.split(".")
        if part in ("patch", "mask_token"):
            return 0
        if part != "stages":
            return self.layers - 1
        stage, kind = int(rest[0]), rest[1]
        before = sum(self.config.depths[:stage])
        return before + int(rest[2]) + 1 if kind == "blocks" else before + self.config.depths[stage]

    def tokens(self, x: Tensor, mask: Tensor | None = None, setting: Setting | None = None) -> list[Tensor]:
        """The tokens of every stage before its merging, (B, *grid_i, D_i), not normalised.

        Args:
            mask: (B, *grid) bool, the patches to hide; only for a model with a mask token.
            setting: at which size and in which windows; images of another size are resized. A larger window than the one
                the bias was learnt for needs a bias network (log-cpb).

        Raises:
            ValueError: images or a mask of another shape, or a setting that this net cannot be run at.
        """
        if x.dim() != self.config.axes + 2 or x.shape[1] != self.config.channels:
            shape = "(B, {}, {}H, W)".format(self.config.channels, "T, " if self.config.axes == 3 else "")
            raise ValueError(f"the model takes a batch of shape {shape}, not {tuple(x.shape)}")
        for size in x.shape[2:]:
            index(size)  # torch.compile makes a graph of one image size, of any batch: with symbols for it, windows and masks take minutes
        windows = [None] * len(self.stages)
        if setting is not None:
            windows = list(self.config.windows_at(setting))
            size = setting.size or tuple(x.shape[2:])
            x = resized(x, size if isinstance(size, tuple) else (size, size))
        x = self.patch(x)
        if mask is not None:
            if self.mask_token is None:
                raise ValueError("a mask, but the model has no mask token; make it with mask_token=True")
            if mask.shape != x.shape[:-1]:
                raise ValueError(f"the mask has shape {tuple(mask.shape)}, the patches {tuple(x.shape[:-1])}; they must be equal")
            x = self.mask_token(x, mask)
        x = self.drop(x)
        levels = []
        for i, stage in enumerate(self.stages):
            x = stage(x, windows[i])
            levels.append(x)
            if i < len(self.stages) - 1:
                x = stage.merge(x)
        return levels

    def features(self, x: Tensor, mask: Tensor | None = None, setting: Setting | None = None) -> Features:
        """A pyramid: images (B, 3, H, W) or clips (B, 3, T, H, W) -> `Features`; `mask` and `setting` as in `tokens`.

        Stages come before each merging; pooled is the mean of the last one's normalised tokens.
        """
        levels = self.tokens(x, mask, setting)
        maps = (self.level_norms[i](level) if self.level_norms else level for i, level in enumerate(levels))
        pooled = self.norm(levels[-1]).flatten(1, -2).mean(dim=1)
        return Features(tuple(level.movedim(-1, 1) for level in maps), pooled)

    def last_map(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The last stage, normalised, as a map: (B, 3, H, W) -> (B, D, h, w). What `Features.pooled` is the mean of."""
        return self.norm(self.tokens(x, mask)[-1]).movedim(-1, 1)

    def forward(self, x: Tensor, mask: Tensor | None = None, setting: Setting | None = None) -> Tensor:
        """Images (B, 3, H, W) or clips (B, 3, T, H, W) -> logits (B, classes); `mask` and `setting` as in `tokens`."""
        return self.head(self.features(x, mask, setting).pooled)
