"""Checkpoints that are whole or absent: safetensors and JSON in a folder that appears by one rename, with a hash of every file.

    runs/<name>/step_00000123/{shard-00001-model-00001-of-00001.safetensors, ..., state.json, manifest.json}

Every rank writes what it holds, through torch.distributed.checkpoint in its Hugging Face form, which has no pickle; any number of
ranks reads it again. No PyTorch or safetensors reader notices a flipped bit; the manifest (xxh3-128, size) does, and the step before
is used.
"""

import errno
import hashlib
import io
import os
import shutil
import stat
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import xxhash
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor

from manyscale.ranks import ALONE, Ranks
from manyscale.storage import as_json, make_folder, parse_json, read_json, sync, write_json

FORMAT = 1
PREFIX = "step_"
STATE, MANIFEST = "state.json", "manifest.json"
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")  # one process is what we mean


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], values: dict[str, Any], ranks: Ranks = ALONE) -> Path:
    """Write one checkpoint: aside, synced, then renamed into place. All ranks call it.

    Args:
        tensors: what this rank holds, shards of sharded ones; what several hold is written by one.
        values: of the leader.

    Raises:
        OSError: on every rank, where the disk of one is full, read-only or gone; earlier checkpoints stand.
    """
    final, aside = folder / f"{PREFIX}{step:08d}", folder / f".{PREFIX}{step:08d}"

    def begin() -> None:
        shutil.rmtree(aside, ignore_errors=True)
        make_folder(folder)
        aside.mkdir()

    def write_own() -> dict[str, Any]:
        storage = HuggingFaceStorageWriter(str(aside), save_distributed=True)
        storage.fs = files = _Fingerprinted()
        _stored(lambda: dcp.save(dict(tensors), storage_writer=storage, process_group=ranks.words, no_dist=ranks.count == 1))
        return files.written

    def commit() -> None:
        write_json(aside / STATE, {"format": FORMAT, "values": values})
        files = {name: entry for own in written for name, entry in own.items()}
        write_json(aside / MANIFEST, {STATE: _fingerprint(aside / STATE), **files})
        before = _unused(folder / f"{final.name}.old")
        if final.exists():  # the same step again: until the new one stands, the old one is still a checkpoint
            os.replace(final, before)
        os.replace(aside, final)
        sync(folder)
        _drop(before)

    try:
        _agreed(ranks, begin if ranks.leads else None)
        written = ranks.collect(_agreed(ranks, write_own))
        _agreed(ranks, commit if ranks.leads else None)
    finally:
        if ranks.leads:
            shutil.rmtree(aside, ignore_errors=True)
    return final


