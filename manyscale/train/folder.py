"""Who may train in a run's folder: one process at a time, and only the run that began there."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from manyscale.config import Run, from_dict, to_dict
from manyscale.ranks import Ranks
from manyscale.storage import make_folder, read_json
from manyscale.train.state import Clock

# What may differ when a run goes on: where and how fast it computes, and what it says; never what it learns.
FREE = {
    *("out", "device", "precision", "compile", "log_every", "tensorboard", "nonfinite"),
    *("input.workers", "input.cache", "input.verify", "input.loader_timeout"),
    *(f"schedule.{name}" for name in ("save_minutes", "save_steps", "save_beside", "keep", "keep_every", "keep_best")),
    *(f"parallel.{name}" for name in ("shard", "shard_group", "offload", "timeout")),
}


_held: set[IO[str]] = set()
# A forked loader worker inherits the lock, and outlives a killed parent by seconds: it lets go at birth.
os.register_at_fork(after_in_child=lambda: [lock.close() for lock in _held])


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system drops with the process however it ends.

    Raises:
        ValueError: another process trains there.
    """
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another process is training here; wait for it or give another --out") from None
        _held.add(lock)
        try:
            yield
        finally:
            _held.discard(lock)


@contextmanager
def entered(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Be in a run's folder, made where it is not there; the leader holds its lock for all. Raises as `only_one`, on every rank."""
    failure = None
    with ExitStack() as held:
        if ranks.leads:
            try:
                make_folder(folder)
                held.enter_context(only_one(folder))
            except (ValueError, OSError) as error:
                failure = error
        said = ranks.tell(str(failure) if failure else "")
        if said:
            raise failure or ValueError(said)
        yield


def check_task(folder: Path, run: Run) -> None:
    """See that a folder holds no run of another task, before any data are opened.

    Raises:
        ValueError: it does, or its recipe is not one.
    """
    file = folder / "recipe.json"
    if file.exists():
        there = from_dict(Run, read_json(file), str(file))
        if there.task != run.task:
            raise ValueError(f"{folder} holds a run of another task, {there.task}; give --out another folder")


def check_recipe(folder: Path, run: Run) -> None:
    """See that the run in a folder is this one.

    Raises:
        ValueError: it is another; the fields that differ are listed.
    """
    check_same(folder / "recipe.json", run)


def check_surroundings(folder: Path, clock: Clock, data: str, precision: torch.dtype, ranks: Ranks) -> None:
    """See that data and precision are those that the run began with, or write down in its clock what they are.

    Args:
        data: the fingerprint of what this rank finds.

    Raises:
        ValueError: one of them changed, so that going on would not be the same run; or ranks have different data.
    """
    others = [rank for rank, found in enumerate(ranks.collect(data)) if found != data]
    if others:
        raise ValueError(f"field `data`: rank {others[0]} finds other classes or files than rank {ranks.rank}; give all ranks one set")
    if clock.data and clock.data != data:
        raise ValueError(f"field `data`: the set's classes or files are not those that {folder} began with; give another --out")
    computed = str(precision).removeprefix("torch.")
    if clock.precision and clock.precision != computed:
        raise ValueError(f"field `precision`: the run began in {clock.precision}, this would be {computed}; give --precision")
    clock.data, clock.precision = data, computed


def check_same(file: Path, run: Run) -> None:
    """See that the run written in a file is this one, but for what is free to differ. Raises as `check_recipe`."""
    old, new = (_flat(to_dict(one)) for one in (from_dict(Run, read_json(file), str(file)), run))
    bound = [name for name in new if name not in FREE and not name.startswith("memory.")]
    differ = [f"{name}: {old[name]!r} there, {new[name]!r} now" for name in bound if old[name] != new[name]]
    if differ:
        raise ValueError(f"{file.parent} holds another run; give --out another folder, or the same fields:\n  " + "\n  ".join(differ))


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
