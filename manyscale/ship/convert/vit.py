"""What the layouts of ViT share: where they keep what has no module of its own, in which shape, and what that says of the net."""

import re
from collections.abc import Mapping
from functools import partial
from math import isqrt, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manyscale.config import ViTConfig
from manyscale.ship.convert.layout import Layout, Row, State


class Names(NamedTuple):
    """How a layout calls the tensors that stand alone. Ours: `token`, `position`, `pool.probe`."""

    token: str
    position: str
    probe: str
    pre_logits: str = "pre_logits.weight"
    token_row: bool = False  # whether positions are written with a row for the class token, before the others


def alone(names: Names) -> list[Row]:
    """Their rows."""
    return [Row(("token",), (names.token,)), Row(("position",), (names.position,)), Row(("pool.probe",), (names.probe,))]


def deduce(state: Mapping[str, Any], names: Names) -> dict[str, Any]:
    """The fields of the configuration that the tensors of a file tell, after `even_out`."""
    fields: dict[str, Any] = {"pool": "token" if names.token in state else "map" if names.probe in state else "gap"}
    fields["pre_logits"] = len(state[names.pre_logits]) if isinstance(state.get(names.pre_logits), Tensor) else 0
    if names.position not in state:
        fields["position"] = "sincos2d"  # flax's nets always have positions, and write those that are learnt
    return fields


def size_hint(file: Mapping[str, Any], config: ViTConfig) -> list[str]:
    """The image size that the positions of a file are for, where it is square and another than that of the model."""
    for name, table in file.items():
        rows = (
            table.shape[-2]
            if re.search(r"pos(ition)?_embed(dings?)?(\.weight)?$", name) and isinstance(table, Tensor) and table.dim() > 1
            else 0
        )
        for places in (rows, rows - 1):  # without or with one for the class token
            side = isqrt(max(places, 0))
            if side and side**2 == places != prod(config.grid):
                return [f"Its positions are for {side} x {side} patches: pass image_size={side * config.patches[0]}."]
    return []


def even_out(state: State, names: Names, places: int) -> State:
    """Class token (C,), positions (N, C) without a row for it, query (1, C).

    A class token's position is added to it, which is all that ever happens to the two.

    Args:
        places: N, of the model.
    """
    state = dict(state)
    token, position, probe = (state.get(name) for name in names[:3])
    if isinstance(token, Tensor):
        state[names.token] = token.flatten()
    if isinstance(position, Tensor) and position.dim() == 3:
        position = state[names.position] = position[0]
    if isinstance(token, Tensor) and isinstance(position, Tensor) and position.shape == (places + 1, token.numel()):
        state[names.token], state[names.position] = token.flatten() + position[0], position[1:]
    if isinstance(probe, Tensor):
        state[names.probe] = probe.reshape(1, -1)
    return state


def restore(state: State, names: Names, *, flat: bool = False) -> State:
    """The inverse of `even_out`; the position of the class token is zero. `flat`: positions keep their two axes."""
    state = dict(state)
    if names.token in state and names.position in state and names.token_row:
        position = state[names.position]
        state[names.position] = torch.cat([torch.zeros_like(position[:1]), position])
    for name in (names.token, names.probe, *(() if flat else (names.position,))):
        if name in state:
            state[name] = state[name].reshape(1, -1, state[name].shape[-1])
    return state


def torch_layout(config: ViTConfig, rows: list[Row], names: Names, fields: dict[str, Any], **options: Any) -> Layout:
    """A layout of torch modules.

    Args:
        fields: of the configuration, which every net of the package has in common.
    """
    return Layout(
        [*rows, *alone(names)],
        dropped=options.pop("dropped", ()),
        enter=partial(even_out, names=names, places=prod(config.grid)),
        leave=partial(restore, names=names, **options),
        says=lambda state: fields | deduce(state, names) | {"position": "learned"},  # `refuse` knows no other: without, they are missing
    )


BLOCK = {"attention.norm_in": "norm1", "mlp.norm_in": "norm2", "mlp.branch.fc1": "mlp.fc1", "mlp.branch.fc2": "mlp.fc2",
         "attention.branch.qkv": "attn.qkv", "attention.branch.proj": "attn.proj"}  # fmt: skip


def in_blocks(table: Mapping[str, str], block: str) -> list[Row]:
    """The rows of a table of names inside a block; `block` is where the other package keeps block {i}."""
    return [Row(("blocks.{i}." + ours,), (f"{block}.{theirs}",)) for ours, theirs in table.items()]


def refuse(config: ViTConfig, package: str, pools: tuple[str, ...] = ("token", "gap", "map"), *, pre_logits: bool = False) -> None:
    """See that `package` can hold a net.

    Raises:
        ValueError: it has no such positions, pooling or layer.
    """
    wrong = []
    if config.position != "learned":
        wrong.append(f"position={config.position}")
    if config.pool not in pools:
        wrong.append(f"pool={config.pool}")
    if config.pre_logits and not pre_logits:
        wrong.append(f"pre_logits={config.pre_logits}")
    if wrong:
        raise ValueError(f"{package} has no ViT with {', '.join(wrong)}; keep it with manyscale.save and manyscale.load")
