"""What folders say of a set: its splits, its classes and their pictures, listed in an order that no file system can change.

The same rules hold for folders on a disk and for names in shards; both are a `Tree`.
"""

import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

from manyscale.data.images import EXTENSIONS

EVALUATION = ("val", "valid", "validation", "test")  # folders that training may evaluate on, the preferred first
INDEX = "index.jsonl"  # in a set's folder: what `data.index` knows of it
DEEPEST = 64  # folders in folders
_LAYOUT = "put each class's pictures into a folder of its own, as in {0}/cat/1.jpg, or {0}/train/cat/1.jpg and {0}/val/cat/1.jpg"


class Tree(Protocol):
    """Files in folders. A key is a path below the root, parted by "/"; the root's own is empty. Hidden names do not exist."""

    def entries(self, key: str) -> list[tuple[str, bool]]:
        """The names in a folder, sorted, and whether each is a folder."""

    def walk(self, key: str) -> Iterator[str]:
        """The keys of every file below a folder, folder by folder, sorted."""

    def path(self, key: str) -> str:
        """What messages call it."""


class Folder:
    """A folder on a disk, as a `Tree`; links are followed, but not in circles."""

    def __init__(self, root: str) -> None:
        self.root = root

    def path(self, key: str) -> str:
        return os.path.join(self.root, key) if key else self.root

    def entries(self, key: str) -> list[tuple[str, bool]]:
        try:
            with os.scandir(self.path(key)) as entries:
                return sorted((entry.name, _is_folder(entry)) for entry in entries if not entry.name.startswith("."))
        except OSError as error:
            raise ValueError(f"{self.path(key)} cannot be listed: {error.strerror}; check its permissions") from None

    def walk(self, key: str, above: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
        status = os.stat(self.path(key))
        above = (*above, (status.st_dev, status.st_ino))
        if len(above) > DEEPEST:
            raise ValueError(f"{self.path(key)}: more than {DEEPEST} folders deep")
        if above[-1] not in above[:-1]:
            for name, is_folder in self.entries(key):
                if is_folder:
                    yield from self.walk(join(key, name), above)
                elif key or name != INDEX:
                    yield join(key, name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


class Names:
    """Names of files and folders, as a `Tree`; no file system is asked."""

    def __init__(self, root: str, files: Iterable[str], folders: Iterable[str] = ()) -> None:
        self.root = root
        self._folders: dict[str, set[tuple[str, bool]]] = {"": set()}
        for key in folders:
            self._add(key)
        for key in files:
            above, _, name = key.rpartition("/")
            self._add(above)
            self._folders[above].add((name, False))

    def _add(self, folder: str) -> None:
        if folder not in self._folders:
            self._folders[folder] = set()
            above, _, name = folder.rpartition("/")
            self._add(above)
            self._folders[above].add((name, True))

    def path(self, key: str) -> str:
        return f"{self.root}:{key}" if key else self.root

    def entries(self, key: str) -> list[tuple[str, bool]]:
        return sorted(self._folders[key])

    def walk(self, key: str) -> Iterator[str]:
        for name, is_folder in self.entries(key):
            if is_folder:
                yield from self.walk(join(key, name))
            else:
                yield join(key, name)


class Pictures(NamedTuple):
    """The pictures of a split."""

    keys: list[str]
    groups: list[int]  # the class of each; where there are none, the folder it lies in
    ignored: tuple[str, ...]  # other files in these folders, as messages call them


def join(key: str, name: str) -> str:
    """The key of what is called `name` in a folder."""
    return f"{key}/{name}" if key else name


def split_folders(tree: Tree) -> dict[str, str]:
    """Split name -> its folder's key; empty where the root holds the class folders itself, one of which may be called `train`."""
    found = [name for name, is_folder in tree.entries("") if is_folder]
    splits = {name: name for name in ("train", *EVALUATION) if name in found}
    nested = "train" in splits and any(is_folder for _, is_folder in tree.entries("train"))
    return splits if nested or len(splits) == len(found) else {}


def class_names(tree: Tree, folder: str) -> tuple[str, ...]:
    """The classes in a split's folder.

    Raises:
        ValueError: none.
    """
    entries = tree.entries(folder)
    classes = tuple(name for name, is_folder in entries if is_folder)
    if not classes:
        loose = any(is_picture(name) for name, _ in entries)
        held = "pictures but no class folders" if loose else "no class folders and no images at all"
        raise ValueError(f"{tree.path(folder)} holds {held}; {_LAYOUT.format(tree.path(folder))}")
    return classes


def class_pictures(tree: Tree, folder: str, classes: tuple[str, ...]) -> Pictures:
    """The pictures in the class folders of a split, by class.

    Raises:
        ValueError: other classes than these, a class without pictures, or a single class.
    """
    found, where = class_names(tree, folder), tree.path(folder)
    extra, missing = sorted(set(found) - set(classes)), sorted(set(classes) - set(found))
    if extra or missing:
        lists = [f"{word} {', '.join(names)}" for word, names in (("has besides", extra), ("lacks", missing)) if names]
        raise ValueError(f"{where} and the train split must have the same class folders, but it {' and '.join(lists)}")
    files = [list(tree.walk(join(folder, name))) for name in classes]
    each = [[key for key in keys if is_picture(key)] for keys in files]
    empty = [name for name, keys in zip(classes, each, strict=True) if not keys]
    if len(empty) == len(classes):
        raise ValueError(f"{where} holds no images at all (names that end in {', '.join(EXTENSIONS)}); {_LAYOUT.format(where)}")
    if empty:
        raise ValueError(f"{where}: no images for the class {', '.join(empty)}; add some, or remove the empty class folder")
    if len(classes) == 1:
        raise ValueError(f"{where} holds only one class, {classes[0]}; add a folder for each other class")
    others = tuple(tree.path(key) for keys in files for key in keys if not is_picture(key))
    return Pictures([key for keys in each for key in keys], [label for label, keys in enumerate(each) for _ in keys], others)


def loose_pictures(tree: Tree, folder: str) -> Pictures:
    """Every picture at any depth below a folder; its group is the number of the folder in it that it lies in.

    Raises:
        ValueError: fewer than two.
    """
    files = list(tree.walk(folder))
    keys = [key for key in files if is_picture(key)]
    below = (key.removeprefix(f"{folder}/") if folder else key for key in keys)
    first = [part if rest else "" for part, _, rest in (key.partition("/") for key in below)]
    number = {name: place for place, name in enumerate(dict.fromkeys(first))}
    if len(keys) < 2:
        held = f"a single image, {keys[0]}" if keys else "no images at all"
        where = tree.path(folder)
        raise ValueError(f"{where} holds {held} (names that end in {', '.join(EXTENSIONS)}); pre-training needs many, in any sub-folders")
    return Pictures(keys, [number[name] for name in first], tuple(tree.path(key) for key in files if not is_picture(key)))


def is_picture(name: str) -> bool:
    """Whether a file's name ends as a picture's."""
    return name.lower().endswith(EXTENSIONS)
