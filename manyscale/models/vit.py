"""Vision Transformer from Ti to G/14, as "Scaling Vision Transformers" has it (arXiv 2106.04560; arXiv 2010.11929).

    patches + positions [, class token] -> pre-norm blocks -> norm -> pool {token, gap, map} [-> tanh layer] -> head

Letters: B batch, (h, w) patches, N tokens (with the class token, where there is one), C channels, D of the pooled vector.
"""

import math

import torch
from torch import Tensor, nn

from manyscale.config import Preprocess, ViTConfig
from manyscale.layers.attention import Attention
from manyscale.layers.block import Block, Mlp
from manyscale.layers.patch import MaskToken
from manyscale.layers.pool import AttentionPool
from manyscale.models.features import Features
from manyscale.ops.positions import resize_positions, sincos2d


class ViT(nn.Module):
    """Vision Transformer. Any image size goes in: positions are resized; what no patch covers at the far ends is not looked at.

    Args:
        config: every number of the net; see `ViTConfig`.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.preprocess: Preprocess | None = None  # how its pictures are prepared, where the weights came with it
        self.labels: tuple[str, ...] = ()  # names of the classes, likewise
        width, eps = config.width, config.norm_eps
        self.patch = nn.Conv2d(config.channels, width, kernel_size=config.patches, stride=config.patches)
        self.mask_token = MaskToken(width) if config.mask_token else None
        self.position = nn.Parameter(torch.empty(math.prod(config.grid), width)) if config.position == "learned" else None
        self.token = nn.Parameter(torch.empty(width)) if config.pool == "token" else None
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            Block(
                width,
                Attention(width, config.heads, config.dropout),
                Mlp(width, config.mlp_width, config.dropout, gelu=config.gelu),
                "pre",
                drop_path=drop_path,
                eps=eps,
            )
            for drop_path in torch.linspace(0, config.drop_path, config.depth, device="cpu").tolist()
        )
        self.norm = nn.LayerNorm(width, eps=eps)
        self.pool = AttentionPool(width, config.heads, config.mlp_width, gelu=config.gelu, eps=eps) if config.pool == "map" else None
        self.pre_logits = nn.Linear(width, config.pre_logits) if config.pre_logits else None
        self.head = nn.Linear(config.pre_logits or width, config.classes) if config.classes else nn.Identity()
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Set every parameter as the original flax code does.

        Every matrix of attention and MLP on its own by Xavier (timm takes q, k and v as one: root 2 too small), MLP biases
        N(0, 1e-6), the patches LeCun normal, positions N(0, 1 / sqrt(C)), the class token and the classifier zero.
        """
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                parts = {"qkv": 3, "kv": 2}.get(name.rpartition(".")[2], 1)
                for part in module.weight.chunk(parts):
                    nn.init.xavier_uniform_(part)
                nn.init.zeros_(module.bias)
                if name.rpartition(".")[2] in ("fc1", "fc2"):
                    nn.init.normal_(module.bias, std=1e-6)
            elif hasattr(module, "reset_parameters"):
                module.reset_parameters()
            elif module is not self and hasattr(module, "initialise"):
                module.initialise()
        _lecun_normal(self.patch.weight)
        if self.position is not None:
            nn.init.normal_(self.position, std=self.config.width**-0.5)
        if self.token is not None:
            nn.init.zeros_(self.token)
        if self.pre_logits is not None:
            _lecun_normal(self.pre_logits.weight)
        if self.config.classes:
            nn.init.zeros_(self.head.weight)
            nn.init.constant_(self.head.bias, self.config.head_bias)

    @property
    def layers(self) -> int:
        """Layers for layer-wise learning rates: the patches with positions and token, every block, and what follows the last."""
        return self.config.depth + 2

    def layer(self, name: str) -> int:
        """The layer of a parameter, 0 nearest the pixels."""
        part, *rest = name.split(".")
        if part == "blocks":
            return int(rest[0]) + 1
        return 0 if part in ("patch", "position", "token", "mask_token") else self.layers - 1

    def tokens(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, tuple[int, int]]:
        """All tokens behind the last norm, (B, N, C), the class token first where there is one, and the grid (h, w) of the others.

        Args:
            mask: (B, h, w) bool, the patches to hide; only for a model with a mask token.
        """
        if x.dim() != 4 or x.shape[1] != self.config.channels:
            raise ValueError(f"the model takes a batch of shape (B, {self.config.channels}, H, W), not {tuple(x.shape)}")
        if any(size < patch for size, patch in zip(x.shape[2:], self.config.patches, strict=True)):
            raise ValueError(f"an image of {tuple(x.shape[2:])} pixels holds no patch of {self.config.patches}")
        x = self.patch(x).permute(0, 2, 3, 1)  # (B, h, w, C)
        grid = tuple(x.shape[1:3])
        if mask is not None:
            if self.mask_token is None:
                raise ValueError("a mask, but the model has no mask token; make it with mask_token=True")
            if mask.shape != x.shape[:-1]:
                raise ValueError(f"the mask has shape {tuple(mask.shape)}, the patches {tuple(x.shape[:-1])}; they must be equal")
            x = self.mask_token(x, mask)
        x = x.flatten(1, 2)  # (B, h·w, C)
        if self.position is not None:
            x = x + resize_positions(self.position, self.config.grid, grid, self.config.position_resize)
        elif self.config.position == "sincos2d":
            x = x + sincos2d(grid, self.config.width, device=x.device).to(x.dtype)
        if self.token is not None:
            x = torch.cat([self.token.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1)  # (B, 1 + h·w, C)
        x = self.drop(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x), grid

    def features(self, x: Tensor, mask: Tensor | None = None) -> Features:
        """Images (B, 3, H, W) -> the map of the last layer (B, C, h, w), and the vector that the head reads; `mask` as in `tokens`."""
        x, grid = self.tokens(x, mask)
        patches = x[:, 1:] if self.token is not None else x
        if self.pool is not None:
            pooled = self.pool(x)
        else:
            pooled = x[:, 0] if self.token is not None else x.mean(dim=1)
        if self.pre_logits is not None:
            pooled = self.pre_logits(pooled).tanh()
        return Features((patches.transpose(1, 2).unflatten(2, grid),), pooled)

    def last_map(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The last layer, normalised, as a map: (B, 3, H, W) -> (B, C, h, w)."""
        x, grid = self.tokens(x, mask)
        patches = x[:, 1:] if self.token is not None else x
        return patches.transpose(1, 2).unflatten(2, grid)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Images (B, 3, H, W) -> logits (B, classes); `mask` as in `tokens`."""
        return self.head(self.features(x, mask).pooled)


def _lecun_normal(weight: Tensor) -> None:
    """Normal with variance 1 / fan-in, cut off at two deviations and widened to make up for it, as jax.nn.initializers has it."""
    std = weight[0].numel() ** -0.5 / 0.87962566103423978
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
