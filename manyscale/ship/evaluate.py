"""Score a saved model on a split of a set."""

from dataclasses import replace
from pathlib import Path

import torch

from manyscale.config import Input, Run, from_dict
from manyscale.data.loader import eval_batches, worker_count
from manyscale.data.sources import Source, open_split
from manyscale.data.transforms import eval_transform
from manyscale.heads.pixels import is_masked, load_masked
from manyscale.models import Net, load
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
        report: called with path and reason of every picture that could not be read.

    Raises:
        ValueError: no such model, set or split, or classes that are not the model's.
    """
    if batch < 1:
        raise ValueError(f"field `batch`: {batch} must be at least 1")
    run = recipe_of(path)
    if is_masked(path) and run:
        settings = replace(run.input, data=data or run.input.data, workers=workers, cache=False)
        return _score_painting(
            path, open_split(settings, split, run.seed, labelled=False).source, run, settings, report, batch, device, precision
        )
    model = load(path)
    if not model.preprocess or not model.config.classes:
        raise ValueError(f"{path}: no head, or no word on how its pictures are prepared; give a model that `train` wrote")
    if not data and not run:
        raise ValueError(f"{path}: there is no recipe.json that names its data; give --data")
    settings = replace(run.input if run else Input(), workers=workers, cache=False)
    source, classes, _ = open_split(replace(settings, data=data or settings.data), split, run.seed if run else 0)
    order = _class_order(model, classes)
    chosen = pick_device(device)
    batches = eval_batches(source, eval_transform(model.preprocess), batch=batch, workers=worker_count(workers), policy=settings.bad_files)
    return score(model.to(chosen), batches, chosen, pick_precision(precision, chosen), report, order, run.loss if run else "softmax")


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


def _class_order(model: Net, classes: tuple[str, ...]) -> torch.Tensor | None:
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
