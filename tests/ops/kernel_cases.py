"""What the window attention kernels are checked on, in a process of its own: Triton decides on import whether it interprets kernels.

    TRITON_INTERPRET=1 python tests/ops/kernel_cases.py interpret
    python tests/ops/kernel_cases.py compile

The first prints errors against float64, a line of JSON a case, and puts the two nodes through torch's own checks. The second compiles
every kernel to machine code of a GPU that need not be there.
"""

import json
import os
import sys
import tempfile
import warnings
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
from manyscale.models import create_model, set_attention
from manyscale.ops import kernel
from manyscale.ops.attention import attend
from manyscale.ops.windows import Layout, enter, layout, leave


class Case(NamedTuple):
    """One call; `block` as of `windowed`, `programs` as `kernel.PROGRAMS`: few, so that each has several windows."""

    grid: tuple[int, ...]
    window: tuple[int, ...]
    shifted: bool = True
    batch: int = 1
    heads: int = 1
    width: int = 16
    cosine: bool = True
    bias: torch.dtype | None = torch.float32
    dtype: torch.dtype = torch.float32
    block: int | None = 64
    programs: int = 1024

    def name(self) -> str:
        shown = [f"{key} {value}" for key, value in self._asdict().items() if value != self._field_defaults.get(key, ...)]
        return ", ".join(shown).replace("torch.", "")


HALF = (torch.bfloat16, torch.float16)
CASES = [
    # a program has whole windows
    Case((1, 3), (1, 1), batch=2, heads=3, cosine=False, bias=None, programs=6),
    Case((9, 8), (7, 7), width=32),
    Case((8, 16), (8, 8), shifted=False, batch=2, cosine=False, programs=3),
    Case((8, 16), (8, 8), width=24, bias=None),
    Case((5, 4), (4, 4), shifted=False, batch=2, heads=3, width=24, cosine=False, programs=6),
    Case((3, 4, 3), (2, 2, 3), width=32, programs=3),
    *(Case((5, 4), (4, 4), heads=3, width=32, dtype=dtype, programs=3) for dtype in HALF),
    *(Case((7, 14), (7, 7), shifted=False, cosine=False, bias=dtype, dtype=dtype) for dtype in HALF),
    # a program has a tile
    Case((12, 12), (12, 12), width=24),
    Case((9, 7), (7, 7), width=32, block=32, programs=4),
    Case((7, 6), (7, 7), heads=3, cosine=False, block=32),
    Case((2, 7, 5), (2, 6, 5), heads=2, cosine=False, bias=None, block=None),
    *(Case((12, 12), (12, 12), width=32, block=None, dtype=dtype) for dtype in HALF),
    *(Case((4, 5), (5, 5), cosine=False, bias=dtype, dtype=dtype, block=16) for dtype in HALF),
]


def inputs(case: Case) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """qkv, bias, scale, and a gradient of the result. Some q and k are zero, or count as zero."""
    cut = layout(case.grid, case.window, shifted=case.shifted, mask_padding=True)
    tokens, count = torch.Size(cut.grid).numel(), torch.Size(cut.window).numel()
    qkv = torch.randn(case.batch, tokens, 3, case.heads, case.width)
    qkv[:, :2, 0], qkv[:, 1:3, 1], qkv[:, 3:4, 0] = 0, 0, 1e-8
    bias = None if case.bias is None else torch.randn(case.heads, count, count).to(case.bias)
    scale = 5 + 10 * torch.rand(case.heads) if case.cosine else None
    return qkv.to(case.dtype), bias, scale, torch.randn(case.batch, tokens, case.heads, case.width).to(case.dtype)


def reference(cut: Layout, qkv: Tensor, bias: Tensor | None, scale: Tensor | None, path: str = "reference") -> Tensor:
    """The result by `ops.windows` and another path; `scale` as of `attend`, or a number a row, (B, W, H, N, 1)."""
    batch, tokens, _, heads, width = qkv.shape
    inside = enter(qkv.reshape(batch, *cut.grid, -1), cut).unflatten(-1, (3, heads, width))  # (B, W, N, 3, H, d)
    out = attend(*inside.permute(3, 0, 1, 4, 2, 5), bias, cut.mask, scale=scale, path=path)  # (B, W, H, N, d)
    return leave(out.transpose(2, 3).flatten(-2), cut).reshape(batch, tokens, heads, width)


