"""A linear layer, with the GELU behind it if there is one."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

Gelu = Literal["exact", "tanh"]

# What torch.compile's CPU graphs call: oneDNN's product, with bias and GELU in the same pass; weights as they lie. F.linear first copies
# the bias to every row, and its GELU reads and writes all again.
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: Gelu | None = None) -> Tensor:
    """x weight^T + bias, then GELU or its tanh approximation: (..., C) -> (..., D). Through oneDNN where `is_quick`."""
    if is_quick(x, weight):
        return _ONEDNN(x, weight, bias, "none" if gelu is None else "gelu", [], {"exact": "none", "tanh": "tanh", None: ""}[gelu])
    x = F.linear(x, weight, bias)
    return x if gelu is None else F.gelu(x, approximate="none" if gelu == "exact" else "tanh")


def is_quick(*tensors: Tensor) -> bool:
    """Whether plain tensors are computed now, in evaluation on a CPU, in a type that oneDNN has: no graph, no autocast, no torch.func."""
    return (
        _ONEDNN is not None
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
        and all(tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.bfloat16) for tensor in tensors)
        and not any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in tensors)
    )


if _ONEDNN is not None:

    @register_flop_formula(_ONEDNN)
    def _(x: torch.Size, weight: torch.Size, *_, out_shape: torch.Size | None = None, **__) -> int:
        return 2 * x.numel() * weight[0]
