"""ViT: the pre-training and fine-tuning of "Scaling Vision Transformers" (arXiv 2106.04560, appendices B to D), and a small one."""

from manyscale.config import Augment, Input, Optim, Run, Schedule, ViTConfig
from manyscale.presets import model_config

INCEPTION = Augment(scale=(0.05, 1.0))  # a crop of 5 to 100 % of the area, and flips: all the augmentation there is


def vit_giant_pretrain() -> Run:
    """g/14 from scratch on millions of pictures or more (`--data FOLDER`): the paper's configuration on JFT-3B.

    16.4 billion pictures; the sum of the rates is 146, so the decay takes weights to e^-4.4 of themselves, the head's to
    e^-438. Give `--branches 120k-steps 400k-steps ...` for runs of several lengths from one trunk.
    """
    return Run(
        recipe="vit_giant_pretrain",
        model=model_config("g/14", pool="map", head_bias=-10.0),
        input=Input(data="pictures", statistics="half", interpolation="bilinear"),
        augment=INCEPTION,
        optim=Optim(
            method="adafactor", momentum="bfloat16", lr=8e-4, warmup_lr=0.0, min_lr=0.0, weight_decay=0.03, head_decay=3.0, clip=1.0
        ),
        schedule=Schedule(length="1M-steps", warmup="10k-steps", curve="rsqrt", cooldown="50k-steps", evaluate_every="10k-steps"),
        loss="sigmoid",
        batch=16_384,
    )


def vit_finetune() -> Run:
    """From any ViT of this package to other labels: `--init RUN --data FOLDER`, 20,000 steps of SGD at 384 px, nothing decayed.

    The paper's rate is 0.03 or 0.01, chosen on held-out training pictures; its patch-14 models go to 518 px
    (`--patch 14 --image-size 518`), and G/14 has a constant rate and averaged weights (`--curve constant --ema 0.9999`).
    """
    return Run(
        recipe="vit_finetune",
        model=model_config("B/16", image_size=384),
        input=Input(data="imagenet", statistics="half", crop_ratio=0.0, interpolation="bilinear"),
        augment=INCEPTION,
        optim=Optim(method="sgd", momentum="bfloat16", lr=0.03, warmup_lr=0.0, min_lr=0.0, weight_decay=0.0, clip=1.0),
        schedule=Schedule(length="20k-steps", warmup="500-steps", evaluate_every="5%"),
        batch=512,
        init="runs/vit_pretrain/best",
    )


def vit_cifar10() -> Run:
    """A small ViT with MAP pooling on CIFAR-10: `manyscale train vit_cifar10 --time 25m`."""
    return Run(
        recipe="vit_cifar10",
        model=ViTConfig(image_size=32, patch=4, width=128, depth=6, heads=4, mlp_width=512, pool="map", drop_path=0.05),
        input=Input(data="cifar10", statistics="half", crop_ratio=1.0, cache=True, workers=0),
        augment=Augment(crop="pad", smoothing=0.1),
        optim=Optim(lr=1e-3, warmup_lr=0.0, min_lr=1e-5, weight_decay=0.1, clip=1.0),
        schedule=Schedule(epochs=30, warmup=1, evaluate_every=2),
        batch=64,
    )
