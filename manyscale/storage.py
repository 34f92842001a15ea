"""Files that are written whole or not at all, and read with errors a person can act on; and what a result in one comes from."""

import errno
import json
import math
import os
import platform
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from manyscale import __version__

JSON_BYTES = 64 << 20  # what `read_json` takes at most


def write(path: Path | str, content: bytes | str | Callable[[Path], None]) -> None:
    """Put `content` at `path`: into a file beside it, synced to the disk, then renamed over it.

    Args:
        content: bytes, text, or a function that writes the file it is given (which keeps the suffix of `path`).

    Raises:
        OSError: the disk is full, read-only or gone; whatever stood at `path` still stands.
    """
    path = Path(path)
    make_folder(path.parent)
    beside = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        if callable(content):
            beside.touch()
            mode = beside.stat().st_mode
            content(beside)
            beside.chmod(mode)  # by the umask: safetensors makes its files private
        else:
            beside.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(beside)
        os.replace(beside, path)
    except SafetensorError as error:  # what safetensors makes of a full disk
        raise OSError(errno.EIO, str(error), str(path)) from None
    finally:
        beside.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """Make a folder and what is missing above it, so that a loss of power does not take it away again."""
    missing = [each for each in (path, *path.parents) if not each.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for each in missing:
        sync(each.parent)


def as_json(value: Any) -> bytes:
    """`value` as indented JSON. NaN and infinity are refused: other readers do."""
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def write_json(path: Path | str, value: Any) -> None:
    """`value` by `as_json` and `write`."""
    write(path, as_json(value))


def read_json(path: Path | str) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: no such file, not JSON as `parse_json` takes it, or not an object; the message names the file.
    """
    value = parse_json(read_text(path, JSON_BYTES), str(path))
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return value


def read_text(path: Path | str, limit: int) -> str:
    """A text file of at most `limit` bytes.

    Raises:
        ValueError: no such file, no regular one, not readable (with its mode and owner), larger, or not UTF-8.
    """
    check_file(path)
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size > limit:
                raise ValueError(f"{path}: more than {limit:,} bytes; no file that this package writes is so large")
            return file.read().decode()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not text, perhaps half-written: {error}") from None


def origin(command: str = "") -> dict[str, str]:
    """What a result comes from: command, version, in a checkout its commit (`-dirty` where files differ from it), Python, date (UTC).

    Args:
        command: what to say instead of how this process was called.
    """
    program = Path(sys.argv[0])
    name = program.parent.name if program.name == "__main__.py" else f"python {program}" if program.suffix == ".py" else program.name
    commit, here = "", Path(__file__)
    if shutil.which("git"):
        git = partial(subprocess.run, cwd=here.parent, capture_output=True, text=True)
        if git(["git", "ls-files", "--error-unmatch", here.name]).returncode == 0:  # not a repository that this is only installed in
            commit = ", commit " + git(["git", "describe", "--always", "--dirty", "--abbrev=10"]).stdout.strip()
    return {
        "command": command or " ".join([name, *sys.argv[1:]]),
        "manyscale": __version__ + commit,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def check_file(path: Path | str) -> None:
    """See that `path` is a regular file that may be read: before opening, as opening a pipe waits for a writer.

    Raises:
        ValueError: it is not; says what it is, or whose.
    """
    try:
        found = os.stat(path)
    except OSError as error:
        link = f", a link to {os.readlink(path)}" if os.path.islink(path) else ""
        raise ValueError(f"{path}{link}: cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path}: not a regular file")
    if not os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
        mode = stat.S_IMODE(found.st_mode)
        raise ValueError(f"{path}: cannot be read: its mode is {mode:04o}, its owner user {found.st_uid}, not this one; ask for chmod a+r")


def parse_json(text: str | bytes, where: str) -> Any:
    """JSON, strictly: what other readers would understand otherwise, or choke on, is refused.

    Args:
        where: what the errors call the text, such as a file's name.

    Raises:
        ValueError: not JSON; NaN, infinity or a number beyond 64 bits; a name twice in one object; nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_finite, parse_float=_finite, parse_int=_short)
    except RecursionError:
        raise ValueError(f"{where}: not JSON of this package: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{where}: not JSON, perhaps half-written: {error}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name `{next(name for name in names if names.count(name) > 1)}` stands twice in one object")
    return values


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{text[:20]} is no finite number")
    return float(text)


def _short(text: str) -> int:
    if len(text) > 20:  # of 2^64 and its sign
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)
