"""The layout of SuperViT's own checkpoints (arXiv 2205.11397), on DeiT and on LV-ViT; and a ViT of any layout as a SuperViT.

Names and shapes are timm's DeiT but for a list of position tables, one for each image size, from small to large. On LV-ViT there
are three convolutions with batch norms before the patches, a second head, and no bias in front of the attention.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from math import isqrt, prod
from typing import Any

import torch
from torch import Tensor

from manyscale.config import SuperViTConfig, ViTConfig
from manyscale.models import SuperViT, ViT
from manyscale.models.kin import beyond_vit, to_supervit
from manyscale.presets import model_config
from manyscale.ship.convert.layout import Layout, Row, State, rows

USUAL = ("model", "state_dict_ema", "state_dict", "model_ema")
"""Which weights of a checkpoint its authors score: on DeiT the raw ones, on LV-ViT, saved by timm, their moving average."""

NET = {"patch": "patch_embed.proj", "norm": "norm", "head": "head", "token_head": "aux_head"}
STEM = {f"stem.{ours}{i}": f"patch_embed.{theirs}{i}" for i in (1, 2, 3) for ours, theirs in (("conv", "conv"), ("norm", "bn"))}
STATISTICS = {f"stem.norm{i}.{ours}": f"patch_embed.bn{i}.running_{theirs}"
              for i in (1, 2, 3) for ours, theirs in (("mean", "mean"), ("variance", "var"))}  # fmt: skip
BLOCK = {"norm1": "norm1", "attention.qkv": "attn.qkv", "attention.proj": "attn.proj", "norm2": "norm2", "mlp.fc1": "mlp.fc1",
         "mlp.fc2": "mlp.fc2"}  # fmt: skip
TABLE = "pos_embed_list.{}"
COUNTER = "num_batches_tracked"  # torch's batch norms count; only one without a momentum reads it
SHAPE = ("patch", "channels", "classes", "width", "depth", "heads", "mlp_width", "drop_path")  # what ViT and SuperViT both say


def layout(config: SuperViTConfig, file: Mapping[str, Any] | tuple[()] = ()) -> Layout:
    """The layout of a `file`; without, the one to write.

    A file has one set of statistics for all sizes; a net with one for each takes it for every size. Which blocks drop tokens, how many
    stay and how images are resized is in no file: the official code's ways are the presets'.

    Raises:
        ValueError: a net with parts that the layout has no place for.
    """
    refused = [f"positions={config.positions}"] if config.positions != "per-size" else []
    refused += [f"registers={config.registers}"] if config.registers else []
    refused += [f"stem_statistics={config.stem_statistics}"] if config.stem_statistics != "shared" and not file else []
    if refused:
        raise ValueError(f"SuperViT's own checkpoints have no {', '.join(refused)}; keep it with manyscale.save and manyscale.load")
    return Layout(
        [
            *rows({**NET, **STEM, **STATISTICS, "token": "cls_token"}),
            *(Row(("blocks.{i}." + ours,), ("blocks.{i}." + theirs,)) for ours, theirs in BLOCK.items()),
            *(Row((f"positions.{i}",), (TABLE.format(slot),)) for i, slot in _tables(config, dict(file)).items()),
        ],
        dropped=(f"*.{COUNTER}",),
        enter=partial(_enter, statistics=len(config.sizes) if config.stem_statistics == "per-size" else 1),
        leave=_leave,
    )


def _tables(config: SuperViTConfig, file: Mapping[str, Any]) -> dict[int, int]:
    """The place of a size in `config.sizes` -> of its table in the file: as long as it must be, else by size."""
    wanted = [1 + prod(grid) for grid in config.grids]
    tables = [file.get(TABLE.format(slot)) for slot in range(len(wanted))]
    found = [table.shape[-2] if isinstance(table, Tensor) and table.dim() > 1 else 0 for table in tables]
    slots = sorted(range(len(wanted)), key=found.__getitem__) if sorted(found) == sorted(wanted) else range(len(wanted))
    return dict(zip(sorted(range(len(wanted)), key=wanted.__getitem__), slots, strict=True))


def _enter(state: State, *, statistics: int) -> State:
    """Class token (C,), tables (1 + N, C), statistics (S, C)."""
    state = dict(state)
    for name, tensor in state.items():
        if isinstance(tensor, Tensor):
            if name == "cls_token":
                state[name] = tensor.flatten()
            elif name.startswith(TABLE.format("")):
                state[name] = tensor.squeeze(0)
            elif name in STATISTICS.values() and tensor.dim() == 1:
                state[name] = tensor.expand(statistics, -1)
    return state


def _leave(state: State) -> State:
    """The inverse of `_enter`, with the counters of the batch norms."""
    result = {}
    for name, tensor in state.items():
        if name == "cls_token":
            tensor = tensor.reshape(1, 1, -1)
        elif name.startswith(TABLE.format("")):
            tensor = tensor.unsqueeze(0)
        elif name in STATISTICS.values():
            tensor = tensor.squeeze(0)
        result[name] = tensor
        if name.endswith("running_var"):
            result[f"{name.rpartition('.')[0]}.{COUNTER}"] = torch.zeros((), dtype=torch.int64, device=tensor.device)
    return result


def sizes_hint(file: Mapping[str, Any], config: SuperViTConfig) -> list[str]:
    """The image sizes that the tables of a file are for, where they are square and others than those of the model."""
    places = []
    while isinstance(table := file.get(TABLE.format(len(places))), Tensor):
        places.append(table.shape[-2] - 1 if table.dim() > 1 else 0)
    square = places and all(count > 0 and isqrt(count) ** 2 == count for count in places)
    if not square or sorted(places) == sorted(map(prod, config.grids)):
        return []
    sizes = tuple(isqrt(count) * config.patch for count in places)
    return [f"Its position tables are for {len(sizes)} square image sizes: pass sizes={sizes}."]


def begins_as(name: str, fields: dict[str, Any]) -> ViTConfig:
    """The ViT whose weights model `name` takes from a file of another layout.

    Args:
        fields: of the SuperViT; and `image_size`, the one that the ViT's positions are for, left out: the largest of `sizes`.

    Raises:
        ValueError: a net that no ViT can fill.
    """
    config = _without_image_size(name, fields)
    if wrong := beyond_vit(config):
        raise ValueError(f"{name} has {', '.join(wrong)}, and no ViT has: take a supervit_deit_*, or a file of source `supervit`")
    said = {field: fields[field] for field in ("gelu", "norm_eps") if field in fields}  # else the file's layout says it
    shape = {field: getattr(config, field) for field in SHAPE}
    return ViTConfig(image_size=fields.get("image_size") or config.image_size, **shape, **said)


def from_vit(vit: ViT, name: str, fields: dict[str, Any]) -> SuperViT:
    """The SuperViT `name` with the weights of the ViT that `begins_as` asked for, its positions resized to every size.

    Raises:
        ValueError: a ViT without a class token.
    """
    found = {field: getattr(vit.config, field) for field in ("classes", "gelu", "norm_eps")}
    return to_supervit(vit, replace(_without_image_size(name, fields), **found))


def _without_image_size(name: str, fields: dict[str, Any]) -> SuperViTConfig:
    config = model_config(name, **{field: value for field, value in fields.items() if field != "image_size"})
    assert isinstance(config, SuperViTConfig)
    return config
