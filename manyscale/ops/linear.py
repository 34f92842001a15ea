"""A linear layer, with the GELU behind it if there is one."""

import os
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils.flop_counter import register_flop_formula

Gelu = Literal["exact", "tanh"]
PLAIN = (Tensor, Parameter)  # not their subclasses: one may be cut over ranks, quantised, or fake

# What torch.compile's CPU graphs call: oneDNN's product, with bias and GELU in the same pass; weights as they lie. F.linear first copies
# the bias to every row, and its GELU reads and writes all again.
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
# F.linear in float32 is MKL's, which is at home there.
_INTEL = os.path.exists("/proc/cpuinfo") and "GenuineIntel" in Path("/proc/cpuinfo").read_text()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: Gelu | None = None) -> Tensor:
    """x weight^T + bias, then GELU or its tanh approximation: (..., C) -> (..., D). Through oneDNN where `is_quick` and it pays."""
    quick = is_quick(x, weight, *(() if bias is None else (bias,)))
    if quick and _fits(x, weight, bias) and _pays(x, weight, gelu):
        return _ONEDNN(x, weight, bias, "none" if gelu is None else "gelu", [], {"exact": "none", "tanh": "tanh", None: ""}[gelu])
    x = F.linear(x, weight, bias)
    if gelu is None:
        return x
    act = torch.ops.aten.gelu_ if quick else F.gelu  # in place it takes no fresh pages of memory, which cost as much as the GELU
    return act(x, approximate="none" if gelu == "exact" else "tanh")


def is_quick(*tensors: Tensor) -> bool:
    """Whether tensors are computed as in `evaluated`, in a type that oneDNN has, and not under autocast."""
    return (
        _ONEDNN is not None
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
        and evaluated(*tensors)
        and all(tensor.dtype in (torch.float32, torch.bfloat16) for tensor in tensors)
    )


def evaluated(*tensors: Tensor) -> bool:
    """Whether plain tensors are computed now, in evaluation on a CPU: no gradient or tangent, no graph being made, no torch.func."""
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0  # no tangents: no_grad leaves these on
        and all(type(tensor) in PLAIN and tensor.is_cpu for tensor in tensors)
    )


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN does what F.linear does: that takes one type alone, and says which shapes do not fit."""
    return (
        weight.dim() == 2
        and weight.numel() > 0
        and x.shape[-1:] == weight.shape[1:]
        and x.dtype == weight.dtype
        and (bias is None or (bias.shape == weight.shape[:1] and bias.dtype == weight.dtype))
    )


def _pays(x: Tensor, weight: Tensor, gelu: Gelu | None) -> bool:
    """Whether oneDNN is quicker than F.linear: where MKL is at home, only where memory takes the time and not arithmetic."""
    home = _INTEL and x.dtype == torch.float32
    return not home or weight.shape[1] <= 192 or (gelu is not None and x.numel() >= 2048 * x.shape[-1])  # both measured


if _ONEDNN is not None:

    @register_flop_formula(_ONEDNN)
    def _(x: torch.Size, weight: torch.Size, *_, out_shape: torch.Size | None = None, **__) -> int:
        return 2 * x.numel() * weight[0]
