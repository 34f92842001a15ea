"""Window attention as GPU kernels (Triton): each window fetches its own tokens, and nothing of N x N is kept.

Tables say which tokens a window has, so there is no roll, no padded copy and no partition of the grid, in 2-D and 3-D alike.
The forward pass keeps one number a row, the logarithm of its softmax's denominator; the backward pass computes the weights
anew (FlashAttention, Dao et al., arXiv 2205.14135; the split into a pass by rows and one by columns: 2307.08691). Of small windows a
program has many whole ones, of one head, with the bias in its registers; of larger ones a tile. Gradients that sum over windows
(bias, scale) are summed within a program, then over programs: no atomics, so two runs are bit-equal.

Letters: B batch, T tokens of the grid, W windows, H heads, N tokens of a window, d channels of a head.
"""

from functools import cache
from math import prod
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from manyscale.ops.windows import Layout, enter, regions, split

PROGRAMS = 1024  # that share the windows of a batch: a few for each place on a large GPU; at 64 x 64 they write 16 MiB of partial sums
KINDS = (torch.float32, torch.bfloat16, torch.float16)


class Tables(NamedTuple):
    """Which tokens each window has, and which of them attend each other."""

    places: Tensor  # (W, N) int32: where in the row-major grid the token is; -1: padding
    labels: Tensor | None  # (W, N) int32: tokens attend each other where labels agree, padding has -1; None: all of a window do
    tokens: int  # T, of the grid


def tables(layout: Layout, *, mask_padding: bool, device: torch.device | None = None) -> Tables:
    """The tables of a layout, whose mask is not read.

    Raises:
        ValueError: padding that is attended; the kernels know only tokens of the grid.
    """
    grid, padded, window, shift = layout[:4]
    if padded != grid and not mask_padding:
        raise ValueError(
            f"field `attention`: kernel never attends padding, and {_by(grid)} tokens in windows of {_by(window)} have some; "
            "give padding=mask, or attention=reference"
        )
    number = torch.arange(1, prod(grid) + 1, dtype=torch.int32, device=device).view(1, *grid, 1)
    places = enter(number, layout)[0, :, :, 0] - 1  # (W, N): zeros come in as padding
    labels = None
    if any(shift) or padded != grid:
        labels = split(regions(grid, padded, shift, mask_padding=True, device=device)[None, ..., None], window)[0, :, :, 0].int()
    return Tables(places.contiguous(), labels if labels is None else labels.contiguous(), prod(grid))


def available(device: torch.device) -> bool:
    """Whether the kernels run on tensors of this device: CUDA, or any where Triton interprets them (TRITON_INTERPRET=1)."""
    programs = _triton()
    return programs is not None and (device.type == "cuda" or programs.INTERPRETED.value)


@cache
def _triton() -> ModuleType | None:
    """The programs, read when they are first needed: Triton takes half a second, and torch brings it along on Linux only."""
    try:
        from manyscale.ops import kernel_triton
    except ImportError:
        return None
    return kernel_triton


def _programs(device: torch.device) -> ModuleType:
    if not available(device):
        missing = "Triton is not installed" if _triton() is None else f"these tokens are on {device.type}"
        raise ValueError(f"field `attention`: kernel needs Triton and a CUDA device, and {missing}; give auto, fused or reference")
    return _triton()


def windowed(qkv: Tensor, tables: Tables, bias: Tensor | None = None, scale: Tensor | None = None, *, block: int | None = None) -> Tensor:
    """softmax(similarity + bias) v in every window, from tokens of the grid to tokens of the grid.

    Args:
        qkv: (B, T, 3, H, d) in float32, bfloat16 or float16, d up to 128: projections of the tokens, neither padded nor shifted.
        tables: of the grid's layout.
        bias: (H, N, N), added to the logits.
        scale: (H,) or (H, 1, 1) float32: logits are scale cos(q, k), a q or k that is too short counting as zero (`ops.unit`). None:
            q k / sqrt(d).
        block: the largest window that a program holds whole, and the side of the tiles of a larger one: a power of two from 16. None:
            as `block_of`.

    Returns:
        (B, T, H, d)

    Raises:
        ValueError: without Triton and a CUDA device; another type; a wider head.
    """
    _, tokens, _, heads, width = qkv.shape
    if qkv.dtype not in KINDS or width > 128:
        raise ValueError(
            f"field `attention`: kernel takes float32, bfloat16 and float16, and heads of up to 128 channels, not {qkv.dtype} and {width}; "
            "give auto, fused or reference"
        )
    windows, count = tables.places.shape
    assert tables.labels is not None or windows * count == tokens, "padding needs labels"
    assert tokens == tables.tokens, f"{tokens} tokens, tables for {tables.tokens}"
    assert bias is None or bias.shape == (heads, count, count), bias.shape
    assert scale is None or (scale.numel() == heads and scale.dtype == torch.float32), scale
    bias, scale = bias if bias is None else bias.contiguous(), scale if scale is None else scale.flatten()
    with torch.autocast(qkv.device.type, enabled=False):  # types are chosen here
        return _forward(qkv.contiguous(), tables.places, tables.labels, bias, scale, block or block_of(qkv))[0]


def block_of(qkv: Tensor) -> int:
    """The largest block whose tensors stay in registers, or nearly: in what ptxas says of the kernels compiled for an H100."""
    return 64 if qkv.dtype != torch.float32 and qkv.shape[-1] <= 64 else 32


def _by(sizes: tuple[int, ...]) -> str:
    return " x ".join(map(str, sizes))


