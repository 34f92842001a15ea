"""Figures 4 and 5 of Swin V2: the bias a table learnt and the bias a network learnt, as pictures, and how rough they are."""

from dataclasses import replace
from itertools import product

import torch
from matplotlib.figure import Figure
from torch import Tensor

from manyscale.config import Run
from manyscale.models import Swin, load
from manyscale.ops.positions import relative_coordinates, relative_index
from manyscale.studies.grid import run_grid
from manyscale.studies.position_bias import BIASES
from manyscale.studies.study import Section, Terms, cell, compare, conclude, describe, small

PAPER = """The maps of a table (Figure 4) and of the log-spaced network (Figure 5), as pictures: no numbers to compare with. A network of
the offset has to be smooth; whether the table comes out smooth by itself is what the pictures let one see."""


def study(terms: Terms) -> dict:
    """Train with each bias, draw every map of the first seed, and measure the roughness of all."""
    base = small(terms, pictures=2_000, shown=12_000) if terms.quick else small(terms, pictures=10_000, shown=60_000)
    base = replace(base, model=replace(base.model, image_size=64, window=8))  # windows of 8: 15 x 15 offsets to look at

    def run(bias: str, seed: int) -> Run:
        out = terms.out / f"{bias}-{seed}"
        return replace(base, recipe=f"{bias} seed {seed}", model=replace(base.model, bias=bias), seed=seed, out=str(out))

    outcomes = run_grid([run(bias, seed) for seed in range(terms.seeds) for bias in BIASES], terms.console)
    nets = {bias: [load(o.run.out) for o in outcomes if o.run.model.bias == bias and o.summary] for bias in BIASES}
    places = [(stage, block) for stage, depth in enumerate(base.model.depths) for block in range(depth)]
    rough = {bias: {place: [roughness(bias_map(net, *place)) for net in members] for place in places} for bias, members in nets.items()}
    mean = {bias: [sum(each) / len(places) for each in zip(*rough[bias].values(), strict=True)] for bias in BIASES}
    rows = [
        (BIASES[bias], *(cell(rough[bias][place], scale=1, digits=2) for place in places), cell(mean[bias], scale=1, digits=2))
        for bias in BIASES
    ]
    findings = [
        compare(f"roughness of {BIASES['table']} over {BIASES[other]}, all blocks", mean["table"], mean[other], scale=1, digits=2, unit="")
        for other in ("linear-cpb", "log-cpb")
        if len(mean["table"]) == len(mean[other])
    ]
    header = ("bias", *(f"stage {stage + 1}, block {block + 1}" for stage, block in places), "mean")
    return conclude(
        terms,
        "Bias maps: Figures 4 and 5 of Swin V2 in miniature",
        sections=[Section("Roughness", header, rows)],
        findings=findings,
        paper=PAPER,
        method=f"{describe(base)} Roughness: the root mean square difference between neighbouring offsets over that between any two, "
        "averaged over heads; 1 is noise, 0 smooth. The picture shows the first seed; each head has its own scale.",
        values={bias: {f"stage {s + 1} block {b + 1}": found for (s, b), found in by.items()} for bias, by in rough.items()},
        picture=_draw({bias: members[0] for bias, members in nets.items() if members}, places),
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


def _draw(nets: dict[str, Swin], places: list[tuple[int, int]]) -> Figure:
    heads = {place: next(iter(nets.values())).config.heads[place[0]] for place in places}
    columns = max(heads.values())
    figure = Figure(figsize=(1.15 * columns + 0.8, 1.25 * len(nets) * len(places) + 0.3), layout="constrained")
    grid = figure.subplots(len(nets) * len(places), columns, squeeze=False)
    for axes in grid.flatten():
        axes.axis("off")
    for row, (place, bias) in zip(grid, product(places, nets), strict=True):
        for head, (axes, values) in enumerate(zip(row, bias_map(nets[bias], *place), strict=False)):
            axes.axis("on")
            axes.imshow(values.numpy(), cmap="viridis")
            axes.set(xticks=[], yticks=[])
            if head == 0:
                axes.set_ylabel(f"{bias}\nstage {place[0] + 1}, block {place[1] + 1}", fontsize=7)
    return figure
