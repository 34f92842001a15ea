"""SuperViT's settings: the net with its sizes and keep rates, and `Setting`, one of its many costs."""

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal

from manyscale.config.checks import require

Size = int | tuple[int, ...]
"""One number for every axis, or one number per axis: (h, w) for images, (t, h, w) for clips."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a net is run: at which image size, and of a SuperViT how many tokens it keeps, of a Swin in which windows.

    `str(setting)` and `Setting.read` are each other's inverse: 160/0.7, 160x224/0.9,0.7,0.5, 160/tokens=70,50,36, 192/window=12.
    """

    size: Size | None = None  # pixels; None: as the images come
    keep: float | tuple[float, ...] = 1.0  # the share of tokens that stays at each dropping block; a tuple: one per block
    tokens: tuple[int, ...] = ()  # instead of shares: how many patches stay at each dropping block
    window: int | tuple[int, ...] | None = None  # of a Swin, for every stage or per stage; None: the one it was built with

    def __post_init__(self) -> None:
        for name, kinds in (("size", Integral), ("keep", Real), ("tokens", Integral), ("window", Integral)):
            value = getattr(self, name)
            numbers = value if isinstance(value, tuple) else (value,)
            fits = all(isinstance(number, kinds) and not isinstance(number, bool) for number in numbers)
            optional = value is None and name in ("size", "window")
            require(fits or optional, name, f"{value!r} must be {'whole ' if kinds is Integral else ''}numbers: one, or a tuple of several")
        require(isinstance(self.tokens, tuple), "tokens", f"{self.tokens!r} must be a tuple, one number per dropping block")
        if self.size is not None:
            sizes = self.size if isinstance(self.size, tuple) else (self.size,) * 2
            require(len(sizes) == 2 and min(sizes) >= 1, "size", f"{self.size}: give one number >= 1 or (height, width)")
        keeps = self.keep if isinstance(self.keep, tuple) else (self.keep,)
        fits = len(keeps) > 0 and all(0 < keep <= 1 for keep in keeps)  # NaN is neither
        require(fits, "keep", f"{self.keep} must be in (0, 1]: 1 keeps every token, 0.7 seven of ten at each dropping block")
        require(all(count >= 1 for count in self.tokens), "tokens", f"{self.tokens}: every dropping block must leave at least one")
        falling = list(self.tokens) == sorted(self.tokens, reverse=True)
        require(falling, "tokens", f"{self.tokens} must not grow from block to block: what was dropped stays dropped")
        require(not self.tokens or self.keep == 1.0, "tokens", f"{self.tokens} are instead of keep={self.keep}: give one of the two")
        windows = self.window if isinstance(self.window, tuple) else (self.window,)
        drops = "a net with windows drops no tokens; leave out the one or the other"
        require(self.window is None or self.is_full, "window", f"{self.window} with keep={self.keep}, tokens={self.tokens}: {drops}")
        require(self.window is None or min(windows, default=0) >= 1, "window", f"{self.window} must be at least 1")

    @property
    def is_full(self) -> bool:
        """Whether every token is kept."""
        return not self.tokens and set(self.keep if isinstance(self.keep, tuple) else (self.keep,)) == {1.0}

    def __str__(self) -> str:
        parts = ["own size" if self.size is None else _joined(self.size, "x")]
        if self.window is not None:
            parts.append(f"window={_joined(self.window, ',')}")
        elif self.tokens:
            parts.append(f"tokens={_joined(self.tokens, ',')}")
        else:
            parts.append(_joined(self.keep, ","))
        return "/".join(parts)

    @classmethod
    def read(cls, text: str) -> "Setting":
        """The setting of a text such as `str` gives; what follows the slash may be left out.

        Raises:
            ValueError: text that says no setting, or one that is refused.
        """
        size, _, rest = text.partition("/")
        kind, _, numbers = rest.rpartition("=")
        try:
            given = None if size == "own size" else _one(tuple(map(int, size.split("x"))))
            if kind == "window":
                values = {"window": _one(tuple(map(int, numbers.split(","))))}
            elif kind == "tokens":
                values = {"tokens": tuple(map(int, numbers.split(",")))}
            elif kind:
                raise ValueError
            else:
                values = {"keep": _one(tuple(map(float, numbers.split(","))))} if rest else {}
        except ValueError:
            raise ValueError(f"setting {text!r}: write size/keep, such as 160/0.7, or 192/window=12 of a Swin") from None
        return cls(size=given, **values)


