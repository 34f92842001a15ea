"""From a picture to the model's input, and from labels to targets.

Shapes: B pictures of H x W pixels, K classes. All randomness comes from torch's global generator.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import one_hot
from torchvision.transforms import v2

from manyscale.config import Augment, Input, Preprocess
from manyscale.data.images import BadImage
from manyscale.data.sources import Source

Transform = Callable[[Image.Image], Tensor]
"""RGB picture of any size -> (3, H, W) float32, normalised."""

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


class Fit(v2.Transform):
    """Resizes a PIL picture until it covers `size` / `crop_ratio`, then cuts `size` out of its centre; ratio 0: squashes it whole.

    The same picture as `v2.Resize` and `v2.CenterCrop` give, but resampled inside the crop only: 3 x 5000 pixels at 256
    would make 109 million on the way.

    Args:
        size: (height, width) in pixels.
    """

    def __init__(self, size: tuple[int, int], crop_ratio: float, interpolation: str) -> None:
        super().__init__()
        self.size, self.crop_ratio, self.interpolation = size, crop_ratio, interpolation

    def transform(self, picture: Image.Image, params: dict[str, object]) -> Image.Image:
        height, width = self.size
        box = (0, 0, *picture.size) if self.crop_ratio == 0 else self._box(*picture.size)
        return picture.resize((width, height), _RESAMPLING[self.interpolation], box=box)

    def _box(self, across: int, down: int) -> tuple[float, float, float, float]:
        """The crop in the picture's own pixels, from the whole pixels of the resized one, rounded as torchvision rounds."""
        height, width = self.size
        high, wide = self._resized(across, down)
        top, left = round((high - height) / 2), round((wide - width) / 2)
        return left * across / wide, top * down / high, (left + width) * across / wide, (top + height) * down / high

    def _resized(self, across: int, down: int) -> tuple[int, int]:
        """Height and width of the whole picture when it has been resized."""
        height, width = self.size
        least_high, least_wide = round(height / self.crop_ratio), round(width / self.crop_ratio)
        scale = max(least_high / down, least_wide / across)
        return max(least_high, int(down * scale)), max(least_wide, int(across * scale))


class Squash(Fit):
    """As `Fit`, but the whole picture is first squashed to `size` / `crop_ratio`, its aspect not kept."""

    def _resized(self, across: int, down: int) -> tuple[int, int]:
        height, width = self.size
        return round(height / self.crop_ratio), round(width / self.crop_ratio)


class RandAugment(v2.RandAugment):
    """RandAugment (arXiv 1909.13719) with a magnitude drawn per picture from N(magnitude, std), clamped to [0, 10].

    What "rand-m9-mstd0.5" asks of timm, with torchvision's operations: 14, one of them the identity, always applied, at
    31 strengths, bilinear. timm's "inc1" has 15: no identity but a half chance to skip each, besides Invert and SolarizeAdd, a
    magnitude per operation, and stronger Posterize.
    """

    def __init__(self, operations: int, magnitude: float, std: float, *, fill: list[int]) -> None:
        super().__init__(num_ops=operations, interpolation=v2.InterpolationMode.BILINEAR, fill=fill)
        self.mean, self.std = magnitude, std

    def forward(self, *inputs: object) -> object:
        drawn = min(max(self.mean + self.std * torch.randn(()).item(), 0.0), 10.0)
        self.magnitude = round(drawn / 10 * (self.num_magnitude_bins - 1))
        return super().forward(*inputs)


def eval_transform(pre: Preprocess) -> Transform:
    """What evaluation and prediction do: resize the short side to size / `crop_ratio`, centre crop, normalise."""
    return v2.Compose([Fit(pre.image_size, pre.crop_ratio, pre.interpolation), *_normalise(pre)])


def few_shot_transform(pre: Preprocess) -> Transform:
    """big_vision's few-shot evaluation: squash to 256/224 of the size, centre crop, normalise; `crop_ratio` is not looked at."""
    return v2.Compose([Squash(pre.image_size, 224 / 256, pre.interpolation), *_normalise(pre)])


