"""Weights of other packages' Swin V1 and V2, ViT and SuperViT, in and out: one file per layout, each a table read in both directions."""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial, reduce
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from manyscale.config import NetConfig, SuperViTConfig, SwinConfig, ViTConfig, nearest
from manyscale.heads.pixels import MaskedImages
from manyscale.models import Net, SuperViT, Swin, ViT, build
from manyscale.models.files import check_finite
from manyscale.models.kin import to_vit
from manyscale.presets import SUPERVIT, SWIN, VIT, model_config
from manyscale.ship.convert import big_vision, mmpretrain, official, simmim, supervit, timm, torchvision, transformers, vit
from manyscale.ship.convert.files import AVERAGED, RAW, choose, read
from manyscale.ship.convert.layout import Layout, Row, State, buffers, expand, learnt_windows, to_ours, to_theirs, version

Shapes = dict[str, tuple[int, ...]]


def convert(
    weights: Mapping[str, Any] | str | os.PathLike[str],
    source: str,
    name: str,
    *,
    ema: bool | None = None,
    allow_nonfinite: bool = False,
    **fields: Any,
) -> Net | MaskedImages:
    """A model of this package from weights of another: `convert("swinv2.pth", source="official", name="swinv2_tiny", window=16)`.

    Tensors are copied bit for bit and keep their dtype. Where a grid does not fill its windows, other packages attend
    the padding: pass `padding="attend"` for their logits there.

    Args:
        weights: a state dict, or a .safetensors, .pth, .pt, .bin, .ckpt or .npz file of one, or of a training's checkpoint,
            with "model" or "state_dict" in it. Pickles are read as plain data only.
        source: of a Swin official, timm, transformers, torchvision or mmpretrain; of a SimMIM file, official reads the
            encoder, and simmim all of it: then the result is a `heads.pixels.MaskedImages`. Of a ViT timm, transformers
            (ViT and SigLIP), big_vision or vision_transformer (the same: any file of either). Of a SuperViT supervit, its own
            checkpoints; or any of a ViT's, whose positions are then resized to every one of `sizes` (`models.kin.to_supervit`).
        name: a preset; its window, patch, sizes and depths must be the file's.
        ema: True: the moving average of the weights that training kept (model_ema, state_dict_ema), False: the raw weights,
            None: the raw ones, but of a SuperViT's file with state_dict_ema that average, as their authors score them.
        allow_nonfinite: whether weights may be NaN or infinite.
        fields: of the configuration. `classes` follows from the file (0 where it has no head); 0 leaves its head out. So
            do a ViT's pooling, pre-logits and positions (a flax file without a table of them means sincos2d); its GELU, epsilon and
            way to resize positions are the source's.
            Where a ViT becomes a SuperViT also `image_size`, the one of the file, if it is not the largest of `sizes`.

    Returns:
        The model, in evaluation mode, on the device of the weights. Not loaded: buffers that follow from the
        configuration (`layout.BUFFERS`), and, by source official, the decoder and mask token of SimMIM files
        (`official.SIMMIM_DROPPED`).

    Raises:
        ValueError: a file that cannot be read, holds code or not the weights that `ema` asks for; an unknown source, name or
            field; weights that are NaN or infinite; and, all in one message, every tensor that is missing, unknown or of another
            shape, by its name in the file.
    """
    state = read(weights) if isinstance(weights, (str, os.PathLike)) else weights
    where = str(weights) if isinstance(weights, (str, os.PathLike)) else "the state dict"
    if not isinstance(state, Mapping):
        raise ValueError(f"convert takes a state dict or a file, not a {type(weights).__name__}; of a module, pass .state_dict()")
    state = choose(state, ema, supervit.USUAL if source == "supervit" else (*RAW, *AVERAGED), where)
    if source == "simmim":
        encoder = convert(state, "official", name, allow_nonfinite=allow_nonfinite, **{**fields, "classes": 0})
        return simmim.put_together(encoder, state, where)
    config, layout, wanted = _read_as(source, name, fields, state, where)
    model, rows, expected = _plan(layout, config)
    problems = _problems(wanted, expected)
    if problems:
        hints = _hints(state, expected, config, source, name, fields)
        raise ValueError("\n  ".join([f"{where} does not hold {name} in the layout of {source}:", *problems, *hints]))
    if not allow_nonfinite:
        check_finite(wanted, where)
    for stage, learnt in (learnt_windows(layout, config, state) if isinstance(config, SwinConfig) else {}).items():
        if learnt != config.pretrained_windows[stage]:
            raise ValueError(
                f"{where}: the bias network of stage {stage + 1} learnt at windows of {learnt}, this model would read it as learnt at "
                f"{config.pretrained_windows[stage]}; pass the file's `window`, or `pretrained_window` with one number per stage"
            )
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in wanted.values()))
    tensors = {key: tensor.to(dtype) for key, tensor in to_ours(rows, wanted).items()}
    model.load_state_dict(tensors, assign=True)
    return (supervit.from_vit(model, name, fields) if name in SUPERVIT and isinstance(model, ViT) else model).eval()


