"""The index of a set: size and xxh3-128 hash of every picture, in `index.jsonl`; of shards also where each lies.

A decoder cannot see most damage: of 400 flipped bits in JPEG and WebP files 395 decoded to other pixels without a word. A
hash sees all of them. The first line says what the set is; then comes a line for each picture:

    {"manyscale": "index", "format": 1, "samples": 2, "shards": []}
    {"name": "cat/1.jpg", "bytes": 8120, "xxh3_128": "0f3c..."}

An index beside its set is read with it: shards are compared with it when they are opened, pictures when `verify` is asked for.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from manyscale.data.images import BadImage, Mark, read_content
from manyscale.data.layout import INDEX, Folder, Names, Tree, is_picture
from manyscale.data.shards import PLACE, Members, list_shard, shard_paths
from manyscale.storage import parse_json, read_text, write

FORMAT = 1
LARGEST_INDEX = 1 << 30  # bytes


class Shard(NamedTuple):
    """A tar of a set, as it was."""

    name: str
    bytes: int
    modified: int  # nanoseconds since 1970


class Index(NamedTuple):
    """What is known of a set's pictures."""

    marks: dict[str, Mark]
    shards: tuple[Shard, ...] = ()  # of a set in tars: them,
    places: Mapping[str, tuple[int, int]] = MappingProxyType({})  # shard and offset of each picture,
    folders: tuple[str, ...] = ()  # the folders, which may be empty,
    others: tuple[str, ...] = ()  # and what else is in them


class Set(NamedTuple):
    """A set as it lies there: a folder, or shards."""

    root: str
    tree: Tree
    shards: tuple[str, ...] = ()  # paths; none of a folder
    places: Mapping[str, tuple[int, int, int]] = MappingProxyType({})  # of a key: shard, offset and bytes
    skipped: tuple[tuple[str, str], ...] = ()  # members that are no regular files, and why

    def pictures(self) -> list[str]:
        """The keys of all its pictures, in order."""
        return [key for key in self.tree.walk("") if is_picture(key)]

    def content_of(self, keys: Sequence[str]) -> Callable[[int], bytes]:
        """A function that reads the bytes of the i-th of these pictures, or raises `BadImage`."""
        if self.shards:
            return Members(self.shards, keys, [0] * len(keys), self.table(keys), 1, verify=False).content
        return lambda index: read_content(self.tree.path(keys[index]))

    def path(self, key: str) -> str:
        """What messages call one of its files."""
        return f"{self.shards[self.places[key][0]]}:{key}" if key in self.places else self.tree.path(key)

    def table(self, keys: Sequence[str], marks: Mapping[str, Mark] | None = None) -> np.ndarray:
        """(N,) of `PLACE`: where these pictures lie, and their hashes."""
        rows = [(*self.places[key], marks[key].xxh3_128 if marks else "") for key in keys]
        return np.array(rows, dtype=PLACE)


def look(root: str, damaged: list[tuple[str, str]] | None = None) -> Set:
    """What lies at `root` now: a folder's listing, or the headers of its shards; no index is asked.

    Args:
        damaged: takes path and reason of shards that cannot be read, which are then passed over.

    Raises:
        ValueError: a shard that cannot be read, a name that two members have.
    """
    shards = shard_paths(root)
    if not shards:
        return Set(root, Folder(root))
    places: dict[str, tuple[int, int, int]] = {}
    folders: list[str] = []
    skipped: list[tuple[str, str]] = []
    for number, path in enumerate(shards):
        try:
            listing = list_shard(path)
        except ValueError as error:
            if damaged is None:
                raise
            damaged.append((path, str(error).removeprefix(f"{path}: ")))
            continue
        for member in listing.members:
            if member.name in places:
                raise ValueError(f"{path}: {member.name!r} is there twice, or in another shard too; keep one of them")
            places[member.name] = (number, member.offset, member.bytes)
        folders += listing.folders
        skipped += listing.skipped
    return Set(root, Names(root, places, folders), tuple(shards), places, tuple(skipped))


def index_path(root: str) -> str:
    """Where the index of a set lies: in its folder, or beside its tar."""
    return os.path.join(root, INDEX) if os.path.isdir(root) else f"{root}.{INDEX}"


def make_index(found: Set, *, workers: int, done: Callable[[int], Any] = lambda count: None) -> tuple[Index, list[BadImage]]:
    """Hash every picture of a set; those that cannot be read are left out and returned.

    Args:
        workers: threads; hashing and reading hold no lock of Python's.
        done: called with how many pictures more have been hashed.
    """
    keys = found.pictures()
    content = found.content_of(keys)
    shards = tuple(Shard(os.path.basename(path), *_stamp(path)) for path in found.shards)

    def hash_some(some: range) -> tuple[list[tuple[str, Mark]], list[BadImage]]:
        good, bad = [], []
        for place in some:
            try:
                good.append((keys[place], Mark.of(content(place))))
            except BadImage as error:
                bad.append(error)
        return good, bad

    marks: dict[str, Mark] = {}
    problems: list[BadImage] = []
    with ThreadPoolExecutor(workers) as threads:
        chunks = [range(start, min(start + 64, len(keys))) for start in range(0, len(keys), 64)]
        for chunk, (good, bad) in zip(chunks, threads.map(hash_some, chunks), strict=True):
            marks.update(good)
            problems += bad
            done(len(chunk))
    if shards != tuple(Shard(os.path.basename(path), *_stamp(path)) for path in found.shards):
        raise ValueError(f"{found.root}: a shard changed while it was being indexed; try again when nobody writes to it")
    others = [key for key in found.places if not is_picture(key)]
    folders = _folders(found.tree) if shards else []
    return Index(marks, shards, {key: found.places[key][:2] for key in marks if shards}, tuple(folders), tuple(others)), problems


