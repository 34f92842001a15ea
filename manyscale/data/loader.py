"""Batches as a pure function of (seed, epoch, sample): no loader state to save, the same for any number of workers and ranks.

Shapes: B good pictures of H x W pixels.
"""

import contextlib
import hashlib
import os
import signal
import struct
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing import active_children, get_all_start_methods
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from manyscale.data.images import BadImage
from manyscale.data.sources import Source
from manyscale.data.transforms import Transform

Key = tuple[int, int, int]
"""(epoch, index, copy): what the pixels of a sample depend on, besides the seed; `copy` counts the times an epoch has shown it."""


Share = tuple[int, int]
"""(i, n): the ith of n equal parts."""

TRIES = 20  # pictures that are tried for one place of a training batch
DEATHS = 3  # in a row, of loader workers
LOOK = 5.0  # seconds between looks whether they live


class BadFile(NamedTuple):
    """A picture that was left out."""

    path: str
    reason: str


class Batch(NamedTuple):
    """The good pictures of a batch, in order, and the bad files that were met."""

    images: Tensor  # (B, 3, H, W) float32; B may be 0
    labels: Tensor  # (B,) int64
    ids: tuple[str, ...]  # of `images`
    bad: tuple[BadFile, ...]

    def parts(self, count: int) -> list["Batch"]:
        """The batch in `count` parts of one size; the first has the bad files."""
        size = len(self.labels) // count
        cuts = [slice(i * size, (i + 1) * size) for i in range(count)]
        return [Batch(self.images[cut], self.labels[cut], self.ids[cut], () if i else self.bad) for i, cut in enumerate(cuts)]


