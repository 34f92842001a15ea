"""Where pictures come from: sets in folders, tars or memory, and their splits."""

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from manyscale.config import Input, nearest
from manyscale.data.images import BadImage, Mark, check_mark, decode_image, read_content, read_image
from manyscale.data.index import Set, index_path, open_set, read_index
from manyscale.data.layout import EVALUATION, Folder, class_names, class_pictures, loose_pictures, split_folders
from manyscale.data.shards import Members

DIGITS = "digits"


class Source(Protocol):
    """Pictures with labels, 0 <= index < len(source)."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Image.Image:
        """The picture in RGB. Raises `BadImage`."""

    def label(self, index: int) -> int:
        """Its class, an index into the set's `classes`."""

    def name(self, index: int) -> str:
        """Its id, the same wherever the set lies: the file's path relative to the set."""

    def path(self, index: int) -> str:
        """Where it lies, for messages."""


class Splits(NamedTuple):
    """A set as training wants it; `val` is what training evaluates on."""

    train: Source
    val: Source
    classes: tuple[str, ...]
    name: str
    ignored: tuple[str, ...] = ()  # files in the class folders whose names end in no picture format


class Split(NamedTuple):
    """One part of a set."""

    source: Source
    classes: tuple[str, ...]
    ignored: tuple[str, ...] = ()  # files in its class folders whose names end in no picture format


class Files:
    """Pictures in files under `root`, as a `Source`; files above `max_pixels` are bad, and with `marks` those that have others."""

    def __init__(
        self, root: str, names: Sequence[str], labels: Sequence[int], max_pixels: int, marks: Sequence[Mark] | None = None
    ) -> None:
        self.root, self.max_pixels = root, max_pixels
        # One array of bytes is shared by forked workers; the reference counts of a list of strings would copy it page by page.
        self._names = np.array([os.fsencode(name) for name in names])
        self._labels = np.array(labels, dtype=np.int64)
        self._marks = None if marks is None else np.array(marks, dtype=[("bytes", np.int64), ("xxh3_128", "S32")])

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, index: int) -> Image.Image:
        if self._marks is None:
            return read_image(self.path(index), self.max_pixels)
        size, digest = self._marks[index].tolist()
        content = read_content(self.path(index))
        check_mark(content, Mark(size, digest.decode()), self.path(index))
        return decode_image(content, self.path(index), self.max_pixels)

    def label(self, index: int) -> int:
        return int(self._labels[index])

    def name(self, index: int) -> str:
        return os.fsdecode(self._names[index])

    def path(self, index: int) -> str:
        return os.path.join(self.root, self.name(index))


class Digits:
    """scikit-learn's embedded handwritten digits, 1,797 grey pictures of 8 x 8 pixels, as a `Source`.

    A fifth of every class is held out for evaluation: always the same pictures, whatever the run's seed.
    """

    classes = tuple("0123456789")

    def __init__(self, *, held_out: bool) -> None:
        from sklearn.datasets import load_digits  # slow to import, and used by this set alone

        pixels, labels = load_digits(return_X_y=True)
        names = np.array([f"{label}/{index:04d}" for index, label in enumerate(labels)])
        chosen = _held_out(names, labels, 0.2, 0, self.classes) == held_out
        levels = np.round(pixels[chosen].reshape(-1, 8, 8) * (255 / 16))  # 16 is white
        self._pixels, self._labels, self._names = levels.astype(np.uint8), labels[chosen], names[chosen]

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(self._pixels[index]).convert("RGB")

    def label(self, index: int) -> int:
        return int(self._labels[index])

    def name(self, index: int) -> str:
        return str(self._names[index])

    def path(self, index: int) -> str:
        return f"{DIGITS}/{self.name(index)}"