# --- Two nodes of a graph ------------------------------------------------------------------------------------------------------


@torch.library.custom_op("manyscale::window_attention", mutates_args=())
def _forward(
    qkv: Tensor, places: Tensor, labels: Tensor | None, bias: Tensor | None, scale: Tensor | None, block: int
) -> tuple[Tensor, Tensor]:
    """The result (B, T, H, d), and the logarithm of every row's denominator (B, W, H, N) in base 2."""
    # every token is in one window, so that each place of `out` is written, once; padded rows write nothing, here and in the backward pass
    programs = _programs(qkv.device)
    out, sums = _fake_forward(qkv, places)
    plan = _Plan.of(qkv, places, labels, block)
    kernel = programs.whole_forward if plan.whole else programs.tile_forward
    with torch.cuda.device_of(qkv):
        kernel[plan.grid](qkv, places, labels, bias, scale, out, sums, *plan.sizes, **plan.constants)
    return out, sums


@torch.library.custom_op("manyscale::window_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    out: Tensor,
    sums: Tensor,
    qkv: Tensor,
    places: Tensor,
    labels: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    block: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of qkv, and of bias and scale (empty without one)."""
    programs = _programs(qkv.device)
    grad, grad_qkv = grad.contiguous(), torch.empty_like(qkv)
    plan = _Plan.of(qkv, places, labels, block)
    bias_parts = sums.new_empty(0) if bias is None else sums.new_empty(plan.loops, *bias.shape)
    scale_parts = sums.new_empty(0) if scale is None else sums.new_empty(plan.grid[0] // plan.heads, plan.heads)
    inputs = (qkv, places, labels, bias, scale, grad)
    with torch.cuda.device_of(qkv):
        if plan.whole:
            programs.whole_backward[plan.grid](*inputs, sums, grad_qkv, bias_parts, scale_parts, *plan.sizes, **plan.constants)
        else:
            inner = torch.empty_like(sums)
            programs.tile_backward_rows[plan.grid](*inputs, out, sums, inner, grad_qkv, scale_parts, *plan.sizes, **plan.constants)
            programs.tile_backward_columns[plan.grid](*inputs, sums, inner, grad_qkv, *plan.sizes, **plan.constants)
            if bias is not None:
                grid = (plan.loops * plan.tiles**2 * plan.heads,)
                programs.tile_backward_bias[grid](*inputs, sums, inner, bias_parts, *plan.sizes, **plan.constants)
    grad_bias = bias_parts if bias is None else bias_parts.sum(dim=0).to(bias.dtype)
    return grad_qkv, grad_bias, scale_parts if scale is None else scale_parts.sum(dim=0)


class _Plan(NamedTuple):
    """What the kernels of a call are launched with."""

    whole: bool  # a program has whole windows
    tiles: int  # of a window, along one side
    loops: int  # programs of one head (and tile of the bias) that share the windows of the batch
    heads: int
    grid: tuple[int]  # programs of a launch
    sizes: tuple[int, int, int, int]  # T, W, B W, H
    constants: dict[str, int | bool]

    @classmethod
    def of(cls, qkv: Tensor, places: Tensor, labels: Tensor | None, block: int) -> "_Plan":
        assert qkv.is_contiguous() and places.is_contiguous(), "the kernels take plain strides"
        batch, tokens, _, heads, width = qkv.shape
        windows, count = places.shape
        block = min(block, max(16, _power_of_two(count)))
        tiles, total = -(-count // block), batch * windows
        whole = tiles == 1
        loops = min(total, max(1, PROGRAMS // (heads * tiles**2)))
        constants = {
            "N": count,
            "D": width,
            "WIDTH": max(16, _power_of_two(width)),
            "BLOCK": block,
            "MASKED": labels is not None or count % block != 0,
            # a product of tensor cores takes four warps from 64 rows on; plain ones, of float32, spread the same over smaller blocks
            "num_warps": 4 if block >= 64 or (block == 32 and (qkv.dtype == torch.float32 or width > 64)) else 2,
            "num_stages": 2,
            "enable_fp_fusion": True,  # Triton is about to change its default
        }
        grid = (heads * (loops if whole else tiles * total),)
        return cls(whole, tiles, loops, heads, grid, (tokens, windows, total, heads), constants)


def _power_of_two(x: int) -> int:
    return 1 << (x - 1).bit_length()


@_forward.register_fake
def _fake_forward(qkv: Tensor, places: Tensor, *_) -> tuple[Tensor, Tensor]:
    batch, tokens, _, heads, width = qkv.shape
    windows, count = places.shape
    return qkv.new_empty(batch, tokens, heads, width), qkv.new_empty(batch, windows, heads, count, dtype=torch.float32)


@_backward.register_fake
def _(grad, out, sums, qkv, places, labels, bias, scale, block) -> tuple[Tensor, Tensor, Tensor]:
    bias, scale = (sums.new_empty(0) if t is None else torch.empty_like(t) for t in (bias, scale))
    return torch.empty_like(qkv), bias, scale


def _keep(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.block = inputs
    ctx.save_for_backward(*output, *tensors)


def _gradients(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    out, sums, qkv, places, labels, bias, scale = ctx.saved_tensors
    grad_qkv, grad_bias, grad_scale = _backward(grad, out, sums, qkv, places, labels, bias, scale, ctx.block)
    return grad_qkv, None, None, None if bias is None else grad_bias, None if scale is None else grad_scale, None


_forward.register_autograd(_gradients, setup_context=_keep)
