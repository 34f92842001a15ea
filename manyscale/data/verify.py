"""Every sample of a set, hashed and decoded: what is wrong with it, said before a run meets it."""

import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from manyscale.data.crew import Fault, over_processes
from manyscale.data.images import BadImage, Mark, decode_image, remarks
from manyscale.data.index import Index, Set, index_path, look, read_index
from manyscale.data.layout import EVALUATION, Tree, is_picture, join, split_folders


class Finding(NamedTuple):
    """Something wrong with a set, or odd about it."""

    path: str
    kind: str  # a word: see docs/data.md
    reason: str
    bad: bool = True  # False: a warning; the sample is used all the same
    key: str = ""  # of the picture, where it is one

    def as_json(self) -> dict[str, Any]:
        """The finding as JSON values."""
        return {"path": self.path, "kind": self.kind, "reason": self.reason, "level": "bad" if self.bad else "warning"}


class Verified(NamedTuple):
    """What `verify` is about to look at."""

    set: Set
    pictures: list[str]  # keys
    index: Index | None
    findings: Iterator[Finding]


def verify(
    root: str, *, index: str = "", max_pixels: int, workers: int, seconds: float, done: Callable[[int], Any] = lambda count: None
) -> Verified:
    """Look at everything in a set.

    Args:
        index: a file; empty: the one beside the set, where there is one.
        max_pixels: larger pictures are bad, as in training.
        workers: processes. One that a picture kills, or holds for longer than `seconds`, is replaced, and the picture reported.
        done: called with how many pictures more have been looked at.

    Raises:
        ValueError: an index that is asked for and cannot be read. What is wrong with the set is a finding.
    """
    path = index or index_path(root)
    known = read_index(path) if index or os.path.exists(path) else None
    damaged: list[tuple[str, str]] = []
    found = look(root, damaged)
    pictures = found.pictures()

    def findings() -> Iterator[Finding]:
        yield from (Finding(shard, "shard", reason) for shard, reason in damaged)
        yield from (Finding(f"{root}:{name}", "skipped", f"{why}; not read", bad=False) for name, why in found.skipped)
        yield from _layout(found.tree)
        if known:
            missing = sorted(known.marks.keys() - set(pictures))
            yield from (Finding(found.path(key), "missing", "was there when the set was indexed", key=key) for key in missing)
        yield from _samples(found, pictures, known, max_pixels, workers, seconds, done)

    return Verified(found, pictures, known, findings())


def _samples(
    found: Set, keys: list[str], known: Index | None, max_pixels: int, workers: int, seconds: float, done: Callable[[int], Any]
) -> Iterator[Finding]:
    content_of = found.content_of(keys)

    def look_at(place: int) -> dict[str, Any]:
        """In another process: the hash, and what there is to say."""
        key, path = keys[place], found.path(keys[place])
        try:
            content = content_of(place)
        except BadImage as bad:
            return {"said": [[bad.kind, bad.reason, True]]}
        mark, said = Mark.of(content), []
        before = known.marks.get(key) if known else None
        try:
            decode_image(content, path, max_pixels)
            said += [[kind, reason, False] for kind, reason in remarks(content, path)]
        except BadImage as bad:
            said.append([bad.kind, bad.reason, True])
        if before and before != mark and not any(bad for *_, bad in said):
            said.append(["changed", f"not the bytes that were indexed: {before.bytes:,} bytes then, {mark.bytes:,} now", True])
        if known and before is None:
            said.append(["new", "not in the index", False])
        return {"said": said, "hash": mark.xxh3_128}

    folders, same = split_folders(found.tree), dict[str, list[str]]()
    for place, answer in over_processes(look_at, len(keys), workers=workers, seconds=seconds):
        key, path = keys[place], found.path(keys[place])
        done(1)
        if isinstance(answer, Fault):
            yield Finding(path, answer.kind, answer.reason, key=key)
            continue
        yield from (Finding(path, kind, reason, bad, key) for kind, reason, bad in answer["said"])
        if "hash" in answer and not any(bad for *_, bad in answer["said"]):
            same.setdefault(answer["hash"], []).append(key)
    for first, *others in map(sorted, same.values()):
        for key in others:
            if reason := _shared(first, key, folders):
                yield Finding(found.path(key), "duplicate", reason, bad=False, key=key)


def _shared(one: str, other: str, splits: dict[str, str]) -> str:
    """Why it matters that two pictures have the same bytes; empty where it does not."""
    (split, label), (split_too, label_too) = (_place(key, splits) for key in (one, other))
    if split != split_too:
        return f"the same bytes are in {split} and in {split_too}: {one}, {other}"
    return f"the same bytes are of two classes: {one}, {other}" if label != label_too else ""


def _place(key: str, splits: dict[str, str]) -> tuple[str, str]:
    first, _, rest = key.partition("/")
    return (first, rest.partition("/")[0]) if first in splits else ("", first)


def _layout(tree: Tree) -> Iterator[Finding]:
    """What is wrong with the folders: all that training would refuse, and files that it would not see."""
    splits = split_folders(tree)
    classes = {split: _classes(tree, folder) for split, folder in (splits or {"": ""}).items()}
    for split, counts in classes.items():
        for name, count in counts.items():
            if not count:
                yield Finding(tree.path(join(split, name)), "empty-class", "no pictures in the folder of this class")
        if len(counts) == 1:
            yield Finding(tree.path(split), "one-class", f"holds only one class, {next(iter(counts))}")
        if "train" in classes and split in EVALUATION:
            for name in sorted(counts.keys() ^ classes["train"].keys()):
                lacks = "train" if name in counts else split
                yield Finding(tree.path(join(split, name)), "classes", f"the class {name} is not in {lacks}")
    for key in tree.walk(""):
        if not is_picture(key):
            yield Finding(tree.path(key), "other-file", "its name ends in no picture format; not read", bad=False)


def _classes(tree: Tree, folder: str) -> dict[str, int]:
    """Pictures of every class folder."""
    names = [name for name, is_folder in tree.entries(folder) if is_folder]
    return {name: sum(map(is_picture, tree.walk(join(folder, name)))) for name in names}
