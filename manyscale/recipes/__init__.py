"""Recipes: functions that return a `Run`. One file per story; `tiny` shrinks any of them to a CPU minute."""

from collections.abc import Callable
from functools import partial

from manyscale.config import Run
from manyscale.recipes import folder, imagenet, simmim, small, supervit, vit
from manyscale.recipes.tiny import tiny
from manyscale.recipes.vit_ladder import SIZES, rung

RECIPES: dict[str, Callable[[], Run]] = {
    "digits": small.digits,
    "cifar10": small.cifar10,
    "folder": folder.folder,
    "simmim_cifar10": simmim.simmim_cifar10,
    "simmim_folder": simmim.simmim_folder,
    "simmim_imagenet_swinv2_base": simmim.simmim_imagenet_swinv2_base,
    "simmim_swinv2_giant_70m": simmim.simmim_swinv2_giant_70m,
    "finetune": simmim.finetune,
    "vit_cifar10": vit.vit_cifar10,
    "vit_giant_pretrain": vit.vit_giant_pretrain,
    "vit_finetune": vit.vit_finetune,
    **{f"vit_ladder_{size}": partial(rung, size) for size in SIZES},
    "supervit_cifar10": supervit.supervit_cifar10,
    "supervit_folder": supervit.supervit_folder,
    "supervit_imagenet_deit_small": supervit.supervit_imagenet_deit_small,
    "supervit_imagenet_lvvit_small": supervit.supervit_imagenet_lvvit_small,
    **imagenet.RECIPES,
}

__all__ = ["RECIPES", "tiny"]
