"""The layouts of google-research/big_vision and vision_transformer: flax trees in .npz files, of every age.

Read: a prefix (`params/`, `opt/target/`, `params/img/` of a SigLIP tower), blocks stacked by scan, the block names of the
first ViT files, a MAP head without a name of its own, positions with a row for the class token, bfloat16 as raw bytes.
Written: big_vision's today, blocks apart; by target vision_transformer, the names of 2020 with that row.
"""

import re
from collections.abc import Mapping
from functools import partial
from math import prod
from typing import Any

from torch import Tensor

from manyscale.config import ViTConfig
from manyscale.ship.convert.layout import Layout, Row, State, rows
from manyscale.ship.convert.vit import Names, alone, deduce, even_out, refuse, restore

NAMES = Names("cls", "pos_embedding", "MAPHead_0/probe", "pre_logits/kernel")
BLOCK = "Transformer/encoderblock_{i}/"
ATTENTION = "MultiHeadDotProductAttention_0/"
OLD_BLOCK = {"LayerNorm_1": "LayerNorm_2", "MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1", "MlpBlock_0": "MlpBlock_3"}
OLD_POSITION = "Transformer/posembed_input/pos_embedding"
MAP_PARTS = ("probe", "MlpBlock_0", "MultiHeadDotProductAttention_0", "LayerNorm_0")


def layout(config: ViTConfig, *, old: bool = False) -> Layout:
    """The layout of any of their files; `old`: what is written is vision_transformer's.

    Raises:
        ValueError: MAP pooling in the old layout, which has none.
    """
    if old:
        refuse(config, "vision_transformer", ("token", "gap"), pre_logits=True)
    block = {
        "attention.norm_in": "LayerNorm_0",
        "attention.branch.proj": ATTENTION + "out",
        "mlp.norm_in": "LayerNorm_1",
        "mlp.branch.fc1": "MlpBlock_0/Dense_0",
        "mlp.branch.fc2": "MlpBlock_0/Dense_1",
    }
    net = {
        "patch": "embedding",
        "norm": "Transformer/encoder_norm",
        "pool.attention.q": f"MAPHead_0/{ATTENTION}query",
        "pool.attention.proj": f"MAPHead_0/{ATTENTION}out",
        "pool.norm": "MAPHead_0/LayerNorm_0",
        "pool.mlp.fc1": "MAPHead_0/MlpBlock_0/Dense_0",
        "pool.mlp.fc2": "MAPHead_0/MlpBlock_0/Dense_1",
        "pre_logits": "pre_logits",
        "head": "head",
    }
    qkv = tuple(f"{ATTENTION}{name}" for name in ("query", "key", "value"))
    return Layout(
        [
            *rows(net),
            *(Row(("blocks.{i}." + ours,), (BLOCK + theirs,)) for ours, theirs in block.items()),
            Row(("blocks.{i}.attention.branch.qkv",), tuple(BLOCK + name for name in qkv)),
            Row(("pool.attention.kv",), tuple(f"MAPHead_0/{name}" for name in qkv[1:])),
            *alone(NAMES),
        ],
        dropped=(),
        enter=partial(enter, places=prod(config.grid)),
        leave=partial(_leave, config=config, old=old),
        leaf=_leaf,
        says=partial(deduce, names=NAMES),  # GELU, epsilon and the way to resize positions are the defaults
    )


def _leaf(name: str, leaf: str) -> str:
    scale = "Norm" in name.rpartition("/")[2] or name.endswith("encoder_norm")
    return f"{name}/{'bias' if leaf == 'bias' else 'scale' if scale else 'kernel'}"


def enter(state: Mapping[str, Any], places: int) -> State:
    """A file's arrays by today's names without a prefix, in torch's shapes: kernels (out, in), convolutions (out, in, h, w).

    Args:
        places: the model's positions.

    Raises:
        ValueError: no ViT, or stacked blocks of several lengths.
    """
    stems = [name.removesuffix("embedding/kernel") for name in state if re.search(r"(^|/)embedding/kernel$", name)]
    if not stems:
        raise ValueError("no `embedding/kernel` in it: not a ViT of big_vision or vision_transformer")
    prefix = min(stems, key=lambda stem: ("/mu/" in stem or "/nu/" in stem, len(stem)))  # weights, not an optimiser's moments
    tree = {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}
    tree = _renamed(_unstacked(tree))
    tree = {name: _as_torch(name, array) if isinstance(array, Tensor) else array for name, array in tree.items()}
    return even_out(tree, NAMES, places)


