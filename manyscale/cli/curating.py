"""Verbs about a set's files: data index, verify, repair and pack."""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from tyro.conf import Positional

from manyscale.cli.parsing import choose, leave, plain, plain_table, show
from manyscale.storage import write

SHOWN = 20  # findings printed; the report has all


def data(arguments: list[str]) -> None:
    """A set's files: `data index SET` (hashes), `data verify SET`, `data repair SET`, `data pack FOLDER TAR`."""
    choose("data", "what to do", DATA, arguments)


def _index(data: Positional[str], out: str = "", workers: int = -1) -> None:
    """Write size and xxh3-128 hash of every picture to the set's index, which `data verify` and `--verify` compare with.

    Args:
        data: a folder, a .tar, a folder of .tars, or the name of one under $MANYSCALE_DATA.
        out: the index; empty: index.jsonl in the folder, or beside the .tar as NAME.tar.index.jsonl.
        workers: threads; -1: one for each core.
    """
    from manyscale.data.index import index_path, look, make_index, write_index

    root, path = _root(data), out or index_path(_root(data))
    found = look(root)
    count = len(found.pictures())
    if not count:
        raise ValueError(f"{root} holds no pictures")
    with _bar("hashing", count) as done:
        index, problems = make_index(found, workers=_cores(workers), done=done)
    for bad in problems[:SHOWN]:
        print(bad, file=sys.stderr)
    write_index(path, index)
    skipped = f", {len(found.skipped):,} members passed over that are no regular files" if found.skipped else ""
    size = sum(mark.bytes for mark in index.marks.values())
    print(f"wrote {path}: {len(index.marks):,} pictures, {size:,} bytes{skipped}")
    if problems:
        leave(f"{len(problems):,} pictures could not be read and are not in it; see `manyscale data verify {data}`", 1)


def _verify(
    data: Positional[str],
    index: str = "",
    max_pixels: int = 64_000_000,
    workers: int = -1,
    seconds: float = 30.0,
    out: str = "",
    json_lines: bool = False,
) -> None:
    """Hash and decode every picture. Exit code 1: something is bad.

    Args:
        data: a folder, a .tar, a folder of .tars, or the name of one under $MANYSCALE_DATA.
        index: the set's index; empty: the one beside it, where there is one.
        max_pixels: larger pictures are bad.
        workers: processes; -1: one for each core.
        seconds: that one picture may take.
        out: a file for the report: a line of JSON for everything found.
        json_lines: print the report instead of words.
    """
    findings, checked, known = _look(_root(data), index, max_pixels, workers, seconds)
    report = "".join(json.dumps(finding.as_json()) + "\n" for finding in findings)
    if out:
        write(out, report)
    if json_lines:
        print(report, end="")
    else:
        _tell(findings, checked, known, data, out)
    bad = sum(finding.bad for finding in findings)
    if bad:
        raise SystemExit(1)


def _repair(
    data: Positional[str],
    undo: bool = False,
    index: str = "",
    max_pixels: int = 64_000_000,
    workers: int = -1,
    seconds: float = 30.0,
) -> None:
    """Move what `data verify` finds bad out of sight, into DATA/.quarantine: nothing is deleted.

    Args:
        data: a folder, or the name of one under $MANYSCALE_DATA.
        undo: put back what the last repair moved.
        index: the set's index; empty: the one in it, where there is one.
        max_pixels: larger pictures are bad.
        workers: processes; -1: one for each core.
        seconds: that one picture may take.
    """
    from manyscale.data.repair import quarantine
    from manyscale.data.repair import undo as put_back
    from manyscale.data.shards import shard_paths

    root = _root(data)
    if shard_paths(root):
        raise ValueError(f"{root}: shards are not repaired; unpack them, repair the folder, and `manyscale data pack` it anew")
    if undo:
        moves = put_back(root)
        print(f"put {len(moves.moved):,} files back from {moves.folder}")
    else:
        findings, checked, known = _look(root, index, max_pixels, workers, seconds)
        _tell(findings, checked, known, data, "")
        there = [one for one in findings if one.bad and one.key and os.path.lexists(one.path)]
        moves = quarantine(root, [(one.key, one.kind, one.reason) for one in there])
        where = f" to {moves.folder}; `manyscale data repair {data} --undo` puts them back" if moves.moved else ""
        again = ", `manyscale data index` makes the index anew" if moves.moved and known else ""
        print(f"moved {len(moves.moved):,} files{where}{again}")
    for key, why in moves.left:
        print(f"left {plain(key)}: {why}", file=sys.stderr)
    if moves.left:
        raise SystemExit(1)


