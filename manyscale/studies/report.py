"""The demo's page: one HTML file with everything inside, readable without a network."""

import base64
import html
import io
import json
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from matplotlib.figure import Figure

from manyscale.models import Swin, transfer
from manyscale.ops.positions import relative_coordinates, relative_index
from manyscale.storage import write

INK, RED, BLUE = "#1f2933", "#c0392b", "#2c6e9b"
COLOURS = {"log-cpb": BLUE, "table": RED}

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Manyscale demo</title>
<style>
:root {{ color-scheme: light; }}
body {{ font: 16px/1.55 system-ui, sans-serif; color: #1f2933; background: #fbfbf9; margin: 0; }}
main {{ max-width: 900px; margin: 0 auto; padding: 40px 20px 80px; }}
h1 {{ font-size: 30px; margin: 0 0 4px; }} h2 {{ font-size: 20px; margin: 44px 0 8px; }}
p {{ margin: 8px 0; }} .lead {{ font-size: 18px; }} .quiet {{ color: #66727f; font-size: 14px; }}
figure {{ margin: 12px 0; }} figure img {{ width: 100%; display: block; }}
table {{ border-collapse: collapse; margin: 12px 0; }}
th, td {{ padding: 6px 18px 6px 0; text-align: right; border-bottom: 1px solid #dfe3e6; }}
th:first-child, td:first-child {{ text-align: left; }} td.better {{ font-weight: 600; }}
.sheet {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(100px, 1fr)); gap: 10px; }}
.sheet div {{ font-size: 13px; text-align: center; }}
.sheet img {{ width: 100%; image-rendering: pixelated; border-radius: 4px; display: block; }}
.right {{ color: #1e7d34; }} .wrong {{ color: #c0392b; font-weight: 600; }}
code, pre {{ font: 14px/1.5 ui-monospace, monospace; background: #eff1ee; border-radius: 4px; }} code {{ padding: 1px 5px; }}
pre {{ padding: 12px 14px; overflow-x: auto; }}
</style>
<main>
<h1>A Swin V2 at a size and window it never saw</h1>
<p class="lead">{verdict}</p>
<p class="quiet">A net of {parameters:,} parameters, trained from scratch on scikit-learn's handwritten digits ({digits} for training,
{pictures} held out): from {seeds} seeds with Swin V2's log-spaced continuous position bias, and from the same seeds with Swin V1's bias
table. Everything else is equal. {seconds:.0f} seconds of training in all, several nets at a time.</p>

<h2>What it learnt</h2>
<figure>{curves}</figure>

<h2>Twice the image, twice the window, the same weights</h2>
<p>The bias of the first is a small network of the offset between two tokens, so a larger window only asks it at more places.
The table has no entry for offsets it never saw; it is stretched bicubically, which gives old offsets new meanings.</p>
<table><tr><th>image, window</th><th>log-spaced bias</th><th>table, bicubic</th></tr>
{rows}</table>
<figure>{transfer}</figure>
<p class="quiet">Top-1 accuracy on {pictures} held-out digits: mean and standard deviation over {seeds} seeds, a thin line for each. One net
more: <code>manyscale train digits --seed 7 --out runs/seven</code>.</p>

<h2>The bias it learnt</h2>
<p>How much a token favours another by where it is: the middle of each map is the token itself. Left, the window it was trained
with; right, what the same weights give at twice the window. Each head of the first stage has its own scale.</p>
<figure>{maps}</figure>

<h2>What it says of digits it never saw</h2>
<p>{wrong}</p>
<div class="sheet">{sheet}</div>

<h2>What to run next</h2>
<pre>manyscale predict {out}/best PICTURE.png
manyscale transfer {out}/best --image-size 48 --window 6
manyscale train folder --data YOUR_FOLDER --time 10m     # a folder with one sub-folder of pictures per class
manyscale train cifar10 --time 25m
manyscale plan count swinv2_tiny</pre>
<p>In Python:</p>
<pre>import manyscale as ms
model = ms.load("{out}/best")                              # a torch.nn.Module
bigger = ms.transfer(model, image_size=64, window=8)       # the same function at a larger window
features = bigger.features(images)                         # (B, 3, 64, 64) -> a pyramid of maps</pre>
</main></html>
"""


def write_report(out: Path, result: dict[str, Any], nets: dict[str, Swin], answers: list[dict[str, Any]]) -> None:
    """Write `report.html`, and `transfer.png` alone, from the demo's numbers, nets and answers."""
    wrong = sum(answer["truth"] != answer["said"] for answer in answers)
    page = PAGE.format(
        verdict=html.escape(result["verdict"]),
        parameters=result["parameters"],
        digits=f"{result['trained_on']:,}",
        seconds=result["seconds"],
        pictures=result["pictures"],
        seeds=result["seeds"],
        curves=_picture(_curves(out, result["seeds"])),
        rows="\n".join(map(_row, result["transfer"])),
        transfer=_picture(_transfer(result["transfer"])),
        maps=_picture(_maps(nets)),
        wrong=f"Its {wrong} mistakes first, then others."
        if 0 < wrong < len(answers)
        else "Some of them."
        if not wrong
        else "Its mistakes.",
        sheet="\n".join(map(_answer, answers)),
        out=html.escape(str(out)),
    )
    write(out / "report.html", page)
    write(out / "transfer.png", lambda path: _transfer(result["transfer"]).savefig(path, dpi=110))


def _row(row: dict[str, Any]) -> str:
    most = max(fmean(row[bias]) for bias in COLOURS)
    cells = "".join(f'<td class="{"better" * (fmean(row[bias]) == most)}">{spread(row[bias])}</td>' for bias in COLOURS)
    return f"<tr><td>{row['image_size']} px, window {row['window']}</td>{cells}</tr>"


def spread(values: list[float]) -> str:
    """Shares in percent: the mean, and the standard deviation where there are several."""
    return f"{100 * fmean(values):.1f}" + (f" ± {100 * stdev(values):.1f} %" if len(values) > 1 else " %")


def _answer(answer: dict[str, Any]) -> str:
    data = io.BytesIO()
    answer["picture"].save(data, "png")
    image = base64.b64encode(data.getvalue()).decode()
    said, kind = f"{answer['said']} · {answer['sure']:.0%}", "right"
    if answer["truth"] != answer["said"]:
        said, kind = f"{said} (it is {answer['truth']})", "wrong"
    return f'<div><img alt="" src="data:image/png;base64,{image}"><span class="{kind}">{html.escape(said)}</span></div>'


def _picture(figure: Figure) -> str:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=150, facecolor="#fbfbf9")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'


def _plain(axes: Any) -> Any:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_facecolor("#fbfbf9")
    return axes


def _curves(out: Path, seeds: int) -> Figure:
    figure = Figure(figsize=(9, 2.9), layout="constrained")
    loss, accuracy = map(_plain, figure.subplots(1, 2))
    for bias, colour in COLOURS.items():
        for seed in range(seeds):
            records = [json.loads(line) for line in (out / f"{bias}-{seed}" / "metrics.jsonl").read_text().splitlines()]
            steps, evaluations = [r for r in records if "loss" in r], [r for r in records if "accuracy" in r]
            style = {"color": colour, "lw": 1.1, "alpha": 0.8, "label": None if seed else bias}
            loss.plot([r["epoch"] for r in steps], [r["loss"] for r in steps], **style)
            accuracy.plot([r["epoch"] for r in evaluations], [100 * r["accuracy"] for r in evaluations], marker=".", **style)
    loss.set(title="training loss", xlabel="epoch", yscale="log")
    accuracy.set(title="held-out accuracy, %", xlabel="epoch")
    accuracy.legend(frameon=False, loc="lower right")
    return figure


def _transfer(rows: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(9, 2.7), layout="constrained")
    axes = _plain(figure.subplots())
    places = range(len(rows))
    for bias, colour in COLOURS.items():
        for seed in range(len(rows[0][bias])):
            axes.plot(places, [100 * row[bias][seed] for row in rows], color=colour, lw=0.8, alpha=0.35)
        axes.plot(places, [100 * fmean(row[bias]) for row in rows], color=colour, lw=2, marker="o", label=bias)
    axes.set_xticks(list(places), [f"{row['image_size']} px, window {row['window']}" for row in rows])
    axes.set(ylabel="accuracy, %", title="trained at the left, everything to the right is untouched weights")
    axes.legend(frameon=False, loc="lower left")
    return figure


@torch.no_grad()
def _maps(nets: dict[str, Swin]) -> Figure:
    heads = next(iter(nets.values())).config.heads[0]
    figure = Figure(figsize=(9, 2.0 * len(nets)), layout="constrained")
    grid = figure.subplots(len(nets), 2 * heads, squeeze=False)
    for row, (bias, net) in zip(grid, nets.items(), strict=True):
        size, window = net.config.size[0], net.config.windows[0][0]
        learnt, moved = bias_map(net), bias_map(transfer(net, 2 * size, 2 * window))
        for head in range(heads):
            low, high = (f(torch.cat([learnt[head].flatten(), moved[head].flatten()])).item() for f in (torch.min, torch.max))
            for axes, values, name in (
                (row[head], learnt[head], f"window {window}"),
                (row[heads + head], moved[head], f"window {2 * window}"),
            ):
                axes.imshow(values.numpy(), cmap="viridis", vmin=low, vmax=high)
                axes.set(xticks=[], yticks=[])
                axes.set_title(f"{name}, head {head + 1}", fontsize=8)
        row[0].set_ylabel(bias)
    return figure


def bias_map(net: Swin) -> torch.Tensor:
    """The bias of every offset in the first stage's second block: (heads, 2 w - 1, 2 w - 1)."""
    stage = net.stages[0]
    window, module = stage.window, stage.blocks[-1].attention.branch.bias
    coordinates = relative_coordinates(window, stage.pretrained, stage.spacing) if stage.spacing else None
    bias = module(relative_index(window, window), coordinates)  # (heads, N, N): each offset stands at many places
    table = bias.new_empty(bias.shape[0], (2 * window[0] - 1) * (2 * window[1] - 1))
    table[:, relative_index(window, window).flatten()] = bias.flatten(1)
    return table.unflatten(1, (2 * window[0] - 1, 2 * window[1] - 1))
