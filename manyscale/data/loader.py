"""Batches as a pure function of (seed, epoch, sample): no loader state to save, the same for any number of workers.

Shapes: B good pictures of H x W pixels.
"""

import contextlib
import hashlib
import os
import signal
import struct
import threading
from collections.abc import Iterator
from multiprocessing import get_all_start_methods
from typing import Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from manyscale.data.images import BadImage
from manyscale.data.sources import Source
from manyscale.data.transforms import Transform

Key = tuple[int, int, int]
"""(epoch, index, copy): what the pixels of a sample depend on, besides the seed; `copy` counts the times an epoch has shown it."""


class BadFile(NamedTuple):
    """A picture that was left out."""

    path: str
    reason: str


class Batch(NamedTuple):
    """The good pictures of a batch, in order, and the bad files that are missing from it."""

    images: Tensor  # (B, 3, H, W) float32; B may be 0
    labels: Tensor  # (B,) int64
    ids: tuple[str, ...]  # of `images`
    bad: tuple[BadFile, ...]


def order(count: int, seed: int, epoch: int, repeats: int = 1) -> Tensor:
    """What an epoch goes through, (count,) int64: a permutation, or the first part of one, every sample `repeats` times in a row."""
    permutation = torch.randperm(count, generator=torch.Generator().manual_seed(seed_from(seed, epoch)))
    return permutation[: -(-count // repeats)].repeat_interleave(repeats)[:count]


def steps_per_epoch(count: int, batch: int) -> int:
    """Whole batches in `count` samples; each epoch leaves out another remainder.

    Raises:
        ValueError: not one.
    """
    if count < batch:
        raise ValueError(f"field `batch`: {batch} is more than the {count} training images there are; use a batch of {count} at most")
    return count // batch


def worker_count(workers: int) -> int:
    """`Input.workers` as a number of processes: -1 becomes one less than the cores this process may use, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores - 1) if workers < 0 else workers


def train_batches(
    source: Source,
    transform: Transform,
    *,
    batch: int,
    seed: int,
    start_step: int,
    steps: int,
    workers: int,
    repeats: int = 1,
    policy: Literal["skip", "stop"] = "skip",
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """The batches of steps `start_step` to `steps` - 1, counted over all epochs; what came before is not read.

    Args:
        workers: loader processes, as `worker_count` gives; one set serves all epochs.
        repeats: how often in a row an epoch shows a sample, transformed anew (repeated augmentation).
        policy: bad files are left out and listed in `Batch.bad`, or end the run.

    Raises:
        ValueError: fewer samples than `batch`; while iterating with "stop", a file that cannot be read, by name.
    """
    each = steps_per_epoch(len(source), batch)

    def keys() -> Iterator[list[Key]]:
        for step in range(start_step, steps):
            epoch, position = divmod(step, each)
            if position == 0 or step == start_step:
                indices = order(len(source), seed, epoch, repeats).tolist()
            places = range(position * batch, (position + 1) * batch)
            yield [(epoch, indices[place], place % repeats) for place in places]

    return _batches(_Samples(source, transform, seed), keys(), workers=workers, policy=policy, pin_memory=pin_memory)


def eval_batches(
    source: Source,
    transform: Transform,
    *,
    batch: int,
    workers: int,
    policy: Literal["skip", "stop"] = "skip",
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Every sample once, in order; the last batch may be short. Arguments and errors as `train_batches`."""
    starts = range(0, len(source), batch)
    keys = ([(0, index, 0) for index in range(start, min(start + batch, len(source)))] for start in starts)
    return _batches(_Samples(source, transform, 0), keys, workers=workers, policy=policy, pin_memory=pin_memory)


class _Samples(Dataset):
    """A key -> (image, label, id), or the file that is bad."""

    def __init__(self, source: Source, transform: Transform, seed: int) -> None:
        self.source, self.transform, self.seed = source, transform, seed

    def __getitem__(self, key: Key) -> tuple[Tensor, int, str] | BadFile:
        index = key[1]
        try:
            picture = self.source.read(index)
        except BadImage as bad:
            return BadFile(bad.path, bad.reason)
        return self._transformed(picture, key), self.source.label(index), self.source.name(index)

    def _transformed(self, picture: Image.Image, key: Key) -> Tensor:
        """`picture` transformed under a generator of its own.

        Not `fork_rng` and `torch.manual_seed`: they cost 160 us a sample, more than a light transform, where this costs 2,
        and `manual_seed` also reseeds the accelerator, which `fork_rng(devices=[])` does not restore.
        """
        state = torch.get_rng_state()
        try:
            epoch, index, copy = key
            torch.default_generator.manual_seed(seed_from(self.seed, epoch, index, *([copy] if copy else [])))
            return self.transform(picture)
        finally:
            torch.set_rng_state(state)

    def collate(self, samples: list[tuple[Tensor, int, str] | BadFile]) -> Batch:
        bad = tuple(sample for sample in samples if isinstance(sample, BadFile))
        good = [sample for sample in samples if not isinstance(sample, BadFile)]
        if not good:
            shape = self._transformed(Image.new("RGB", (1, 1)), (0, 0, 0)).shape
            return Batch(torch.empty(0, *shape), torch.empty(0, dtype=torch.int64), (), bad)
        images, labels, ids = zip(*good, strict=True)
        return Batch(default_collate(images), torch.tensor(labels), ids, bad)


def _batches(samples: _Samples, keys: Iterator[list[Key]], *, workers: int, policy: str, pin_memory: bool) -> Iterator[Batch]:
    loader = DataLoader(
        samples,
        batch_sampler=keys,
        collate_fn=samples.collate,
        num_workers=workers,  # torch gives each of them one thread
        worker_init_fn=_leave_signals_to_parent,
        pin_memory=pin_memory,
        # forked workers share the source's memory; other ways of starting would copy a cached set into each
        multiprocessing_context="fork" if workers and "fork" in get_all_start_methods() else None,
        generator=torch.Generator(),  # the loader draws a seed we do not use; this keeps it from the caller's generator
    )
    with _signals_held():
        reads = iter(loader)
    for read in reads:
        if policy == "stop" and read.bad:
            bad = BadImage(*read.bad[0])
            raise ValueError(f"{bad}; repair or remove the file, or leave such files out with `bad_files` skip")
        yield read


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait for the end of the block, and never reach processes that start in it: they are born deaf to them."""
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals_to_parent(worker: int) -> None:
    """Lets the parent finish its step and save when all processes are told to stop at once (Ctrl-C, `timeout`, Slurm, systemd)."""
    if hasattr(signal, "sigwaitinfo"):  # a handler could not tell who sent the signal
        threading.Thread(target=_end_with_parent, daemon=True).start()
    else:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _end_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def seed_from(*numbers: int) -> int:
    """A seed in [0, 2^63) from several numbers: neighbours get unrelated ones, which sums and products do not give."""
    digest = hashlib.blake2b(struct.pack(f"<{len(numbers)}q", *numbers), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
