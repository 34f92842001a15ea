"""SimMIM: hide blocks of a picture and paint them in (arXiv 2111.09886; for Swin V2, arXiv 2111.09883 section 4.1).

Letters: B batch, H x W pixels, (h, w) patches.
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyscale.config import Preprocess, Run, SimMIM
from manyscale.data.images import BadImage
from manyscale.data.loader import Batch, seed_from
from manyscale.data.transforms import eval_transform
from manyscale.heads.pixels import MaskedImages, load_masked, save_masked
from manyscale.models import build, load
from manyscale.ops.tokens import block_mask
from manyscale.ranks import ALONE, Ranks
from manyscale.tasks.pictures import Pictures, Report, all_reported, something


class Pretrain(Pictures):
    """The SimMIM task of a run; labels, where the set has any, are not looked at.

    Raises:
        ValueError: besides those of `Pictures`, a mask unit that does not fit the patches or the image.
    """

    metric, better = "l1", min  # decides which weights are the best

    def __init__(self, run: Run) -> None:
        super().__init__(run, labelled=False)
        mask_unit(run.simmim, run.model.size, run.model.patches)

    def model(self) -> MaskedImages:
        """What is trained: a fresh encoder, or the one of `init`, and a fresh head."""
        if not self.run.init:
            return MaskedImages(build(self.run.model))
        return MaskedImages(self.initial(load(self.run.init), classes=0, mask_token=True))

    def targets(self, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) and their masks (B, h, w) on the device; the masks come from torch's own generator."""
        mask = masks_for(batch.images, self.run.simmim, self.run.model.patches)
        return batch.images.to(device, non_blocking=True), mask.to(device, non_blocking=True)

    def loss(self, model: nn.Module, images: Tensor, mask: Tensor) -> Tensor:
        """The mean absolute error over the hidden pixels."""
        return painting_loss(model, images, mask, self.run.simmim.target_window, self.run.model.patches)

    def evaluate(self, model: nn.Module, device: torch.device, precision: torch.dtype, report: Report) -> dict[str, float]:
        """The loss on the held-out pictures."""
        return score(model, self.eval_batches(), self.run.simmim, self.run.model.patches, device, precision, report, self.ranks)

    def save(self, model: MaskedImages, folder: Path) -> None:
        """Write the encoder, which `--init` and `ms.load` take, and the head beside it."""
        model.encoder.preprocess = self.preprocess
        save_masked(model, folder)

    def load(self, folder: Path) -> MaskedImages:
        """What `save` wrote."""
        return load_masked(folder)

    def draw(self, model: MaskedImages, path: Path | str) -> None:
        """A sheet of held-out pictures: as they are, as the net sees them, and as it paints them."""
        transform, inputs = eval_transform(self.preprocess), []
        for index in torch.linspace(0, len(self.splits.val) - 1, min(8, len(self.splits.val))).long().unique().tolist():
            with suppress(BadImage):
                inputs.append(transform(self.splits.val.read(index)))
        draw_painted([paint(model, torch.stack(inputs), self.run.simmim, self.preprocess)], path)


