"""Batch-norm statistics for each image size of a trained net."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from manyscale.models.supervit import SizedBatchNorm, SuperViT
from manyscale.ops.images import resized


@torch.no_grad()
def recalibrated(model: SuperViT, batches: Iterable[Tensor]) -> SuperViT:
    """The same net with statistics of its conv stem for each size, measured on pictures (slimmable nets, arXiv 1903.05134, section 3.3).

    A stem that shares its statistics between sizes has those of none: of SuperViT's four passes two are at a smaller size, and come last.

    Args:
        batches: of training pictures, (B, 3, H, W) each, prepared as the net wants them; every batch counts as much.

    Raises:
        ValueError: a net without batch norms, or no batch.
    """
    config = model.config
    if getattr(model, "stem", None) is None:
        raise ValueError("there is nothing to recalibrate: this net has no conv stem, and its layer norms keep no statistics")
    new = SuperViT(replace(config, stem_statistics="per-size")).to(model.patch.weight)
    norms = list(new.sized_norms())
    state = model.state_dict()
    for name, tensor in new.state_dict().items():
        state[name] = state[name].expand_as(tensor)
    new.load_state_dict(state)
    new.stem.train()
    count = 0
    for count, images in enumerate(batches, 1):
        for norm in norms:
            norm.momentum = 1 / count  # the running statistics are then the plain mean over batches
        for i, size in enumerate(config.sizes):
            size = size if isinstance(size, tuple) else (size, size)
            new.stem(resized(images.to(new.patch.weight), size, config.resize), i)
    if not count:
        raise ValueError("no picture to recalibrate on")
    for norm in norms:
        norm.momentum = SizedBatchNorm.momentum
    new.train(model.training)
    new.preprocess, new.labels = model.preprocess, model.labels
    return new
