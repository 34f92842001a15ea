"""A ViT's weights as a SuperViT's, and back: the same net where every token is kept."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from manyscale.config import Setting, Size, SuperViTConfig, ViTConfig
from manyscale.models.supervit import SuperViT
from manyscale.models.vit import ViT
from manyscale.ops.positions import resize_positions, sincos2d

BLOCK = {"norm1": "attention.norm_in", "attention.qkv": "attention.branch.qkv", "attention.proj": "attention.branch.proj",
         "norm2": "mlp.norm_in", "mlp.fc1": "mlp.branch.fc1", "mlp.fc2": "mlp.branch.fc2"}  # fmt: skip

PLAIN = {"stem": "patch", "qkv_bias": True, "skip": 1.0, "token_head": None}  # what a SuperViT may have that a ViT has not


def beyond_vit(config: SuperViTConfig) -> list[str]:
    """What of a SuperViT no weights of a ViT can fill, such as `stem=conv`."""
    return [f"{name}={getattr(config, name)}" for name, plain in PLAIN.items() if getattr(config, name) != plain]


@torch.no_grad()
def to_supervit(vit: ViT, config: SuperViTConfig | None = None, **fields: Any) -> SuperViT:
    """A SuperViT with the weights of a ViT, whose positions are resized to every size; no training is needed to run it.

    Args:
        config: of the result; None: what follows from the ViT, with `sizes` of its own image size alone, and tokens dropped at a
            quarter, half and three quarters of its blocks.
        fields: of the configuration, replaced.

    Raises:
        ValueError: a ViT without a class token, by whose attention tokens are chosen, or of another shape than `config`.
    """
    old = vit.config
    if old.pool != "token" or old.pre_logits or len(set(old.patches)) > 1:
        raise ValueError(
            f"a SuperViT chooses tokens by the attention of its class token; this ViT has pool={old.pool}, pre_logits={old.pre_logits}, "
            f"patch={old.patch}: take one with pool=token, pre_logits=0 and square patches"
        )
    follows = {"patch": old.patches[0], "channels": old.channels, "classes": old.classes, "width": old.width, "depth": old.depth,
               "heads": old.heads, "mlp_width": old.mlp_width, "gelu": old.gelu, "norm_eps": old.norm_eps}  # fmt: skip
    if config is None:
        quarters = tuple(dict.fromkeys(part * old.depth // 4 for part in (1, 2, 3)))  # (3, 6, 9) of 12
        config = SuperViTConfig(**{"sizes": (old.size,), "drop_path": old.drop_path, "drop_blocks": quarters, **follows, **fields})
    else:
        config = replace(config, **fields)
    wrong = [f"{name}={getattr(config, name)}, the ViT's is {value}" for name, value in follows.items() if getattr(config, name) != value]
    wrong += beyond_vit(config)
    if wrong:
        raise ValueError(f"this SuperViT cannot hold the weights of that ViT: {'; '.join(wrong)}")
    new = SuperViT(config).to(vit.patch.weight)
    state = vit.state_dict()
    tensors = {name: state[theirs] for name, theirs in _names(config).items()}
    if old.position == "learned":
        table = state["position"]
    else:
        table = sincos2d(old.grid, old.width) if old.position == "sincos2d" else torch.zeros(old.grid[0] * old.grid[1], old.width)
    nowhere = torch.zeros(1, old.width)  # a ViT's class token has its position in it
    for i, grid in enumerate(config.grids if config.positions == "per-size" else (config.grid_of(config.size),)):
        resized = resize_positions(table, old.grid, grid, old.position_resize)
        tensors[f"positions.{i}"] = torch.cat([nowhere.to(resized), resized])
    new.load_state_dict({**new.state_dict(), **tensors})
    new.train(vit.training)
    new.preprocess, new.labels = vit.preprocess, vit.labels
    if new.preprocess:
        new.preprocess = replace(new.preprocess, image_size=config.size)
    return new


@torch.no_grad()
def to_vit(model: SuperViT, size: Size | None = None) -> ViT:
    """The ViT that a SuperViT is at one of its sizes where every token is kept; None: the largest.

    Raises:
        ValueError: a size without positions, or a net with parts that a ViT does not have.
    """
    config = model.config
    size = size or config.size
    size = size if isinstance(size, tuple) else (size, size)
    wrong = beyond_vit(config) + ([f"registers={config.registers}"] if config.registers else [])
    if wrong:
        raise ValueError(f"a ViT has no {', '.join(wrong)}; keep this net with manyscale.save and manyscale.load")
    config.counts(Setting(), size)  # refuses a size without positions
    vit = ViT(
        ViTConfig(
            image_size=size, patch=config.patch, channels=config.channels, classes=config.classes, width=config.width, depth=config.depth,
            heads=config.heads, mlp_width=config.mlp_width, pool="token", gelu=config.gelu, norm_eps=config.norm_eps,
            position_resize="bicubic", drop_path=config.drop_path,
        )
    ).to(model.patch.weight)  # fmt: skip
    state = model.state_dict()
    tensors: dict[str, Tensor] = {theirs: state[name] for name, theirs in _names(config).items()}
    if config.positions == "per-size":
        table = state[f"positions.{config.grids.index(config.grid_of(size))}"]
    else:
        table = state["positions.0"]
        table = torch.cat([table[:1], resize_positions(table[1:], config.grid_of(config.size), config.grid_of(size), "bicubic")])
    tensors["token"], tensors["position"] = state["token"] + table[0], table[1:]
    vit.load_state_dict(tensors)
    vit.train(model.training)
    vit.preprocess, vit.labels = model.preprocess, model.labels
    if vit.preprocess:
        vit.preprocess = replace(vit.preprocess, image_size=size)
    return vit


def _names(config: SuperViTConfig) -> dict[str, str]:
    """SuperViT's name of every tensor that the two share -> ViT's."""
    modules = {"patch": "patch", "norm": "norm"} | ({"head": "head"} if config.classes else {})
    modules |= {f"blocks.{i}.{ours}": f"blocks.{i}.{theirs}" for i in range(config.depth) for ours, theirs in BLOCK.items()}
    leaves = {f"{ours}.{leaf}": f"{theirs}.{leaf}" for ours, theirs in modules.items() for leaf in ("weight", "bias")}
    return {"token": "token", **leaves}
