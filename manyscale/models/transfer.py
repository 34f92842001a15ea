"""The same function at another resolution and window, nothing retrained (Swin V2 section 3.3)."""

from dataclasses import replace
from typing import Literal

import torch

from manyscale.config import Size, Windows
from manyscale.models.build import build
from manyscale.models.swin import Swin
from manyscale.ops.positions import resize_table


@torch.no_grad()
def transfer(
    model: Swin,
    image_size: Size,
    window: Windows | None = None,
    *,
    classes: int | None = None,
    drop_path: float | None = None,
    mask_token: bool | None = None,
    table: Literal["bicubic", "geometric"] = "bicubic",
) -> Swin:
    """A new model with the weights of `model`, laid out for `image_size` and `window`. `model` is left as it is.

    A continuous bias keeps the coordinates it learnt (`pretrained_window` stays at the window of its training, however
    often it is transferred), so a round trip gives the same model to the last bit. A table is resized, and its round trip
    is an approximation: going to a smaller window forgets the far offsets.

    Args:
        image_size: pixels; one number or one per axis.
        window: as in the configuration; None keeps it.
        classes: a new, freshly initialised head for so many classes; None keeps the head.
        drop_path: for training on; None keeps it.
        mask_token: with one (fresh, where the model has none) or without; None keeps it.
        table: how a bias table is resized; geometric is what SimMIM fine-tuning uses.

    Raises:
        ValueError: a size or window that the configuration refuses.
    """
    config = replace(
        model.config,
        image_size=tuple(image_size) if isinstance(image_size, (tuple, list)) else image_size,
        window=model.config.window if window is None else window,
        pretrained_window=model.config.pretrained_windows,
        classes=model.config.classes if classes is None else classes,
        drop_path=model.config.drop_path if drop_path is None else drop_path,
        mask_token=model.config.mask_token if mask_token is None else mask_token,
    )
    new = build(config).to(next(model.parameters()))
    tensors = model.state_dict()
    if classes is not None:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}
    if not config.mask_token:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("mask_token.")}
    for name in tensors:
        if name.endswith("bias.table"):
            stage = int(name.split(".")[1])
            tensors[name] = resize_table(tensors[name], model.config.windows[stage], config.windows[stage], table)
    new.load_state_dict({**new.state_dict(), **tensors})
    new.train(model.training)
    new.labels = model.labels if classes is None else ()
    if model.preprocess and config.axes == 2:
        new.preprocess = replace(model.preprocess, image_size=config.size)
    return new
