"""What a foreign layout is: one table of names, read in both directions.

A row pairs names of this package with names of another. A row of modules stands for their weight and bias. A side of
several names is one tensor in as many equal parts along its first axis; `None` is a part of zeros. `columns` says in
which order the other package keeps the last axis. What else differs, `enter` evens out on the way in and `leave` restores on
the way out: shapes of class tokens and positions, flax's kernels, names of older files.
"""

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manyscale.config import NetConfig, SwinConfig
from manyscale.ops.positions import relative_coordinates, relative_index

BUFFERS = ("*relative_coords_table", "*relative_position_index", "*attn_mask")
"""Tensors that files of every layout may hold and that follow from the configuration: not loaded."""

V1 = {"similarity": "dot", "norm": "pre", "bias": "table", "merge_norm": "before"}
V2 = {"similarity": "cosine", "norm": "res-post", "bias": "log-cpb", "merge_norm": "after"}


class Row(NamedTuple):
    """Names here and there; see the module's docstring. {i} and {j} are stage and block, counted from 0."""

    ours: tuple[str | None, ...]
    theirs: tuple[str, ...]
    columns: Callable[[int], Tensor] | None = None  # length -> (length,) places in our last axis, in their order


State = dict[str, Tensor]


def _as_it_is(state: State) -> State:
    return state


def _dotted(name: str, leaf: str) -> str:
    return f"{name}.{leaf}"


class Layout(NamedTuple):
    """How another package names and keeps the weights of a net."""

    rows: list[Row]
    attention: str = ""  # the name of the module that keeps a Swin's relative positions
    dropped: tuple[str, ...] = BUFFERS  # shell-style patterns of tensors that are not loaded
    writes_buffers: bool = False  # whether its own loader wants the relative positions in the file
    enter: Callable[[State], State] = _as_it_is  # a file's tensors -> with the names and shapes that the rows expect
    leave: Callable[[State], State] = _as_it_is  # the inverse
    leaf: Callable[[str, str], str] = _dotted  # a module's name and `weight` or `bias` -> the tensor's
    says: Callable[[State], dict[str, Any]] | None = None  # fields of the configuration that a file's tensors tell, after `enter`

    @property
    def heads(self) -> list[str]:
        """The names of the classifier and, behind it, of one on every patch."""
        return [row.theirs[0] for row in self.rows if row.ours in (("head",), ("token_head",))]


def rows(table: Mapping[str, str], prefix: str = "") -> list[Row]:
    """The rows of a plain table, ours to theirs, with `prefix` before each of theirs."""
    return [Row((ours,), (prefix + theirs,)) for ours, theirs in table.items()]


def in_block(table: Mapping[str, str], block: str) -> list[Row]:
    """The rows of a table of names inside a block; `block` is where the other package keeps one."""
    return [Row(("stages.{i}.blocks.{j}." + ours,), (f"{block}.{theirs}",)) for ours, theirs in table.items()]


def version(config: SwinConfig) -> int:
    """1 or 2.

    Raises:
        ValueError: a mixture of the two, or a video model: no other package can hold it.
    """
    for number, fields in ((1, V1), (2, V2)):
        if config.axes == 2 and all(getattr(config, name) == value for name, value in fields.items()):
            return number
    mixture = ", ".join(f"{name}={getattr(config, name)}" for name in V1)
    raise ValueError(
        f"other packages hold Swin V1 or V2 on images only; this is {mixture} on {config.axes} axes. "
        "Keep such a model with manyscale.save and manyscale.load"
    )


def expand(layout: Layout, config: NetConfig, ours: Iterable[str]) -> list[Row]:
    """The layout's rows for the parameters named `ours`, each with full names on both sides.

    Raises:
        ValueError: parameters for which the layout has no name.
    """
    ours, found = set(ours), {}
    for place in _places(config):
        for row in layout.rows:
            here, there = (tuple(name and name.format(**place) for name in side) for side in (row.ours, row.theirs))
            if here[0] in ours:
                found[here] = Row(here, there, row.columns)
            for leaf in ("weight", "bias"):
                if f"{here[0]}.{leaf}" in ours:
                    here_leaf = tuple(name and f"{name}.{leaf}" for name in here)
                    found[here_leaf] = Row(here_leaf, tuple(layout.leaf(name, leaf) for name in there), row.columns)
    homeless = sorted(ours - set(chain.from_iterable(found)))
    if homeless:
        hint = "; pass extra_norm_every=0" if any("extra_norm" in name for name in homeless) else ""
        raise ValueError(f"this layout has no name for {', '.join(homeless)}{hint}")
    return list(found.values())