def export_weights(model: Net | MaskedImages, target: str) -> dict[str, Tensor]:
    """The inverse of `convert`: the model's weights as `target` names and keeps them, copies on the same device.

    Target supervit writes a SuperViT; the targets of a ViT write the ViT that it is at its largest size with every token.
    A mask token is written by target simmim alone, which takes a `MaskedImages`; the others take nets without a use for one.

    timm, transformers and torchvision load the result strictly (torchvision with the buffers its files hold); the
    official code and mmpretrain load it as their own loaders do, without the buffers that they rebuild. What big_vision and
    vision_transformer read is a .npz: `numpy.savez(file, **{name: tensor.numpy() for name, tensor in weights.items()})`.

    A ViT's GELU and epsilon stand in no file: who loads it must set them where they are not the target's own (big_vision: tanh
    and 1e-6; timm: exact and 1e-6; transformers: `hidden_act` and `layer_norm_eps`).

    Raises:
        ValueError: an unknown target, or a model that it cannot hold: a mixture of V1 and V2, a video model, further
            norms; for torchvision also a window that does not fit every stage; a SuperViT on LV-ViT as a ViT.
    """
    if target == "simmim":
        if not isinstance(model, MaskedImages):
            raise ValueError("target simmim takes encoder and decoder: a MaskedImages, as `heads.pixels.load_masked` reads it from a run")
        return {**_export(model.encoder, official.layout(model.config, ("encoder.",))), **simmim.take_apart(model)}
    if isinstance(model, SuperViT) and target in VIT_SOURCES:
        model = to_vit(model)
    return _export(model, _layout(target, model.config, ()))


def _export(model: Net, layout: Layout) -> dict[str, Tensor]:
    state = {key: tensor.detach() for key, tensor in model.state_dict().items() if not key.startswith("mask_token.")}
    extra = buffers(layout, model.config) if layout.writes_buffers and isinstance(model, Swin) else {}
    return {**layout.leave(to_theirs(expand(layout, model.config, state), state)), **extra}


def _layout(source: str, config: NetConfig, file: Any) -> Layout:
    family, sources = FAMILIES[type(config)]
    if source not in sources:
        more = {"Swin": ("simmim",), "ViT": (), "SuperViT": tuple(VIT_SOURCES)}[family]
        raise ValueError(f"unknown source `{source}` of a {family}; {nearest(source, (*sources, *more))}")
    if isinstance(config, SwinConfig):
        version(config)
    return sources[source](config if isinstance(config, SuperViTConfig) else replace(config, mask_token=False), file)


