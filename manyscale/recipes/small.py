"""Small pictures on a small machine: minutes on two CPU cores."""

from manyscale.config import Augment, Input, Optim, Run, Schedule, SwinConfig


def digits() -> Run:
    """A micro Swin V2 on scikit-learn's embedded digits (8 x 8 pixels, shown at 32): about a minute."""
    return Run(
        recipe="digits",
        model=SwinConfig(image_size=32, patch=4, window=4, width=48, depths=(2, 2), heads=(3, 6), mlp_ratio=2.0, drop_path=0.05),
        input=Input(data="digits", statistics="half", crop_ratio=1.0, workers=0, cache=True),
        augment=Augment(crop="resized", scale=(0.5, 1.0), flip=0.0),
        optim=Optim(lr=2e-3, min_lr=1e-5, ema=0.98),
        schedule=Schedule(epochs=36, warmup=3, evaluate_every=6),
        batch=64,
        precision="float32",
    )


def cifar10() -> Run:
    """A small Swin V2 on CIFAR-10: `manyscale train cifar10 --time 25m`."""
    return Run(
        recipe="cifar10",
        model=SwinConfig(image_size=32, patch=4, window=4, width=96, depths=(2, 4), heads=(3, 6)),
        # Reading cached pictures is cheap: on two cores a worker costs more by its interruptions than it saves. With an
        # accelerator, give it some: --workers -1.
        input=Input(data="cifar10", crop_ratio=1.0, cache=True, workers=0),
        augment=Augment(crop="pad", smoothing=0.1),
        optim=Optim(lr=2e-3, min_lr=1e-5),
        schedule=Schedule(epochs=30, warmup=0.3, evaluate_every=2),
        batch=64,
    )