def _joined(value: int | float | tuple, by: str) -> str:
    return by.join(str(one).removesuffix(".0") for one in (value if isinstance(value, tuple) else (value,)))


def _one(values: tuple) -> int | float | tuple:
    return values if len(values) > 1 else values[0]


@dataclass(frozen=True, kw_only=True)
class SuperViTConfig:
    """One ViT for many image sizes and numbers of tokens (SuperViT, arXiv 2205.11397). The defaults are the paper's DeiT-S.

    The paper's algorithm can be read as dropping tokens in every block but 3, 6 and 9. These three, counted from 0, are the only
    ones that drop: only so do keep rates 0.7 and 0.5 cost the 1.5 and 2 times less that it reports.
    """

    sizes: tuple[int | tuple[int, int], ...] = (128, 160, 192, 224)  # pixels; each has its positions
    keeps: tuple[float, ...] = (0.5, 0.7, 1.0)  # what it is trained for; a setting may ask for any other
    patch: int = 16
    channels: int = 3
    classes: int = 1000  # 0: no head, `forward` returns the pooled features
    width: int = 384
    depth: int = 12
    heads: int = 6
    mlp_width: int = 1536
    drop_blocks: tuple[int, ...] = (3, 6, 9)  # counted from 0: tokens leave between their attention and their MLP
    count_rule: Literal["supervit", "patches"] = "supervit"  # ceil(keep x N) stay of N tokens with the class token, or without it
    fuse: bool = False  # what leaves a block stays as one token, the sum of all weighted by their scores (EViT, arXiv 2202.07800)
    positions: Literal["per-size", "interpolated"] = "per-size"  # a table for each size, or the largest one's resized to any
    resize: Literal["corners", "antialias"] = "corners"  # of images to a setting's size: the official way, or with low-pass filter
    stem: Literal["patch", "conv"] = "patch"  # patches; or three convolutions, then patches of half the size (LV-ViT)
    stem_width: int = 64
    stem_statistics: Literal["shared", "per-size"] = "shared"  # of the batch norms of a conv stem
    registers: int = 0  # further tokens of no place, never dropped
    qkv_bias: bool = True
    skip: float = 1.0  # residual branches are divided by it (LV-ViT: 2)
    token_head: float | None = None  # LV-ViT: a second head on every patch; its largest logits count this much in the answer
    gelu: Literal["exact", "tanh"] = "exact"
    norm_eps: float = 1e-6
    drop_path: float = 0.0  # stochastic depth of the last block; linear from 0 at the first

    def __post_init__(self) -> None:
        for name in ("patch", "channels", "width", "depth", "heads", "mlp_width", "stem_width"):
            require(getattr(self, name) >= 1, name, f"{getattr(self, name)} must be at least 1")
        for name in ("classes", "registers"):
            require(getattr(self, name) >= 0, name, f"{getattr(self, name)} must be 0 (none) or more")
        require(self.width % self.heads == 0, "heads", f"{self.heads} must divide the width {self.width}")
        require(len(self.sizes) > 0, "sizes", "give one image size or more, such as 128 160 192 224")
        require(len(set(map(_pair, self.sizes))) == len(self.sizes), "sizes", f"{self.sizes} names one size twice")
        for size in self.sizes:
            self.grid_of(size)
        require(len(self.keeps) > 0 and all(0 < keep <= 1 for keep in self.keeps), "keeps", f"{self.keeps} must all be in (0, 1]")
        require(len(set(self.keeps)) == len(self.keeps), "keeps", f"{self.keeps} names one share twice")
        rising = list(self.drop_blocks) == sorted(set(self.drop_blocks))
        inside = all(0 <= block < self.depth for block in self.drop_blocks)
        require(rising and inside, "drop_blocks", f"{self.drop_blocks} must rise and be blocks of 0 to {self.depth - 1}")
        require(self.stem == "patch" or self.patch % 2 == 0, "patch", f"{self.patch}: a conv stem halves the picture; give an even number")
        require(self.skip > 0 and math.isfinite(self.skip), "skip", f"{self.skip} must be positive; 1: plain residuals")
        weighs = self.token_head is None or (math.isfinite(self.token_head) and self.token_head >= 0)
        require(weighs, "token_head", f"{self.token_head} must be 0 or more, such as 0.5; None: no such head")
        require(self.norm_eps > 0, "norm_eps", f"{self.norm_eps} must be positive")
        require(0 <= self.drop_path < 1, "drop_path", f"{self.drop_path} must be in [0, 1)")

    @property
    def size(self) -> tuple[int, int]:
        """The largest of `sizes`, (height, width): what pictures are prepared at."""
        return max(map(_pair, self.sizes), key=lambda size: size[0] * size[1])

    @property
    def image_size(self) -> Size:
        """The largest of `sizes`, as one number where it is square."""
        return self.size[0] if self.size[0] == self.size[1] else self.size

    @property
    def axes(self) -> int:
        """2: images."""
        return 2

    @property
    def patches(self) -> tuple[int, int]:
        """`patch` per axis."""
        return (self.patch, self.patch)

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Patches per axis at each of `sizes`."""
        return tuple(map(self.grid_of, self.sizes))

    @property
    def last(self) -> tuple[int, int]:
        """Channels of the last map, and its stride in pixels across."""
        return self.width, self.patch

    @property
    def layout(self) -> dict[str, tuple]:
        """What a transfer changes: where the net looks, not what it knows."""
        return {"sizes": self.sizes, "keeps": self.keeps}

    @property
    def clipped(self) -> list[str]:
        """Nothing: patches must divide every size."""
        return []

    @property
    def settings(self) -> tuple[Setting, ...]:
        """Every size with every keep rate, the cheapest of each size first."""
        sizes = sorted(self.sizes, key=lambda size: math.prod(_pair(size)))
        return tuple(Setting(size=size, keep=keep) for size in sizes for keep in sorted(self.keeps))

    def grid_of(self, size: Size) -> tuple[int, int]:
        """Patches per axis of an image of `size`.

        Raises:
            ValueError: patches do not divide it.
        """
        height, width = _pair(size)
        divides = min(height, width) >= self.patch and height % self.patch == 0 and width % self.patch == 0
        require(
            divides, "size", f"{size} must be a multiple of the patch {self.patch}, such as {self.patch * max(1, height // self.patch)}"
        )
        return height // self.patch, width // self.patch

    def has_positions(self, size: Size) -> bool:
        """Whether images of `size` have positions."""
        return self.positions == "interpolated" or _pair(size) in map(_pair, self.sizes)

    def counts(self, setting: Setting, size: Size | None = None) -> tuple[int, ...]:
        """How many patches each dropping block keeps, chosen by their scores. With `fuse`, where some leave, one more token follows.

        Args:
            size: of the images, where the setting does not say.

        Raises:
            ValueError: a size that patches do not divide, or that has no positions; a schedule that does not fit; a window.
        """
        require(setting.window is None, "window", f"{setting}: a SuperViT has no windows; give a size and what it keeps, such as 160/0.7")
        size = setting.size or size or self.size
        left = math.prod(self.grid_of(size))
        has = self.has_positions(size)
        fix = 'give one of them, or make the net with positions="interpolated"'
        require(has, "size", f"{size} has no position table; there are tables for {', '.join(map(str, self.sizes))}: {fix}")
        drops = len(self.drop_blocks)
        given = setting.keep if isinstance(setting.keep, tuple) else (setting.keep,) * drops
        require(len(given) == drops, "keep", f"{setting.keep} must have one number per dropping block, {drops}")
        require(len(setting.tokens) in (0, drops), "tokens", f"{setting.tokens} must have one number per dropping block, {drops}")
        counts = []
        for i, keep in enumerate(given):
            if setting.tokens:
                stay = setting.tokens[i]
                require(stay <= left, "tokens", f"{setting.tokens}: block {self.drop_blocks[i]} has {left} patches, it cannot keep {stay}")
            else:  # rounded: 0.07 x 100 is 7, not 7.000000000000001
                among = left + (self.count_rule == "supervit")
                stay = left if keep == 1 else min(max(math.ceil(round(keep * among, 9)), 1), left)
            counts.append(stay)
            left = stay + (self.fuse and stay < left)
        return tuple(counts)


def _pair(size: Size) -> tuple[int, int]:
    require(not isinstance(size, tuple) or len(size) == 2, "sizes", f"{size}: give one number or (height, width)")
    return size if isinstance(size, tuple) else (size, size)
