"""The window attention kernels on a GPU: are they right, and how long do they take beside the other paths?

    python tools/gpu/kernel.py --device cuda --out docs/results/gpu
    TRITON_INTERPRET=1 python tools/gpu/kernel.py --device cpu --quick --out /tmp/kernel      # to try the script; nothing is timed

Fresh random inputs against float64 on the CPU; every case twice, which must be bit-equal; a batch whose offsets need 64 bits. Times are
of attention alone, from the projections q, k, v of the grid to what the last projection takes, in rounds of all paths one after another.
"""

import argparse
import platform
import statistics
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
from manyscale.ops import kernel
from manyscale.ops.windows import Layout, layout
from manyscale.storage import origin, write
from tests.ops.kernel_cases import Case, reference, run

LIMIT = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2.5e-3}
TIMED = [  # images, tokens a side, window, heads
    (256, 64, 8, 3),
    (64, 64, 16, 3),
    (16, 96, 24, 4),
]


def cases(quick: bool) -> list[Case]:
    """Few enough to be compiled in minutes: all cuts in one form, and two of them, a whole window and tiles, in all forms."""
    two = [((5, 6), (4, 4)), ((9, 10), (9, 9))] if quick else [((15, 21), (7, 7)), ((19, 36), (12, 12))]
    more = [((9, 12), (4, 4)), ((16, 24), (8, 8)), ((35, 48), (16, 16)), ((51, 72), (24, 24)), ((64, 64), (32, 32))]
    more += [((40, 80), (40, 40)), ((5, 9, 10), (2, 7, 7)), ((9, 16, 16), (8, 8, 8))]
    size = {"batch": 1, "heads": 1} if quick else {"batch": 2, "heads": 3}
    forms = product((True, False), (True, False), (torch.float32, torch.bfloat16, None))
    found = [Case(*cut, **size, width=32, dtype=dtype) for cut in two + more[: 1 if quick else None] for dtype in LIMIT]
    found += [
        Case(*cut, **size, width=32, shifted=shifted, cosine=cosine, bias=bias, dtype=torch.bfloat16)
        for (shifted, cosine, bias), cut in product(forms, two)
    ]
    found += [Case((2, 3), (1, 1), **size, cosine=False, bias=None, dtype=dtype) for dtype in LIMIT]  # no gradient but that of v
    found += [Case(*cut, **size, width=width, dtype=dtype) for cut, width, dtype in product(two, (16, 24, 64, 128), LIMIT)]
    return [case._replace(block=None) for case in dict.fromkeys(found)][:: 7 if quick else 1]


def correct(device: torch.device, quick: bool) -> tuple[list[str], bool]:
    """A line for each type, and one for each case beyond its limit."""
    torch.use_deterministic_algorithms(True)  # torch.empty is NaN now: what is not written shows
    worst, bad, count = dict.fromkeys(LIMIT, (0.0, "")), [], 0
    for case in cases(quick):
        errors, same = run(case, device, repeat=2)
        count += 1
        name, error = max(errors.items(), key=lambda item: item[1] if item[1] == item[1] else float("inf"))
        worst[case.dtype] = max(worst[case.dtype], (error, f"{name} of {case.name()}"))
        if not (error < LIMIT[case.dtype] and same):
            bad.append(f"- {'wrong' if same else 'two runs differ'}: {case.name()}: {errors}")
    torch.use_deterministic_algorithms(False)
    lines = [f"{count} cases, {len(bad)} beyond their limits. Worst relative errors, of results and gradients:", ""]
    return lines + [f"- {str(dtype)[6:]}: {error:.1e}, {where}" for dtype, (error, where) in worst.items()] + bad, bool(bad)


def far(device: torch.device) -> tuple[list[str], bool]:
    """The last image of a batch of more than 2^31 numbers, in the batch and alone."""
    lines = []
    for window in (8, 16):
        cut = layout((64, 64), (window, window), shifted=True, mask_padding=True, device=device)
        tables = kernel.tables(cut, mask_padding=True, device=device)
        bias, scale = torch.randn(3, window**2, window**2, device=device), torch.full((3,), 10.0, device=device)
        qkv = torch.randn(1900, 4096, 3, 3, 32, device=device, dtype=torch.bfloat16)
        found = []
        for x in (qkv, qkv[-1:].clone()):
            x.requires_grad_()
            out = kernel.windowed(x, tables, bias, scale)
            found.append((out.detach()[-1:].clone(), torch.autograd.grad(out, x, out.detach())[0][-1:].clone()))
        if not all(map(torch.equal, *found)):
            lines.append(f"- wrong: window {window}, the last of {len(qkv)} images ({qkv.numel():,} numbers) is not what it is alone")
    return lines or ["The last image of a batch of more than 2^31 numbers is, bit for bit, what it is alone."], bool(lines)


