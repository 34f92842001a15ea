"""The Swin V2 paper's image classification, number by number (arXiv 2111.09883 appendix A1; the official configurations).

The learning rates of the official files are per 512 images and scale with the batch, which `lr_batch` says. RandAugment is
torchvision's at the papers' strength, "rand-m9-mstd0.5-inc1"; see `data.transforms` for how the two differ.
"""

from collections.abc import Callable
from functools import partial

from manyscale.config import Augment, Input, Optim, Run, Schedule
from manyscale.presets import model_config

STRONG = Augment(color_jitter=0.4, randaugment=2, erase=0.25, mixup=0.8, cutmix=1.0, smoothing=0.1)


def imagenet(size: str, window: int) -> Run:
    """From scratch on ImageNet-1k at 256 px: V2-T 81.8 % (window 8), 82.8 % (16); S 83.7, 84.1; B 84.2, 84.6 in the paper."""
    drop_path = {"tiny": 0.2, "small": 0.3, "base": 0.5}[size]
    return Run(
        recipe=f"imagenet_swinv2_{size}_window{window}",
        model=model_config(f"swinv2_{size}", image_size=256, window=window, drop_path=drop_path),
        input=Input(data="imagenet", crop_ratio=0.875),
        augment=STRONG,
        optim=Optim(lr=5e-4, min_lr=5e-6, warmup_lr=5e-7, lr_batch=512, weight_decay=0.05, clip=5.0),
        schedule=Schedule(epochs=300, warmup=20),
        batch=1024,
    )


def imagenet22k(size: str) -> Run:
    """Supervised on ImageNet-22k at 192 px, window 12: 14 million pictures in 21,841 classes."""
    return Run(
        recipe=f"imagenet22k_swinv2_{size}_window12",
        model=model_config(f"swinv2_{size}", image_size=192, window=12, drop_path=0.2, classes=21841),
        input=Input(data="imagenet22k", crop_ratio=0.875),
        augment=STRONG,
        optim=Optim(lr=1.25e-4, min_lr=1.25e-6, warmup_lr=1.25e-7, lr_batch=512, weight_decay=0.1, clip=5.0),
        schedule=Schedule(epochs=90, warmup=5),
        batch=4096,
    )


def from_22k(size: str, image_size: int, window: int) -> Run:
    """ImageNet-1k from the 22k weights at a larger window: B 86.2 % (256, 16), 87.1 % (384, 24); L 86.9, 87.6 in the paper.

    The bias network keeps the coordinates it learnt at window 12 (6 in the last stage). The head starts fresh: the official
    runs start it from the 1,000 rows of the 22k head that name the same classes.
    """
    model = model_config(f"swinv2_{size}", image_size=image_size, window=window, pretrained_window=(12, 12, 12, 6), drop_path=0.2)
    return Run(
        recipe=f"imagenet_swinv2_{size}_window{window}_from22k",
        model=model,
        # at 384 px the official evaluation squashes the whole picture
        input=Input(data="imagenet", crop_ratio=0.875 if image_size == 256 else 0.0),
        augment=STRONG,
        optim=Optim(lr=2e-5, min_lr=2e-7, warmup_lr=2e-8, lr_batch=512, weight_decay=1e-8, clip=5.0),
        schedule=Schedule(epochs=30, warmup=5),
        batch=1024,
        init=f"runs/imagenet22k_swinv2_{size}_window12/best",
    )


_SCRATCH = [partial(imagenet, size, window) for size in ("tiny", "small", "base") for window in (8, 16)]
_PRETRAIN = [partial(imagenet22k, size) for size in ("base", "large")]
_FINETUNE = [partial(from_22k, size, *at) for size in ("base", "large") for at in ((256, 16), (384, 24))]
RECIPES: dict[str, Callable[[], Run]] = {make().recipe: make for make in (*_SCRATCH, *_PRETRAIN, *_FINETUNE)}
