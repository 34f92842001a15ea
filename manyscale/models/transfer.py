"""The same function at another resolution, window or patch, nothing retrained (Swin V2 section 3.3; ViT section 3.2)."""

from dataclasses import replace
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor

from manyscale.config import NetConfig, Size, SuperViTConfig, SwinConfig, ViTConfig, Windows
from manyscale.models.build import Net, build
from manyscale.ops.patches import resize_kernel
from manyscale.ops.positions import resize_positions, resize_table


@torch.no_grad()
def transfer(
    model: Net,
    image_size: Size | None = None,
    window: Windows | None = None,
    *,
    sizes: tuple[Size, ...] | None = None,
    keeps: tuple[float, ...] | None = None,
    patch: Size | None = None,
    classes: int | None = None,
    drop_path: float | None = None,
    mask_token: bool | None = None,
    table: Literal["bicubic", "geometric"] = "bicubic",
) -> Net:
    """A new model with the weights of `model`, laid out for `image_size` and `window` or `patch`, or `sizes`. `model` is left as it is.

    Swin: a continuous bias keeps the coordinates it learnt (`pretrained_window` stays at the window of its training,
    however often it is transferred), so a round trip gives the same model to the last bit. A table is resized, and its
    round trip is an approximation: going to a smaller window forgets the far offsets.

    ViT: learnt positions are resized as `position_resize` says, and the kernel of the patches so that enlarged pictures
    give the tokens they gave (`ops.patches.resize_kernel`).

    SuperViT: a size it had keeps its positions, a new one gets those of the nearest, resized as timm does.

    Args:
        image_size: pixels; one number or one per axis; None keeps it.
        window: of a Swin, as in the configuration; None keeps it.
        sizes, keeps: of a SuperViT, instead of `image_size`; None keeps them.
        patch: of a ViT; None keeps it.
        classes: a new, freshly initialised head for so many classes; None keeps the head.
        drop_path: for training on; None keeps it.
        mask_token: with one (fresh, where the model has none) or without; None keeps it.
        table: how a bias table is resized; geometric is what SimMIM fine-tuning uses.

    Raises:
        ValueError: a size, window or patch that the configuration refuses, or that this kind of model does not have.
    """
    old = model.config
    image_size = tuple(image_size) if isinstance(image_size, (tuple, list)) else image_size
    asked = {
        "image_size": image_size,
        "window": window,
        "sizes": sizes,
        "keeps": keeps,
        "patch": patch,
        "classes": classes,
        "drop_path": drop_path,
        "mask_token": mask_token,
    }
    changes: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    config = replace(old, **_allowed(old, changes))
    new = build(config).to(next(model.parameters()))
    tensors = model.state_dict()
    if classes is not None:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(("head.", "token_head."))}
    if isinstance(config, SuperViTConfig):
        tensors = _sized(tensors, old, config)
    elif not config.mask_token:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("mask_token.")}
    for name in tensors:
        tensors[name] = _resized(name, tensors[name], old, config, table)
    new.load_state_dict({**new.state_dict(), **tensors})
    new.train(model.training)
    new.labels = model.labels if classes is None else ()
    if model.preprocess and config.axes == 2:
        new.preprocess = replace(model.preprocess, image_size=config.size)
    return new


def _allowed(old: NetConfig, changes: dict[str, Any]) -> dict[str, Any]:
    if changes.keys() & {"sizes", "keeps"} and not isinstance(old, SuperViTConfig):
        raise ValueError("field `sizes`: only a SuperViT has several, and keep rates; give an image size")
    if isinstance(old, SuperViTConfig):
        refused = next(
            (name for name in ("image_size", "window", "patch") if changes.get(name, getattr(old, name, None)) != getattr(old, name, None)),
            "",
        )
        if refused:
            raise ValueError(f"field `{refused}`: a SuperViT has sizes and keeps its patches; give `sizes`, such as 128 160 192 224")
        if changes.get("mask_token"):
            raise ValueError("field `mask_token`: a SuperViT has none; pre-train a ViT and start from it")
        return {name: value for name, value in changes.items() if name in ("sizes", "keeps", "classes", "drop_path")}
    if isinstance(old, SwinConfig):
        if changes.get("patch", old.patch) != old.patch:
            raise ValueError(f"field `patch`: a Swin keeps its patches of {old.patch}; give a window")
        return {**changes, "pretrained_window": old.pretrained_windows}
    if "window" in changes:
        raise ValueError("field `window`: a ViT has none; give an image size, and a patch if you like")
    return changes


def _resized(name: str, tensor: Tensor, old: NetConfig, new: NetConfig, table: Literal["bicubic", "geometric"]) -> Tensor:
    """A tensor of the state dict as the new layout has it."""
    if isinstance(old, SwinConfig) and isinstance(new, SwinConfig) and name.endswith("bias.table"):
        stage = int(name.split(".")[1])
        return resize_table(tensor, old.windows[stage], new.windows[stage], table)
    if isinstance(old, ViTConfig) and isinstance(new, ViTConfig):
        if name == "position":
            return resize_positions(tensor, old.grid, new.grid, old.position_resize)
        if name == "patch.weight":
            return resize_kernel(tensor, new.patches)
    return tensor


def _sized(tensors: dict[str, Tensor], old: SuperViTConfig, new: SuperViTConfig) -> dict[str, Tensor]:
    """A SuperViT's tensors with positions and statistics for the new sizes, each taken from the nearest of the old."""
    nearest = [min(range(len(old.grids)), key=lambda i: abs(prod(old.grids[i]) - prod(grid))) for grid in new.grids]
    result = {name: tensor for name, tensor in tensors.items() if not name.startswith("positions.")}
    if new.positions == "per-size":
        pairs = [(old.grids[i], grid, tensors[f"positions.{i}"]) for i, grid in zip(nearest, new.grids, strict=True)]
    else:
        pairs = [(old.grid_of(old.size), new.grid_of(new.size), tensors["positions.0"])]
    for i, (before, after, table) in enumerate(pairs):
        result[f"positions.{i}"] = torch.cat([table[:1], resize_positions(table[1:], before, after, "bicubic")])
    if new.stem_statistics == "per-size":
        for name in result:
            if name.endswith((".mean", ".variance")):
                result[name] = result[name][nearest]
    return result
