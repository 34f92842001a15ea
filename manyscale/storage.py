"""Files that are written whole or not at all, and read with errors a person can act on."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


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
        ValueError: no such file, not JSON, or not an object; the message names the file.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    return parse_json(content, path)


def parse_json(content: bytes, path: Path | str) -> dict[str, Any]:
    """The JSON object that the file at `path` is, of which this is the content. Raises as `read_json`."""
    try:
        value = json.loads(content.decode())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON, perhaps half-written: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return value
