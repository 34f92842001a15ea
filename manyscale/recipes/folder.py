"""Your own pictures: a folder with one sub-folder per class."""

from manyscale.config import Augment, Input, Optim, Run, Schedule, SwinConfig


def folder() -> Run:
    """A small Swin V2 from scratch on photos of any size: `manyscale train folder --data FOLDER --time 10m`.

    With weights to start from, `--init FOLDER` fine-tunes them instead; give the learning rate of a fine-tune too.
    """
    return Run(
        recipe="folder",
        model=SwinConfig(image_size=96, patch=4, window=6, width=48, depths=(2, 2, 2), heads=(3, 6, 12), mlp_ratio=3.0, drop_path=0.05),
        input=Input(data="folder", crop_ratio=0.875),
        augment=Augment(crop="resized", scale=(0.35, 1.0), color_jitter=0.3, smoothing=0.1),
        optim=Optim(lr=1e-3, min_lr=1e-5),
        schedule=Schedule(epochs=60, warmup=3, evaluate_every=2),
        batch=64,
    )
