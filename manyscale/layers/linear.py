"""Linear layers, which in evaluation on a CPU know a faster way. They stay torch's own, so that who swaps or wraps these finds them."""

from torch import Tensor, nn

from manyscale.ops.linear import Gelu, is_quick, linear


def watched(*modules: nn.Module) -> bool:
    """Whether hooks see, or change, what goes through modules."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def project(layer: nn.Linear, x: Tensor) -> Tensor:
    """layer(x): (..., C) -> (..., D), by the quicker way where there is one."""
    return linear(x, layer.weight, layer.bias) if _plain(layer) and is_quick(x, layer.weight) else layer(x)


def project_with(layer: nn.Linear, x: Tensor, bias: Tensor) -> Tensor:
    """A layer without a bias of its own, and this one: (..., C) -> (..., D)"""
    return linear(x, layer.weight, bias) if _plain(layer) else layer(x) + bias


def with_gelu(layer: nn.Linear, act: nn.GELU, x: Tensor) -> Tensor:
    """act(layer(x)), in one pass where that is quick."""
    if not _plain(layer) or type(act) is not nn.GELU or watched(act) or not is_quick(x, layer.weight):
        return act(layer(x))
    kind: Gelu = "exact" if act.approximate == "none" else "tanh"
    return linear(x, layer.weight, layer.bias, kind)


def _plain(layer: nn.Module) -> bool:
    """Whether nothing has taken a layer's place, and nothing watches it."""
    return type(layer) is nn.Linear and not watched(layer)