def to_theirs(rows: list[Row], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under their names, each a copy of its own."""
    result = {}
    for row in rows:
        whole = _join([torch.zeros_like(state[row.ours[0]]) if name is None else state[name] for name in row.ours])
        if row.columns:
            whole = whole.index_select(-1, row.columns(whole.shape[-1]).to(whole.device))
        result.update(zip(row.theirs, (part.clone() for part in whole.chunk(len(row.theirs))), strict=True))
    return result


def to_ours(rows: list[Row], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_theirs`."""
    result = {}
    for row in rows:
        whole = _join([state[name] for name in row.theirs])
        if row.columns:
            whole = whole.index_select(-1, row.columns(whole.shape[-1]).argsort().to(whole.device))
        parts = zip(row.ours, whole.chunk(len(row.ours)), strict=True)
        result.update((name, part.clone()) for name, part in parts if name is not None)
    return result


def buffers(layout: Layout, config: SwinConfig) -> dict[str, Tensor]:
    """The relative positions of every block, as the official code keeps them (the index flat, as torchvision does).

    Raises:
        ValueError: a window larger than its stage's grid, which this package clips and torchvision pads up to.
    """
    result = {}
    for place in _places(config):
        window, pretrained = config.windows[place["i"]], config.pretrained_windows[place["i"]]
        if window != config.windows[0]:
            raise ValueError(
                f"torchvision has one window for all stages and never clips it; this model's are {config.windows}. "
                "Use a window that fits the last stage, image size / 32"
            )
        name = layout.attention.format(**place)
        result[f"{name}.relative_position_index"] = relative_index(window, window).flatten()
        if version(config) == 2:
            coordinates = relative_coordinates(window, pretrained, "log")
            result[f"{name}.relative_coords_table"] = coordinates.reshape(1, *(2 * w - 1 for w in window), 2)
    return result


def learnt_windows(layout: Layout, config: SwinConfig, state: Mapping[str, Tensor]) -> dict[int, tuple[int, ...]]:
    """The window each stage's bias network learnt its coordinates at, where the file holds them.

    The largest coordinate is log8(1 + 8 (w - 1) / (p - 1)) for windows of w tokens and a network that learnt at p.
    """
    result = {}
    for place in _places(config):
        table = state.get(f"{layout.attention.format(**place)}.relative_coords_table")
        largest = table[0, -1, -1].double().tolist() if isinstance(table, Tensor) and table.dim() == 4 else [0.0]
        if all(c > 0 for c in largest):  # 0: a window of one token, which says nothing
            offsets = [n // 2 for n in table.shape[1:3]]
            result[place["i"]] = tuple(round(8 * w / (8**c - 1)) + 1 for w, c in zip(offsets, largest, strict=True))
    return result


def merge_order(length: int) -> Tensor:
    """The four neighbours of a merging as torch's Unfold gives them: by channel, then along rows. Ours: down columns, then by channel."""
    return torch.arange(length).reshape(4, length // 4)[[0, 2, 1, 3]].T.flatten()


def _join(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]  # the copy is made where the result is taken apart


def _places(config: NetConfig) -> list[dict[str, int]]:
    """The numbers a name may hold: stage i, block j, and what other packages count instead; of a ViT or SuperViT, block i."""
    if not isinstance(config, SwinConfig):
        return [{"i": i} for i in range(config.depth)]
    stages = len(config.depths)
    return [
        {"i": i, "j": j, "next": i + 1, "odd": 2 * i + 1, "even": 2 * i + 2, "last": stages - 1}
        for i, depth in enumerate(config.depths)
        for j in range(depth)
    ]
