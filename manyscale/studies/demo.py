"""`manyscale demo`: a micro Swin V2 learns real images, moves to a window it never saw, and explains itself in a report.

The claim shown is that of Swin V2's Table 1: without retraining, a log-spaced continuous position bias loses less at a
larger window than a resized table does.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from manyscale.config import Run
from manyscale.data.images import BadImage
from manyscale.data.loader import eval_batches
from manyscale.data.sources import open_splits
from manyscale.data.transforms import eval_transform
from manyscale.models import Swin, load, save, transfer
from manyscale.recipes import RECIPES
from manyscale.storage import read_json, write_json
from manyscale.studies import report
from manyscale.tasks.classify import score
from manyscale.train.loop import train

NETS = {"log-cpb": "log-spaced continuous bias (Swin V2)", "table": "table bias (Swin V1), resized bicubically"}
SIZES = ((32, 4), (48, 6), (64, 8))  # image size and window; the first is trained, the last is twice that


def demo(out: Path, recipe: Run | None = None) -> dict[str, Any]:
    """Train both nets, transfer both, write `report.html`, `report.json` and `best/` under `out`; say what was measured.

    Args:
        recipe: what to train instead of the digits recipe.
    """
    console, recipe = Console(highlight=False, soft_wrap=True), recipe or RECIPES["digits"]()
    runs, nets, rows = {}, {}, []
    for number, (bias, meaning) in enumerate(NETS.items(), 1):
        console.print(f"[bold]{number} of 3[/bold]  train a micro Swin V2 with a {meaning}")
        run = replace(recipe, recipe=f"demo {bias}", model=replace(recipe.model, bias=bias), out=str(out / bias))
        runs[bias] = train(run)
        nets[bias] = load(out / bias)
    console.print("[bold]3 of 3[/bold]  the same weights, untouched, at larger images and windows")
    splits = open_splits(recipe.input, recipe.seed)
    val = splits.val
    for size, window in SIZES:
        row: dict[str, Any] = {"image_size": size, "window": window}
        for bias, net in nets.items():
            row[bias] = measure(transfer(net, size, window), val, recipe.batch)
        rows.append(row)
        shown = "   ".join(f"{bias} {row[bias]:.1%}" for bias in NETS)
        console.print(f"  {size} px, window {window}: {shown}")
    best = nets["log-cpb"]
    save(best, out / "best")
    for name in ("recipe.json", "metrics.json"):
        write_json(out / "best" / name, read_json(out / "log-cpb" / "best" / name))
    result = {
        "trained_on": len(splits.train),
        "pictures": len(val),
        "accuracy": rows[0]["log-cpb"],
        "transfer": rows,
        "seconds": sum(summary["seconds"] for summary in runs.values()),
        "parameters": sum(p.numel() for p in best.parameters()),
        "verdict": verdict(rows, len(val)),
    }
    write_json(out / "report.json", result)
    report.write_report(out, result, nets, answers(best, val))
    console.print(f"\n{result['verdict']}\n[bold]Open {out}/report.html[/bold]; the model is in {out}/best")
    return result


def measure(net: Swin, val: Any, batch: int) -> float:
    """Top-1 accuracy on the held-out pictures."""
    batches = eval_batches(val, eval_transform(net.preprocess), batch=batch, workers=0)
    return score(net.eval(), batches, torch.device("cpu"), torch.float32, lambda path, reason: None)["accuracy"]


def verdict(rows: list[dict[str, Any]], pictures: int) -> str:
    """What the numbers say, in one sentence that is true whatever they are."""
    trained, moved = rows[0], rows[-1]
    lost = {bias: trained[bias] - moved[bias] for bias in NETS}
    error = math.sqrt(sum(moved[bias] * (1 - moved[bias]) / pictures for bias in NETS))
    difference = lost["table"] - lost["log-cpb"]
    if difference > 2 * error:
        finding = "the log-spaced bias loses less, by more than twice the standard error"
    elif difference > 0:
        finding = "the log-spaced bias loses less, but within twice the standard error of one run"
    else:
        finding = "here the log-spaced bias does not lose less"
    return (
        f"Held-out accuracy {trained['log-cpb']:.1%} (log-cpb), {trained['table']:.1%} (table). Untouched at {moved['image_size']} px and "
        f"window {moved['window']}: {moved['log-cpb']:.1%} against {moved['table']:.1%}: {finding} ({pictures} pictures, one seed)."
    )


@torch.no_grad()
def answers(net: Swin, val: Any, wanted: int = 24) -> list[dict[str, Any]]:
    """Held-out pictures with what the net says: the ones it gets wrong first, then others."""
    transform, seen = eval_transform(net.preprocess), []
    for index in range(len(val)):
        try:
            picture = val.read(index)
        except BadImage:
            continue
        seen.append((picture, val.label(index)))
    probabilities = torch.cat([net(torch.stack([transform(p) for p, _ in part])).softmax(-1) for part in _parts(seen, 64)])
    said = probabilities.argmax(-1).tolist()
    order = sorted(range(len(seen)), key=lambda i: (said[i] == seen[i][1], i * 7919 % len(seen)))
    return [
        {"picture": seen[i][0], "truth": net.labels[seen[i][1]], "said": net.labels[said[i]], "sure": probabilities[i].max().item()}
        for i in order[:wanted]
    ]


def _parts(items: list[Any], size: int) -> list[list[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
