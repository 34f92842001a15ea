"""A linear layer that knows a faster way in evaluation on a CPU."""

from torch import Tensor, nn

from manyscale.ops.linear import Gelu, is_quick, linear


class Linear(nn.Linear):
    """nn.Linear, its arithmetic by `ops.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., D)"""
        return linear(x, self.weight, self.bias)


def watched(*modules: nn.Module) -> bool:
    """Whether hooks see, or change, what goes through modules."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def with_gelu(layer: nn.Linear, act: nn.GELU, x: Tensor) -> Tensor:
    """act(layer(x)), in one pass where that is quick and nothing has taken the layers' place or watches them."""
    plain = type(layer) is Linear and type(act) is nn.GELU and is_quick(x, layer.weight)
    if not plain or watched(layer, act):
        return act(layer(x))
    kind: Gelu = "exact" if act.approximate == "none" else "tanh"
    return linear(x, layer.weight, layer.bias, kind)