def write_index(path: str, index: Index) -> None:
    """Put an index at `path`, whole or not at all. Raises `OSError`."""
    head: dict[str, Any] = {"manyscale": "index", "format": FORMAT, "samples": len(index.marks)}
    head |= {"shards": [shard._asdict() for shard in index.shards]}
    if index.shards:
        head |= {"folders": index.folders, "others": index.others}
    lines = [json.dumps(head)]
    for name, mark in index.marks.items():
        place = dict(zip(("shard", "offset"), index.places[name], strict=True)) if index.shards else {}
        lines.append(json.dumps({"name": name, **mark._asdict(), **place}))
    write(path, "\n".join([*lines, ""]))


def read_index(path: str) -> Index:
    """The index that `write_index` wrote.

    Raises:
        ValueError: no such file, not whole, or not an index; the file and line are named.
    """
    head_line, *lines = read_text(path, LARGEST_INDEX).split("\n")
    head = parse_json(head_line, f"{path}, line 1")
    if not isinstance(head, dict) or head.get("manyscale") != "index" or type(head.get("format")) is not int:
        raise ValueError(f"{path}: not an index of this package; make one by `manyscale data index`")
    if head["format"] > FORMAT:
        raise ValueError(f"{path}: format {head['format']}; this manyscale reads up to {FORMAT}: upgrade it")
    if not all(isinstance(head.get(kind, []), list) for kind in ("shards", "folders", "others")):
        raise ValueError(f"{path}, line 1: `shards`, `folders` and `others` are lists")
    if lines[-1:] != [""] or len(lines) - 1 != head.get("samples"):
        raise ValueError(
            f"{path}: not whole: {len(lines) - 1:,} lines for {head.get('samples')} pictures; run `manyscale data index` again"
        )
    shards = tuple(Shard(*_fields(one, {"name": str, "bytes": int, "modified": int}, f"{path}, line 1")) for one in head.get("shards", []))
    marks: dict[str, Mark] = {}
    places: dict[str, tuple[int, int]] = {}
    wanted = {"name": str, "bytes": int, "xxh3_128": str} | ({"shard": int, "offset": int} if shards else {})
    for number, line in enumerate(lines[:-1], 2):
        where = f"{path}, line {number}"
        name, size, digest, *place = _fields(parse_json(line, where), wanted, where)
        if name in marks or len(digest) != 32 or size < 0:
            raise ValueError(f"{where}: {name!r} is there twice, or its size or hash is none")
        if place and not (0 <= place[0] < len(shards) and 0 <= place[1] <= shards[place[0]].bytes - size):
            raise ValueError(f"{where}: {name!r} lies outside of its shard")
        marks[name], places[name] = Mark(size, digest), tuple(place)
    names = [head.get(kind, []) for kind in ("folders", "others")]
    if not all(isinstance(name, str) for some in names for name in some):
        raise ValueError(f"{path}, line 1: `folders` and `others` are lists of names")
    return Index(marks, shards, places if shards else {}, *map(tuple, names))


def open_set(root: str) -> Set:
    """A set for training: a folder, or shards by their index, where they have one that is still true of them.

    A shard of the size and time in the index is taken for the same. Of one with another time, a copy perhaps, everything is
    hashed once more; `manyscale data index` spares the next time that.

    Raises:
        ValueError: shards that changed since they were indexed; and as `look`.
    """
    shards, path = shard_paths(root), index_path(root)
    if not shards or not os.path.exists(path):
        return look(root)
    index = read_index(path)
    again = f"; run `manyscale data index {root}` if they are meant to be so"
    if [shard.name for shard in index.shards] != [os.path.basename(shard) for shard in shards]:
        raise ValueError(f"{root}: other shards than those in {path}{again}")
    touched = False
    for shard, where in zip(index.shards, shards, strict=True):
        size, modified = _stamp(where)
        if size != shard.bytes:
            raise ValueError(f"{where}: changed since it was indexed: {shard.bytes:,} bytes then, {size:,} now{again}")
        touched |= modified != shard.modified
    if touched:
        now, _ = make_index(look(root), workers=os.cpu_count() or 1)
        for name in sorted(index.marks.keys() | now.marks.keys()):
            if (index.marks.get(name), index.places.get(name)) != (now.marks.get(name), now.places.get(name)):
                raise ValueError(f"{root}: changed since it was indexed, at {name!r}{again}")
    tree = Names(root, [*index.marks, *index.others], index.folders)
    return Set(root, tree, tuple(shards), {name: (*place, index.marks[name].bytes) for name, place in index.places.items()})


def _stamp(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    return status.st_size, status.st_mtime_ns


def _fields(value: Any, kinds: dict[str, type], where: str) -> list[Any]:
    if not isinstance(value, dict) or set(value) != set(kinds) or any(type(value[name]) is not kind for name, kind in kinds.items()):
        raise ValueError(f"{where}: expected {', '.join(kinds)}")
    return [value[name] for name in kinds]


def _folders(tree: Tree, key: str = "") -> list[str]:
    below = [f"{key}/{name}" if key else name for name, is_folder in tree.entries(key) if is_folder]
    return [*below, *(folder for one in below for folder in _folders(tree, one))]
