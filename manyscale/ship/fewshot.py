"""What a saved model's features know of a set: few-shot linear regression on its pictures."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch

from manyscale.config import Input, Run
from manyscale.data.loader import worker_count
from manyscale.data.sources import open_split, same_set
from manyscale.data.transforms import preprocess_for
from manyscale.models import load
from manyscale.ship.evaluate import recipe_of
from manyscale.tasks.fewshot import L2, SHOTS, FewShot, Scores
from manyscale.tasks.pictures import Report
from manyscale.train.state import pick_device


def probe(
    path: str,
    report: Report,
    *,
    data: str = "",
    split: str = "val",
    shots: Sequence[int] = SHOTS,
    seeds: int = 3,
    l2s: Sequence[float] = (L2,),
    fewer: bool = False,
    statistics: Literal["imagenet", "half"] | None = None,
    batch: int = 64,
    workers: int = -1,
    device: str = "auto",
) -> Scores:
    """Few-shot accuracy of the features of the model at `path`, in float32: learnt from the train split, scored on another.

    A set without an evaluation split of its own is split as the run split it where it is the run's own, so that nothing
    is scored that the model was trained on; any other is split alike for all models.

    Args:
        path: a run's folder, or any folder or file that `ms.save` wrote; of a SimMIM run its encoder.
        report: called with path and reason of every picture that could not be read.
        data: a set by name or folder; empty: the one the run was trained on.
        split: what is scored.
        statistics: the mean and deviation of a model's pictures where it does not bring its own.

    The others are those of `tasks.fewshot.few_shot`.

    Raises:
        ValueError: no such model, set or split; a model of clips, or one that brings no statistics; and as `few_shot`.
    """
    model, run = load(path), recipe_of(path)
    if model.config.axes != 2:
        raise ValueError(f"{path}: a model of clips; few-shot evaluation takes models of pictures")
    if not data and not run:
        raise ValueError(f"{path}: there is no recipe.json that names its data; give --data")
    if split in ("train", "all"):
        raise ValueError(f"field `split`: {split} holds the pictures that are learnt from; give val, test or another split folder")
    settings, seed = _settings(run, data)
    train, classes, _ = open_split(settings, "train", seed)
    evaluation = FewShot(
        train=train,
        test=open_split(settings, split, seed).source,
        classes=classes,
        shots=tuple(shots),
        seeds=seeds,
        l2s=tuple(l2s),
        fewer=fewer,
        batch=batch,
        workers=worker_count(workers),
        policy=settings.bad_files,
    )
    preprocess = model.preprocess or (preprocess_for(Input(statistics=statistics), model.config.size, train) if statistics else None)
    if not preprocess:
        raise ValueError(f"{path}: no word on how its pictures are prepared; give --statistics imagenet or half, as it was trained with")
    chosen = pick_device(device)
    return evaluation.scores(model.to(chosen, torch.float32), preprocess, chosen, torch.float32, report)


def _settings(run: Run | None, data: str) -> tuple[Input, int]:
    """How the set is read, and the seed that splits it."""
    if run and (not data or same_set(data, run.input.data)):
        return replace(run.input, data=data or run.input.data, share=1.0, cache=False), run.seed
    return Input(data=data), 0
