"""One static graph for each setting of a net."""

from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import register_constant

from manyscale.config import Setting

register_constant(Setting)  # so that torch.export takes one as an argument


def compile_settings(model: nn.Module, settings: Iterable[Setting], **options: Any) -> dict[Setting, Callable[..., Any]]:
    """`model(images, setting)` compiled for each setting on its own, with the weights shared.

    torch.compile counts what it makes of one piece of code against a limit of 8 (`torch._dynamo.config.recompile_limit`) and
    goes on uncompiled past it; the paper's grid has 12 settings. So every setting is given code of its own. Compiling happens at
    the first call, and again for another batch size.

    Args:
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
        return torch.compile(own, **{"dynamic": False, **options})

    return {setting: made(setting) for setting in settings}
