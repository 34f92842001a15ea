"""Is the arithmetic right on this device? Every attention path and whole nets against float64 on the CPU.

    python tools/gpu/correct.py --device cuda --out docs/results/gpu

Fresh random inputs, every parameter random (norms too), shifted and not, with padding, windows 7 to 32, head widths 32 and
64, float32, bfloat16 and float16. Prints ||out - ref|| / ||ref|| of outputs and gradients and writes them as Markdown.
"""

import argparse
import copy
import platform
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import manyscale as ms
from manyscale.ops.attention import attend
from manyscale.ops.windows import layout
from manyscale.storage import origin, write
from tests.conftest import loud

LIMIT = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
Row = tuple[str, str, str, float, float]


def error(found: torch.Tensor, reference: torch.Tensor) -> float:
    return ((found.detach().double().cpu() - reference).norm() / reference.norm()).item()


def attention_rows(device: torch.device, windows: tuple[int, ...]) -> list[Row]:
    rows = []
    for window in windows:
        for width in (32, 64):
            for shifted in (False, True):
                cut = layout((2 * window + 3, 3 * window), (window, window), shifted=shifted, mask_padding=True)
                shape = (1, cut.padded[0] * cut.padded[1] // window**2, 2, window**2, width)
                q, k, v = (torch.randn(shape, dtype=torch.float64) / width**0.25 for _ in range(3))
                bias = torch.randn(2, window**2, window**2, dtype=torch.float64)
                reference, gradients = backward(q, k, v, bias, cut.mask, "reference")
                for path in ("reference", "fused"):
                    for dtype in LIMIT:
                        mask = None if cut.mask is None else cut.mask.to(device)
                        cast = [t.to(device, dtype) for t in (q, k, v, bias)]
                        out, found = backward(*cast, mask, path)
                        worst = max(error(a, b) for a, b in zip(found, gradients, strict=True))
                        name = f"attention {path}, window {window}, head width {width}{', shifted' * shifted}"
                        rows.append((name, str(dtype), "", error(out, reference), worst))
    return rows


def backward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, mask: torch.Tensor | None, path: str) -> tuple:
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v, bias)]
    out = attend(*leaves, mask, path=path)
    out.double().square().sum().backward()
    return out.detach().cpu().double(), [leaf.grad.cpu().double() for leaf in leaves]


def net_rows(device: torch.device, sizes: tuple[int, ...]) -> list[Row]:
    rows = []
    for name in ("swin_tiny", "swinv2_tiny"):
        exact = loud(ms.create_model(name, depths=(1, 2, 2, 1), classes=50)).double().eval()
        for size in sizes:
            x = torch.randn(2, 3, size, size + 30, dtype=torch.float64)
            reference = exact(x).detach()
            for dtype in LIMIT:
                net = copy.deepcopy(exact).to(device, dtype)
                rows.append(
                    (f"{name}, {size} x {size + 30} px", str(dtype), "pure", error(net(x.to(device, dtype)), reference), float("nan"))
                )
                if dtype != torch.float32:
                    net = copy.deepcopy(exact).float().to(device)
                    with torch.autocast(device.type, dtype):
                        out = net(x.float().to(device))
                    rows.append((f"{name}, {size} x {size + 30} px", str(dtype), "autocast", error(out, reference), float("nan")))
    return rows


def supervit_rows(device: torch.device, settings: tuple[str, ...]) -> list[Row]:
    """Logits at settings. In half precision near ties fall otherwise: the name has the share of the last kept patches that is the same."""
    rows = []
    exact = loud(ms.create_model("supervit_deit_tiny", depth=6, drop_blocks=(1, 2, 4), classes=50)).double().eval()
    x = torch.randn(4, 3, 224, 224, dtype=torch.float64)
    for setting in map(ms.Setting.read, settings):
        reference, places = exact(x, setting).detach(), exact.tokens(x, setting).places
        for dtype in LIMIT:
            net, images = copy.deepcopy(exact).to(device, dtype), x.to(device, dtype)
            here = net.tokens(images, setting).places.cpu()
            same = torch.stack([torch.isin(a, b).double().mean() for a, b in zip(here, places, strict=True)]).mean().item()
            unit = "px" if dtype == torch.float32 else f"pixels, {same:.0%} of the patches the same"
            rows.append((f"SuperViT, {setting} {unit}", str(dtype), "pure", error(net(images, setting), reference), float("nan")))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", default="docs/results/gpu")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the script")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    rows = attention_rows(device, (4, 7) if arguments.quick else (7, 8, 12, 16, 24, 32))
    rows += net_rows(device, (64,) if arguments.quick else (64, 225, 256))
    rows += supervit_rows(device, ("128/0.5",) if arguments.quick else ("224/1", "224/0.7", "160/0.5", "128/0.5"))
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    made = origin()
    lines = [f"# Correctness on {what}", ""]
    lines += [f"{made['date']}, torch {torch.__version__}, manyscale {made['manyscale']}, `{made['command']}`", ""]
    lines += ["Relative error against float64 on the CPU.", "", "| what | dtype | how | output | worst gradient |", "|---|---|---|---|---|"]
    lines += [f"| {n} | {d.removeprefix('torch.')} | {h} | {o:.1e} | {'' if g != g else f'{g:.1e}'} |" for n, d, h, o, g in rows]
    limits = {str(dtype): limit for dtype, limit in LIMIT.items()}
    bad = [row for row in rows if "attention" in row[0] and not max(row[3], row[4]) < 3 * limits[row[1]]]
    bad += [row for row in rows if "px" in row[0] and not row[3] < 30 * limits[row[1]]]
    lines += ["", f"{len(rows)} rows, {len(bad)} beyond their limits."]
    write(Path(arguments.out) / f"{made['date']}-correct.md", "\n".join(lines) + "\n")
    print("\n".join(lines[-12:]))
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
