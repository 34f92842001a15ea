"""Bad files out of a set and back: moved within it, never deleted, with a record of every move."""

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from manyscale.storage import parse_json, read_text, write

QUARANTINE = ".quarantine"  # in the set's folder; hidden names are no part of a set
RECORD = "moved.jsonl"


class Moves(NamedTuple):
    """What became of files."""

    moved: list[str]  # keys
    left: list[tuple[str, str]]  # keys and why they were not moved
    folder: str


def quarantine(root: str, findings: Iterable[tuple[str, str, str]]) -> Moves:
    """Move files of a set to `.quarantine/NUMBER/` below it, under the same names.

    The record is on the disk before the first file is moved, and every move is one rename: whenever it is stopped, `undo`
    puts everything back.

    Args:
        findings: key, kind and reason of each.

    Raises:
        ValueError: the quarantine is a link to somewhere else.
        OSError: the folder cannot be written.
    """
    wanted = {key: (kind, reason) for key, kind, reason in findings}
    left = [(key, why) for key in wanted if (why := _outside(root, key))]
    movable = [key for key in wanted if key not in dict(left)]
    if not movable:
        return Moves([], left, "")
    number = 1 + max((int(name) for name in _numbers(root)), default=0)
    folder = Path(root, QUARANTINE, f"{number:04d}")
    lines = [json.dumps({"name": key, "kind": wanted[key][0], "reason": wanted[key][1]}) for key in movable]
    write(folder / RECORD, "\n".join([*lines, ""]))
    moved = []
    for key in movable:
        try:
            _move(Path(root, key), folder / "files" / key)
            moved.append(key)
        except OSError as error:
            left.append((key, error.strerror or str(error)))
    return Moves(moved, left, str(folder))


def undo(root: str) -> Moves:
    """Put back what the last `quarantine` moved; once more: the one before. Files that have a new one in their place stay there.

    Raises:
        ValueError: nothing is in quarantine, or its record is not whole or names a place outside of the set.
    """
    numbers = _numbers(root)
    if not numbers:
        raise ValueError(f"{root}: nothing is in quarantine")
    folder = Path(root, QUARANTINE, numbers[-1])
    record = folder / RECORD
    moved, left = [], []
    for number, line in enumerate(read_text(record, 1 << 30).splitlines(), 1):
        entry = parse_json(line, f"{record}, line {number}")
        key = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(key, str) or not key or os.path.isabs(key) or ".." in key.split("/") or _outside(root, key):
            raise ValueError(f"{record}, line {number}: names no place in the set; move its files back by hand")
        aside, place = folder / "files" / key, Path(root, key)
        if not os.path.lexists(aside):  # it was stopped before this one was moved
            continue
        if os.path.lexists(place):
            left.append((key, "another file has taken its place"))
            continue
        _move(aside, place)
        moved.append(key)
    if not left:
        record.unlink()
        for at in (*(at for at, _, _ in os.walk(folder, topdown=False)), folder.parent):
            with contextlib.suppress(OSError):  # not empty
                os.rmdir(at)
    return Moves(moved, left, str(folder))


def _numbers(root: str) -> list[str]:
    folder = Path(root, QUARANTINE)
    if folder.is_symlink():
        raise ValueError(f"{folder}: a link; the quarantine lies in the set itself: remove the link")
    return sorted((path.name for path in folder.iterdir() if path.name.isdigit()), key=int) if folder.is_dir() else []


def _outside(root: str, key: str) -> str:
    """Why a file is not the set's to move: a folder on the way to it is a link to somewhere else. Empty: it is."""
    whole, above = os.path.realpath(root), os.path.realpath(os.path.dirname(os.path.join(root, key)))
    return "" if above == whole or above.startswith(whole + os.sep) else f"it lies outside of the set, in {above}"


def _move(old: Path, new: Path) -> None:
    new.parent.mkdir(parents=True, exist_ok=True)
    os.rename(old, new)
