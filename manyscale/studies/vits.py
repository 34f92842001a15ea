"""What the studies of "Scaling Vision Transformers" share: a small ViT on many classes, and few-shot sets of others."""

import math
from dataclasses import replace
from typing import Any, NamedTuple

from manyscale.config import Run, ViTConfig, in_steps
from manyscale.data.loader import steps_per_epoch
from manyscale.data.sources import DIGITS, open_splits, same_set
from manyscale.recipes.vit_ladder import rung
from manyscale.studies.study import Terms
from manyscale.train.schedule import total_rate

SHOTS = (1, 5, 10, 25)


class Upstream(NamedTuple):
    """What is learnt from, and what few-shot evaluation asks about."""

    data: str
    probe: str
    pictures: int
    classes: int


def upstream(terms: Terms) -> Upstream:
    """The study's sets: `terms.data`, and for few shots CIFAR-10, or Tiny-ImageNet where that is learnt from.

    Raises:
        ValueError: both are one: few shots of classes that were learnt already say nothing of features.
    """
    probe = terms.probe or ("tiny-imagenet" if terms.data == "cifar10" else "cifar10")
    if same_set(probe, terms.data):
        raise ValueError(f"field `probe`: {probe} is the set that is learnt from; give one of other classes")
    splits = open_splits(rung("w32", data=terms.data).input, 0)
    return Upstream(terms.data, probe, len(splits.train), len(splits.classes))


def vit(terms: Terms, sets: Upstream, size: str, *, share: float = 1.0, seed: int = 0, **schedule: Any) -> Run:
    """A rung of the ladder with the paper's sigmoid loss, its bias at the prior of one class in so many.

    Args:
        schedule: fields of it: `length`, or `branches`.
    """
    run = rung(size, data=sets.data, probe=sets.probe, share=share, seed=seed)
    augment = replace(run.augment, flip=0.0) if sets.data == DIGITS else run.augment
    return replace(
        run,
        input=replace(run.input, held_out=2_000) if terms.quick else run.input,
        model=replace(run.model, head_bias=-math.log(sets.classes - 1)),
        augment=augment,
        schedule=replace(run.schedule, **{"branches": (), **schedule}),
        fewshot=replace(run.fewshot, shots=SHOTS, draws=10),  # few pictures say little: draw often
        loss="sigmoid",
        compile=terms.compile,
    )


def decayed(run: Run, sets: Upstream, *, body: float, head: float) -> Run:
    """The run with the weight decays that shrink body and head by e^-body and e^-head over its length.

    A decay's number says nothing without the length and rates of the run: the paper's 0.03 and 3.0 are exponents of 4.4
    and 438 over a million steps.
    """
    each = steps_per_epoch(round(run.input.share * sets.pictures), run.batch)
    total = total_rate(run, in_steps(run.schedule.length, steps=0, steps_per_epoch=each, batch=run.batch), each)
    return replace(run, optim=replace(run.optim, weight_decay=body / total, head_decay=head / total))


def shot(record: dict[str, Any], count: int) -> float | None:
    """The few-shot accuracy in an evaluation's record."""
    return next((value for name, value in record.items() if name.endswith(f" {count}shot")), None)


def trained(run: Run, sets: Upstream) -> ViTConfig:
    """The net that the run trains: a recipe's does not know yet how many classes the data has."""
    assert isinstance(run.model, ViTConfig)
    return replace(run.model, classes=sets.classes)


def describe_vit(run: Run, sets: Upstream) -> str:
    """Net, data and optimiser in a few sentences."""
    optim, model = run.optim, run.model
    overlap = ""
    if {sets.data, sets.probe} == {"tiny-imagenet", "cifar10"}:
        overlap = " (no class of one is called as one of the other, but both know cats, dogs, frogs and cars)"
    one = f"Width {model.width}, {model.depth} blocks, {run.schedule.length}. " if run.schedule.length else ""  # of several lengths none
    return (
        f"ViT, but for what is compared with {model.pool} pooling; patch {model.patch} at {model.size[0]} px, MLPs four times as wide. "
        f"{one}"
        f"{sets.data}, {sets.pictures:,} pictures in {sets.classes} classes; few-shot on {sets.probe}{overlap}, {run.fewshot.draws} draws, "
        f"l2 {run.fewshot.l2:g}. "
        f"Sigmoid loss, {optim.method}, clip {optim.clip:g}, batch {run.batch}, crops of at least {run.augment.scale[0]:.0%} of the area"
        f"{', flips' if run.augment.flip else ''}, {run.precision}. Rate: rsqrt after a warm-up of {run.schedule.warmup}, the last "
        f"{run.schedule.cooldown} of a run a line to zero. Evaluated once, at the end"
        f"{f', upstream on {run.input.held_out:,} held-out pictures' if run.input.held_out else ''}."
    )
