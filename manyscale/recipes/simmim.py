"""Pre-training without labels, and the fine-tuning that follows (SimMIM, arXiv 2111.09886; Swin V2, 2111.09883 section 4.1).

Light augmentation throughout: a crop of at least two thirds, and flips.
"""

from dataclasses import replace

from manyscale.config import Augment, Input, Optim, Run, Schedule, SimMIM
from manyscale.presets import model_config
from manyscale.recipes.folder import folder
from manyscale.recipes.imagenet import STRONG
from manyscale.recipes.small import cifar10

LIGHT = Augment(scale=(0.67, 1.0))


def simmim_cifar10() -> Run:
    """The net of the `cifar10` recipe learns CIFAR-10's pictures without their labels."""
    run = cifar10()
    return replace(
        run,
        recipe="simmim_cifar10",
        task="simmim",
        augment=LIGHT,
        optim=Optim(lr=2e-3, min_lr=1e-5),
        simmim=SimMIM(
            mask_unit=8, target_window=15
        ),  # a quarter of the picture, where 192 px have a sixth: fewer blocks than 16 say little
    )


def simmim_folder() -> Run:
    """The net of the `folder` recipe learns from pictures without labels, in any sub-folders: `--data FOLDER`."""
    run = folder()
    return replace(
        run,
        recipe="simmim_folder",
        task="simmim",
        augment=LIGHT,
        optim=Optim(lr=1e-3, min_lr=1e-5),
        simmim=SimMIM(mask_unit=16, target_window=23),
    )


def simmim_imagenet_swinv2_base() -> Run:
    """V2-B on ImageNet-1k at 192 px, window 12, 800 epochs; `finetune` holds what follows."""
    return Run(
        recipe="simmim_imagenet_swinv2_base",
        task="simmim",
        model=model_config("swinv2_base", image_size=192, window=12, drop_path=0.1),
        input=Input(data="imagenet"),
        augment=LIGHT,
        optim=Optim(lr=1e-4, min_lr=0.0, warmup_lr=5e-7, lr_batch=512, weight_decay=0.05, clip=5.0),
        schedule=Schedule(epochs=800, warmup=10, milestones=(700,)),
        batch=2048,
    )


def simmim_swinv2_giant_70m() -> Run:
    """V2-G, 3.0 billion parameters, on 70 million pictures at 192 px (`--data FOLDER`): 20 epochs of batch 9,216.

    The paper says neither where its cosine ends nor the drop path: both are 0 here.
    """
    return Run(
        recipe="simmim_swinv2_giant_70m",
        task="simmim",
        model=model_config("swinv2_giant", image_size=192, window=12, drop_path=0.0),
        input=Input(data="pictures"),
        augment=LIGHT,
        optim=Optim(lr=1.4e-3, min_lr=0.0, weight_decay=0.1, clip=100.0),
        schedule=Schedule(epochs=20, warmup="30k-steps"),
        batch=9216,
    )


def finetune() -> Run:
    """From any SimMIM run to labels: `--init RUN --data FOLDER`, at a larger window, rates falling towards the pixels.

    The numbers are those of V2-B after 800 epochs (224 px, window 14, after 192 and 12); the net is that of `init`.
    """
    return Run(
        recipe="finetune",
        model=model_config("swinv2_base", image_size=224, window=14, pretrained_window=(12, 12, 12, 6), drop_path=0.1),
        input=Input(data="imagenet"),
        augment=STRONG,
        optim=Optim(lr=1.25e-3, min_lr=2.5e-7, warmup_lr=2.5e-7, lr_batch=512, weight_decay=0.05, clip=5.0, layer_decay=0.75),
        schedule=Schedule(epochs=100, warmup=20),
        batch=2048,
        init="runs/simmim_imagenet_swinv2_base/best",
    )