def contenders(cut: Layout, heads: int, device: torch.device, blocks: list[int]) -> dict[str, Callable[..., Tensor]]:
    tables = kernel.tables(cut, mask_padding=True, device=device)

    def other(path: str) -> Callable[..., Tensor]:
        return lambda qkv, bias, scale: reference(cut, qkv, bias, scale.view(heads, 1, 1), path)

    def own(block: int | None) -> Callable[..., Tensor]:
        return lambda qkv, bias, scale: kernel.windowed(qkv, tables, bias, scale, block=block)

    return {"kernel": own(None), **{f"kernel, block {n}": own(n) for n in blocks}, "reference": other("reference"), "fused": other("fused")}


def timed(device: torch.device, shapes: list[tuple[int, int, int, int]], rounds: int, blocks: list[int]) -> list[str]:
    """A table: milliseconds and peak MiB of each path, forward alone and with the backward pass."""
    lines = ["| images, tokens, window, heads | path | forward ms | with backward ms | peak MiB |", "|---|---|---|---|---|"]
    for batch, side, window, heads in shapes:
        cut = layout((side, side), (window, window), shifted=True, mask_padding=True, device=device)
        qkv = torch.randn(batch, side**2, 3, heads, 32, device=device, dtype=torch.bfloat16, requires_grad=True)
        bias = torch.randn(heads, window**2, window**2, device=device, requires_grad=True)
        scale = torch.full((heads,), 10.0, device=device, requires_grad=True)
        grad = torch.randn(batch, side**2, heads, 32, device=device, dtype=torch.bfloat16)

        def forward(call, inputs=(qkv, bias, scale)):
            with torch.no_grad():
                call(*inputs)

        def both(call, inputs=(qkv, bias, scale), grad=grad):
            torch.autograd.grad(call(*inputs), inputs, grad)

        calls = contenders(cut, heads, device, blocks)
        peaks = {name: _peak(lambda call=call: both(call), device) for name, call in calls.items()}
        calls = {name: call for name, call in calls.items() if peaks[name] is not None}
        spent = [
            _rounds({name: (lambda call=call, way=way: way(call)) for name, call in calls.items()}, device, rounds)
            for way in (forward, both)
        ]
        for name, peak in peaks.items():
            numbers = ["out of memory", "", ""] if peak is None else [f"{spent[0][name]:.3f}", f"{spent[1][name]:.3f}", f"{peak:.0f}"]
            lines.append(f"| {batch}, {side} x {side}, {window}, {heads} | {name} | {' | '.join(numbers)} |")
    return lines if device.type == "cuda" else [line.replace("0.000", "not timed") for line in lines]


def _peak(call: Callable[[], None], device: torch.device) -> float | None:
    """MiB that a call has at once beyond what was there before; None where they are not to be had."""
    if device.type != "cuda":
        call()
        return 0.0
    try:
        call()  # compiles
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None


def _rounds(calls: dict[str, Callable[[], None]], device: torch.device, rounds: int) -> dict[str, float]:
    """The median milliseconds of each."""
    if device.type != "cuda":
        return dict.fromkeys(calls, 0.0)
    events = {name: [] for name in calls}
    for number in range(3 + rounds):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            if number >= 3:
                events[name].append((start, end))
    torch.cuda.synchronize(device)
    return {name: statistics.median(start.elapsed_time(end) for start, end in pairs) for name, pairs in events.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", default="docs/results/gpu")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the script")
    parser.add_argument("--untested", action="store_true", help="only the times")
    parser.add_argument("--rounds", type=int, default=30, help="of timing; 0: none")
    parser.add_argument("--blocks", type=int, nargs="*", default=[], help="blocks to time besides the chosen one")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    lines, table, wrong = ["Not checked."], [], False
    if not arguments.untested:
        lines, wrong = correct(device, arguments.quick)
        if device.type == "cuda" and not arguments.quick:
            more, also = far(device)
            lines, wrong = [*lines, "", *more], wrong or also
    if arguments.rounds:
        table = timed(device, [(1, 8, 4, 1), (1, 9, 9, 1)] if arguments.quick else TIMED, arguments.rounds, arguments.blocks)
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    made = origin()
    head = [f"# Window attention kernels on {what}", ""]
    head += [f"{made['date']}, torch {torch.__version__}, manyscale {made['manyscale']}, `{made['command']}`", "", *lines, ""]
    head += [
        f"bfloat16, shifted windows, d 32, cosines, a learnt bias; medians of {arguments.rounds} rounds. Peak: with the backward pass.",
        "",
    ]
    write(Path(arguments.out) / f"{made['date']}-kernel.md", "\n".join([*head, *table]) + "\n")
    print("\n".join([*lines, "", *table]))
    sys.exit(wrong)


if __name__ == "__main__":
    main()
