"""Image classification: soft-label cross-entropy, top-1 and top-5."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import xxhash
from torch import Tensor, nn

from manyscale.config import Run
from manyscale.data.images import BadImage
from manyscale.data.loader import Batch, eval_batches, steps_per_epoch, train_batches, worker_count
from manyscale.data.sources import open_splits
from manyscale.data.transforms import eval_transform, mix, preprocess_for, train_transform
from manyscale.models import Swin

Report = Callable[[str, str], Any]  # what to call with the path and the reason of a file that could not be read


class Loss(NamedTuple):
    """What to minimise, and what it is made of for the log."""

    total: Tensor
    parts: dict[str, Tensor]


class Classify:
    """The classification task of a run.

    `run` is the run made whole: the number of classes comes from the data.

    Raises:
        ValueError: data that cannot be used, named with the fix.
    """

    metric = "accuracy"  # the larger the better; decides which weights are the best

    def __init__(self, run: Run) -> None:
        if run.model.axes != 2:
            raise ValueError(f"field `image_size`: {run.model.image_size} makes a video model; this task takes pictures: height and width")
        self.splits = open_splits(run.input, run.seed)
        self.labels = self.splits.classes
        self.run = replace(run, model=replace(run.model, classes=len(self.labels)))
        self.preprocess = preprocess_for(run.input, self.run.model.size, self.splits.train)
        self.mix = mix(run.augment, len(self.labels))
        self.steps_per_epoch = steps_per_epoch(len(self.splits.train), run.batch)

    def train_batches(self, start: int, steps: int) -> Iterator[Batch]:
        """The batches of steps `start` to `steps` - 1, a pure function of the seed."""
        run, transform = self.run, train_transform(self.preprocess, self.run.augment)
        return train_batches(
            self.splits.train, transform, batch=run.batch, seed=run.seed, start_step=start, steps=steps,
            workers=worker_count(run.input.workers), policy=run.input.bad_files, pin_memory=torch.cuda.is_available(),
        )  # fmt: skip

    def fingerprint(self) -> str:
        """A hash of the set's classes and of the names of its files, in order: what the order of samples depends on."""
        state = xxhash.xxh3_128(os.fsencode("\n".join(self.labels)))
        for source in (self.splits.train, self.splits.val):
            for index in range(len(source)):
                state.update(os.fsencode(source.name(index)))
        return state.hexdigest()

    def targets(self, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) and soft labels (B, classes) on the device, mixed where the run says so."""
        return self.mix(batch.images.to(device, non_blocking=True), batch.labels.to(device, non_blocking=True))

    def loss(self, model: nn.Module, images: Tensor, targets: Tensor) -> Loss:
        """The mean cross-entropy of the batch."""
        total = F.cross_entropy(model(images).float(), targets)
        return Loss(total, {})

    def evaluate(self, model: nn.Module, device: torch.device, precision: torch.dtype, report: Report) -> dict[str, float]:
        """Top-1 and top-5 accuracy and loss on the held-out split, over the files that could be read."""
        run, transform, workers = self.run, eval_transform(self.preprocess), worker_count(self.run.input.workers)
        batches = eval_batches(self.splits.val, transform, batch=run.batch, workers=workers, policy=run.input.bad_files)
        return score(model, batches, device, precision, report)

    def finish(self, model: Swin) -> None:
        """Give a model what prediction needs to know."""
        model.preprocess, model.labels = self.preprocess, self.labels

    @torch.no_grad()
    def draw(self, model: nn.Module, device: torch.device, path: Path | str) -> None:
        """A sheet of held-out pictures with what the model says of each."""
        source, transform = self.splits.val, eval_transform(self.preprocess)
        shown, inputs = [], []
        for index in torch.linspace(0, len(source) - 1, min(24, len(source))).long().unique().tolist():
            with suppress(BadImage):
                picture = source.read(index)
                inputs.append(transform(picture))
                picture.thumbnail((256, 256))
                shown.append((picture, source.label(index)))
        probabilities = model.eval()(torch.stack(inputs).to(device)).float().softmax(-1)
        confidence, said = (t.tolist() for t in probabilities.max(-1))
        captions = [
            (f"{self.labels[guess]} {sure:.0%}", guess == truth) for (_, truth), guess, sure in zip(shown, said, confidence, strict=True)
        ]
        draw_sheet([picture for picture, _ in shown], captions, path)


@torch.no_grad()
def score(
    model: nn.Module, batches: Iterable[Batch], device: torch.device, precision: torch.dtype, report: Report, classes: Tensor | None = None
) -> dict[str, float]:
    """Top-1, top-5 and cross-entropy of a model over batches, every picture counted once.

    Args:
        classes: (K,) int64, the model's class for each of the set's, where the two are not in the same order.

    Raises:
        ValueError: no picture could be read.
    """
    was_training, count = model.training, 0
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64)
    for batch in batches:
        for bad in batch.bad:
            report(bad.path, bad.reason)
        if not len(batch.labels):
            continue
        labels = (batch.labels if classes is None else classes[batch.labels]).to(device)
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            logits = model(batch.images.to(device)).float()
        ranks = (logits.topk(min(5, logits.shape[-1])).indices == labels[:, None]).cpu()
        loss = F.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack([ranks[:, 0].sum(), ranks.any(-1).sum(), loss.cpu()]).double()
        count += len(labels)
    model.train(was_training)
    if not count:
        raise ValueError("no picture of the held-out split could be read; see bad_files.jsonl")
    top1, top5, loss = (sums / count).tolist()
    return {"accuracy": top1, "top5": top5, "val_loss": loss, "pictures": count}


def draw_sheet(pictures: list[Any], captions: list[tuple[str, bool | None]], path: Path | str, columns: int = 8) -> None:
    """A contact sheet: each picture with its caption, green where it is right, red where it is wrong."""
    from matplotlib.figure import Figure

    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    figure = Figure(figsize=(1.5 * columns, 1.75 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in grid:
        axes.axis("off")
    for axes, picture, (text, right) in zip(grid, pictures, captions, strict=False):
        axes.imshow(picture, interpolation="nearest" if max(picture.size) < 64 else "antialiased")
        axes.set_title(text, fontsize=8, color={True: "#1e7d34", False: "#c0392b", None: "#222222"}[right], wrap=True)
    figure.savefig(path, dpi=110)