def train_transform(pre: Preprocess, augment: Augment) -> Transform:
    """What training does, in the papers' order: crop, flip, RandAugment or else colour jitter, normalise, random erasing.

    Crop "pad" covers the image size first (squashes where `pre.crop_ratio` is 0) unless the picture has it, then pads it
    by 1/8 with the mean colour: zeros after normalisation, as in the ResNet paper.
    """
    fill = [round(255 * mean) for mean in pre.mean]
    height, width = pre.image_size
    steps: list[Callable] = []
    if augment.crop == "resized":
        kind = v2.InterpolationMode(pre.interpolation)
        steps.append(v2.RandomResizedCrop((height, width), augment.scale, augment.ratio, interpolation=kind, antialias=True))
    elif augment.crop == "pad":
        steps.append(Fit(pre.image_size, float(pre.crop_ratio > 0), pre.interpolation))
        steps.append(v2.RandomCrop((height, width), padding=[width // 8, height // 8], fill=fill))
    else:
        steps.append(Fit(pre.image_size, pre.crop_ratio, pre.interpolation))
    if augment.flip:
        steps.append(v2.RandomHorizontalFlip(augment.flip))
    if augment.randaugment:
        steps.append(RandAugment(augment.randaugment, augment.magnitude, augment.magnitude_std, fill=fill))
    elif augment.color_jitter:
        steps.append(v2.ColorJitter(*[augment.color_jitter] * 3))  # of brightness, contrast and saturation, not of hue
    steps += _normalise(pre)
    if augment.erase:
        steps.append(v2.RandomErasing(augment.erase, value="random"))  # N(0, 1): noise in normalised units
    return v2.Compose(steps)


def _normalise(pre: Preprocess) -> list[Callable]:
    return [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(pre.mean, pre.std)]


def mix(augment: Augment, classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Mixup and cutmix of a batch, and label smoothing: (B, 3, H, W) float, (B,) int64 -> images, (B, K) targets that sum to 1.

    One draw per batch mixes every picture with the one before it. Smoothing spreads `augment.smoothing` evenly over all K
    classes. With all of it off the targets are one-hot.
    """
    mixers: list[v2.Transform] = []
    shares: list[float] = []
    if augment.mixup:
        mixers.append(v2.MixUp(alpha=augment.mixup, num_classes=classes))
        shares.append(1 - augment.mix_switch if augment.cutmix else 1)
    if augment.cutmix:
        mixers.append(v2.CutMix(alpha=augment.cutmix, num_classes=classes))
        shares.append(augment.mix_switch if augment.mixup else 1)
    chosen = v2.RandomChoice(mixers, p=shares) if mixers else None

    def mixed(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        images, targets = chosen(images, labels) if chosen else (images, one_hot(labels, classes).float())
        return images, targets * (1 - augment.smoothing) + augment.smoothing / classes

    return mixed


def preprocess_for(settings: Input, image_size: tuple[int, int], train_source: Source) -> Preprocess:
    """The preprocessing that `settings` ask for at `image_size` (height, width); measures `train_source` for "own" statistics.

    Raises:
        ValueError: "own" statistics, and not one of the pictures looked at can be read.
    """
    pre = Preprocess(image_size=image_size, crop_ratio=settings.crop_ratio, interpolation=settings.interpolation)
    if settings.statistics == "imagenet":  # what Preprocess holds by default
        return pre
    half = (0.5, 0.5, 0.5)
    mean, std = (half, half) if settings.statistics == "half" else measure_statistics(train_source)
    return dataclasses.replace(pre, mean=mean, std=std)


def measure_statistics(source: Source, *, limit: int = 2000) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of RGB in [0, 1] over at most `limit` pictures, evenly spaced: the same ones every time.

    Every picture counts the same, whatever its size. The deviation is at least 1/255, one grey level, so that plain
    pictures can be normalised too. Rounded to 4 digits.

    Raises:
        ValueError: none of them can be read.
    """
    levels = np.arange(256) / 255
    means, squares = [], []
    for index in np.linspace(0, len(source) - 1, min(limit, len(source))).round().astype(int).tolist():
        try:
            counts = np.array(source.read(index).histogram()).reshape(3, 256)
        except BadImage as bad:
            broken = str(bad)
            continue
        shares = counts / counts.sum(1, keepdims=True)
        means.append(shares @ levels)
        squares.append(shares @ levels**2)
    if not means:
        raise ValueError(f"statistics `own`: not one of the pictures can be read; {broken}")
    mean = np.mean(means, axis=0)
    std = np.sqrt(np.maximum(np.mean(squares, axis=0) - mean**2, 255.0**-2))
    return tuple(mean.round(4).tolist()), tuple(std.round(4).tolist())