class Writer:
    """Writes checkpoints beside the training: a step waits for a copy of its tensors, not for the disk. One at a time.

    Args:
        beside: else every save waits for the disk.
    """

    def __init__(self, ranks: Ranks, *, beside: bool = True) -> None:
        self.ranks = ranks.apart() if beside else ranks
        self.beside, self.thread, self.failure = beside, None, None
        self.rooms: dict[str, Tensor] = {}  # where copies go, again and again
        pinned = {"use_pinned_memory": True, "use_shared_memory": False, "use_async_staging": False, "use_non_blocking_copy": True}
        self.stager = DefaultStager(StagingOptions(**pinned)) if torch.cuda.is_available() else None

    def save(self, folder: Path, step: int, tensors: dict[str, Tensor], values: dict[str, Any], **tidied: int) -> None:
        """Begin to write one checkpoint, and then `tidy`, once the one before is written.

        Raises:
            OSError: that one could not be.
        """
        self.wait()
        copies = self._copies(tensors) if self.beside else tensors

        def work() -> None:
            try:
                path = save_checkpoint(folder, step, copies, values, self.ranks)
                if self.ranks.leads:
                    tidy(folder, whole=path, **tidied)
            except BaseException as error:  # raised where the training waits for it
                self.failure = error

        if self.beside:
            self.thread = threading.Thread(target=work, name="checkpoint", daemon=True)
            self.thread.start()
        else:
            work()
            self.wait()

    def _copies(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What no later step touches. From a GPU torch's stager brings it; on a CPU that copies storages at a fifth of a copy's speed."""
        if self.stager:
            return self.stager.stage(dict(tensors))
        copies = {}
        for name, tensor in tensors.items():
            own = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
            room = self.rooms.get(name)
            if room is None or room.shape != own.shape:
                room = self.rooms[name] = torch.empty_like(own)
            copies[name] = room.copy_(own)
            if isinstance(tensor, DTensor):
                whole = {"shape": tensor.shape, "stride": tensor.stride(), "run_check": False}
                copies[name] = DTensor.from_local(room, tensor.device_mesh, tensor.placements, **whole)
        return copies

    def wait(self) -> None:
        """Until what was begun is on the disk. Raises as `save`."""
        if self.thread:
            self.thread.join()
            self.thread = None
        if self.failure:
            failure, self.failure = self.failure, None
            raise failure


def newest_checkpoint(folder: Path, note: Callable[[str], None], ranks: Ranks = ALONE) -> Path | None:
    """The newest checkpoint that is whole, or None. A damaged one is named through `note` and renamed, never deleted.

    Raises:
        ValueError: written by a newer version.
        OSError: on every rank, where one cannot read now, which says nothing about the checkpoint; or nothing can be renamed.
    """
    for name in reversed(ranks.tell([path.name for path in checkpoints(folder)])):
        path = folder / name
        found = _agreed(ranks, lambda path=path: verify(path, (ranks.rank, ranks.count)))
        damage = next(filter(None, ranks.collect(found)), "")
        if not damage:
            form = read_json(path / STATE)["format"]
            if form > FORMAT:
                raise ValueError(f"{path}: format {form}; this manyscale reads up to {FORMAT}: upgrade it")
            others = sorted({file.name for file in path.iterdir()} - set(read_json(path / MANIFEST)) - {MANIFEST})
            if others:
                note(f"{path}: {', '.join(others)} was not written with it and is not read")
            return path
        aside = _unused(path.with_name(f"damaged_{path.name}"))
        _agreed(ranks, (lambda path=path, aside=aside: os.replace(path, aside)) if ranks.leads else None)
        if ranks.leads:
            note(f"checkpoint {path.name} is damaged ({damage}); kept as {aside.name}, going back to the one before")
    return None


def read_values(path: Path) -> dict[str, Any]:
    """The plain values of a checkpoint."""
    return read_json(path / STATE)["values"]


def empty_tensors(path: Path) -> dict[str, Tensor]:
    """What a checkpoint holds, as tensors on the meta device: whole shapes and dtypes by name."""
    found = _reader(path).read_metadata().state_dict_metadata
    return {name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta") for name, entry in found.items()}


def read_tensors(path: Path, into: dict[str, Tensor], ranks: Ranks = ALONE) -> None:
    """Fill tensors from a checkpoint, of sharded ones this rank's part. All ranks call it."""
    _stored(lambda: dcp.load(into, storage_reader=_reader(path), process_group=ranks.words, no_dist=ranks.count == 1))


def load_checkpoint(folder: Path, note: Callable[[str], None]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest whole checkpoint as whole tensors on the CPU, and its values; or None. Notes and raises as `newest_checkpoint`."""
    path = newest_checkpoint(folder, note)
    if path is None:
        return None
    tensors = {name: torch.empty_like(tensor, device="cpu") for name, tensor in empty_tensors(path).items()}
    read_tensors(path, tensors)
    return tensors, read_values(path)


def copy_checkpoint(path: Path, folder: Path, changes: dict[str, Any]) -> None:
    """Put a checkpoint into another run's folder, some of its values changed: aside, then renamed into place."""
    final, aside = folder / path.name, folder / f".{path.name}"
    make_folder(folder)
    try:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(path, aside)
        write_json(aside / STATE, {"format": FORMAT, "values": read_values(path) | changes})
        write_json(aside / MANIFEST, read_json(path / MANIFEST) | {STATE: _fingerprint(aside / STATE)})
        for file in aside.iterdir():
            sync(file)
        os.replace(aside, final)
        sync(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def verify(path: Path, share: tuple[int, int] = (0, 1)) -> str:
    """What is wrong with a checkpoint, or an empty string; with `share` (i, n), of every n files one is looked at.

    Raises:
        OSError: a file cannot be read now, as over a network that is down; a block that the disk has lost is damage.
    """
    name = MANIFEST
    try:
        content = (path / MANIFEST).read_bytes()
        manifest = parse_json(content, MANIFEST)
        if not isinstance(manifest, dict) or content != as_json(manifest):  # only white space changes nothing else
            return f"{MANIFEST} is not what was written"
        if STATE not in manifest:
            return f"{MANIFEST} lists {', '.join(manifest)}"
        for name in sorted(manifest)[share[0] :: share[1]]:
            file = path / name
            if file.parent != path or not stat.S_ISREG(file.stat().st_mode):
                return f"{name}, which {MANIFEST} lists, is no file of it"
            found = _fingerprint(file)
            if manifest[name] != found:
                return f"{name} is not what {MANIFEST} says: {found}, not {manifest[name]}"
    except ValueError as error:
        return str(error)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return f"{name} is missing" if name == MANIFEST else f"{name}, which {MANIFEST} lists, is missing"
        if error.errno in (errno.EIO, errno.EISDIR):
            return f"{name} cannot be read: {error.strerror}"
        raise
    return ""


def checkpoints(folder: Path) -> list[Path]:
    """The committed checkpoints, oldest first; `step_00000123.old`, which was about to be replaced, before that of its step."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.is_dir()]
    return sorted(found, key=lambda path: (path.name.partition(".")[0], not path.suffix, path.name))


def tidy(folder: Path, keep: int, *, every: int = 0, best: int = 0, whole: Path | None = None) -> None:
    """Drop old checkpoints, and what interrupted writes left behind; what cannot be deleted stays.

    Args:
        keep: the newest so many stay.
        every: and those of every so many steps; 0: none.
        best: and that of this step.
        whole: one that is known to be whole. Else the newest that is found so stays too, however old.
    """
    there = checkpoints(folder)
    stay = set(there[-keep:]) | {path for path in there if _step(path) == best or (every and _step(path) % every == 0)}
    stay.add(whole or next((path for path in reversed(there) if not verify(path)), there[-1]) if there else whole)
    for path in [*there, *folder.glob(f".{PREFIX}*"), *folder.glob(".old_*")]:
        if path not in stay:
            _drop(path)


def _drop(path: Path) -> None:
    if path.name.startswith(PREFIX):  # out of sight first: a half-deleted folder must not look like a checkpoint
        try:
            path = path.rename(_unused(path.with_name(f".old_{path.name}")))
        except OSError:
            return
    shutil.rmtree(path, ignore_errors=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix(PREFIX)) if path.name.removeprefix(PREFIX).isdecimal() else -1


def _agreed(ranks: Ranks, work: Callable[[], Any] | None) -> Any:
    """What `work` gives on this rank; where it failed on any, an OSError on all."""
    result = failure = None
    try:
        result = work() if work else None
    except OSError as error:
        failure = error
    said = ranks.collect(failure and [failure.errno, failure.strerror or str(failure), str(failure.filename or "")])
    if failure:
        raise failure
    for code, text, name in filter(None, said):
        raise OSError(code, text, name)
    return result


def _stored(work: Callable[[], None]) -> None:
    """Run what reads or writes through torch.distributed.checkpoint; what the disk said comes out as an OSError."""
    try:
        work()
    except CheckpointException as error:
        failures: Iterable[tuple[int, Any]] = error.failures.items()
        rank, (cause, *_) = next(iter(failures))
        if not isinstance(cause, Exception):  # Ctrl-C
            raise cause from None
        if isinstance(cause, OSError):
            raise OSError(cause.errno, cause.strerror or str(cause), cause.filename) from error
        raise OSError(None, f"rank {rank}: {cause}") from error


def _reader(path: Path) -> HuggingFaceStorageReader:
    """A reader of the files that belong to a checkpoint, whatever else lies there."""
    reader = HuggingFaceStorageReader(str(path))
    files = [str(path / name) for name in sorted(read_json(path / MANIFEST)) if name.endswith(".safetensors")]
    reader.fs.ls = lambda _: files
    return reader


def _unused(path: Path) -> Path:
    tries = (path.with_name(f"{path.name}{suffix}") for suffix in ("", *(f".{n}" for n in range(1, 1000))))
    return next(p for p in tries if not p.exists())


class _Fingerprinted(FileSystem):
    """Where torch writes to: takes the fingerprint of what was meant, while it is written, which costs less than to read it back."""

    def __init__(self) -> None:
        super().__init__()
        self.written: dict[str, dict[str, Any]] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.BufferedWriter]:
        with _Hashing(Path(path).open(mode, buffering=0)) as stream:
            yield stream
        self.written[Path(path).name] = {"bytes": stream.bytes, "xxh3_128": stream.hash.hexdigest()}


class _Hashing(io.BufferedWriter):
    def __init__(self, file: io.RawIOBase) -> None:
        super().__init__(file)
        self.hash, self.bytes = xxhash.xxh3_128(), 0

    def write(self, data: Any) -> int:
        self.bytes += len(data)
        with ThreadPoolExecutor(1) as beside:
            beside.submit(self.hash.update, data)
            return super().write(data)  # all of it, or an OSError


def _fingerprint(path: Path) -> dict[str, Any]:
    # read, not mapped: a block that the disk has lost must come as an error, not as a signal
    with path.open("rb", buffering=0) as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "xxh3_128": hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()}