class Cached:
    """`source` with every picture decoded once, here and now, and kept: 3 bytes of memory per pixel. Bad files stay bad.

    Decoding happens before workers start, so that they share one copy and the first epoch is as fast as the others. One
    after the other: on small pictures, threads lose more waiting for Python's lock than they gain.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._pixels = bytearray()  # all pictures end to end: one object, which forked workers share
        self._sizes = np.zeros((len(source), 2), dtype=np.int64)
        self._ends = np.zeros(len(source) + 1, dtype=np.int64)
        self._bad: dict[int, str] = {}
        for index in range(len(source)):
            try:
                picture = source.read(index)
                self._sizes[index] = picture.size
                self._pixels += picture.tobytes()
            except BadImage as bad:
                self._bad[index] = bad.reason
            self._ends[index + 1] = len(self._pixels)

    def __len__(self) -> int:
        return len(self._source)

    def read(self, index: int) -> Image.Image:
        if index in self._bad:
            raise BadImage(self.path(index), self._bad[index])
        width, height = map(int, self._sizes[index])
        pixels = memoryview(self._pixels)[self._ends[index] : self._ends[index + 1]]
        return Image.frombytes("RGB", (width, height), pixels)

    def label(self, index: int) -> int:
        return self._source.label(index)

    def name(self, index: int) -> str:
        return self._source.name(index)

    def path(self, index: int) -> str:
        return self._source.path(index)


class Part:
    """The pictures of `source` at `indices`, as a `Source`."""

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self._source, self._indices = source, indices

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, index: int) -> Image.Image:
        return self._source.read(int(self._indices[index]))

    def label(self, index: int) -> int:
        return self._source.label(int(self._indices[index]))

    def name(self, index: int) -> str:
        return self._source.name(int(self._indices[index]))

    def path(self, index: int) -> str:
        return self._source.path(int(self._indices[index]))


def open_splits(settings: Input, seed: int, *, labelled: bool = True) -> Splits:
    """The set that `settings.data` names, in two parts: `digits`, or class folders on disk or in tars (see `open_split`).

    Args:
        seed: chooses the hold-out where the set brings no evaluation split; the same seed, the same pictures.
        labelled: whether class folders are asked for.

    Raises:
        ValueError: there is no such set, or its folders are not as they must be. The message names the folder and the fix.
    """
    train, classes, ignored = open_split(settings, "train", seed, labelled=labelled)
    val, _, also = open_split(settings, "val", seed, labelled=labelled)
    if 0 < settings.held_out < len(val):
        val = Part(val, np.linspace(0, len(val) - 1, settings.held_out).round().astype(int))
    name = settings.data if settings.data == DIGITS else os.path.basename(find_folder(settings.data))
    return Splits(train, val, classes, name, tuple(dict.fromkeys((*ignored, *also))))


def open_split(settings: Input, split: str, seed: int, *, labelled: bool = True) -> Split:
    """One part of a set: `train`, `val` or the name of any split folder, such as `test`.

    In a folder, every class is a sub-folder, of pictures at any depth; names that start with a dot are ignored. Split
    folders are `train` beside `val`, `valid`, `validation` or `test`: `val` then means the first of these that exists,
    as what training evaluates on. Where there is none, `val` is the fraction `settings.holdout` of every class, chosen
    by seed and file names alone, and `train` the rest; `all` is both, for evaluating on a whole folder.

    Not labelled, every picture below the folder counts, wherever it lies; there are no classes and every label is 0. Where
    there are class folders the same pictures are held out and shared as labelled: what learns from them later was not
    pre-trained on its held-out pictures, but for classes too small to give the fraction one.

    Members of a .tar, or of the .tars in a folder, lie in such folders by their names, and are held out as the same files
    would be. With `settings.verify`, a picture that is not what the set's index says (`data.index`) is bad.

    Raises:
        ValueError: as `open_splits`.
    """
    whole, groups = _open_whole(settings, split, seed, labelled)
    source = whole.source
    if split == "train" and settings.share < 1:
        ranks = _ranks([source.name(index) for index in range(len(source))], seed)
        groups = groups if labelled else _pooled(groups, settings.share)
        source = Part(source, np.sort(np.concatenate(list(_lowest(ranks, groups, settings.share).values()))))
    return whole._replace(source=Cached(source) if settings.cache and settings.data != DIGITS else source)


def _open_whole(settings: Input, split: str, seed: int, labelled: bool) -> tuple[Split, list[int]]:
    """A split before a share of it is taken, and of every picture the class, or the folder that stands for one."""
    if settings.data == DIGITS:
        _check_known(split, ("train", "val"), DIGITS)
        digits = Digits(held_out=split == "val")
        return Split(digits, Digits.classes if labelled else ()), [digits.label(index) for index in range(len(digits))]
    whole = open_set(find_folder(settings.data))
    folders = split_folders(whole.tree)
    evaluation = next((folders[name] for name in EVALUATION if name in folders), None)
    if evaluation:
        known = {**folders, "val": evaluation}
    else:
        known = dict.fromkeys(("train", "val", "all"), folders.get("train", ""))
    _check_known(split, known, whole.root)
    if labelled:
        classes = class_names(whole.tree, folders.get("train", known[split]))
        names, groups, ignored = class_pictures(whole.tree, known[split], classes)
    else:
        classes = ()
        names, groups, ignored = loose_pictures(whole.tree, known[split])
    if split != "all" and not evaluation:
        kept = np.flatnonzero(_held_out(names, groups, settings.holdout, seed, classes) == (split == "val"))
        names, groups = [names[index] for index in kept], [groups[index] for index in kept]
    skipped = tuple(f"{whole.root}:{name} ({why})" for name, why in whole.skipped)
    return Split(_source(whole, names, groups if labelled else [0] * len(names), settings), classes, (*ignored, *skipped)), groups


def _source(whole: Set, names: list[str], labels: list[int], settings: Input) -> Source:
    """The pictures of these names; with `settings.verify` read against the set's index."""
    marks = _marks(whole.root, names) if settings.verify else None
    if whole.shards:
        return Members(whole.shards, names, labels, whole.table(names, marks), settings.max_pixels, verify=settings.verify)
    return Files(whole.root, names, labels, settings.max_pixels, None if marks is None else [marks[name] for name in names])