def _read_as(source: str, name: str, fields: dict[str, Any], state: Mapping[str, Any], where: str) -> tuple[NetConfig, Layout, State]:
    """What a file is taken for: the net, its layout, and the tensors to load, as the rows expect them.

    The net is what name, fields and file say. Of a SuperViT's name and a ViT's layout, it is the ViT that the SuperViT begins as.
    """
    given = {"classes": 0, **fields}
    begins = name in SUPERVIT and source in VIT_SOURCES
    config = supervit.begins_as(name, given) if begins else model_config(name, **given)
    layout = _layout(source, config, state)
    try:
        state = layout.enter(dict(state))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if layout.says:
        config = replace(config, **{field: value for field, value in layout.says(state).items() if field not in given})
        layout = _layout(source, config, state)
    classifier = state.get(layout.leaf(layout.heads[0], "weight"))
    if "classes" not in fields and isinstance(classifier, Tensor):
        config = replace(config, classes=len(classifier))
    dropped = layout.dropped if config.classes else (*layout.dropped, *(f"{head}[./]*" for head in layout.heads))
    return config, layout, {key: tensor for key, tensor in state.items() if not any(fnmatchcase(key, pattern) for pattern in dropped)}


def _plan(layout: Layout, config: NetConfig) -> tuple[Net, list[Row], Shapes]:
    """The model without memory, its rows, and the shapes it expects by foreign name."""
    with torch.device("meta"):
        model = build(config)
    rows = expand(layout, config, model.state_dict())
    return model, rows, {key: tuple(tensor.shape) for key, tensor in to_theirs(rows, model.state_dict()).items()}


def _problems(state: Mapping[str, Any], expected: Shapes) -> list[str]:
    """A line for each tensor that does not fit."""
    lines = [f"missing: {key} {shape}" for key, shape in expected.items() if key not in state]
    for key, tensor in state.items():
        found = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        if key not in expected:
            lines.append(f"unknown: {key} {found}")
        elif found != expected[key]:
            lines.append(f"shape: {key} is {found}, the model's is {expected[key]}")
        elif not tensor.is_floating_point():
            lines.append(f"dtype: {key} is {tensor.dtype}, not floating point")
    return lines


def _hints(state: Mapping[str, Any], expected: Shapes, config: NetConfig, source: str, name: str, fields: dict[str, Any]) -> list[str]:
    """What the names and shapes say the file is."""
    if any(key.endswith(("dist_token", "distillation_token")) for key in state):
        return ["It is a DeiT with a second class token and head for distillation: take one without, such as deit_small_patch16_224."]
    presets = SWIN if name in SWIN else SUPERVIT if name in SUPERVIT else {**VIT, **SUPERVIT}
    sources = SOURCES if name in SWIN else {**VIT_SOURCES, **SUPERVIT_SOURCES}
    for preset in presets:
        for other in sources:
            if (other, preset) != (source, name):
                try:
                    net, layout, found = _read_as(other, preset, fields, state, "")
                    fits = not _problems(found, _plan(layout, net)[2])
                except ValueError:  # fields or a layout that this preset refuses, or norms without a name there
                    continue
                if fits:
                    return [f'It fits source="{other}", name="{preset}".']
    if isinstance(config, SuperViTConfig):
        return supervit.sizes_hint(state, config)
    if isinstance(config, ViTConfig):
        return vit.size_hint(state, config)
    for key, shape in expected.items():
        found = state.get(key)
        if key.endswith("relative_position_bias_table") and isinstance(found, Tensor) and tuple(found.shape) != shape:
            side = isqrt(len(found))
            if side * side == len(found) and side % 2:
                return [f"Its bias tables are for windows of {side // 2 + 1}: pass window={side // 2 + 1} and the file's image_size."]
    return []


def _flax(config: ViTConfig, names: Any, *, old: bool) -> Layout:
    return big_vision.layout(config, old=old and not names)


VIT_SOURCES: dict[str, Callable[..., Layout]] = {
    "timm": timm.vit_layout,
    "transformers": transformers.vit_layout,
    "big_vision": partial(_flax, old=False),
    "vision_transformer": partial(_flax, old=True),
}
SUPERVIT_SOURCES: dict[str, Callable[..., Layout]] = {"supervit": supervit.layout}
SOURCES: dict[str, Callable[..., Layout]] = {
    "official": official.layout,
    "timm": timm.layout,
    "transformers": transformers.layout,
    "torchvision": torchvision.layout,
    "mmpretrain": mmpretrain.layout,
}
FAMILIES = {SwinConfig: ("Swin", SOURCES), ViTConfig: ("ViT", VIT_SOURCES), SuperViTConfig: ("SuperViT", SUPERVIT_SOURCES)}