@torch.no_grad()
def score(
    model: nn.Module,
    batches: Iterable[Batch],
    settings: SimMIM,
    patches: tuple[int, ...],
    device: torch.device,
    precision: torch.dtype,
    report: Report,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """The loss of a model over batches, every picture counted once and hidden by the same mask at every call, on any number of ranks.

    Raises:
        ValueError: no picture could be read, or the mask unit does not fit.
    """
    was_training, sums = model.training, torch.zeros(2, dtype=torch.float64)
    model.eval()
    for number, batch in enumerate(all_reported(batches, report, ranks)):
        images, count = something(batch.images), len(batch.images)
        whose = torch.Generator().manual_seed(seed_from(number * ranks.count + ranks.rank))
        mask = masks_for(images, settings, patches, whose)
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            loss = painting_loss(model, images.to(device), mask.to(device), settings.target_window, patches)
        sums += torch.tensor([loss.item() * count, count])
    model.train(was_training)
    total, count = ranks.total(sums).tolist()
    if not count:
        raise ValueError("no picture of the held-out split could be read; see bad_files.jsonl")
    return {"l1": total / count, "pictures": int(count)}


def masks_for(images: Tensor, settings: SimMIM, patches: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
    """A mask (B, h, w) for each of the pictures (B, 3, H, W)."""
    size = tuple(images.shape[-2:])
    grid = tuple(s // p for s, p in zip(size, patches, strict=True))
    return block_mask(len(images), grid, mask_unit(settings, size, patches), settings.mask_ratio, generator=generator)


def mask_unit(settings: SimMIM, image_size: tuple[int, ...], patches: tuple[int, ...]) -> tuple[int, ...]:
    """`mask_unit` in patches per axis.

    Raises:
        ValueError: it is no multiple of the patch, or does not divide the image.
    """
    unit = settings.mask_unit
    if any(unit % patch for patch in patches):
        raise ValueError(f"field `mask_unit`: {unit} pixels are not whole patches of {patches}; give a multiple")
    if any(size % unit for size in image_size):
        raise ValueError(f"field `mask_unit`: {unit} pixels do not divide the image of {image_size}; give --mask-unit or --image-size so")
    return tuple(unit // patch for patch in patches)


class LocalNorm(NamedTuple):
    """Pixels, and what they were normalised by: pixels = target * deviation + mean. All (B, C, H, W)."""

    target: Tensor
    mean: Tensor
    deviation: Tensor


def local_norm(images: Tensor, window: int) -> LocalNorm:
    """Every pixel by mean and deviation of the `window` x `window` pixels around it that lie in the picture.

    The deviation is the unbiased one, with 1e-6 added to the variance (Swin V2 section 4.1 takes it for huge nets; the
    numbers are the official code's). `window` 0: the pixels as they are.
    """
    if not window:
        return LocalNorm(images, torch.zeros_like(images), torch.ones_like(images))
    with torch.autocast(images.device.type, enabled=False):
        images = images.to(torch.promote_types(images.dtype, torch.float32))
        mean, square = (F.avg_pool2d(x, window, 1, window // 2, count_include_pad=False) for x in (images, images.square()))
        inside = F.avg_pool2d(torch.ones_like(images[:1, :1]), window, 1, window // 2) * window**2  # pixels in each window
        inside = inside.round()
        variance = (square - mean.square()).clamp(min=0) * inside / (inside - 1).clamp(min=1)
        deviation = (variance + 1e-6).sqrt()
        return LocalNorm((images - mean) / deviation, mean, deviation)


def painting_loss(model: nn.Module, images: Tensor, mask: Tensor, window: int, patches: tuple[int, ...]) -> Tensor:
    """The loss of `model` on pictures (B, 3, H, W) with masks (B, h, w); `window` as in `local_norm`."""
    return masked_l1(model(images, mask).float(), local_norm(images, window).target, mask, patches)


def masked_l1(pixels: Tensor, target: Tensor, mask: Tensor, patches: tuple[int, ...]) -> Tensor:
    """The mean of |pixels - target|, both (B, C, H, W), where `mask` (B, h, w) is True; `patches` is a patch in pixels."""
    hidden = on_pixels(mask, patches).to(pixels.dtype)
    error = (pixels - target).abs() * hidden
    return error.sum() / (hidden.sum() + 1e-5) / pixels.shape[1]


def on_pixels(mask: Tensor, patches: tuple[int, ...]) -> Tensor:
    """A mask of patches (B, h, w) as one of pixels (B, 1, H, W)."""
    return mask.repeat_interleave(patches[0], dim=1).repeat_interleave(patches[1], dim=2)[:, None]


class Painted(NamedTuple):
    """What a net makes of pictures, each (B, 3, H, W) in [0, 1]."""

    inputs: Tensor
    seen: Tensor  # the hidden blocks grey
    painted: Tensor  # the hidden blocks as the net paints them
    errors: tuple[float, ...]  # of each picture: the training loss
    normalised: bool  # whether local mean and contrast of the hidden blocks are the picture's own: the net says nothing of them


@torch.no_grad()
def paint(model: MaskedImages, images: Tensor, settings: SimMIM, preprocess: Preprocess, seed: int = 0) -> Painted:
    """Hide blocks of preprocessed pictures (B, 3, H, W) and let the net paint them.

    A net that learnt normalised targets says nothing of local mean and contrast: these are taken from the picture itself.
    """
    patches = model.config.patches
    mask = masks_for(images, settings, patches, torch.Generator().manual_seed(seed))
    device, was_training = next(model.parameters()).device, model.training
    images, mask = images.to(device), mask.to(device)
    pixels = model.eval()(images, mask).float()
    model.train(was_training)
    local = local_norm(images, settings.target_window)
    errors = tuple(masked_l1(pixels[i : i + 1], local.target[i : i + 1], mask[i : i + 1], patches).item() for i in range(len(images)))
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (preprocess.mean, preprocess.std))
    shown, made = ((x * std + mean).clamp(0, 1).cpu() for x in (images, pixels * local.deviation + local.mean))
    hidden = on_pixels(mask, patches).cpu()
    seen, painted = torch.where(hidden, torch.full_like(shown, 0.5), shown), torch.where(hidden, made, shown)
    return Painted(shown, seen, painted, errors, settings.target_window > 0)


def draw_painted(pictures: Sequence[Painted], path: Path | str, captions: Sequence[str] = ()) -> None:
    """Three rows: pictures as they are, as the net sees them, and as it paints them; one column a picture."""
    from matplotlib.figure import Figure

    rows = {name: torch.cat([getattr(one, name) for one in pictures]) for name in ("inputs", "seen", "painted")}
    count = len(rows["inputs"])
    normalised = any(one.normalised for one in pictures)
    labels = {"inputs": "picture", "seen": "seen", "painted": "painted, but for\nbrightness and contrast" if normalised else "painted"}
    figure = Figure(figsize=(1.5 * count + 0.4, 4.7 + 0.4 * bool(captions)), layout="constrained")
    grid = figure.subplots(3, count, squeeze=False)
    for places, (name, images) in zip(grid, rows.items(), strict=True):
        for axes, image in zip(places, images, strict=True):
            axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest" if image.shape[-1] < 96 else "antialiased")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        places[0].set_ylabel(labels[name])
    for axes, text in zip(grid[0], captions, strict=False):
        axes.set_title(text, fontsize=8, wrap=True)
    figure.savefig(path, dpi=110)