def order(count: int, seed: int, epoch: int, repeats: int = 1) -> Tensor:
    """What an epoch goes through, (count,) int64: a permutation, or the first part of one, every sample `repeats` times in a row."""
    permutation = torch.randperm(count, generator=torch.Generator().manual_seed(seed_from(seed, epoch)))
    return permutation[: -(-count // repeats)].repeat_interleave(repeats)[:count]


def instead(key: Key, attempt: int, seed: int, count: int) -> int:
    """Which of `count` samples takes the place of a bad one, at the first, second, ... attempt."""
    return seed_from(seed, *key, attempt) % count


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
    share: Share = (0, 1),
    pin_memory: bool = False,
    timeout: float = 0.0,
) -> Iterator[Batch]:
    """The batches of steps `start_step` to `steps` - 1, counted over all epochs; what came before is not read.

    Args:
        workers: loader processes, as `worker_count` gives; one set serves all epochs.
        repeats: how often in a row an epoch shows a sample, transformed anew (repeated augmentation).
        policy: bad files are replaced by others, drawn by the seed, and listed in `Batch.bad`; or end the run.
        share: of every batch, the (i, n)th of n equal parts is given: a rank's.
        timeout: seconds without a batch after which workers count as hung; 0: never.

    Raises:
        ValueError: fewer samples than `batch`, or a batch that does not fall into equal parts; while iterating with "stop", a file
            that cannot be read, by name, else one for which no replacement was found.
    """
    each, (rank, ranks) = steps_per_epoch(len(source), batch), share
    if batch % ranks:
        raise ValueError(f"field `batch`: {batch} is not shared out evenly by {ranks} ranks; give a multiple")

    def keys(begin: int) -> Iterator[list[Key]]:
        for step in range(begin, steps):
            epoch, position = divmod(step, each)
            if position == 0 or step == begin:
                indices = order(len(source), seed, epoch, repeats).tolist()
            first = position * batch + rank * (batch // ranks)
            yield [(epoch, indices[place], place % repeats) for place in range(first, first + batch // ranks)]

    samples, loading = _Samples(source, transform, seed, replace=policy == "skip"), {"pin_memory": pin_memory, "timeout": timeout}
    return _lasting(samples, keys, start_step, policy=policy, least=batch // ranks, workers=workers, **loading)


def eval_batches(
    source: Source,
    transform: Transform,
    *,
    batch: int,
    workers: int,
    policy: Literal["skip", "stop"] = "skip",
    share: Share = (0, 1),
    pin_memory: bool = False,
    timeout: float = 0.0,
) -> Iterator[Batch]:
    """Every sample once, in order; the last batch may be short, and bad files are missing. Arguments and errors as `train_batches`.

    Args:
        share: (i, n): of every n batches the ith, an empty one where the last n are not full, so that all ranks have as many.
    """
    rank, ranks = share
    starts = range(0, -(-len(source) // (batch * ranks)) * batch * ranks, batch)[rank::ranks]
    keys = [[(0, index, 0) for index in range(start, min(start + batch, len(source)))] for start in starts]
    samples, loading = _Samples(source, transform, 0, replace=False), {"pin_memory": pin_memory, "timeout": timeout}
    return _lasting(samples, lambda begin: iter(keys[begin:]), 0, policy=policy, workers=workers, **loading)


class Sample(NamedTuple):
    """One picture, or none, and the bad files that were met on the way."""

    image: Tensor | None  # (3, H, W)
    label: int
    id: str
    bad: tuple[BadFile, ...]


class _Samples(Dataset):
    """A key -> its sample. With `replace`, the seed draws another picture for a bad one, the same in every run."""

    def __init__(self, source: Source, transform: Transform, seed: int, *, replace: bool) -> None:
        self.source, self.transform, self.seed, self.replace = source, transform, seed, replace

    def __getitem__(self, key: Key) -> Sample:
        epoch, index, copy = key
        bad: list[BadFile] = []
        for attempt in range(TRIES if self.replace else 1):
            if attempt:
                index = instead(key, attempt, self.seed, len(self.source))
            try:
                picture = self.source.read(index)
            except BadImage as error:
                bad.append(BadFile(error.path, error.reason))
                continue
            picture = self._transformed(picture, (epoch, index, copy))
            return Sample(picture, self.source.label(index), self.source.name(index), tuple(bad))
        return Sample(None, 0, "", tuple(bad))

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

    def collate(self, samples: list[Sample]) -> Batch:
        bad = tuple(file for sample in samples for file in sample.bad)
        good = [sample for sample in samples if sample.image is not None]
        if not good:
            shape = self._transformed(Image.new("RGB", (1, 1)), (0, 0, 0)).shape
            return Batch(torch.empty(0, *shape), torch.empty(0, dtype=torch.int64), (), bad)
        images, labels, ids, _ = zip(*good, strict=True)
        return Batch(default_collate(images), torch.tensor(labels), ids, bad)


def _lasting(
    samples: _Samples, keys: Callable[[int], Iterator[list[Key]]], start: int, *, policy: str, least: int = 0, workers: int, **loading: Any
) -> Iterator[Batch]:
    """The batches of `keys(start)`; where workers die or hang, new ones go on with the batch that was waited for.

    Args:
        keys: those of every batch from a step on.
        least: pictures that a batch must have.
    """
    deaths = 0
    while True:
        try:
            for batch in _batches(samples, keys(start), workers=workers, **loading):
                if batch.bad and (policy == "stop" or len(batch.labels) < least):
                    others = f" (nor can {TRIES - 1} others that were drawn in its place)" if policy == "skip" else ""
                    bad = BadImage(*batch.bad[0])
                    raise ValueError(f"{bad}{others}; repair or remove the file, or leave such files out with `bad_files` skip")
                yield batch
                start, deaths = start + 1, 0
            return
        except (RuntimeError, ConnectionError, EOFError) as error:
            deaths += 1
            lost = not isinstance(error, RuntimeError) or str(error).startswith("DataLoader ")  # else an error of our own, in a worker
            if not (workers and lost) or deaths > DEATHS:
                raise
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            warnings.warn(f"loader workers were lost at batch {start} ({said}); new ones go on with it", RuntimeWarning, stacklevel=2)


def _batches(samples: _Samples, keys: Iterator[list[Key]], *, workers: int, pin_memory: bool, timeout: float) -> Iterator[Batch]:
    loader = DataLoader(
        samples,
        batch_sampler=keys,
        collate_fn=samples.collate,
        num_workers=workers,  # torch gives each of them one thread
        worker_init_fn=_leave_signals_to_parent,
        pin_memory=pin_memory,
        timeout=LOOK if workers else 0.0,  # then it sees whether all live, and waits on
        # forked workers share the source's memory; other ways of starting would copy a cached set into each
        multiprocessing_context="fork" if workers and "fork" in get_all_start_methods() else None,
        generator=torch.Generator(),  # the loader draws a seed we do not use; this keeps it from the caller's generator
    )
    before = set(active_children())
    with _signals_held():
        reads = iter(loader)
    born, since = set(active_children()) - before, time.monotonic()
    while True:
        try:
            batch = next(reads, None)
        except (RuntimeError, ConnectionError, EOFError) as error:
            if str(error).startswith("DataLoader timed out") and (not timeout or time.monotonic() - since < timeout):
                continue
            for worker in born:  # one that hangs heeds no softer word
                worker.kill()
            raise
        if batch is None:
            return
        yield batch
        since = time.monotonic()


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait for the end of the block, and never reach processes that start in it: they are born deaf to them.

    And torch's handler of dead workers is put away: it raises wherever the training is, not where a batch is waited for.
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        yield
        return
    children = signal.getsignal(signal.SIGCHLD)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGCHLD) != children is not None:
            signal.signal(signal.SIGCHLD, children)
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
