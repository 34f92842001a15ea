"""Score a saved model on a split of a set."""

from dataclasses import replace
from pathlib import Path

import torch

from manyscale.config import Input, Run, from_dict
from manyscale.data.loader import eval_batches, worker_count
from manyscale.data.sources import open_split
from manyscale.data.transforms import eval_transform
from manyscale.models import Swin, load
from manyscale.storage import read_json
from manyscale.tasks.classify import Report, score
from manyscale.train.state import pick_device, pick_precision


def evaluate(
    path: str,
    report: Report,
    *,
    data: str = "",
    split: str = "val",
    batch: int = 64,
    workers: int = -1,
    device: str = "auto",
    precision: str = "float32",
) -> dict[str, float]:
    """Top-1 and top-5 accuracy and loss of the model at `path` on one split, over the pictures that could be read.

    Args:
        path: a run's folder, or any folder that `ms.save` wrote; a run brings its own data.
        data: a set by name or folder; empty: the one the run was trained on.
        report: called with path and reason of every picture that could not be read.

    Raises:
        ValueError: no such model, set or split, or classes that are not the model's.
    """
    if batch < 1:
        raise ValueError(f"field `batch`: {batch} must be at least 1")
    model, run = load(path), recipe_of(path)
    if not model.preprocess or not model.config.classes:
        raise ValueError(f"{path}: no head, or no word on how its pictures are prepared; give a model that `train` wrote")
    if not data and not run:
        raise ValueError(f"{path}: there is no recipe.json that names its data; give --data")
    settings = replace(run.input if run else Input(), workers=workers, cache=False)
    source, classes, _ = open_split(replace(settings, data=data or settings.data), split, run.seed if run else 0)
    order = _class_order(model, classes)
    chosen = pick_device(device)
    batches = eval_batches(source, eval_transform(model.preprocess), batch=batch, workers=worker_count(workers), policy=settings.bad_files)
    return score(model.to(chosen), batches, chosen, pick_precision(precision, chosen), report, order)


def recipe_of(path: str) -> Run | None:
    """The recipe that lies beside a model, if one does."""
    for file in (Path(path) / "recipe.json", Path(path) / "best" / "recipe.json"):
        if file.exists():
            return from_dict(Run, read_json(file), str(file))
    return None


def _class_order(model: Swin, classes: tuple[str, ...]) -> torch.Tensor | None:
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
