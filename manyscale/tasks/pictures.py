"""What tasks on pictures share: the set, its order, and what a checkpoint must find unchanged."""

import copy
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, Self

import torch
import xxhash
from torch import Tensor, nn

from manyscale.config import Run, SuperViTConfig
from manyscale.data.loader import Batch, eval_batches, steps_per_epoch, train_batches, worker_count
from manyscale.data.resident import resident_batches
from manyscale.data.sources import open_splits
from manyscale.data.transforms import eval_transform, preprocess_for, train_transform
from manyscale.models import Net, ViT, transfer
from manyscale.models.kin import to_supervit
from manyscale.ranks import ALONE, Ranks

Report = Callable[[str, str], Any]  # what to call with the path and the reason of a file that could not be read


class Pictures:
    """The data side of a task on pictures. `run` is the run made whole.

    Args:
        labelled: whether the set must have a folder per class; else every picture below its folder is one.

    Raises:
        ValueError: data that cannot be used, named with the fix.
    """

    ranks = ALONE  # who share the pictures
    passes_many = False  # whether a step has several passes, of which some leave parameters untouched

    def __init__(self, run: Run, *, labelled: bool) -> None:
        if isinstance(run.model, SuperViTConfig) and not labelled:
            raise ValueError("field `model`: a SuperViT has no mask token; pre-train a ViT with pool=token, and start from it by --init")
        if run.model.axes != 2:
            raise ValueError(f"field `image_size`: {run.model.image_size} makes a video model; this task takes pictures: height and width")
        self.splits = open_splits(run.input, run.seed, labelled=labelled)
        self.labels = self.splits.classes
        self.run = self._whole(run)
        self.preprocess = preprocess_for(run.input, self.run.model.size, self.splits.train)
        self.probes: dict[str, Any] = {}  # few-shot evaluations by the name of their set: see `tasks.open_task`
        self.steps_per_epoch = steps_per_epoch(len(self.splits.train), run.batch)

    def of(self, run: Run) -> Self:
        """The same task on the same pictures, opened once, for a run that differs in how and how long it learns."""
        other = copy.copy(self)
        other.run = self._whole(run)
        return other

    def _whole(self, run: Run) -> Run:
        """A run with what its data say about the net."""
        if isinstance(run.model, SuperViTConfig):  # which has no mask token
            return replace(run, model=replace(run.model, classes=len(self.labels)))
        return replace(run, model=replace(run.model, classes=len(self.labels), mask_token=not self.labels))

    def share(self, ranks: Ranks) -> None:
        """Take this rank's share of all pictures from here on."""
        self.ranks = ranks
        self.probes = {name: replace(probe, ranks=ranks) for name, probe in self.probes.items()}

    def probed(
        self, model: nn.Module, device: torch.device, precision: torch.dtype, report: Report, note: Callable[[str], None]
    ) -> dict[str, float]:
        """The few-shot accuracies of a net, `{"SET 5shot": ...}`. A set on which its features say nothing yet is noted and left out."""
        encoder, found = getattr(model, "encoder", model), {}  # of a SimMIM net
        for name, evaluation in self.probes.items():
            try:
                scores = evaluation(encoder, self.preprocess, device, precision, report)
            except ValueError as error:
                note(f"few-shot evaluation on {name} left out: {error}")
                continue
            found |= {f"{name} {shots}": accuracy for shots, accuracy in scores.items()}
        return found

    def compile(self, model: nn.Module) -> None:
        """torch.compile what the training step calls."""
        model.compile()

    def passes(self, step: int) -> int:
        """How many losses a step has."""
        return 1

    def losses(self, model: nn.Module, images: Tensor, targets: Tensor, step: int, average: nn.Module | None) -> Iterator[Tensor]:
        """The losses of one step, each backpropagated before the next is asked for: of most tasks one.

        Args:
            step: for tasks whose losses depend on it.
            average: the moving average of the weights, where there is one.
        """
        yield self.loss(model, images, targets)

    def describe(self) -> str:
        """The set in words."""
        classes = f" in {len(self.labels)} classes" if self.labels else ""
        return f"{len(self.splits.train):,} pictures{classes}, {len(self.splits.val):,} held out"

    def train_batches(self, start: int, steps: int, device: torch.device) -> Iterator[Batch]:
        """This rank's share of the batches of steps `start` to `steps` - 1 for a net on `device`, a pure function of the seed."""
        run, source, share = self.run, self.splits.train, (self.ranks.rank, self.ranks.count)
        common = {"batch": run.batch, "seed": run.seed, "start_step": start, "steps": steps, "policy": run.input.bad_files, "share": share}
        if run.input.resident:
            return resident_batches(source, self.preprocess, run.augment, device=device, **common)
        more = {"workers": worker_count(run.input.workers), "repeats": run.augment.repeats, "pin_memory": device.type == "cuda"}
        more["timeout"] = run.input.loader_timeout
        return train_batches(source, train_transform(self.preprocess, run.augment), **more, **common)

    def eval_batches(self) -> Iterator[Batch]:
        """This rank's share of the held-out pictures, in order: whole batches, as many as every other rank has."""
        run, transform, workers = self.run, eval_transform(self.preprocess), worker_count(self.run.input.workers)
        share, timeout = (self.ranks.rank, self.ranks.count), run.input.loader_timeout
        return eval_batches(
            self.splits.val, transform, batch=run.batch, workers=workers, policy=run.input.bad_files, share=share, timeout=timeout
        )

    def fingerprint(self) -> str:
        """A hash of the set's classes and of the names of its files, in order: what the order of samples depends on."""
        state = xxhash.xxh3_128(os.fsencode("\n".join(self.labels)))
        for source in (self.splits.train, self.splits.val):
            for index in range(len(source)):
                state.update(os.fsencode(source.name(index)))
        return state.hexdigest()

    def initial(self, old: Net, *, classes: int | None, mask_token: bool) -> Net:
        """The net of the run's `init`, laid out for the run's image size, window or patch, and drop path.

        A table that SimMIM learnt is resized geometrically, as its official fine-tuning does, any other bicubically.
        """
        model = self.run.model
        if isinstance(model, SuperViTConfig) and isinstance(old, ViT):
            old = to_supervit(old, replace(model, classes=old.config.classes))
        if isinstance(model, SuperViTConfig):
            mask_token = None
        table = "geometric" if getattr(old.config, "mask_token", False) and not mask_token else "bicubic"
        if type(old.config) is not type(model):
            kinds = (type(old.config).__name__, type(model).__name__)
            raise ValueError(
                f"field `init`: {self.run.init} holds a net of kind {kinds[0]}, the recipe's is a {kinds[1]}; take a recipe of its kind"
            )
        return transfer(old, **model.layout, classes=classes, drop_path=model.drop_path, mask_token=mask_token, table=table)


def all_reported(batches: Iterable[Batch], report: Report, ranks: Ranks = ALONE) -> Iterator[Batch]:
    """The batches as they come; at the end, the bad files of all ranks are reported on each."""
    met: dict[str, str] = {}
    for batch in batches:
        met |= {bad.path: bad.reason for bad in batch.bad}
        yield batch
    for files in ranks.collect(met):
        for path, reason in files.items():
            report(path, reason)


def something(images: Tensor) -> Tensor:
    """The pictures (B, 3, H, W), or one black one where there are none: ranks that share a net pass it as often as the others."""
    return images if len(images) else images.new_zeros(1, *images.shape[1:])