def _unstacked(tree: dict[str, Any]) -> dict[str, Any]:
    """Blocks one by one, where scan has stacked them."""
    stacked = {name: array for name, array in tree.items() if name.startswith("Transformer/encoderblock/")}
    if not stacked:
        return tree
    depths = {len(array) if isinstance(array, Tensor) and array.dim() else 0 for array in stacked.values()}
    if len(depths) > 1:
        shapes = ", ".join(f"{name} {tuple(array.shape)}" for name, array in list(stacked.items())[:4])
        raise ValueError(f"stacked blocks of several depths, {sorted(depths)}: the first axis must be the depth everywhere ({shapes}, ...)")
    apart = {
        name.replace("encoderblock/", f"encoderblock_{i}/", 1): part for name, array in stacked.items() for i, part in enumerate(array)
    }
    return {**{name: array for name, array in tree.items() if name not in stacked}, **apart}


def _renamed(tree: dict[str, Any]) -> dict[str, Any]:
    """Names of older files as today's."""
    new = {}
    for name, array in tree.items():
        for today, then in OLD_BLOCK.items():
            name = re.sub(rf"^(Transformer/encoderblock_\d+/){then}/", rf"\1{today}/", name)
        if name in (OLD_POSITION, "Transformer/pos_embedding"):
            name = NAMES.position
        if name.split("/")[0] in MAP_PARTS:
            name = f"MAPHead_0/{name}"
        new[name] = array
    return new


def _as_torch(name: str, array: Tensor) -> Tensor:
    *_, module, leaf = ("", *name.split("/"))
    if leaf == "kernel" and array.dim() == 4:
        return array.permute(3, 2, 0, 1)
    if leaf == "kernel" and module in ("query", "key", "value") and array.dim() == 3:
        return array.flatten(1).T  # (C, heads, d) -> (heads d, C)
    if leaf == "kernel" and module == "out" and array.dim() == 3:
        return array.flatten(0, 1).T  # (heads, d, C) -> (C, heads d)
    if leaf == "kernel" and array.dim() == 2:
        return array.T
    return array.flatten() if leaf == "bias" and module in ("query", "key", "value") else array


def _as_flax(name: str, tensor: Tensor, heads: int) -> Tensor:
    *_, module, leaf = ("", *name.split("/"))
    if leaf == "kernel" and tensor.dim() == 4:
        return tensor.permute(2, 3, 1, 0).contiguous()
    if leaf == "kernel" and module in ("query", "key", "value"):
        return tensor.T.unflatten(1, (heads, -1)).contiguous()
    if leaf == "kernel" and module == "out":
        return tensor.T.unflatten(0, (heads, -1)).contiguous()
    if leaf == "kernel":
        return tensor.T.contiguous()
    return tensor.unflatten(0, (heads, -1)) if leaf == "bias" and module in ("query", "key", "value") else tensor


def _leave(state: State, *, config: ViTConfig, old: bool) -> State:
    """The inverse of `enter`, for one layout of theirs.

    Raises:
        ValueError: a net without positions: a file without them means fixed ones.
    """
    if config.position == "none":
        raise ValueError("big_vision has no ViT with position=none; keep it with manyscale.save and manyscale.load")
    tree = {name: _as_flax(name, tensor, config.heads) for name, tensor in state.items()}
    tree = restore(tree, NAMES._replace(token_row=old))
    if not old:
        return {f"params/{name}": tensor for name, tensor in tree.items()}
    named = {}
    for name, tensor in tree.items():
        for today, then in OLD_BLOCK.items():
            name = re.sub(rf"^(Transformer/encoderblock_\d+/){today}/", rf"\1{then}/", name)
        named[OLD_POSITION if name == NAMES.position else name] = tensor
    return named
