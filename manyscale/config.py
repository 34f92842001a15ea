"""Every setting of the house: frozen, keyword-only dataclasses that hold values only, and their strict reader and writer.

No torch here: recipes, planners and the command line read this file without paying for the engine.
Each class checks its own values when it is made; a `ValueError` names the field and the fix.
"""

import dataclasses
import difflib
import math
import types
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

Size = int | tuple[int, ...]
"""One number for every axis, or one number per axis: (h, w) for images, (t, h, w) for clips."""

Windows = int | tuple[int | tuple[int, ...], ...]
"""One number; one per axis; one per stage; or, per stage, one per axis. See `SwinConfig.windows`."""


def _require(holds: bool, field_name: str, message: str) -> None:
    if not holds:
        raise ValueError(f"field `{field_name}`: {message}")


def _finite(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(math.isfinite(value), name, f"{value} is not a finite number; give one, such as 0.001")


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
            _require(getattr(self, name) >= 1, name, f"{getattr(self, name)} must be at least 1")
        _require(self.classes >= 0, "classes", f"{self.classes} must be 0 (no head) or more")
        _require(len(self.depths) >= 1 and min(self.depths) >= 1, "depths", f"{self.depths}: give each stage at least one block")
        _require(len(self.heads) == len(self.depths), "heads", f"{self.heads} must have one number per stage, {len(self.depths)}")
        for stage, heads in enumerate(self.heads):
            width = self.width * 2**stage
            _require(heads >= 1 and width % heads == 0, "heads", f"{heads} of stage {stage + 1} must divide its width {width}")
        _require(self.axes in (2, 3), "image_size", f"{self.image_size}: give one number, (height, width) or (frames, height, width)")
        _require(min(self.size) >= 1, "image_size", f"{self.image_size} must be at least 1 on every axis")
        _require(len(self.patches) == self.axes and min(self.patches) >= 1, "patch", f"{self.patch}: give one number >= 1, or {self.axes}")
        _require(min(map(min, self.built_windows("window"))) >= 1, "window", f"{self.window} must be at least 1 everywhere; 8 is usual")
        _require(
            min(map(min, self.built_windows("pretrained_window"))) >= 0,
            "pretrained_window",
            f"{self.pretrained_window} must not be negative",
        )
        _require(1 <= self.width * self.mlp_ratio < math.inf, "mlp_ratio", f"{self.mlp_ratio} must leave the MLP a channel; 4 is usual")
        _require(self.extra_norm_every >= 0, "extra_norm_every", f"{self.extra_norm_every} must be 0 (none) or more")
        for name in ("drop_path", "dropout"):
            _require(0 <= getattr(self, name) < 1, name, f"{getattr(self, name)} must be in [0, 1)")

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
        _require(fits, name, f"{given} fits neither {self.axes} axes nor {stages} stages")
        return each

    @property
    def windows(self) -> tuple[tuple[int, ...], ...]:
        """The window of every stage and axis, clipped to the stage's grid at `image_size` (official code, per axis as timm)."""
        pairs = zip(self.built_windows("window"), self.grids, strict=True)
        return tuple(tuple(min(w, g) for w, g in zip(window, grid, strict=True)) for window, grid in pairs)

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
class Preprocess:
    """How a picture becomes the model's input: saved beside the weights, so that prediction repeats what evaluation did."""

    image_size: tuple[int, int] = (256, 256)  # (height, width) in pixels
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # of RGB in [0, 1]
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    crop_ratio: float = 0.875  # centre crop / resized short side; 0: squash the whole picture, no crop
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bicubic"

    def __post_init__(self) -> None:
        _require(min(self.image_size) >= 1, "image_size", f"{self.image_size} must be at least 1 pixel")
        _require(min(self.std) > 0, "std", f"{self.std} must be positive")
        _require(0 <= self.crop_ratio <= 1, "crop_ratio", f"{self.crop_ratio} must be 0 (squash) or in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class Input:
    """Where the pictures come from and how they are read."""

    data: str = "digits"  # `digits`, a folder of class folders, or the name of one under $MANYSCALE_DATA
    holdout: float = 0.1  # fraction kept for evaluation where the set brings no val or test split
    share: float = 1.0  # of the training pictures of every class, chosen by seed and file names: learning from fewer labels
    statistics: Literal["imagenet", "half", "own"] = "imagenet"  # mean and std; half: 0.5; own: measured on the train split
    crop_ratio: float = 0.875  # of the evaluation's centre crop; 0: squash the whole picture
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bicubic"
    bad_files: Literal["skip", "stop"] = "skip"  # a picture that cannot be read: leave it out and report it, or end the run
    max_pixels: int = 64_000_000  # larger pictures count as bad before they are decoded (decompression bombs)
    cache: bool = False  # keep decoded pictures in memory: for small sets of small pictures
    resident: bool = False  # keep the training pictures on the device, crop and flip them there by the batch; all of one size
    workers: int = -1  # loader processes; 0: load in the training process; -1: one less than the cores, at most 8

    def __post_init__(self) -> None:
        _require(0 < self.holdout < 1, "holdout", f"{self.holdout} must be between 0 and 1, such as 0.1")
        _require(0 < self.share <= 1, "share", f"{self.share} must be in (0, 1]; 1: all")
        _require(0 <= self.crop_ratio <= 1, "crop_ratio", f"{self.crop_ratio} must be 0 (squash) or in (0, 1]")
        _require(self.max_pixels >= 1, "max_pixels", f"{self.max_pixels} must be at least 1")
        _require(self.workers >= -1, "workers", f"{self.workers} must be -1 (choose), 0 or more")


@dataclass(frozen=True, kw_only=True)
class Augment:
    """What training does to pictures and labels. Everything off: `Augment(crop="none", flip=0)`."""

    crop: Literal["resized", "pad", "none"] = "resized"  # random resized crop; pad by 1/8 and crop; the evaluation's geometry
    scale: tuple[float, float] = (0.08, 1.0)  # area of the random resized crop
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5  # probability of a left-right flip
    color_jitter: float = 0.0  # brightness, contrast and saturation (0.4 in the papers, where RandAugment is off)
    randaugment: int = 0  # operations per picture (2 in the papers); 0: off
    magnitude: float = 9.0  # of RandAugment, 0 to 10, as "m9" in the papers' strings
    magnitude_std: float = 0.5  # its standard deviation per picture, as "mstd0.5"
    erase: float = 0.0  # probability of random erasing with noise
    mixup: float = 0.0  # alpha of mixup; 0: off
    cutmix: float = 0.0  # alpha of cutmix; 0: off
    mix_switch: float = 0.5  # probability of cutmix where both are on
    smoothing: float = 0.0  # label smoothing

    def __post_init__(self) -> None:
        for name in ("flip", "erase", "mix_switch"):
            _require(0 <= getattr(self, name) <= 1, name, f"{getattr(self, name)} is a probability, in [0, 1]")
        for name in ("color_jitter", "randaugment", "magnitude_std", "mixup", "cutmix"):
            _require(0 <= getattr(self, name) < math.inf, name, f"{getattr(self, name)} must be 0 (off) or more")
        _require(0 <= self.magnitude <= 10, "magnitude", f"{self.magnitude} must be in [0, 10]")
        _require(0 <= self.smoothing < 1, "smoothing", f"{self.smoothing} must be in [0, 1)")
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            _require(0 < low <= high < math.inf, name, f"{(low, high)} must be (low, high) with 0 < low <= high")


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW with the official parameter groups, and what surrounds its step."""

    lr: float = 1e-3  # peak
    min_lr: float = 1e-5  # at the end of the cosine
    warmup_lr: float = 1e-6  # at the first step
    lr_batch: int = 0  # the three rates are per this many images and scale with the batch (the papers: 512); 0: as given
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float = 5.0  # gradient norm; 0: no clipping
    layer_decay: float = 1.0  # each block's rate over that of the next one towards the head
    ema: float = 0.0  # decay of the weights' moving average; 0: none. Evaluated and kept as best where on
    decay_position_bias: bool = False  # decay position biases and logit scales too, as the official SimMIM code does by mistake

    def __post_init__(self) -> None:
        _finite(self, "lr", "min_lr", "warmup_lr", "weight_decay", "eps", "clip", "layer_decay", "ema")
        for name in ("min_lr", "warmup_lr", "weight_decay", "clip", "lr_batch"):
            _require(getattr(self, name) >= 0, name, f"{getattr(self, name)} must not be negative")
        _require(self.lr > 0, "lr", f"{self.lr} must be positive, such as 0.001")
        _require(self.eps > 0, "eps", f"{self.eps} must be positive")
        _require(all(0 <= b < 1 for b in self.betas), "betas", f"{self.betas} must be in [0, 1)")
        _require(0 < self.layer_decay <= 1, "layer_decay", f"{self.layer_decay} must be in (0, 1]; 1: off")
        _require(0 <= self.ema < 1, "ema", f"{self.ema} must be in [0, 1); 0: off")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long, and how the learning rate goes: linear warm-up, then a cosine over the rest, or steps down."""

    epochs: int = 300
    warmup: float = 20.0  # epochs
    milestones: tuple[float, ...] = ()  # epochs at which the rate falls to a tenth, instead of along a cosine
    time: str = ""  # a budget such as 30m, 8h or 1h30m: `epochs` then follows from the measured speed
    evaluate_every: int = 1  # epochs
    patience: int = 0  # stop after this many evaluations without a better one; 0: never
    save_minutes: float = 10.0  # between checkpoints; every evaluation saves one too
    save_steps: int = 0  # a checkpoint every so many steps besides; 0: none
    keep: int = 2  # checkpoints kept

    def __post_init__(self) -> None:
        _finite(self, "warmup", "save_minutes")
        for name in ("epochs", "evaluate_every", "keep"):
            _require(getattr(self, name) >= 1, name, f"{getattr(self, name)} must be at least 1")
        rising = list(self.milestones) == sorted(self.milestones) and all(0 < m < self.epochs for m in self.milestones)
        _require(rising, "milestones", f"{self.milestones} must rise, within the {self.epochs} epochs")
        for name in ("warmup", "patience", "save_minutes", "save_steps"):
            _require(getattr(self, name) >= 0, name, f"{getattr(self, name)} must not be negative")
        seconds(self.time)


@dataclass(frozen=True, kw_only=True)
class SimMIM:
    """Pre-training without labels: hide patches, paint them in (SimMIM, arXiv 2111.09886; Swin V2 section 4.1)."""

    mask_unit: int = 32  # pixels on a side of what is hidden or shown as one
    mask_ratio: float = 0.6  # of the units, rounded up
    target_window: int = 47  # pixels, odd: targets are normalised by the mean and deviation around each (V2); 0: raw (V1)

    def __post_init__(self) -> None:
        _require(self.mask_unit >= 1, "mask_unit", f"{self.mask_unit} must be at least 1 pixel; 32 is usual")
        _require(0 < self.mask_ratio <= 1, "mask_ratio", f"{self.mask_ratio} must be in (0, 1]; 0.6 is usual")
        well = self.target_window == 0 or (self.target_window >= 3 and self.target_window % 2 == 1)
        _require(well, "target_window", f"{self.target_window} must be 0 (raw targets) or odd and at least 3; 47 is usual")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run, whole: the same values give the same weights."""

    recipe: str = ""  # the name it came from
    task: Literal["classify", "simmim"] = "classify"
    model: SwinConfig = field(default_factory=SwinConfig)
    input: Input = field(default_factory=Input)
    augment: Augment = field(default_factory=Augment)
    optim: Optim = field(default_factory=Optim)
    schedule: Schedule = field(default_factory=Schedule)
    simmim: SimMIM = field(default_factory=SimMIM)  # where that is the task
    batch: int = 64  # images per step
    accumulate: int = 1  # backward passes per step; each takes batch / accumulate images
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 where the device computes in it
    device: str = "auto"
    compile: bool = False  # torch.compile the training step's net: a minute or two at the start, faster steps after it
    seed: int = 0
    init: str = ""  # a folder or .safetensors of this package to start from: its net, at this run's image_size, window and drop_path
    out: str = ""  # the run's folder; empty: runs/<recipe>
    log_every: int = 20  # steps
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name in ("batch", "accumulate", "log_every"):
            _require(getattr(self, name) >= 1, name, f"{getattr(self, name)} must be at least 1")
        _require(0 <= self.seed < 2**63, "seed", f"{self.seed} must be from 0 to 2^63 - 1")
        _require(self.batch % self.accumulate == 0, "accumulate", f"{self.accumulate} must divide the batch {self.batch}")

    @property
    def folder(self) -> str:
        """Where the run is written."""
        return self.out or f"runs/{self.recipe or self.task}"


def seconds(duration: str) -> float:
    """A duration such as `90s`, `30m`, `8h` or `1h30m` in seconds; empty: infinity.

    Raises:
        ValueError: anything else.
    """
    if not duration:
        return math.inf
    total, number = 0.0, ""
    for letter in duration.strip().lower():
        if letter.isdecimal() or letter == ".":
            number += letter
        elif letter in "dhms" and number.count(".") <= 1 and number.strip("."):
            total, number = total + float(number) * {"d": 86400, "h": 3600, "m": 60, "s": 1}[letter], ""
        else:
            break
    else:
        if not number and total > 0:
            return total
    raise ValueError(f"field `time`: {duration!r} is not a duration; write 90s, 30m, 8h or 1h30m")


def nearest(name: str, names: Any) -> str:
    """The sentence that suggests what `name` was meant to be: the nearest of `names`, or all of them where none is near."""
    names = sorted(names)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean `{close[0]}`?" if close else f"known: {', '.join(names)}"


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass of this file as plain dicts, lists and scalars, ready for JSON."""
    return dataclasses.asdict(config, dict_factory=lambda pairs: {name: _lists(value) for name, value in pairs})


def _lists(value: Any) -> Any:
    return [_lists(item) for item in value] if isinstance(value, tuple) else value


def from_dict(kind: type[T], values: Any, where: str = "") -> T:
    """The dataclass `kind` from what `to_dict` gave: strict keys, strict types, lists become tuples again.

    Args:
        where: what the errors call the place, such as a file's name.

    Raises:
        ValueError: an unknown field (with the nearest known one), a wrong type, or a value the class refuses.
    """
    prefix = f"{where}: " if where else ""
    if not isinstance(values, dict):
        raise ValueError(f"{prefix}expected fields of {kind.__name__}, found {values!r}")
    kinds = get_type_hints(kind)
    for name in values:
        if name not in kinds:
            raise ValueError(f"{prefix}unknown field `{name}` of {kind.__name__}; {nearest(name, kinds)}")
    arguments = {name: _read(kinds[name], value, f"{prefix}field `{name}`") for name, value in values.items()}
    try:
        return kind(**arguments)
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from None


def _read(kind: Any, value: Any, where: str) -> Any:
    """`value` as `kind`, an annotation of this file: scalar, Literal, tuple, union or dataclass."""
    origin, arguments = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        return from_dict(kind, value, where)
    if origin is Literal and value in arguments:
        return value
    if origin in (Union, types.UnionType):
        for option in arguments:
            try:
                return _read(option, value, where)
            except ValueError:
                continue
    if origin is tuple and isinstance(value, (list, tuple)):
        each = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
        if len(each) == len(value):
            return tuple(_read(option, item, where) for option, item in zip(each, value, strict=True))
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if kind in (int, str, bool) and type(value) is kind:
        return value
    expected = " or ".join(map(str, arguments)) if origin is Literal else getattr(kind, "__name__", str(kind))
    raise ValueError(f"{where}: expected {expected}, found {value!r}")
