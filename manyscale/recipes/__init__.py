"""Recipes: functions that return a `Run`. One file per story; `tiny` shrinks any of them to a CPU minute."""

from collections.abc import Callable

from manyscale.config import Run
from manyscale.recipes import folder, imagenet, small
from manyscale.recipes.tiny import tiny

RECIPES: dict[str, Callable[[], Run]] = {
    "digits": small.digits,
    "cifar10": small.cifar10,
    "folder": folder.folder,
    **imagenet.RECIPES,
}

__all__ = ["RECIPES", "tiny"]
