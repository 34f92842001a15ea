"""Image classification: cross-entropy of soft labels, over all classes or of each on its own; top-1 and top-5."""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyscale.config import Run
from manyscale.data.images import BadImage
from manyscale.data.loader import Batch
from manyscale.data.transforms import eval_transform, mix
from manyscale.models import Net, build, load, save
from manyscale.ranks import ALONE, Ranks
from manyscale.tasks.pictures import Pictures, Report, all_reported, something


class Classify(Pictures):
    """The classification task of a run; the number of classes comes from the data."""

    metric, better = "accuracy", max  # decides which weights are the best

    def __init__(self, run: Run) -> None:
        super().__init__(run, labelled=True)
        self.mix = mix(run.augment, len(self.labels))

    def model(self) -> Net:
        """What is trained: a fresh model, or the one of `init`, with a new head where its classes are others."""
        if not self.run.init:
            return build(self.run.model)
        old = load(self.run.init)
        same = old.config.classes == len(self.labels) and old.labels in ((), self.labels)
        return self.initial(old, classes=None if same else len(self.labels), mask_token=False)

    def targets(self, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) and soft labels (B, classes) on the device, mixed where the run says so."""
        return self.mix(batch.images.to(device, non_blocking=True), batch.labels.to(device, non_blocking=True))

    def loss(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy of the batch."""
        return LOSSES[self.run.loss](model(images).float(), targets).mean()

    def evaluate(self, model: nn.Module, device: torch.device, precision: torch.dtype, report: Report) -> dict[str, float]:
        """Top-1 and top-5 accuracy and loss on the held-out split, over the files that could be read."""
        return score(model, self.eval_batches(), device, precision, report, loss=self.run.loss, ranks=self.ranks)

    def save(self, model: Net, folder: Path) -> None:
        """Write a model with what prediction needs to know."""
        model.preprocess, model.labels = self.preprocess, self.labels
        save(model, folder)

    def load(self, folder: Path) -> Net:
        """What `save` wrote."""
        return load(folder)

    @torch.no_grad()
    def draw(self, model: nn.Module, path: Path | str) -> None:
        """A sheet of held-out pictures with what the model says of each."""
        source, transform = self.splits.val, eval_transform(self.preprocess)
        shown, inputs = [], []
        for index in torch.linspace(0, len(source) - 1, min(24, len(source))).long().unique().tolist():
            with suppress(BadImage):
                picture = source.read(index)
                inputs.append(transform(picture))
                picture.thumbnail((256, 256))
                shown.append((picture, source.label(index)))
        was_training, device = model.training, next(model.parameters()).device
        probabilities = model.eval()(torch.stack(inputs).to(device)).float().softmax(-1)
        model.train(was_training)
        confidence, said = (t.tolist() for t in probabilities.max(-1))
        captions = [
            (f"{self.labels[guess]} {sure:.0%}", guess == truth) for (_, truth), guess, sure in zip(shown, said, confidence, strict=True)
        ]
        draw_sheet([picture for picture, _ in shown], captions, path)


def softmax_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of one distribution over the classes: (B, classes) twice -> (B,)"""
    return F.cross_entropy(logits, targets, reduction="none")


def sigmoid_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of every class, summed over them, as ViT's code has it: (B, classes) twice -> (B,)"""
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(-1)


LOSSES = {"softmax": softmax_loss, "sigmoid": sigmoid_loss}


@torch.no_grad()
def score(
    model: nn.Module,
    batches: Iterable[Batch],
    device: torch.device,
    precision: torch.dtype,
    report: Report,
    classes: Tensor | None = None,
    loss: Literal["softmax", "sigmoid"] = "softmax",
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """Top-1, top-5 and mean loss of a model over batches, every picture counted once.

    Args:
        classes: (K,) int64, the model's class for each of the set's, where the two are not in the same order.
        ranks: who share the batches.

    Raises:
        ValueError: no picture could be read.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64)
    for batch in all_reported(batches, report, ranks):
        labels = (batch.labels if classes is None else classes[batch.labels]).to(device)
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            logits = model(something(batch.images).to(device)).float()[: len(labels)]
        sums += torch.cat([tally(logits, labels, loss), torch.tensor([len(labels)])])
    model.train(was_training)
    *sums, count = ranks.total(sums).tolist()
    if not count:
        raise ValueError("no picture of the held-out split could be read; see bad_files.jsonl")
    top1, top5, mean = (total / count for total in sums)
    return {"accuracy": top1, "top5": top5, "val_loss": mean, "pictures": int(count)}


def tally(logits: Tensor, labels: Tensor, loss: str = "softmax") -> Tensor:
    """How many of (B, classes) logits are right, right among the best five, and the sum of their losses: (3,) float64 on the CPU."""
    ranks = logits.topk(min(5, logits.shape[-1])).indices == labels[:, None]
    losses = LOSSES[loss](logits, F.one_hot(labels, logits.shape[-1]).float())
    return torch.stack([ranks[:, 0].sum(), ranks.any(-1).sum(), losses.sum()]).double().cpu()


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
