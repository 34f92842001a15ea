"""The architectures' settings. Each class checks its own values when it is made."""

import math
from dataclasses import dataclass, replace
from typing import Literal

from manyscale.config.checks import require
from manyscale.config.supervit import Setting, Size, SuperViTConfig

Windows = int | tuple[int | tuple[int, ...], ...]
"""One number; one per axis; one per stage; or, per stage, one per axis. See `SwinConfig.windows`."""


@dataclass(frozen=True, kw_only=True)
class SwinConfig:
    """Swin Transformer V1 and V2 (arXiv 2103.14030, 2111.09883), on images or clips. The defaults are Swin V2-T."""

    image_size: Size = 256  # pixels the windows are laid out for; forward takes any size. (t, h, w) makes a video model
    patch: Size = 4
    channels: int = 3
    classes: int = 1000  # 0: no head, `forward` returns the pooled features
    width: int = 96  # C, channels of the first stage; every later stage doubles it
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    window: Windows = 8
    pretrained_window: Windows = 0  # the window the bias network learnt its coordinates at; 0: its own window
    mlp_ratio: float = 4.0
    similarity: Literal["dot", "cosine"] = "cosine"  # V1: dot; V2: cosine (paper section 3.2)
    norm: Literal["pre", "post", "sandwich", "res-post"] = "res-post"  # V1: pre; V2: res-post (section 3.2)
    bias: Literal["table", "linear-cpb", "log-cpb"] = "log-cpb"  # V1: table; V2: log-cpb (section 3.3)
    merge_norm: Literal["before", "after"] = "after"  # of the patch merging's linear layer. V1: before; V2: after
    zero_init: bool = True  # norms that close a residual branch start at zero (official V2 code; not in the paper)
    extra_norm_every: int = 0  # V2-H and V2-G: a norm on the main branch every 6 blocks (section 3.2); 0: none
    extra_norm_scope: Literal["stage", "model"] = "stage"  # where those blocks are counted from
    padding: Literal["mask", "attend"] = "mask"  # padded tokens: masked out, or attended as every other code does
    level_norms: bool = False  # one LayerNorm per pyramid level in `features`, for dense heads
    mask_token: bool = False  # a learnt stand-in for hidden patches (SimMIM): `forward(x, mask)` then takes a mask
    drop_path: float = 0.0  # stochastic depth of the last block; linear from 0 at the first
    dropout: float = 0.0  # of attention weights, projections and MLPs

    def __post_init__(self) -> None:
        for name in ("channels", "width"):
            require(getattr(self, name) >= 1, name, f"{getattr(self, name)} must be at least 1")
        require(self.classes >= 0, "classes", f"{self.classes} must be 0 (no head) or more")
        require(len(self.depths) >= 1 and min(self.depths) >= 1, "depths", f"{self.depths}: give each stage at least one block")
        require(len(self.heads) == len(self.depths), "heads", f"{self.heads} must have one number per stage, {len(self.depths)}")
        for stage, heads in enumerate(self.heads):
            width = self.width * 2**stage
            require(heads >= 1 and width % heads == 0, "heads", f"{heads} of stage {stage + 1} must divide its width {width}")
        require(self.axes in (2, 3), "image_size", f"{self.image_size}: give one number, (height, width) or (frames, height, width)")
        require(min(self.size) >= 1, "image_size", f"{self.image_size} must be at least 1 on every axis")
        require(len(self.patches) == self.axes and min(self.patches) >= 1, "patch", f"{self.patch}: give one number >= 1, or {self.axes}")
        require(min(map(min, self.built_windows("window"))) >= 1, "window", f"{self.window} must be at least 1 everywhere; 8 is usual")
        require(
            min(map(min, self.built_windows("pretrained_window"))) >= 0,
            "pretrained_window",
            f"{self.pretrained_window} must not be negative",
        )
        require(1 <= self.width * self.mlp_ratio < math.inf, "mlp_ratio", f"{self.mlp_ratio} must leave the MLP a channel; 4 is usual")
        require(self.extra_norm_every >= 0, "extra_norm_every", f"{self.extra_norm_every} must be 0 (none) or more")
        for name in ("drop_path", "dropout"):
            require(0 <= getattr(self, name) < 1, name, f"{getattr(self, name)} must be in [0, 1)")

    @property
    def layout(self) -> dict[str, Size | Windows]:
        """What a transfer changes: where and how the net looks, not what it knows."""
        return {"image_size": self.image_size, "window": self.window}

    @property
    def last(self) -> tuple[int, int]:
        """Channels of the last map, and its stride in pixels across."""
        factor = 2 ** (len(self.depths) - 1)
        return self.width * factor, self.patches[-1] * factor

    @property
    def size(self) -> tuple[int, ...]:
        """`image_size` per axis."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size,) * 2

    @property
    def axes(self) -> int:
        """2 for images, 3 for clips."""
        return len(self.size)

    @property
    def patches(self) -> tuple[int, ...]:
        """`patch` per axis."""
        return self.patch if isinstance(self.patch, tuple) else (self.patch,) * self.axes

    @property
    def grids(self) -> tuple[tuple[int, ...], ...]:
        """Tokens per axis of every stage at `image_size`. Merging halves height and width, never time."""
        grid = tuple(-(-size // patch) for size, patch in zip(self.size, self.patches, strict=True))
        grids = [grid]
        for _ in self.depths[1:]:
            grids.append(grids[-1][:-2] + tuple(-(-g // 2) for g in grids[-1][-2:]))
        return tuple(grids)

    def built_windows(self, name: str) -> tuple[tuple[int, ...], ...]:
        """`window` or `pretrained_window` as one tuple per stage of one number per axis, as given, not yet clipped.

        A flat tuple as long as there are axes is per axis; one as long as there are stages is per stage. Where both
        fit (two stages of images), it is per axis: write the per-stage form nested, ((8, 8), (4, 4)).
        """
        given, stages = getattr(self, name), len(self.depths)
        if isinstance(given, tuple) and len(given) == 1 and isinstance(given[0], tuple):
            given = given[0]  # how the command line reads `--window 8 8`
        if isinstance(given, tuple) and len(given) == self.axes and all(isinstance(w, int) for w in given):
            return (given,) * stages
        each = given if isinstance(given, tuple) else (given,) * stages
        each = tuple(w if isinstance(w, tuple) else (w,) * self.axes for w in each)
        fits = len(each) == stages and all(len(w) == self.axes for w in each)
        require(fits, name, f"{given} fits neither {self.axes} axes nor {stages} stages")
        return each

    @property
    def windows(self) -> tuple[tuple[int, ...], ...]:
        """The window of every stage and axis, clipped to the stage's grid at `image_size` (official code, per axis as timm)."""
        pairs = zip(self.built_windows("window"), self.grids, strict=True)
        return tuple(tuple(min(w, g) for w, g in zip(window, grid, strict=True)) for window, grid in pairs)

    def windows_at(self, setting: Setting) -> tuple[tuple[int, ...] | None, ...]:
        """The windows that a setting asks of every stage, not yet clipped; None: the stage's own.

        Raises:
            ValueError: a setting that this net cannot be run at: one that drops tokens, or another window for a table.
        """
        require(self.axes == 2, "size", f"{setting}: settings are for images, this net takes clips")
        require(setting.is_full, "keep", f"{setting}: a Swin keeps every token; give a size and a window")
        if setting.window is None:
            return (None,) * len(self.depths)
        require(self.bias != "table", "window", f"{setting}: this net's bias is a table for its own window; transfer it to another")
        return replace(self, window=setting.window).built_windows("window")

    @property
    def clipped(self) -> list[str]:
        """A sentence for every stage whose window was asked for larger than its grid."""
        stages = enumerate(zip(self.built_windows("window"), self.windows, strict=True), 1)
        return [f"stage {i}: window {asked} is larger than its grid: clipped to {w}" for i, (asked, w) in stages if asked != w]

    @property
    def pretrained_windows(self) -> tuple[tuple[int, ...], ...]:
        """The window that scales the bias coordinates of every stage and axis: `pretrained_window`, or the stage's own."""
        pairs = zip(self.built_windows("pretrained_window"), self.windows, strict=True)
        return tuple(tuple(p or w for p, w in zip(pretrained, own, strict=True)) for pretrained, own in pairs)


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Vision Transformer as "Scaling Vision Transformers" trains it (arXiv 2106.04560; big_vision's code). The defaults are B/16."""

    image_size: Size = 224  # pixels the positions are made for; forward takes any size
    patch: Size = 16
    channels: int = 3
    classes: int = 1000  # 0: no head, `forward` returns the pooled features
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_width: int = 3072  # explicit: the ratios of g, G and So400m are no round numbers
    pool: Literal["token", "gap", "map"] = "gap"  # a class token; the mean of the tokens; attention with a learnt query (MAP)
    pre_logits: int = 0  # width of a tanh layer between pooling and head; 0: none, as in the paper
    position: Literal["learned", "sincos2d", "none"] = "learned"  # added to the patches before a class token joins them
    position_resize: Literal["bilinear", "bicubic"] = "bilinear"  # at other sizes; bilinear: the original's, ends aligned
    gelu: Literal["tanh", "exact"] = "tanh"  # tanh: the original's approximation; exact: timm's, transformers'
    norm_eps: float = 1e-6
    head_bias: float = 0.0  # the classifier's at the start; for sigmoid losses -10, or -ln(classes)
    mask_token: bool = False  # a learnt stand-in for hidden patches (SimMIM): `forward(x, mask)` then takes a mask
    drop_path: float = 0.0  # stochastic depth of the last block; linear from 0 at the first
    dropout: float = 0.0  # of embeddings, attention outputs and MLPs

    def __post_init__(self) -> None:
        for name in ("channels", "width", "depth", "heads", "mlp_width"):
            require(getattr(self, name) >= 1, name, f"{getattr(self, name)} must be at least 1")
        for name in ("classes", "pre_logits"):
            require(getattr(self, name) >= 0, name, f"{getattr(self, name)} must be 0 (none) or more")
        require(self.width % self.heads == 0, "heads", f"{self.heads} must divide the width {self.width}")
        require(len(self.size) == 2, "image_size", f"{self.image_size}: give one number or (height, width)")
        require(len(self.patches) == 2 and min(self.patches) >= 1, "patch", f"{self.patch}: give one number >= 1, or (height, width)")
        require(min(self.grid) >= 1, "image_size", f"{self.image_size} must hold at least one patch of {self.patch}")
        positions = self.position != "sincos2d" or self.width % 4 == 0
        require(positions, "position", f"sincos2d needs a width that 4 divides, not {self.width}")
        require(self.norm_eps > 0, "norm_eps", f"{self.norm_eps} must be positive")
        require(math.isfinite(self.head_bias), "head_bias", f"{self.head_bias} is not a finite number")
        for name in ("drop_path", "dropout"):
            require(0 <= getattr(self, name) < 1, name, f"{getattr(self, name)} must be in [0, 1)")

    @property
    def layout(self) -> dict[str, Size | Windows]:
        """What a transfer changes: where and how the net looks, not what it knows."""
        return {"image_size": self.image_size, "patch": self.patch}

    @property
    def last(self) -> tuple[int, int]:
        """Channels of the last map, and its stride in pixels across."""
        return self.width, self.patches[-1]

    @property
    def axes(self) -> int:
        """2: images."""
        return 2

    @property
    def size(self) -> tuple[int, ...]:
        """`image_size` per axis."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size,) * 2

    @property
    def patches(self) -> tuple[int, ...]:
        """`patch` per axis."""
        return self.patch if isinstance(self.patch, tuple) else (self.patch,) * 2

    @property
    def grid(self) -> tuple[int, ...]:
        """Patches per axis at `image_size`; what is left over at the far ends is not looked at, as in the original."""
        return tuple(size // patch for size, patch in zip(self.size, self.patches, strict=True))

    @property
    def clipped(self) -> list[str]:
        """A sentence for what the image has and no patch covers."""
        rest = [size % patch for size, patch in zip(self.size, self.patches, strict=True)]
        return [f"patches of {self.patch} leave out the last {rest} pixels of {self.image_size}"] if any(rest) else []


NetConfig = SwinConfig | ViTConfig | SuperViTConfig