def run(case: Case, device: torch.device | None = None, repeat: int = 1) -> tuple[dict[str, float], bool]:
    """Errors ||found - exact|| / ||exact|| of the result and of each gradient, and whether all repeats were bit-equal.

    A scale's gradient is a sum over rows whose terms cancel: its error is measured by the norm of the terms, not of what is left.
    """
    tensors = inputs(case)
    names = ["out", "qkv", *["bias"] * (case.bias is not None), *["scale"] * case.cosine]
    cut = layout(case.grid, case.window, shifted=case.shifted, mask_padding=True)
    qkv, bias, scale, grad = (t if t is None else t.double() for t in tensors)
    windows, count = kernel.tables(cut, mask_padding=True).places.shape
    rows = None if scale is None else scale.view(-1, 1, 1).expand(case.batch, windows, case.heads, count, 1).clone()
    leaves = [t.requires_grad_() for t in (qkv, bias, rows) if t is not None]
    out = reference(cut, qkv, bias, rows)
    exact = (out.detach(), *torch.autograd.grad(out, leaves, grad))

    qkv, bias, scale, grad = (t if t is None else t.to(device) for t in tensors)
    tables = kernel.tables(cut, mask_padding=True, device=device)
    leaves = [t.requires_grad_() for t in (qkv, bias, scale) if t is not None]
    found = []
    for _ in range(repeat):
        out = kernel.windowed(qkv, tables, bias, scale, block=case.block)
        found.append((out.detach(), *torch.autograd.grad(out, leaves, grad)))
    assert [t.dtype for t in found[0]] == [case.dtype, *(leaf.dtype for leaf in leaves)]
    same = all(torch.equal(a, b) for other in found for a, b in zip(found[0], other, strict=True))
    return {name: _error(name, a, b) for name, a, b in zip(names, found[0], exact, strict=True)}, same


def _error(name: str, found: Tensor, exact: Tensor) -> float:
    size = exact.norm()
    if name == "scale":
        exact = exact.sum(dim=(0, 1, 3, 4))
    return ((found.double().cpu() - exact).norm() / size).item()


def interpret() -> None:
    torch.use_deterministic_algorithms(True)  # torch.empty is NaN now: what is not written shows
    for number, case in enumerate(CASES):
        torch.manual_seed(number)
        kernel.PROGRAMS = case.programs
        errors, same = run(case, repeat=2 if number in (1, 11) else 1)
        print(json.dumps({"case": case.name(), "dtype": str(case.dtype)[6:], "errors": errors, "same": same}), flush=True)


