"""What a net answers at several settings: on a whole split, and to mixed requests in one call.

Letters: N pictures, K classes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from manyscale.config import Preprocess, Setting
from manyscale.data.loader import Batch
from manyscale.models import Net
from manyscale.models.settings import run_at
from manyscale.ship.measure import size_of
from manyscale.tasks.pictures import Report


class Answers(NamedTuple):
    """The logits of every setting on the same pictures, on the CPU."""

    logits: dict[Setting, Tensor]  # (N, K) float32 each
    labels: Tensor  # (N,) int64


def prepared(model: Net, settings: Iterable[Setting | None]) -> Preprocess:
    """How pictures are prepared for all of these settings: at the model's own size, or the largest that a setting asks for.

    The net resizes them to each setting's size, as it did in training.

    Raises:
        ValueError: a model that does not know how its pictures are prepared, or has no head.
    """
    if not model.preprocess or not model.config.classes:
        raise ValueError("this model has no head or does not know how its pictures are prepared; give one that `train` wrote")
    asked = [size_of(model.config, setting) for setting in settings if setting is not None and setting.size is not None]
    return replace(model.preprocess, image_size=max([model.preprocess.image_size, *asked], key=prod))


@torch.no_grad()
def collect(
    model: Net,
    settings: Sequence[Setting],
    batches: Iterable[Batch],
    device: torch.device,
    precision: torch.dtype,
    report: Report,
    classes: Tensor | None = None,
) -> Answers:
    """The logits of every setting over batches; each picture is read once. They take 4 x N x K bytes a setting.

    Args:
        report: called with path and reason of every picture that could not be read.
        classes: (K,) int64, the model's class for each of the set's, where the two are not in the same order.

    Raises:
        ValueError: fewer than two pictures could be read, or logits that are no numbers.
    """
    logits: dict[Setting, list[Tensor]] = {setting: [] for setting in settings}
    labels = []
    model.eval()
    for batch in batches:
        for bad in batch.bad:
            report(bad.path, bad.reason)
        if not len(batch.labels):
            continue
        labels.append(batch.labels if classes is None else classes[batch.labels])
        images = batch.images.to(device)
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            for setting in settings:
                logits[setting].append(run_at(model, images, setting).float().cpu())
    if sum(map(len, labels)) < 2:
        raise ValueError("fewer than two pictures of the split could be read; give another set or split")
    whole = {setting: torch.cat(parts) for setting, parts in logits.items()}
    for setting, found in whole.items():
        if not found.isfinite().all():
            raise ValueError(f"setting {setting}: answers that are NaN or infinite; the weights are broken, or try --precision float32")
    return Answers(whole, torch.cat(labels))


def halves(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The places of `count` pictures in two halves, drawn by a seed: to choose on, and to report on."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[: count // 2].sort().values, order[count // 2 :].sort().values


@torch.no_grad()
def answer_mixed(model: Net, requests: Sequence[tuple[Tensor, Setting | None]], batch: int = 32) -> Tensor:
    """Logits of pictures that each ask for a setting of their own: (N, K), in the order they came.

    Those of one setting and one shape run together.

    Args:
        requests: image (3, H, W) and setting; None: the image as it is.
        batch: the most pictures at a time.

    Raises:
        ValueError: no request, or a setting that the net cannot be run at.
    """
    if not requests or batch < 1:
        raise ValueError("no requests" if not requests else f"field `batch`: {batch} must be at least 1")
    model.eval()
    groups: dict[tuple[Setting | None, torch.Size], list[int]] = {}
    for place, (image, setting) in enumerate(requests):
        groups.setdefault((setting, image.shape), []).append(place)
    places, parts = [], []
    for (setting, _), members in groups.items():
        for start in range(0, len(members), batch):
            together = members[start : start + batch]
            parts.append(run_at(model, torch.stack([requests[place][0] for place in together]), setting))
            places += together
    answered = torch.cat(parts)
    return torch.empty_like(answered).index_copy_(0, torch.tensor(places, device=answered.device), answered)
