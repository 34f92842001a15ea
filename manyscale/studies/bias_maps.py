"""Figures 4 and 5 of Swin V2: the bias a table learnt and the biases two networks learnt, as pictures, and how rough they are."""

from dataclasses import replace

import torch
from matplotlib.figure import Figure
from torch import Tensor

from manyscale.models import Swin, load
from manyscale.ops.positions import relative_coordinates, relative_index
from manyscale.studies.grid import run_grid
from manyscale.studies.position_bias import BIASES, trained, tuned
from manyscale.studies.study import Section, Terms, Values, cell, compare, conclude, describe, small

SIZES = ((64, 8), (128, 16))  # image and window: where it is trained, where fine-tuned; the paper: 256 and 8, 512 and 16
QUICK = ((64, 8), (96, 12))
PAPER = """Figure 4 shows the maps of all three biases in the first block, trained at window 8 and fine-tuned at window 16, Figure 5 those
in the last block, for Swin-T. The claim: both networks' maps are smoother than the table's, and the log-spaced network's keep their look
when the window grows. The figures give no numbers."""


def study(terms: Terms) -> dict:
    """Train with each bias, fine-tune at twice the window, draw the maps of the first seed, and measure the roughness of all."""
    base = small(terms, pictures=1_000, shown=3_000) if terms.quick else small(terms, pictures=10_000, shown=60_000)
    (size, window), larger = sizes = QUICK if terms.quick else SIZES
    base = replace(base, model=replace(base.model, image_size=size, window=window))  # windows of 8: 15 x 15 offsets to look at

    cases = [(bias, seed) for seed in range(terms.seeds) for bias in BIASES]
    outcomes = run_grid([trained(terms, base, *case) for case in cases], terms.console)
    whole = [case for case, outcome in zip(cases, outcomes, strict=True) if outcome.summary]
    terms.console.print(f"fine-tune them at {larger[0]} px, window {larger[1]}")
    further = run_grid([tuned(terms, base, *case, *larger) for case in whole], terms.console)
    nets = {(*case, window): load(trained(terms, base, *case).out) for case in whole}
    nets |= {(*case, larger[1]): load(o.run.out) for case, o in zip(whole, further, strict=True) if o.summary}

    depths = base.model.depths
    places = {"first": (0, 0), "last": (len(depths) - 1, depths[-1] - 1)}
    rough: dict[tuple[str, int, str], Values] = {
        (bias, w, name): [
            roughness(bias_map(nets[bias, seed, w], *place)) if (bias, seed, w) in nets else None for seed in range(terms.seeds)
        ]
        for bias in BIASES
        for _, w in sizes
        for name, place in places.items()
    }
    columns = [(w, name) for _, w in sizes for name in places]
    rows = [(BIASES[bias], *(cell(rough[bias, w, name], scale=1, digits=2) for w, name in columns)) for bias in BIASES]
    findings = [
        compare(f"window {w}, {name} block: roughness of the table over {BIASES[other]}", rough["table", w, name], rough[other, w, name],
                claim=1, scale=1, digits=2, unit="")
        for other in ("linear-cpb", "log-cpb")
        for w, name in columns
    ]  # fmt: skip
    return conclude(
        terms,
        "Bias maps: Figures 4 and 5 of Swin V2 in miniature",
        sections=[Section("Roughness", ("bias", *(f"window {w}, {name} block" for w, name in columns)), rows)],
        findings=findings,
        paper=PAPER,
        method=f"{describe(base)} Fine-tuned at {larger[0]} px, window {larger[1]}, for a tenth of the epochs at a 25th of the rate; "
        "the table gets there bicubically, which smooths it. Roughness: the root mean square difference between neighbouring offsets over "
        "that between any two, averaged over heads; 1 is noise, 0 smooth. The picture shows the first seed; each map has its own scale.",
        values={f"{bias}, window {w}, {name} block": found for (bias, w, name), found in rough.items()},
        picture=_draw(nets, [w for _, w in sizes], places),
    )


@torch.no_grad()
def bias_map(net: Swin, stage: int, block: int) -> Tensor:
    """The bias of every offset in a block's window: (heads, 2 h - 1, 2 w - 1)."""
    part = net.stages[stage]
    window, module = part.window, part.blocks[block].attention.branch.bias
    coordinates = relative_coordinates(window, part.pretrained, part.spacing) if part.spacing else None
    index = relative_index(window, window)
    bias = module(index, coordinates)  # (heads, N, N): each offset stands at many places
    sides = [2 * w - 1 for w in window]
    table = bias.new_empty(bias.shape[0], sides[0] * sides[1])
    table[:, index.flatten()] = bias.flatten(1)
    return table.unflatten(1, sides)


def roughness(maps: Tensor) -> float:
    """(heads, h, w) -> how much neighbours differ, relative to what any two places do: 1 for noise, 0 for smooth maps."""
    down, right = maps.diff(dim=1).square().mean((1, 2)), maps.diff(dim=2).square().mean((1, 2))
    return ((down + right) / 2 / (2 * maps.var((1, 2), correction=0) + 1e-12)).sqrt().mean().item()


def _draw(nets: dict[tuple[str, int, int], Swin], windows: list[int], places: dict[str, tuple[int, int]]) -> Figure:
    heads = next(iter(nets.values())).config.heads
    shown = [(name, bias, w) for name in places for bias in BIASES for w in windows if (bias, 0, w) in nets]
    columns = max(heads[stage] for stage, _ in places.values())
    figure = Figure(figsize=(1.15 * columns + 1.2, 1.2 * len(shown) + 0.3), layout="constrained")
    grid = figure.subplots(len(shown), columns, squeeze=False)
    for axes in grid.flatten():
        axes.axis("off")
    for row, (name, bias, w) in zip(grid, shown, strict=True):
        maps = bias_map(nets[bias, 0, w], *places[name])
        for head, (axes, values) in enumerate(zip(row, maps, strict=False)):
            axes.axis("on")
            axes.imshow(values.numpy(), cmap="viridis")
            axes.set(xticks=[], yticks=[])
            if head == 0:
                axes.set_ylabel(f"{name} block\n{BIASES[bias]}\nwindow {w}", fontsize=7)
    return figure