def graph() -> None:
    """The nodes under torch's own checks, compiled, exported and under autocast; what is saved for the backward pass."""
    torch.manual_seed(0)
    case = Case((2, 3), (2, 2))
    tables = kernel.tables(layout(case.grid, case.window, shifted=True, mask_padding=True), mask_padding=True)
    qkv, bias, scale, grad = (t.requires_grad_() for t in inputs(case))
    nodes = torch.ops.manyscale
    torch.library.opcheck(nodes.window_attention.default, (qkv, *tables[:2], bias, scale, 64))
    with torch.no_grad():
        out, sums = nodes.window_attention(qkv, *tables[:2], bias, scale, 64)
        for some in ((bias, scale), (None, None)):
            arguments = (grad, out, sums, qkv, *tables[:2], *some, 64)
            torch.library.opcheck(nodes.window_attention_backward.default, arguments, test_utils=("test_schema", "test_faketensor"))

    class Net(torch.nn.Module):
        def forward(self, qkv: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
            return kernel.windowed(qkv, tables, bias.mT, scale)

    def gradients(net) -> tuple[Tensor, ...]:
        return torch.autograd.grad(net(qkv, bias, scale).square().sum(), (qkv, bias, scale))

    plain, compiled = Net(), torch.compile(Net(), fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(plain), gradients(compiled), strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        expected = plain(qkv, bias, scale)
        assert torch.equal(torch.export.export(plain, (qkv, bias, scale)).module()(qkv, bias, scale), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(plain(qkv, bias, scale), expected)

    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        kernel.windowed(qkv, tables, bias, scale)
    assert sorted(saved) == sorted(t.numel() for t in (qkv, out, sums, *tables[:2], bias, scale)), "and nothing of N x N but the bias"


def nets() -> None:
    """Whole nets, a line of JSON each: errors of logits and gradients against the reference path, relative to their norms."""
    for fields in (
        {"image_size": (20, 36)},
        {"image_size": 32, "similarity": "dot", "norm": "pre", "bias": "table", "merge_norm": "before"},
        {"image_size": (4, 20, 36), "patch": (2, 4, 4), "window": (2, 4, 4)},
    ):
        torch.manual_seed(0)
        small = {"width": 16, "depths": (2, 2), "heads": (1, 2), "window": 4, "classes": 10, "drop_path": 0.0, "zero_init": False}
        net = create_model("swinv2_tiny", **{**small, **fields})
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        size = net.config.image_size if isinstance(net.config.image_size, tuple) else (net.config.image_size,) * 2
        x, found = torch.randn(2, 3, *size), {}
        for path in ("reference", "kernel"):
            logits = set_attention(net.train(), path)(x)
            found[path] = (logits, *torch.autograd.grad(logits.square().sum(), tuple(net.parameters())))
        errors = [((a - b).norm() / b.norm()).item() for a, b in zip(found["kernel"], found["reference"], strict=True)]
        with torch.no_grad():
            net.eval()
            again = ((net(x) - set_attention(net, "reference")(x)).norm() / logits.norm()).item()
        print(json.dumps({"net": str(fields), "error": max(errors), "evaluated": again}), flush=True)


# --- Compiled without a GPU ----------------------------------------------------------------------------------------------------

COMPILED = {
    "compile": [Case((side, 16), (side, side), heads=3, width=32, dtype=torch.bfloat16, block=None) for side in (8, 12)],
    "compile-all": [
        Case((side, 2 * side + odd), (side, side), shifted, 2, 3, width, cosine, bias, dtype, None)
        for (side, odd), (dtype, width), (shifted, cosine, bias) in product(
            [(7, 1), (12, 1)],
            [(torch.float32, 32), (torch.float16, 24), (torch.bfloat16, 32), (torch.bfloat16, 128)],
            [(True, True, torch.float32), (False, False, None), (False, False, torch.bfloat16)],
        )
    ],
}


def compile_only(part: str, capability: int) -> None:
    """Every launch of a call, with its own arguments, up to where the GPU comes in; a line of JSON a case: sizes in bytes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Absent:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    made = {}

    def build(self, *arguments, grid: tuple[int], warmup: bool, **constants) -> None:
        made[self.__name__] = launch(self, *arguments, grid=grid, warmup=True, **constants)

    kernel.available = lambda device: True  # on the CPU, nothing of it is run
    driver.set_active(Absent())
    launch, triton.JITFunction.run = triton.JITFunction.run, build
    for case in COMPILED[part]:
        made.clear()
        qkv, bias, scale, grad = inputs(case)
        tables = kernel.tables(layout(case.grid, case.window, shifted=case.shifted, mask_padding=True), mask_padding=True)
        out, sums = kernel._forward._init_fn(qkv, *tables[:2], bias, scale, kernel.block_of(qkv))
        kernel._backward._init_fn(grad, out, sums, qkv, *tables[:2], bias, scale, kernel.block_of(qkv))
        sizes = {name: {"code": len(built.asm["cubin"]), "shared": built.metadata.shared} for name, built in made.items()}
        print(json.dumps({"case": case.name(), "kernels": sizes}), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    part, *capability = sys.argv[1:]
    if part == "interpret":
        interpret()
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")  # torch's check looks there itself
        graph()
        nets()
        print(json.dumps("two nodes of a graph"))
    else:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["TRITON_CACHE_DIR"] = folder
            compile_only(part, int(*capability or [90]))
