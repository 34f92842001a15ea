"""A ladder of ViTs for scaling laws: sizes x data x durations, the durations as cooldowns from one trunk each.

Nets grow in width and depth together ("Scaling Vision Transformers", section 3.6), see every picture at 32 px as 16 or 64
patches, and have a common peak rate that falls with the width.
"""

from manyscale.config import Augment, Input, Optim, Probe, Run, Schedule, ViTConfig

SIZES = {"w32": (32, 2, 1), "w64": (64, 3, 2), "w128": (128, 4, 4), "w192": (192, 6, 6), "w384": (384, 12, 6)}  # width, depth, heads


def rung(
    size: str,
    *,
    data: str = "tiny-imagenet",
    probe: str = "cifar10",
    share: float = 1.0,
    branches: tuple[str, ...] = ("20k-images", "60k-images", "200k-images", "600k-images"),
    patch: int = 8,
    seed: int = 0,
) -> Run:
    """One size on one share of the data, its rate brought down at each of `branches`.

    Args:
        size: a key of `SIZES`.
        data: labelled pictures to learn from.
        probe: a set of other classes, for few-shot evaluation at the end of each branch.
        share: of the training pictures.
        branches: durations, of which the last 40 % are cooldown.
    """
    width, depth, heads = SIZES[size]
    return Run(
        recipe=f"vit_ladder_{size}",
        model=ViTConfig(image_size=32, patch=patch, width=width, depth=depth, heads=heads, mlp_width=4 * width, pool="map"),
        input=Input(data=data, statistics="half", crop_ratio=1.0, share=share, cache=True, resident=True, workers=0),
        augment=Augment(scale=(0.25, 1.0)),
        optim=Optim(lr=3e-3 * (64 / width) ** 0.5, warmup_lr=0.0, weight_decay=0.1, clip=1.0),
        schedule=Schedule(
            warmup="2k-images", timescale="20k-images", curve="rsqrt", cooldown="40%", branches=branches, evaluate_every="600k-images"
        ),
        fewshot=Probe(probe=(probe,) if probe else (), l2=64.0),
        batch=64,
        precision="float32",
        seed=seed,
        log_every=50,
    )
