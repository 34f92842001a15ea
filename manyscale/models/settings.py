"""A net at one of its settings, and a static graph for each."""

from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor, nn
from torch.utils._pytree import register_constant

from manyscale.config import Setting
from manyscale.models.vit import ViT
from manyscale.ops.images import resized

register_constant(Setting)  # so that torch.export takes one as an argument


def run_at(model: nn.Module, images: Tensor, setting: Setting | None) -> Tensor:
    """`model(images, setting=setting)` for a net of any kind: (B, 3, H, W) -> (B, classes). None: the images as they come.

    Raises:
        ValueError: a setting that the net cannot be run at.
    """
    if setting is None:
        return model(images)
    if not isinstance(model, ViT):
        return model(images, setting=setting)
    if setting.window is not None or not setting.is_full:
        raise ValueError(f"setting {setting}: a ViT keeps every token and has no windows; give a size alone")
    size = setting.size or tuple(images.shape[2:])
    return model(resized(images, size if isinstance(size, tuple) else (size, size)))


class AtSetting(nn.Module):
    """A net at one setting, for whoever calls a net with images alone."""

    def __init__(self, model: nn.Module, setting: Setting | None) -> None:
        super().__init__()
        self.model, self.setting = model, setting

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, classes)"""
        return run_at(self.model, images, self.setting)


def frozen(run: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled function whose graphs keep the weights in the form that a CPU's products read them.

    Each graph has its own copy, as large as the weights, and does not see when they change. For calls without gradients.
    """

    def call(*args: Any, **rest: Any) -> Any:
        with torch._inductor.config.patch(freezing=True):
            return run(*args, **rest)

    return call


def compile_settings(
    model: nn.Module, settings: Iterable[Setting], *, freeze: bool = False, **options: Any
) -> dict[Setting, Callable[..., Any]]:
    """`model(images, setting)` compiled for each setting on its own, with the weights shared.

    torch.compile counts what it makes of one piece of code against a limit of 8 (`torch._dynamo.config.recompile_limit`) and
    goes on uncompiled past it; the paper's grid has 12 settings. So every setting is given code of its own. Compiling happens at
    the first call, and again for another batch size.

    Args:
        freeze: for serving on a CPU; see `frozen`.
        options: of torch.compile; by default `dynamic=False`.

    Returns:
        For each setting a function of the images, (B, 3, H, W), that takes the other arguments of `model` too.
    """

    def made(setting: Setting) -> Callable[..., Any]:
        def run(images: Tensor, **rest: Any) -> Any:
            return model(images, setting=setting, **rest)

        name = f"run {setting}"
        own = FunctionType(run.__code__.replace(co_name=name), run.__globals__, name, run.__defaults__, run.__closure__)
        own.__kwdefaults__ = run.__kwdefaults__
        compiled = torch.compile(own, **{"dynamic": False, **options})
        return frozen(compiled) if freeze else compiled

    return {setting: made(setting) for setting in settings}
