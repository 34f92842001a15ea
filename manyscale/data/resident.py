"""A whole training set kept on the device as bytes, cropped and flipped there by the batch: for small pictures of one size.

What `data.loader` does picture by picture in Python, a few tensor operations do for the batch: a crop and its resizing are
one matrix per axis, with the same filters (`_resampling`). Shapes: N pictures of H x W pixels; B of them become h x w.
"""

from collections.abc import Iterator
from itertools import chain
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from manyscale.config import Augment, Preprocess
from manyscale.data.images import BadImage
from manyscale.data.loader import TRIES, BadFile, Batch, Share, instead, order, seed_from, steps_per_epoch
from manyscale.data.sources import Source

CROPS = 10  # that torchvision's random resized crop tries, before it takes the middle


def resident_batches(
    source: Source,
    pre: Preprocess,
    augment: Augment,
    *,
    batch: int,
    seed: int,
    start_step: int,
    steps: int,
    device: torch.device,
    policy: Literal["skip", "stop"] = "skip",
    share: Share = (0, 1),
) -> Iterator[Batch]:
    """As `data.loader.train_batches`, on `device`: the same order, crops of the same distribution, other draws.

    Raises:
        ValueError: an augmentation other than crop and flip, pictures of several sizes, fewer of them than `batch`; with
            "stop", a file that cannot be read, by name.
    """
    if augment.crop != "resized" or augment.randaugment or augment.color_jitter or augment.erase or augment.repeats > 1:
        raise ValueError(
            "field `resident`: pictures kept on the device are cropped (`crop` resized) and flipped, no more; use --no-resident"
        )
    each, (rank, ranks) = steps_per_epoch(len(source), batch), share
    pixels, bad = _read(source, policy)
    pixels, labels = pixels.to(device), torch.tensor([source.label(index) for index in range(len(source))]).to(device)
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (pre.mean, pre.std))
    for step in range(start_step, steps):
        epoch, position = divmod(step, each)
        if position == 0 or step == start_step:
            indices = order(len(source), seed, epoch)
            crops, flips = (t.to(device) for t in draw(len(source), augment, pixels.shape[-2:], seed_from(seed, epoch, -1)))
        first = position * batch + rank * (batch // ranks)
        chosen = indices[first : first + batch // ranks].tolist()
        good = [_good(index, epoch, bad, seed, len(source)) for index in chosen]
        rows = torch.tensor(good, dtype=torch.int64, device=device)
        images = crop(pixels[rows].float(), crops[rows], flips[rows], pre.image_size, pre.interpolation)
        images = (images.clamp(0, 255) / 255 - mean) / std
        yield Batch(images, labels[rows], tuple(map(source.name, good)), tuple(bad[index] for index in chosen if index in bad))


def _good(index: int, epoch: int, bad: dict[int, BadFile], seed: int, count: int) -> int:
    """The sample itself, or the one that the loader shows for a bad file."""
    others = (instead((epoch, index, 0), attempt, seed, count) for attempt in range(1, TRIES))
    good = next((i for i in chain((index,), others) if i not in bad), None)
    if good is None:
        raise ValueError(f"{bad[index].path}: {bad[index].reason}, and neither can {TRIES - 1} others that were drawn in its place be read")
    return good


def _read(source: Source, policy: str) -> tuple[Tensor, dict[int, BadFile]]:
    """(N, 3, H, W) uint8, black where a file is bad, and those files by index."""
    pictures: dict[int, np.ndarray] = {}
    bad: dict[int, BadFile] = {}
    for index in range(len(source)):
        try:
            pictures[index] = np.asarray(source.read(index))
        except BadImage as error:
            if policy == "stop":
                raise ValueError(f"{error}; repair or remove the file, or leave such files out with `bad_files` skip") from None
            bad[index] = BadFile(error.path, error.reason)
    if not pictures:
        raise ValueError(f"no training picture can be read; the first: {bad[0].path}: {bad[0].reason}")
    sizes: dict[tuple[int, ...], int] = {}  # and the first picture of each
    for index, picture in pictures.items():
        sizes.setdefault(picture.shape, index)
    if len(sizes) > 1:
        (first, a), (other, b) = list(sizes.items())[:2]
        raise ValueError(
            f"field `resident`: {source.path(a)} has {first[1]} x {first[0]} pixels, {source.path(b)} {other[1]} x {other[0]}; pictures "
            "kept on the device are of one size; use --no-resident"
        )
    shape = next(iter(sizes))
    whole = np.zeros((len(source), *shape), dtype=np.uint8)
    for index, picture in pictures.items():
        whole[index] = picture
    return torch.from_numpy(whole).permute(0, 3, 1, 2).contiguous(), bad


def draw(count: int, augment: Augment, size: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    """A crop and a flip for every picture of an epoch, by torchvision's `RandomResizedCrop.get_params`.

    Returns:
        crops (count, 4) int64: top, left, height and width in the picture's pixels; flips (count,) bool.
    """
    height, width = size
    chance = torch.rand(count, 2 * CROPS + 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    areas, shapes, (down, across, turned) = chance[:, :CROPS], chance[:, CROPS : 2 * CROPS], chance[:, 2 * CROPS :].T
    area = height * width * (augment.scale[0] + areas * (augment.scale[1] - augment.scale[0]))
    narrow, broad = torch.tensor(augment.ratio, dtype=torch.float64).log()
    ratio = (narrow + shapes * (broad - narrow)).exp()  # of width to height
    wide, high = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()  # (count, CROPS)
    fits = (wide > 0) & (wide <= width) & (high > 0) & (high <= height)
    first = fits.to(torch.uint8).argmax(1, keepdim=True)  # the first that fits; argmax of equal values: the first
    any_fits = fits.any(1)
    most = min(width, max(1, round(height * augment.ratio[1]))), min(height, max(1, round(width / augment.ratio[0])))  # the ratios allow
    wide = torch.where(any_fits, wide.gather(1, first)[:, 0], most[0])
    high = torch.where(any_fits, high.gather(1, first)[:, 0], most[1])
    top = torch.where(any_fits, (down * (height - high + 1)).floor().long(), (height - high) // 2)
    left = torch.where(any_fits, (across * (width - wide + 1)).floor().long(), (width - wide) // 2)
    return torch.stack([top, left, high, wide], 1), turned < augment.flip


def crop(images: Tensor, crops: Tensor, flips: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """(B, 3, H, W) float -> (B, 3, h, w): every picture's crop resized to `size` with antialiasing, then mirrored where `flips`."""
    top, left, high, wide = crops.T
    rows = _resampling(top, high, images.shape[-2], size[0], interpolation)  # (B, h, H)
    columns = _resampling(left, wide, images.shape[-1], size[1], interpolation)  # (B, w, W)
    columns = torch.where(flips[:, None, None], columns.flip(1), columns)
    return rows[:, None] @ images @ columns.mT[:, None]


def _resampling(start: Tensor, length: Tensor, inputs: int, outputs: int, interpolation: str) -> Tensor:
    """(B, outputs, inputs): how much of each pixel goes into each of a crop resized to `outputs`; pixels outside it give nothing.

    Args:
        start, length: (B,) of the crop, in pixels.
    """
    start, length = start[:, None, None].float(), length[:, None, None].float()
    at = torch.arange(inputs, device=start.device) + 0.5  # centres of the pixels
    scale = length / outputs
    centre = start + (torch.arange(outputs, device=start.device)[:, None] + 0.5) * scale  # (B, outputs, 1)
    if interpolation == "nearest":
        return (at == centre.floor() + 0.5).float()
    x = ((at - centre) / scale.clamp(min=1)).abs()  # the filter grows with the scale where it shrinks the picture
    if interpolation == "bilinear":
        weights = (1 - x).clamp(min=0)
    else:  # Keys' cubic with a = -1/2, as Pillow's and torch's antialiased ones
        near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
        weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    weights = weights * ((at > start) & (at < start + length))
    return weights / weights.sum(-1, keepdim=True)
