"""Between the code and the file system: sees every call on files below a folder, and may let one fail, tear, or be the last.

At the level of what pathlib, shutil and torch.distributed.checkpoint call: `open`, and functions of `os`. What Rust reads goes past it.
"""

import builtins
import io
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHANGES = {"create", "write", "fsync", "rename", "mkdir", "unlink", "rmdir", "chmod", "utime"}
CRASHED = 99
ONE_PATH = {"mkdir": "mkdir", "unlink": "unlink", "remove": "unlink", "rmdir": "rmdir", "chmod": "chmod", "utime": "utime"}
LOOKS = {"stat": "stat", "scandir": "list", "listdir": "list"}


@dataclass
class Call:
    """One call: its kind, the path or paths, and what was written."""

    kind: str
    paths: tuple[str, ...]
    content: bytes = b""


class Disk:
    """Lets every call through; a context. Subclasses do otherwise in `call`, whose `do` is the real thing (of a write: with the bytes)."""

    def __init__(self, root: Path) -> None:
        self.root = str(root)

    def call(self, call: Call, do: Callable[..., Any]) -> Any:
        return do(call.content) if call.kind == "write" else do()

    def __enter__(self) -> "Disk":
        self.kept = [(module, name, getattr(module, name)) for module, name in self._patched()]
        real = {name: function for module, name, function in self.kept if module is os}
        for module, name, function in self.kept:
            setattr(module, name, self._open(function) if name == "open" and module is not os else self._os(name, function, real))
        self.sendfile, shutil._USE_CP_SENDFILE = shutil._USE_CP_SENDFILE, False  # copies go through `open` too
        return self

    def __exit__(self, *error: object) -> None:
        shutil._USE_CP_SENDFILE = self.sendfile
        for module, name, function in self.kept:
            setattr(module, name, function)

    def _patched(self) -> list[tuple[Any, str]]:
        return [(builtins, "open"), (io, "open"), *((os, name) for name in ("open", "fsync", "replace", "rename", *ONE_PATH, *LOOKS))]

    def _where(self, path: Any, folder: int | None = None) -> str:
        """An absolute path, of a file handle too; empty where it is not below the root."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        elif folder is not None:
            path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), os.fspath(path))
        path = os.path.abspath(os.fspath(path))
        return path if path == self.root or path.startswith(self.root + "/") else ""

    def _os(self, name: str, function: Callable[..., Any], real: dict[str, Callable[..., Any]]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            first = arguments[0] if arguments else named.get("path", ".")
            where = self._where(first, named.get("dir_fd", named.get("src_dir_fd")))
            if not where:
                return function(*arguments, **named)
            paths = (where,)
            if name == "open":
                makes = arguments[1] & (os.O_CREAT | os.O_TRUNC)
                kind = "create" if makes else "open"
            elif name in ("replace", "rename"):
                kind, paths = "rename", (where, self._where(arguments[1]))
            else:
                kind = (ONE_PATH | LOOKS | {"fsync": "fsync"})[name]
            return self.call(Call(kind, paths), lambda: function(*arguments, **named))

        return call

    def _open(self, function: Callable[..., Any]) -> Callable[..., Any]:
        disk = self

        def call(
            file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None, newline: Any = None, **more: Any
        ):
            where = disk._where(file) if not isinstance(file, int) else ""
            if not where:
                return function(file, mode, buffering, encoding, errors, newline, **more)
            makes, both = any(letter in mode for letter in "wax"), "+" in mode
            plain = mode.replace("b", "").replace("t", "")
            raw = disk.call(Call("create" if makes else "open", (where,)), lambda: _File(where, plain, disk))
            if buffering == 0:
                return raw
            buffered = (io.BufferedRandom if both else io.BufferedWriter if makes else io.BufferedReader)(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding or "utf-8", errors, newline)

        return call


class _File(io.FileIO):
    def __init__(self, path: str, mode: str, disk: Disk) -> None:
        super().__init__(path, mode)
        self.path, self.disk = path, disk

    def write(self, data: Any) -> int:
        return self.disk.call(Call("write", (self.path,), bytes(data)), super().write)

    def readinto(self, buffer: Any) -> int:
        return self.disk.call(Call("read", (self.path,)), lambda: super(_File, self).readinto(buffer))

    def readall(self) -> bytes:
        return self.disk.call(Call("read", (self.path,)), super().readall)


class Record(Disk):
    """Writes every call down."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.calls: list[Call] = []

    def call(self, call: Call, do: Callable[..., Any]) -> Any:
        result = super().call(call, do)
        self.calls.append(call)  # one that failed, such as the making of what is there, changed nothing
        return result


@dataclass(frozen=True)
class Point:
    """The `number`th change is the last thing that happens; of a write, `share` of its bytes."""

    number: int
    kind: str
    share: float = 1.0


def points(calls: list[Call]) -> list[Point]:
    """All that a run could end at."""
    changes = [call for call in calls if call.kind in CHANGES]
    return [Point(n, call.kind, share) for n, call in enumerate(changes) for share in ((0, 1 / 3, 1) if call.kind == "write" else (1,))]


class Crash(Disk):
    """Ends the process at a point, as `kill -9` does: nothing is flushed, no `finally` runs, whoever catches what."""

    def __init__(self, root: Path, point: Point) -> None:
        super().__init__(root)
        self.point, self.count = point, 0

    def call(self, call: Call, do: Callable[..., Any]) -> Any:
        if call.kind not in CHANGES:
            return super().call(call, do)
        last = self.count == self.point.number
        if last and call.kind == "write":
            call.content = call.content[: int(len(call.content) * self.point.share)]
        result = super().call(call, do)
        self.count += 1
        return os._exit(CRASHED) if last else result


class Fault(Disk):
    """Fails the `number`th call on files, or with `lasting` all from there on. Without an errno, a write writes half of its bytes."""

    def __init__(self, root: Path, number: int, errno: int | None, lasting: bool = False) -> None:
        super().__init__(root)
        self.number, self.errno, self.lasting, self.count, self.struck = number, errno, lasting, 0, 0

    def call(self, call: Call, do: Callable[..., Any]) -> Any:
        self.count += 1
        if self.count <= self.number or (self.struck and not self.lasting):
            return super().call(call, do)
        self.struck, self.hit = self.struck + 1, call
        if self.errno is not None:
            raise OSError(self.errno, os.strerror(self.errno), call.paths[0])
        return do(call.content[: (len(call.content) + 1) // 2]) if call.kind == "write" else super().call(call, do)


def begun(disk: Disk, work: Callable[[], Any]) -> int:
    """A forked child that does `work` on a disk."""
    child = os.fork()
    if not child:
        code = 70
        try:
            with disk:
                work()
            code = 0
        finally:
            os._exit(code)
    return child


def ended(child: int) -> int:
    """How it ends: CRASHED, or 0, or 70 where it raised something."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
