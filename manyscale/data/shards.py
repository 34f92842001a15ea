"""Pictures in plain, uncompressed tar files: found by their headers, read in place, never extracted.

Member names are keys, laid out as folders are (`train/cat/1.jpg`), and no paths: nothing is ever written under them. Only
regular members count; links, devices and names that would leave the folder are passed over and told. Python's `tarfile`
parses each header's 512 bytes, but does not walk the file: it takes garbage for the end, reads extended headers of any
size into memory, and before its 2025 fix turned in circles on negative sizes (CVE-2025-8194).

Format: POSIX.1-2017 pax, "ustar Interchange Format" and its extended headers; GNU's long names.
"""

import io
import os
import stat
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from manyscale.data.images import BadImage, Mark, check_mark, check_size, decode_image, read_content
from manyscale.data.layout import DEEPEST

BLOCK = 512
MAX_MEMBERS = 2_000_000  # of a set: ImageNet's 1.3 million in one file are not too many
MAX_EXTENDED = 1 << 16  # bytes of one extended header, which holds a name and a few dates
MAX_NAME = 1024  # characters
PLACE = np.dtype([("shard", np.int32), ("offset", np.int64), ("bytes", np.int64), ("xxh3_128", "S32")])
_DESCRIBING = (*(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE), tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


class Member(NamedTuple):
    """A regular file in a shard."""

    name: str  # its key
    offset: int  # of its first byte
    bytes: int


class Listing(NamedTuple):
    """What a shard holds."""

    members: list[Member]
    folders: list[str]
    skipped: list[tuple[str, str]]  # name and why


def shard_paths(root: str) -> list[str]:
    """The tars that a set consists of: `root` itself, or those in a folder without sub-folders; none where it is no such set."""
    if not os.path.isdir(root):
        return [root]
    with os.scandir(root) as entries:
        shown = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    tars = [entry.path for entry in shown if entry.name.endswith(".tar") and not entry.is_dir()]
    return [] if any(entry.is_dir() for entry in shown if not entry.is_symlink()) else tars


def list_shard(path: str) -> Listing:
    """Every member of a tar, by reading nothing but its headers.

    Raises:
        ValueError: no regular file, compressed, truncated, damaged, with bytes after its end, or beyond the limits above; the
            place is named. An end in the midst of things is an error: what follows it would be lost without a word.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError(f"{path}: not a regular file")
        handle = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        return _list(path, os.fstat(handle).st_size, lambda count, place: os.pread(handle, count, place))
    finally:
        os.close(handle)


def _list(path: str, size: int, read: Callable[[int, int], bytes]) -> Listing:
    found, place = Listing([], [], []), 0
    if read(2, 0) == b"\x1f\x8b":
        raise ValueError(f"{path}: compressed; shards are plain tars: unpack it by `gunzip`")
    extended: dict[str, str] = {}  # what the headers before a member say of it
    while (block := read(BLOCK, place)) != bytes(BLOCK):
        where = f"{path}: the header at byte {place:,}"
        if len(block) < BLOCK:
            raise ValueError(f"{path}: truncated: {size:,} bytes, without the mark of its end")
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise ValueError(f"{where} is damaged, or of no tar: {error}") from None
        if header.type == tarfile.GNUTYPE_SPARSE:
            raise ValueError(f"{where} is of a sparse member; pack it without --sparse")
        describes = header.type in _DESCRIBING
        name = header.name if describes else extended.get("path", header.name)
        length = header.size if describes or "size" not in extended else int(extended["size"])
        length = length if describes or header.isreg() or header.type not in tarfile.SUPPORTED_TYPES else 0
        start = place + BLOCK
        if not 0 <= length <= size - start:
            raise ValueError(
                f"{where}, of {name[:100]!r}, says {length:,} bytes follow, and there are {size - start:,}: truncated or damaged"
            )
        if not describes:
            _take(found, header, name, start, length)
            extended = {}
        elif length > MAX_EXTENDED:
            raise ValueError(f"{where} is one of {length:,} bytes that describes a member; at most {MAX_EXTENDED:,} are read")
        elif header.type == tarfile.GNUTYPE_LONGNAME:
            extended["path"] = os.fsdecode(read(length, start).rstrip(b"\0"))
        elif header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            extended |= _extended(read(length, start), where)
        if len(found.members) + len(found.folders) + len(found.skipped) > MAX_MEMBERS:
            raise ValueError(f"{path}: more than {MAX_MEMBERS:,} members; make several sets of it")
        place = start + -(-length // BLOCK) * BLOCK
    while block := read(1 << 20, place):
        if block.strip(b"\0"):
            raise ValueError(f"{path}: bytes behind its end at byte {place:,}; were tars joined by `cat`? keep them as files of their own")
        place += len(block)
    return found


def _take(found: Listing, header: tarfile.TarInfo, name: str, start: int, length: int) -> None:
    """Enter a member where it belongs."""
    key = name.rstrip("/").removeprefix("./")
    parts = key.split("/")
    if name.rstrip("/") in ("", "."):
        return
    if name.startswith("/") or ".." in parts or "" in parts or len(name) > MAX_NAME or len(parts) > DEEPEST or "\0" in name:
        found.skipped.append((name[:MAX_NAME], "a name that is no path below the set"))
    elif any(part.startswith(".") for part in parts):
        pass  # hidden, as in folders
    elif header.isdir():
        found.folders.append(key)
    elif header.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE):
        found.members.append(Member(key, start, length))
    else:
        kinds = {tarfile.SYMTYPE: "a symbolic link", tarfile.LNKTYPE: "a hard link", tarfile.FIFOTYPE: "a pipe"}
        found.skipped.append((key, kinds.get(header.type, "a device or sparse member")))


def _extended(content: bytes, where: str) -> dict[str, str]:
    """The path and size in records `LENGTH KEY=VALUE\\n`."""
    found, place = {}, 0
    while place < len(content):
        digits = content[place : place + 8].partition(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        record = content[place : place + length]
        key, equals, value = record[len(digits) + 1 : -1].partition(b"=")
        if not equals or len(record) != length or not record.endswith(b"\n"):
            raise ValueError(f"{where} is damaged")
        if key == b"path" or (key == b"size" and value.isdigit() and len(value) < 20):
            found[key.decode()] = os.fsdecode(value)
        elif key == b"size":
            raise ValueError(f"{where} gives the size {value[:20]!r}")
        elif key.startswith(b"GNU.sparse"):
            raise ValueError(f"{where}: sparse members are not read; pack it without --sparse")
        place += length
    return found


class Members:
    """Pictures in shards, as a `Source`; what is above `max_pixels` is bad, and with `verify` what is not as it was indexed.

    Args:
        shards: paths.
        names, labels: of the pictures.
        places: of each, (N,) of `PLACE`.
    """

    def __init__(
        self, shards: Sequence[str], names: Sequence[str], labels: Sequence[int], places: np.ndarray, max_pixels: int, *, verify: bool
    ) -> None:
        self.max_pixels, self.verify = max_pixels, verify
        self._shards = tuple(shards)
        self._names = np.array([os.fsencode(name) for name in names])  # arrays, for forked workers share them: see `Files`
        self._labels, self._places = np.array(labels, dtype=np.int64), places

    def __len__(self) -> int:
        return len(self._labels)

    def content(self, index: int) -> bytes:
        """A picture's bytes, as they stand in the shard. Raises `BadImage`."""
        place, path = self._places[index], self.path(index)
        check_size(path, int(place["bytes"]))
        try:
            with open(self._shards[place["shard"]], "rb") as shard:
                content = os.pread(shard.fileno(), int(place["bytes"]), int(place["offset"]))
        except OSError as error:
            raise BadImage(path, f"cannot be read: {error.strerror or error}", "unreadable") from None
        if len(content) < place["bytes"]:
            raise BadImage(path, "truncated: its shard ends within it", "truncated")
        return content

    def read(self, index: int) -> Image.Image:
        content = self.content(index)
        if self.verify:
            check_mark(content, self.mark(index), self.path(index))
        return decode_image(content, self.path(index), self.max_pixels)

    def mark(self, index: int) -> Mark:
        """What the index says of its bytes."""
        return Mark(int(self._places[index]["bytes"]), self._places[index]["xxh3_128"].decode())

    def label(self, index: int) -> int:
        return int(self._labels[index])

    def name(self, index: int) -> str:
        return os.fsdecode(self._names[index])

    def path(self, index: int) -> str:
        return f"{self._shards[self._places[index]['shard']]}:{self.name(index)}"


def pack(root: str, names: Sequence[str], path: Path, done: Callable[[int], Any]) -> None:
    """Write the files of these names below `root` to a plain tar, all with the same owner, mode and date.

    Raises:
        BadImage: a file that is no regular one, or cannot be read.
    """
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in names:
            content = read_content(os.path.join(root, name))
            header = tarfile.TarInfo(name)
            header.size, header.mode = len(content), 0o644
            tar.addfile(header, io.BytesIO(content))
            done(1)
