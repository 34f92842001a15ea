"""What a disk holds after power is lost: of the calls so far, what was synced, and of the rest as little as a file system may keep.

A file's content counts from the fsync of the file. A name (made, renamed, removed) counts from the fsync of its folder; before that,
folders keep what was done to them up to some moment, each another. An ideal disk has no other order.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path

from tests.crash.disk import Call


@dataclass
class File:
    now: bytes = b""
    kept: bytes = b""


@dataclass
class Folder:
    now: dict[str, "File | Folder"] = field(default_factory=dict)
    kept: dict[str, "File | Folder"] = field(default_factory=dict)
    pending: list[dict[str, "File | Folder | None"]] = field(default_factory=list)

    def change(self, **names: "File | Folder | None") -> None:
        """Names that come (or, None, go) in one stroke."""
        _apply(self.now, names)
        self.pending.append(names)

    def sync(self) -> None:
        self.kept, self.pending = dict(self.now), []


def _apply(names: dict[str, "File | Folder"], change: dict[str, "File | Folder | None"]) -> None:
    for name, node in change.items():
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


def read(path: Path) -> File | Folder:
    """What lies there, all of it synced."""
    if path.is_file():
        return File(path.read_bytes(), path.read_bytes())
    names = {each.name: read(each) for each in path.iterdir()}
    return Folder(names, dict(names))


class Power:
    """A disk that calls are replayed on."""

    def __init__(self, root: Path) -> None:
        self.root, self.top = root, read(root)

    def _parts(self, path: str) -> list[str]:
        return list(Path(path).relative_to(self.root).parts)

    def _node(self, parts: list[str]) -> File | Folder:
        node = self.top
        for part in parts:
            node = node.now[part]
        return node

    def replay(self, call: Call) -> None:
        """One call that succeeded."""
        *above, name = self._parts(call.paths[0]) or [""]
        folder = self._node(above)
        match call.kind:
            case "create":  # every mode here empties the file
                if name in folder.now:
                    folder.now[name].now = b""
                else:
                    folder.change(**{name: File()})
            case "write":
                folder.now[name].now += call.content
            case "mkdir":
                folder.change(**{name: Folder()})
            case "unlink" | "rmdir":
                folder.change(**{name: None})
            case "rename":
                *over, new = self._parts(call.paths[1])
                node, other = folder.now[name], self._node(over)
                if other is folder:
                    folder.change(**{name: None, new: node})
                else:
                    other.change(**{new: node})
                    folder.change(**{name: None})
            case "fsync":
                node = folder.now[name] if name else self.top
                if isinstance(node, Folder):
                    node.sync()
                else:
                    node.kept = node.now

    def lost(self, into: Path, way: str, chance: random.Random) -> None:
        """Write down what is left. `way`: none of what was not synced, names (but no content), or a part of both."""
        self._lost(self.top, into, way, chance)

    def _lost(self, node: File | Folder, path: Path, way: str, chance: random.Random) -> None:
        if isinstance(node, File):
            path.write_bytes(_content(node, way, chance))
            return
        path.mkdir(exist_ok=True)
        count = {"none": 0, "names": len(node.pending)}.get(way, chance.randint(0, len(node.pending)))
        names = dict(node.kept)
        for change in node.pending[:count]:
            _apply(names, change)
        for name, each in names.items():
            self._lost(each, path / name, way, chance)


def _content(file: File, way: str, chance: random.Random) -> bytes:
    if way != "part" or file.now == file.kept:
        return file.kept
    torn = file.now[: chance.randint(0, len(file.now))]
    return chance.choice([file.kept, torn, torn + bytes(len(file.now) - len(torn)), file.now])