def _pack(folder: Positional[str], tar: Positional[str]) -> None:
    """Put the pictures of a folder into one plain tar, and index it.

    Args:
        folder: with class folders, or split folders of those, or pictures alone.
        tar: the file to write; its name ends in .tar. The same pictures give the same bytes.
    """
    from manyscale.data.images import BadImage
    from manyscale.data.index import index_path, look, make_index, write_index
    from manyscale.data.shards import pack

    found = look(_root(folder))
    keys = found.pictures()
    if found.shards or not keys or not tar.endswith(".tar"):
        raise ValueError(f"give a folder with pictures and the name of a .tar, not {folder} and {tar}")
    try:
        with _bar("packing", len(keys)) as done:
            write(tar, lambda path: pack(found.root, keys, path, done))
    except BadImage as bad:
        raise ValueError(f"{bad}; `manyscale data repair {folder}` moves such files out of the way") from None
    index, problems = make_index(look(os.path.abspath(tar)), workers=_cores(-1))
    assert not problems, problems
    write_index(index_path(tar), index)
    print(f"wrote {tar} and {index_path(tar)}: {len(keys):,} pictures")


def _look(root: str, index: str, max_pixels: int, workers: int, seconds: float) -> tuple[list[Any], int, bool]:
    """Everything `verify` finds, in order; of how many pictures; and whether they were compared with an index."""
    from manyscale.data.verify import verify

    if not seconds > 0:
        raise ValueError(f"field `seconds`: {seconds} must be positive")
    if max_pixels < 1:
        raise ValueError(f"field `max_pixels`: {max_pixels} must be at least 1")
    counted: list[Callable[[int], Any]] = []
    options = {"index": index, "max_pixels": max_pixels, "workers": _cores(workers), "seconds": seconds}
    verified = verify(root, **options, done=lambda count: counted[0](count))
    with _bar("verifying", len(verified.pictures)) as done:
        counted.append(done)
        findings = sorted(verified.findings, key=lambda one: (not one.bad, one.path, one.kind))
    return findings, len(verified.pictures), verified.index is not None


def _tell(findings: list[Any], checked: int, known: bool, data: str, out: str) -> None:
    for finding in findings[:SHOWN]:
        print(f"{'bad' if finding.bad else 'odd'}  {finding.kind}: {plain(finding.path)}: {plain(finding.reason)}")
    if len(findings) > SHOWN:
        print(f"and {len(findings) - SHOWN:,} more; {f'all are in {out}' if out else '--out FILE lists all'}")
    counts = Counter((not finding.bad, finding.kind) for finding in findings)
    if counts:
        rows = [(escape(kind), "warning" if fine else "bad", f"{count:,}") for (fine, kind), count in sorted(counts.items())]
        show(plain_table(("kind", "level", "count"), rows, right=2))
    bad = sum(finding.bad for finding in findings)
    with_index = "" if known else f"; without an index damage that still decodes is not seen: `manyscale data index {data}`"
    print(f"{checked:,} pictures looked at: {bad:,} bad, {len(findings) - bad:,} warnings{with_index}")


def _root(data: str) -> str:
    from manyscale.data.sources import DIGITS, find_folder

    if data == DIGITS:
        raise ValueError(f"field `data`: {DIGITS} are part of scikit-learn and need no care; give a folder or a .tar")
    return find_folder(data)


def _cores(workers: int) -> int:
    if workers == 0 or workers < -1:
        raise ValueError(f"field `workers`: {workers} must be -1 (one for each core), 1 or more")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if workers < 0 else workers


@contextmanager
def _bar(what: str, count: int) -> Iterator[Callable[[int], Any]]:
    """A progress bar where someone looks, and what to call with every step forward."""
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(what, total=count)
        yield lambda step: progress.advance(task, step)


DATA: dict[str, tuple[Callable[..., None], str]] = {
    "index": (_index, "SET [--out FILE]"),
    "verify": (_verify, "SET [--index FILE] [--out REPORT.jsonl] [--json-lines]"),
    "repair": (_repair, "FOLDER [--undo]"),
    "pack": (_pack, "FOLDER SET.tar"),
}
