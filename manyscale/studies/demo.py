"""`manyscale demo`: a micro Swin V2 learns real images, moves to a window it never saw, and explains itself in a report.

The claim shown is that of Swin V2's Table 1: without retraining, a log-spaced continuous position bias loses less at a
larger window than a resized table does.
"""

import math
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
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
from manyscale.studies.grid import run_grid
from manyscale.tasks.classify import score
from manyscale.train.loop import Stopped

NETS = {"log-cpb": "log-spaced continuous bias (Swin V2)", "table": "bias table (Swin V1), resized bicubically"}
SIZES = ((32, 4), (48, 6), (64, 8))  # image size and window; the first is trained, the last is twice that
SEEDS = 3


def demo(out: Path, recipe: Run | None = None, seeds: int = SEEDS) -> dict[str, Any]:
    """Train both nets, transfer both, write `report.html`, `report.json` and `best/` under `out`; say what was measured.

    Args:
        recipe: what to train instead of the digits recipe.
        seeds: each net is trained from so many seeds.

    Raises:
        ValueError: a run that cannot be started.
        Stopped: by a signal, or a run diverged.
    """
    console, recipe = Console(highlight=False, soft_wrap=True), recipe or RECIPES["digits"]()
    runs = [
        replace(recipe, recipe=f"{bias} seed {seed}", model=replace(recipe.model, bias=bias), seed=seed, out=str(out / f"{bias}-{seed}"))
        for seed in range(seeds)
        for bias in NETS
    ]
    console.print(f"[bold]1 of 2[/bold]  train a micro Swin V2 from {seeds} seeds with each of two position biases:")
    for bias, meaning in NETS.items():
        console.print(f"  {bias:8} {meaning}")
    outcomes = run_grid(runs, console)
    for outcome in outcomes:
        if outcome.diverged:
            raise Stopped(f"{outcome.run.folder}: {outcome.diverged}", 1)
    console.print("[bold]2 of 2[/bold]  the same weights, untouched, at larger images and windows")
    nets = {bias: [load(out / f"{bias}-{seed}") for seed in range(seeds)] for bias in NETS}
    splits = open_splits(recipe.input, recipe.seed)
    val = splits.val
    rows = []
    for size, window in SIZES:
        row: dict[str, Any] = {"image_size": size, "window": window}
        for bias in NETS:
            row[bias] = [measure(transfer(net, size, window), val, recipe.batch) for net in nets[bias]]
        rows.append(row)
        shown = "   ".join(f"{bias} {report.spread(row[bias])}" for bias in NETS)
        console.print(f"  {size} px, window {window}: {shown}")
    best = nets["log-cpb"][0]
    save(best, out / "best")
    for name in ("recipe.json", "metrics.json"):
        write_json(out / "best" / name, read_json(out / "log-cpb-0" / "best" / name))
    result = {
        "trained_on": len(splits.train),
        "pictures": len(val),
        "seeds": seeds,
        "accuracy": fmean(rows[0]["log-cpb"]),
        "transfer": rows,
        "seconds": sum(outcome.summary["seconds"] for outcome in outcomes if outcome.summary),
        "parameters": sum(p.numel() for p in best.parameters()),
        "verdict": verdict(rows),
    }
    write_json(out / "report.json", result)
    report.write_report(out, result, {bias: nets[bias][0] for bias in NETS}, answers(best, val))
    console.print(f"\n{result['verdict']}\n[bold]Open {out}/report.html[/bold]; the model is in {out}/best")
    return result


def measure(net: Swin, val: Any, batch: int) -> float:
    """Top-1 accuracy on the held-out pictures."""
    batches = eval_batches(val, eval_transform(net.preprocess), batch=batch, workers=0)
    return score(net.eval(), batches, torch.device("cpu"), torch.float32, lambda path, reason: None)["accuracy"]


def verdict(rows: list[dict[str, Any]]) -> str:
    """What the numbers say, in one sentence that is true whatever they are."""
    trained, moved = rows[0], rows[-1]
    lost = {bias: [before - after for before, after in zip(trained[bias], moved[bias], strict=True)] for bias in NETS}
    difference = fmean(lost["table"]) - fmean(lost["log-cpb"])
    points = {bias: f"{100 * fmean(lost[bias]):.1f}" for bias in NETS}
    seeds = len(lost["table"])
    if seeds > 1:
        error = math.sqrt(sum(stdev(lost[bias]) ** 2 / seeds for bias in NETS))
        doubt = "more than twice its standard error" if abs(difference) > 2 * error else "within twice its standard error"
        sure = f", a difference of {abs(100 * difference):.1f} points ({doubt})"
    else:
        sure = " (one seed)"
    finding = "the log-spaced bias loses less" if difference > 0 else "here the log-spaced bias does not lose less"
    return (
        f"Held-out accuracy {fmean(trained['log-cpb']):.1%} (log-cpb), {fmean(trained['table']):.1%} (table), mean of {seeds} "
        f"seed{'s' * (seeds > 1)}. Untouched at {moved['image_size']} px and window {moved['window']} they lose {points['log-cpb']} and "
        f"{points['table']} points: {finding}{sure}."
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
