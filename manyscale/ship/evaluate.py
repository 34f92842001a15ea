"""Score a saved model on a split of a set."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from manyscale.config import Input, Preprocess, Run, Setting, from_dict
from manyscale.data.loader import eval_batches, worker_count
from manyscale.data.sources import Part, Source, open_split
from manyscale.data.transforms import eval_transform
from manyscale.heads.pixels import is_masked, load_masked
from manyscale.models import Net, load
from manyscale.models.settings import AtSetting
from manyscale.ship.answers import prepared
from manyscale.storage import read_json
from manyscale.tasks import simmim
from manyscale.tasks.classify import score
from manyscale.tasks.pictures import Report
from manyscale.train.state import pick_device, pick_precision


def evaluate(
    path: str,
    report: Report,
    *,
    data: str = "",
    split: str = "val",
    setting: str = "",
    batch: int = 64,
    workers: int = -1,
    device: str = "auto",
    precision: str = "float32",
) -> dict[str, float]:
    """Top-1 and top-5 accuracy and loss of the model at `path` on one split, over the pictures that could be read.

    Of a SimMIM run instead `l1`, its training loss.

    Args:
        path: a run's folder, or any folder that `ms.save` wrote; a run brings its own data.
        data: a set by name or folder; empty: the one the run was trained on.
        setting: how the net is run, such as 160/0.7 or 192/window=12; empty: at its own size, whole.
        report: called with path and reason of every picture that could not be read.

    Raises:
        ValueError: no such model, set or split, classes that are not the model's, or a setting it cannot be run at.
    """
    if batch < 1:
        raise ValueError(f"field `batch`: {batch} must be at least 1")
    run = recipe_of(path)
    if is_masked(path) and run:
        if setting:
            raise ValueError(f"field `setting`: {setting}: a SimMIM run paints at its own size; leave it out")
        settings = replace(run.input, data=data or run.input.data, workers=workers, cache=False)
        return _score_painting(
            path, open_split(settings, split, run.seed, labelled=False).source, run, settings, report, batch, device, precision
        )
    model = load(path)
    chosen, asked = pick_device(device), Setting.read(setting) if setting else None
    transform = eval_transform(prepared(model, [asked]))
    scored = open_scored(path, model, data, split)
    batches = eval_batches(scored.source, transform, batch=batch, workers=worker_count(workers), policy=scored.policy)
    net, dtype = AtSetting(model, asked).to(chosen), pick_precision(precision, chosen)
    return score(net, batches, chosen, dtype, report, scored.order, run.loss if run else "softmax")


class Scored(NamedTuple):
    """The pictures that a model is scored on."""

    source: Source
    order: Tensor | None  # (K,) int64, the model's class for each of the set's; None: they are in the same order
    policy: Literal["skip", "stop"]  # what becomes of files that cannot be read
    name: str  # set and split


def open_scored(path: str, model: Net, data: str = "", split: str = "val") -> Scored:
    """The split of a set that the model at `path` is scored on; empty `data`: the set that the run was trained on.

    Raises:
        ValueError: no such set or split, no word on which, or classes that are not the model's.
    """
    run = recipe_of(path)
    if not data and not run:
        raise ValueError(f"{path}: there is no recipe.json that names its data; give --data")
    settings = replace(run.input if run else Input(), cache=False)
    settings = replace(settings, data=data or settings.data)
    source, classes, _ = open_split(settings, split, run.seed if run else 0)
    return Scored(source, _class_order(model, classes), settings.bad_files, f"{settings.data}, {split}")


def pictures_for(model: Net, data: str, count: int = 2_000, preprocess: Preprocess | None = None) -> Iterator[Tensor]:
    """Batches (B, 3, H, W) of `count` training pictures of a set, drawn at random; labels are not looked at.

    They are prepared as `preprocess` says; None: as the model's own.

    Raises:
        ValueError: no such set, or a model that does not know how its pictures are prepared.
    """
    preprocess = preprocess or model.preprocess
    if not preprocess:
        raise ValueError("this model does not know how its pictures are prepared; give one that `train` or `convert` wrote")
    source = open_split(Input(data=data), "train", 0, labelled=False).source
    chosen = Part(source, np.random.default_rng(0).permutation(len(source))[:count])
    return (batch.images for batch in eval_batches(chosen, eval_transform(preprocess), batch=100, workers=0) if len(batch.images))


def _score_painting(
    path: str, source: Source, run: Run, settings: Input, report: Report, batch: int, device: str, precision: str
) -> dict[str, float]:
    model, chosen = load_masked(path), pick_device(device)
    if not model.encoder.preprocess:
        raise ValueError(f"{path}: no word on how its pictures are prepared; give a run's folder")
    batches = eval_batches(
        source, eval_transform(model.encoder.preprocess), batch=batch, workers=worker_count(settings.workers), policy=settings.bad_files
    )
    dtype = pick_precision(precision, chosen)
    return simmim.score(model.to(chosen), batches, run.simmim, model.config.patches, chosen, dtype, report)


def recipe_of(path: str) -> Run | None:
    """The recipe that lies beside a model, if one does."""
    for file in (Path(path) / "recipe.json", Path(path) / "best" / "recipe.json"):
        if file.exists():
            return from_dict(Run, read_json(file), str(file))
    return None


def _class_order(model: Net, classes: tuple[str, ...]) -> Tensor | None:
    """The model's class for each of the set's, by name; None where the model has no names, and they must only be as many."""
    if not model.labels:
        if len(classes) != model.config.classes:
            raise ValueError(f"the set has {len(classes)} classes, the model {model.config.classes}")
        return None
    extra, missing = sorted(set(classes) - set(model.labels)), sorted(set(model.labels) - set(classes))
    if extra or missing:
        lists = [f"{word} {', '.join(names[:10])}" for word, names in (("has besides", extra), ("lacks", missing)) if names]
        raise ValueError(f"the set's classes are not the model's: it {' and '.join(lists)}")
    return torch.tensor([model.labels.index(name) for name in classes])
