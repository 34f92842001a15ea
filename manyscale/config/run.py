"""The settings of a training run: its data, augmentation, optimiser, schedule, and all of it as one `Run`."""

import math
import re
from dataclasses import dataclass, field
from typing import Literal

from manyscale.config.checks import finite, require
from manyscale.config.durations import Duration, check_duration, parts, seconds
from manyscale.config.memory import Memory
from manyscale.config.nets import NetConfig, SwinConfig
from manyscale.config.parallel import Parallel
from manyscale.config.supervit import Setting


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How a picture becomes the model's input: saved beside the weights, so that prediction repeats what evaluation did."""

    image_size: tuple[int, int] = (256, 256)  # (height, width) in pixels
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # of RGB in [0, 1]
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    crop_ratio: float = 0.875  # centre crop / resized short side; 0: squash the whole picture, no crop
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bicubic"

    def __post_init__(self) -> None:
        require(min(self.image_size) >= 1, "image_size", f"{self.image_size} must be at least 1 pixel")
        require(min(self.std) > 0, "std", f"{self.std} must be positive")
        require(0 <= self.crop_ratio <= 1, "crop_ratio", f"{self.crop_ratio} must be 0 (squash) or in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class Input:
    """Where the pictures come from and how they are read."""

    data: str = (
        "digits"  # `digits`, a folder of class folders, a .tar of one or a folder of .tars, or the name of one under $MANYSCALE_DATA
    )
    holdout: float = 0.1  # fraction kept for evaluation where the set brings no val or test split
    held_out: int = 0  # evaluate on so many of the held-out pictures while training, evenly spread over them; 0: all
    share: float = 1.0  # of the training pictures of every class, chosen by seed and file names: learning from fewer labels
    statistics: Literal["imagenet", "half", "own"] = "imagenet"  # mean and std; half: 0.5; own: measured on the train split
    crop_ratio: float = 0.875  # of the evaluation's centre crop; 0: squash the whole picture
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bicubic"
    bad_files: Literal["skip", "stop"] = "skip"  # what cannot be read: report it, train on another, evaluate without; or end the run
    max_pixels: int = 64_000_000  # larger pictures count as bad before they are decoded (decompression bombs)
    verify: bool = False  # hash every picture that is read: one that is not as `manyscale data index` saw it counts as bad
    cache: bool = False  # keep decoded pictures in memory: for small sets of small pictures
    resident: bool = False  # keep the training pictures on the device, crop and flip them there by the batch; all of one size
    workers: int = -1  # loader processes; 0: load in the training process; -1: one less than the cores, at most 8
    loader_timeout: float = 300.0  # seconds for a batch, after which workers count as hung and are replaced; 0: any time

    def __post_init__(self) -> None:
        require(0 < self.holdout < 1, "holdout", f"{self.holdout} must be between 0 and 1, such as 0.1")
        require(self.held_out >= 0, "held_out", f"{self.held_out} must be 0 (all) or more")
        require(0 < self.share <= 1, "share", f"{self.share} must be in (0, 1]; 1: all")
        require(0 <= self.crop_ratio <= 1, "crop_ratio", f"{self.crop_ratio} must be 0 (squash) or in (0, 1]")
        require(self.max_pixels >= 1, "max_pixels", f"{self.max_pixels} must be at least 1")
        require(0 <= self.loader_timeout < math.inf, "loader_timeout", f"{self.loader_timeout} must be 0 (wait on) or seconds, such as 300")
        require(self.workers >= -1, "workers", f"{self.workers} must be -1 (choose), 0 or more")


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
    repeats: int = 1  # how often an epoch shows a picture, each time augmented anew; of as many times fewer pictures (arXiv 1901.09335)

    def __post_init__(self) -> None:
        for name in ("flip", "erase", "mix_switch"):
            require(0 <= getattr(self, name) <= 1, name, f"{getattr(self, name)} is a probability, in [0, 1]")
        for name in ("color_jitter", "randaugment", "magnitude_std", "mixup", "cutmix"):
            require(0 <= getattr(self, name) < math.inf, name, f"{getattr(self, name)} must be 0 (off) or more")
        require(self.repeats >= 1, "repeats", f"{self.repeats} must be at least 1")
        require(0 <= self.magnitude <= 10, "magnitude", f"{self.magnitude} must be in [0, 10]")
        require(0 <= self.smoothing < 1, "smoothing", f"{self.smoothing} must be in [0, 1)")
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            require(0 < low <= high < math.inf, name, f"{(low, high)} must be (low, high) with 0 < low <= high")


@dataclass(frozen=True, kw_only=True)
class Optim:
    """The optimiser with the official parameter groups, and what surrounds its step."""

    method: Literal["adamw", "adafactor", "sgd"] = "adamw"  # adafactor: as "Scaling Vision Transformers" modified it
    momentum: Literal["float32", "bfloat16", "bfloat16-jax"] = "float32"  # how it is kept; -jax: with the original's rounding
    lr: float = 1e-3  # peak
    min_lr: float = 1e-5  # at the end of a cosine or line
    warmup_lr: float = 1e-6  # at the first step
    lr_batch: int = 0  # the three rates are per this many images and scale with the batch (the papers: 512); 0: as given
    weight_decay: float = 0.05  # of matrices; every step takes rate x decay of a weight away, so a short run decays it less in all
    head_decay: float | None = None  # of the classifier's matrix, where another than weight_decay (the ViT paper: 100 times that)
    decay_rules: tuple[tuple[str, float], ...] = ()  # (pattern, decay): the first that matches a parameter's whole name decides
    betas: tuple[float, float] = (0.9, 0.999)  # of momentum and squares; adafactor: its second grows up to this
    eps: float = 1e-8
    clip: float = 5.0  # gradient norm; 0: no clipping
    layer_decay: float = 1.0  # each block's rate over that of the next one towards the head
    ema: float = 0.0  # decay of the weights' moving average; 0: none. Evaluated and kept as best where on
    decay_position_bias: bool = False  # decay position biases and logit scales too, as the official SimMIM code does by mistake

    def __post_init__(self) -> None:
        finite(self, "lr", "min_lr", "warmup_lr", "weight_decay", "eps", "clip", "layer_decay", "ema")
        for name, value in [("head_decay", self.head_decay or 0.0), *(("decay_rules", decay) for _, decay in self.decay_rules)]:
            require(0 <= value < math.inf, name, f"{value} must be a finite number, not negative")
        for pattern, _ in self.decay_rules:
            require(_compiles(pattern), "decay_rules", f"{pattern!r} is not a regular expression")
        for name in ("min_lr", "warmup_lr", "weight_decay", "clip", "lr_batch"):
            require(getattr(self, name) >= 0, name, f"{getattr(self, name)} must not be negative")
        require(self.lr > 0, "lr", f"{self.lr} must be positive, such as 0.001")
        require(self.eps > 0, "eps", f"{self.eps} must be positive")
        require(all(0 <= b < 1 for b in self.betas), "betas", f"{self.betas} must be in [0, 1)")
        require(0 < self.layer_decay <= 1, "layer_decay", f"{self.layer_decay} must be in (0, 1]; 1: off")
        require(0 <= self.ema < 1, "ema", f"{self.ema} must be in [0, 1); 0: off")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long, and how the learning rate goes: linear warm-up, a curve over the rest, and perhaps a linear cooldown.

    Durations are in epochs, or say their unit: 500-steps, 20k-steps, 1.5M-images, 5% (of the run).
    """

    epochs: int = 300
    length: str = ""  # instead of the epochs: a duration such as 20k-steps or 1B-images
    time: str = ""  # a budget such as 30m, 8h or 1h30m: the number of steps then follows from the measured speed
    warmup: Duration = 20.0
    curve: Literal["cosine", "linear", "rsqrt", "constant"] = "cosine"  # after the warm-up; rsqrt: 1 / sqrt(1 + steps / timescale)
    timescale: Duration = 0  # of rsqrt; 0: as long as the warm-up
    cooldown: Duration = 0  # at the end, times a line down to zero: for rsqrt and constant, which do not know where the end is
    branches: tuple[Duration, ...] = ()  # one run each of these lengths, with its cooldown, from one trunk that they share
    milestones: tuple[float, ...] = ()  # epochs at which the rate falls to a tenth, instead of along a curve
    evaluate_every: Duration = 1
    patience: int = 0  # stop after this many evaluations without a better one; 0: never
    save_minutes: float = 10.0  # between checkpoints; every evaluation saves one too
    save_steps: int = 0  # a checkpoint every so many steps besides; 0: none
    keep: int = 2  # checkpoints kept: the newest so many, and always the newest that is whole
    keep_every: int = 0  # besides, those of every so many steps; 0: none
    keep_best: bool = False  # besides, that of the best evaluation so far
    save_beside: bool = True  # write them while the training goes on, which takes a copy in memory

    def __post_init__(self) -> None:
        finite(self, "save_minutes")
        for name in ("epochs", "keep"):
            require(getattr(self, name) >= 1, name, f"{getattr(self, name)} must be at least 1")
        check_duration("evaluate_every", self.evaluate_every, least=1)
        for name in ("warmup", "timescale", "cooldown"):
            check_duration(name, getattr(self, name))
        for name, lengths in (("length", (self.length,) if self.length else ()), ("branches", self.branches)):
            for length in lengths:
                check_duration(name, length, least=1, percent=False)
        rising = list(self.milestones) == sorted(self.milestones) and all(0 < m < self.epochs for m in self.milestones)
        require(rising, "milestones", f"{self.milestones} must rise, within the {self.epochs} epochs")
        for name in ("patience", "save_minutes", "save_steps", "keep_every"):
            require(getattr(self, name) >= 0, name, f"{getattr(self, name)} must not be negative")
        seconds(self.time)
        if self.branches:
            self._check_branches()

    def _check_branches(self) -> None:
        """See that the trunk does not depend on where a branch ends, so that a branch is what its run alone would be."""
        require(self.curve in ("rsqrt", "constant") and not self.milestones, "curve", "a trunk of branches needs rsqrt or constant")
        require(parts(self.cooldown)[0] > 0, "cooldown", "branches are cooldowns; give its duration, such as 20%")
        require(not self.time and not self.patience, "time", "branches have lengths of their own: give neither time nor patience")
        for name in ("warmup", "timescale", "evaluate_every"):
            said = parts(getattr(self, name))[1] != "%"
            require(said, name, f"per cent of which branch? {getattr(self, name)!r} must be in steps, epochs or images")


@dataclass(frozen=True, kw_only=True)
class SimMIM:
    """Pre-training without labels: hide patches, paint them in (SimMIM, arXiv 2111.09886; Swin V2 section 4.1)."""

    mask_unit: int = 32  # pixels on a side of what is hidden or shown as one
    mask_ratio: float = 0.6  # of the units, rounded up
    target_window: int = 47  # pixels, odd: targets are normalised by the mean and deviation around each (V2); 0: raw (V1)

    def __post_init__(self) -> None:
        require(self.mask_unit >= 1, "mask_unit", f"{self.mask_unit} must be at least 1 pixel; 32 is usual")
        require(0 < self.mask_ratio <= 1, "mask_ratio", f"{self.mask_ratio} must be in (0, 1]; 0.6 is usual")
        well = self.target_window == 0 or (self.target_window >= 3 and self.target_window % 2 == 1)
        require(well, "target_window", f"{self.target_window} must be 0 (raw targets) or odd and at least 3; 47 is usual")


@dataclass(frozen=True, kw_only=True)
class Supernet:
    """How one weight set learns many settings (SuperViT, arXiv 2205.11397, section 3.4). The defaults are the paper's."""

    sampling: Literal["paper", "sandwich", "all"] = "paper"  # which settings a step passes; see `tasks.supernet.draw_passes`
    teacher: Literal["size", "largest", "average", "other"] = "size"  # of passes that drop tokens: the whole pass of their size, that of
    # the largest, the moving average of the weights at the largest, or another net
    teacher_run: str = ""  # a folder or .safetensors of this package: the other net
    label_share: float = 1.0  # of the labels in whole passes that have a teacher besides
    temperature: float = 1.0  # of what is learnt from a teacher
    mix_token: float = 0.0  # alpha of MixToken (LV-ViT), which mixes patches, instead of mixup and cutmix; 0: off
    token_labels: Literal["picture", "teacher"] = "picture"  # what a head on patches learns: their picture's label, or the other net's word
    token_weight: float = 1.0  # of that loss; only the largest whole pass has it
    settings: tuple[str, ...] = ()  # of a Swin, such as 192/window=12; a SuperViT has its sizes and keeps
    watch: Literal["all", "corners"] = "all"  # which settings an evaluation scores; corners: the cheapest and the whole net

    def __post_init__(self) -> None:
        finite(self, "label_share", "temperature", "mix_token", "token_weight")
        require(0 <= self.label_share <= 1, "label_share", f"{self.label_share} must be in [0, 1]; 1: labels alone")
        require(self.temperature > 0, "temperature", f"{self.temperature} must be positive; 1 is usual")
        for name in ("mix_token", "token_weight"):
            require(getattr(self, name) >= 0, name, f"{getattr(self, name)} must not be negative")
        wanted = self.teacher == "other" or self.token_labels == "teacher"
        require(wanted == bool(self.teacher_run), "teacher_run", "goes with --teacher other or --token-labels teacher, and they with it")
        for text in self.settings:
            Setting.read(text)


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Few-shot evaluation while training: what the features know of classes they were not taught (`manyscale fewshot`)."""

    probe: tuple[str, ...] = ()  # labelled sets, by name or folder, besides the run's own data; none: off
    shots: tuple[int, ...] = (1, 5, 10, 25)
    draws: int = 3  # of the few pictures, seeds 0, 1, ...
    l2: float = 1024.0  # penalty of the regression; small nets want less
    probe_every: int = 1  # evaluations; the last one counts always

    def __post_init__(self) -> None:
        require(len(self.shots) > 0 and min(self.shots) >= 1, "shots", f"{self.shots}: give one count or more, each at least 1")
        for name in ("draws", "probe_every"):
            require(getattr(self, name) >= 1, name, f"{getattr(self, name)} must be at least 1")
        require(0 < self.l2 < math.inf, "l2", f"{self.l2} must be positive, such as 1024")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run, whole: the same values give the same weights."""

    recipe: str = ""  # the name it came from
    task: Literal["classify", "simmim", "supernet"] = "classify"
    model: NetConfig = field(default_factory=SwinConfig)
    input: Input = field(default_factory=Input)
    augment: Augment = field(default_factory=Augment)
    optim: Optim = field(default_factory=Optim)
    schedule: Schedule = field(default_factory=Schedule)
    simmim: SimMIM = field(default_factory=SimMIM)  # where that is the task
    supernet: Supernet = field(default_factory=Supernet)  # likewise
    fewshot: Probe = field(default_factory=Probe)
    memory: Memory = field(default_factory=Memory)
    parallel: Parallel = field(default_factory=Parallel)
    loss: Literal["softmax", "sigmoid"] = "softmax"  # of classification; sigmoid: every class a question of its own, summed
    batch: int = 64  # images per step, over all ranks
    accumulate: int = (
        1  # backward passes per step, over all ranks, of batch / accumulate images each; at least one a rank. 0: as few as fit
    )
    nonfinite: int = 3  # steps in a row whose loss or gradient is not finite, and which are left out, before the run ends; 0: at the first
    spike: float = 0.0  # a loss so many robust deviations above the last 100 sends the run back to its last checkpoint, and past the
    # samples since; 0: never
    without: tuple[tuple[int, int], ...] = ()  # (first, past the last) steps whose samples are left out, such as 1200 1300
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 where the device computes in it
    device: str = "auto"
    compile: bool = False  # torch.compile the training step's net: a minute or two at the start, faster steps after it
    seed: int = 0
    init: str = ""  # a folder or .safetensors of this package to start from: its net, at this run's sizes, windows and drop_path
    out: str = ""  # the run's folder; empty: runs/<recipe>
    log_every: int = 20  # steps
    tensorboard: bool = False

    def __post_init__(self) -> None:
        finite(self, "spike")
        require(self.spike >= 0, "spike", f"{self.spike} must be 0 (never) or deviations, such as 8")
        for first, end in self.without:
            require(0 <= first < end, "without", f"{(first, end)} must be a step and a later one")
        require(self.accumulate >= 0, "accumulate", f"{self.accumulate} must be at least 1, or 0: as few as fit")
        for name in ("batch", "log_every"):
            require(getattr(self, name) >= 1, name, f"{getattr(self, name)} must be at least 1")
        require(self.nonfinite >= 0, "nonfinite", f"{self.nonfinite} must be 0 or more")
        require(0 <= self.seed < 2**63, "seed", f"{self.seed} must be from 0 to 2^63 - 1")
        require(self.batch % (self.accumulate or 1) == 0, "accumulate", f"{self.accumulate} must divide the batch {self.batch}")

    @property
    def folder(self) -> str:
        """Where the run is written."""
        return self.out or f"runs/{self.recipe or self.task}"


def _compiles(pattern: str) -> bool:
    try:
        return bool(re.compile(pattern))
    except re.error:
        return False
