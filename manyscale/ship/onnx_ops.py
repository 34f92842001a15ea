"""Operations of torch in ONNX's terms, where what torch makes of them is wrong or takes engines longer than it need."""

from collections.abc import Callable
from typing import Any

import torch


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For `torch.onnx.export(custom_translation_table=...)`."""
    from onnxscript import opset20 as op
    from onnxscript.function_libs.torch_lib.ops.core import aten_index, aten_layer_norm
    from onnxscript.function_libs.torch_lib.ops.nn import aten_scaled_dot_product_attention

    def sort(x: Any, *, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
        """TopK of all: of equals it puts the earlier first, which a stable sort does."""
        length = op.Shape(x, start=dim, end=None if dim == -1 else dim + 1)
        return op.TopK(x, length, axis=dim, largest=int(descending), sorted=1)

    def index(x: Any, indices: Any) -> Any:
        """A look-up along one axis as Gather, which engines do beforehand where all is known, as of position biases; not GatherND."""
        (axis, *others) = [axis for axis, places in enumerate(indices) if places is not None]
        if others or indices[axis].dtype.name != "INT64":
            return aten_index(x, indices)
        return op.Gather(x, indices[axis], axis=axis)

    def attention(q: Any, k: Any, v: Any, mask: Any = None, dropout: float = 0.0, is_causal: bool = False, **rest: Any) -> Any:
        """Keys transposed in one operation, which an engine does within the product; torch's has a reshaping on either side of it."""
        scale = rest.get("scale")
        if is_causal or rest.get("enable_gqa") or dropout or (mask is not None and mask.dtype.name == "BOOL"):
            return aten_scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, **rest)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        logits = op.MatMul(q if scale == 1 else op.Mul(q, op.CastLike(scale, q)), op.Transpose(k, perm=[0, 1, 3, 2]))
        return op.MatMul(op.Softmax(logits if mask is None else op.Add(logits, mask), axis=-1), v)

    def layer_norm(x: Any, normalized: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, cudnn: bool = True) -> Any:
        """Of tokens in a row: of a grid OpenVINO takes a norm apart into a mean, a difference and a norm."""
        grid = x.shape[1:]
        if len(grid) < 3 or len(normalized) > 1 or not all(isinstance(size, int) for size in grid):
            return aten_layer_norm(x, normalized, weight, bias, eps, cudnn)
        row = op.Reshape(x, op.Constant(value_ints=[0, -1, grid[-1]]))
        return op.Reshape(aten_layer_norm(row, normalized, weight, bias, eps, cudnn), op.Constant(value_ints=[0, *grid]))

    aten = torch.ops.aten
    return {
        aten.sort.stable: sort,
        aten.index.Tensor: index,
        aten.scaled_dot_product_attention.default: attention,
        aten.layer_norm.default: layer_norm,
    }
