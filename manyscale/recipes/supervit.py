"""SuperViT: one weight set at many sizes and numbers of tokens (arXiv 2205.11397; numbers of the official runs on 4 x 256 images)."""

from dataclasses import replace

from manyscale.config import Augment, Input, Optim, Run, Schedule, Supernet, SuperViTConfig
from manyscale.presets import model_config
from manyscale.recipes.folder import folder

STRONG = Augment(color_jitter=0.4, randaugment=2, erase=0.25, smoothing=0.1)


def supervit_imagenet_deit_small() -> Run:
    """DeiT-S on ImageNet-1k: 80.6 % at 224 px with all tokens, 79.95 % at half the cost (224 / 0.5), 73.75 % at a sixth (128 / 0.5).

    The positions are not decayed; the official code decays them by mistake (`--decay-rules "positions\\..*" 0.05` does too).
    """
    return Run(
        recipe="supervit_imagenet_deit_small",
        task="supernet",
        model=model_config("supervit_deit_small"),
        input=Input(data="imagenet", crop_ratio=0.875),
        augment=replace(STRONG, mixup=0.8, cutmix=1.0, repeats=3),
        optim=Optim(lr=5e-4, min_lr=5e-6, warmup_lr=5e-7, lr_batch=512, weight_decay=0.05, clip=0.0),
        schedule=Schedule(epochs=300, warmup=5, evaluate_every=5),
        batch=1024,
    )


def supervit_imagenet_lvvit_small() -> Run:
    """LV-ViT-S on ImageNet-1k: 83.5 % at 224 px with all tokens, 83.15 % at 224 / 0.7.

    The official run learns token labels that a larger net gave beforehand; `--token-labels teacher --teacher-run RUN` asks a net of
    this package while training instead, and by default every patch learns its picture's label. Its last ten epochs, at the lowest
    rate, and its randomly changing interpolation are left out.
    """
    return Run(
        recipe="supervit_imagenet_lvvit_small",
        task="supernet",
        model=model_config("supervit_lvvit_small"),
        input=Input(data="imagenet", crop_ratio=0.9),
        augment=STRONG,
        optim=Optim(lr=1.6e-3, min_lr=1e-5, warmup_lr=1e-6, weight_decay=0.05, clip=0.0, ema=0.99992),
        schedule=Schedule(epochs=300, warmup=5, evaluate_every=5),
        supernet=Supernet(mix_token=1.0),
        batch=1024,
    )


def supervit_cifar10() -> Run:
    """Three sizes and four keep rates on CIFAR-10: `manyscale train supervit_cifar10 --time 60m`."""
    return Run(
        recipe="supervit_cifar10",
        task="supernet",
        model=SuperViTConfig(
            sizes=(16, 24, 32), keeps=(0.3, 0.5, 0.7, 1.0), patch=4, width=96, depth=8, heads=3, mlp_width=384, drop_blocks=(2, 4, 6)
        ),
        input=Input(data="cifar10", statistics="half", crop_ratio=1.0, cache=True, workers=0),
        augment=Augment(crop="pad", smoothing=0.1),
        optim=Optim(lr=1e-3, warmup_lr=0.0, min_lr=1e-5, weight_decay=0.1, clip=1.0),
        schedule=Schedule(epochs=20, warmup=1, evaluate_every=4),
        batch=64,
    )


def supervit_folder() -> Run:
    """A small net on your own photos at 64, 96 and 128 px: `manyscale train supervit_folder --data FOLDER --time 30m`.

    With a ViT of this package to start from, `--init FOLDER` takes its weights: give the net its shape by --width, --depth, ...
    """
    run = folder()
    return replace(
        run,
        recipe="supervit_folder",
        task="supernet",
        model=SuperViTConfig(
            sizes=(64, 96, 128), patch=16, width=192, depth=8, heads=3, mlp_width=768, drop_blocks=(2, 4, 6), drop_path=0.05
        ),
        schedule=replace(run.schedule, evaluate_every=4),
    )