def _marks(root: str, names: list[str]) -> Mapping[str, Mark]:
    path = index_path(root)
    if not os.path.exists(path):
        raise ValueError(f"field `verify`: {root} has no index; run `manyscale data index {root}`")
    marks = read_index(path).marks
    new = [name for name in names if name not in marks]
    if new:
        raise ValueError(
            f"field `verify`: {len(new):,} pictures of {root} are not in its index, such as {new[0]!r}; "
            f"run `manyscale data index {root}` again"
        )
    return marks


def find_folder(data: str) -> str:
    """What `data` means: a folder or a tar by its path, or else by its name under $MANYSCALE_DATA (default ~/.cache/manyscale/data).

    Raises:
        ValueError: neither is there; suggests the nearest name. Nothing is fetched and nothing is run.
    """
    if re.match(r"[a-z][a-z0-9+.-]*://|pipe:", data):
        raise ValueError(f"field `data`: {data!r} is an address or a command; only files of this machine are read: fetch it first")
    home = os.path.expanduser(os.environ.get("MANYSCALE_DATA") or "~/.cache/manyscale/data")
    for place in (os.path.expanduser(data), os.path.join(home, data)):
        if os.path.isdir(place) or (place.endswith(".tar") and os.path.lexists(place)):
            return os.path.abspath(place)
    names = [DIGITS, *(name for name, is_folder in Folder(home).entries("") if is_folder)] if os.path.isdir(home) else [DIGITS]
    raise ValueError(
        f"field `data`: no folder {data!r} here, no .tar, and no set of that name in {home} ($MANYSCALE_DATA); give the path of a folder "
        f"with one sub-folder per class, such as ./flowers, or the name of a set: {nearest(data, names)}"
    )


def same_set(one: str, other: str) -> bool:
    """Whether two names are of one set; one that is not there (a run's need not be, any more) is what it is called."""

    def place(name: str) -> str:
        with suppress(ValueError):
            return name if name == DIGITS else find_folder(name)
        return name

    return place(one) == place(other)


def _held_out(names: Sequence[str], labels: Sequence[int], fraction: float, seed: int, classes: tuple[str, ...]) -> np.ndarray:
    """True for the pictures kept for evaluation: of every class, those whose name and seed hash lowest.

    A file that comes or goes later hardly moves the others.
    """
    labels = labels if classes else _pooled(labels, fraction)
    chosen, counts = np.zeros(len(names), dtype=bool), np.bincount(labels)
    for label, members in _lowest(_ranks(names, seed), labels, fraction).items():
        if counts[label] < 2 and classes:
            raise ValueError(
                f"class {classes[label]} has a single image, {names[members[0]]}, which cannot be split into train and val; "
                f"add images, remove the class, or make a val folder beside train"
            )
        chosen[members[: counts[label] - 1]] = True
    return chosen


def _ranks(names: Sequence[str], seed: int) -> list[bytes]:
    """A lot for every name: the same for the same name and seed, whatever the others are."""
    return [hashlib.blake2b(os.fsencode(f"{seed} {name}")).digest() for name in names]


def _lowest(ranks: Sequence[bytes], labels: Sequence[int], fraction: float) -> dict[int, np.ndarray]:
    """Of every label, the places of the lowest-ranking fraction, at least one, lowest first."""
    found, labels = {}, np.asarray(labels)
    for label in np.unique(labels).tolist():
        members = np.flatnonzero(labels == label)
        count = max(1, round(len(members) * fraction))
        found[label] = np.array(sorted(members, key=ranks.__getitem__)[:count])
    return found


def _pooled(groups: Sequence[int], fraction: float) -> list[int]:
    """Folders too small to give the fraction one, all as one group: they are no classes, and may be very many."""
    counts = np.bincount(groups)
    return [group if round(counts[group] * fraction) else len(counts) for group in groups]


def _check_known(split: str, known: Iterable[str], where: str) -> None:
    if split not in known:
        raise ValueError(f"{where} has no split `{split}`; {nearest(split, known)}")
