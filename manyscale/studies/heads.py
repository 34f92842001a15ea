"""Figure 5 right of "Scaling Vision Transformers" in miniature: class token, mean and MAP pooling, and what one more token costs."""

import statistics
import time
from dataclasses import replace
from typing import Any

import torch
from matplotlib.figure import Figure

from manyscale.config import Run, ViTConfig
from manyscale.models import build
from manyscale.plan.count import count
from manyscale.studies.grid import run_grid
from manyscale.studies.study import COLOURS, Section, Terms, Values, cell, compare, conclude, plain
from manyscale.studies.vits import Upstream, decayed, describe_vit, shot, trained, upstream, vit

POOLS = ("token", "gap", "map")
DECAYS = (0.3, 40.0)  # exponents of the head's decay
BODY = 1.0
ROUNDS = 7
PAPER = """Figure 5, ViT-B/32: class token, mean and MAP pooling with a linear head are about equal where the head's decay is strong, so the
token, which makes 256 tokens 257 and on a TPU pads them to 384, can go (section 3.2). The paper prints no numbers of the figure."""


def study(terms: Terms) -> dict[str, Any]:
    """Three ways to pool, with and without the tanh layer, at two decays of the head; then the cost of a token."""
    sets = upstream(terms)
    cases = [(pool, tanh, decay) for pool in POOLS for tanh in ((False,) if terms.quick else (False, True)) for decay in DECAYS]
    asked = [(case, seed) for case in cases for seed in range(terms.seeds)]
    runs = [run(terms, sets, *case, seed) for case, seed in asked]
    ended = dict(zip(asked, run_grid(runs, terms.console), strict=True))

    def values(case: tuple[str, bool, float], metric: str) -> Values:
        records = [o.summary["last"] if (o := ended[case, seed]).summary else None for seed in range(terms.seeds)]
        return [None if r is None else r["accuracy"] if metric == "upstream" else shot(r, 10) for r in records]

    found = {case: {metric: values(case, metric) for metric in ("upstream", "10-shot")} for case in cases}
    parameters = {case: count(trained(run, sets)).parameters for (case, _), run in zip(asked, runs, strict=True)}
    findings = [
        compare(f"{metric}, head decay {decay:g}: {one} over {other}", found[one, False, decay][metric], found[other, False, decay][metric])
        for metric in ("upstream", "10-shot")
        for decay in DECAYS
        for one, other in (("map", "token"), ("gap", "token"), ("map", "gap"))
    ]
    terms.console.print("time of 256 and 257 tokens")
    padding = measure_padding(quick=terms.quick)
    findings.append(
        f"257 tokens take {padding['time']:.3f} times the time of 256 on {padding['device']} (tokens: 1.004, padded to 128: 1.5)"
        + (f", and {padding['memory']:.3f} times the memory" if "memory" in padding else "")
    )
    return conclude(
        terms,
        "Heads: Figure 5 (right) of Scaling Vision Transformers in miniature",
        sections=[
            Section(
                "Top-1 %",
                ("pooling", "tanh layer", "head decay", "parameters", sets.data, f"{sets.probe}, 10-shot"),
                [
                    (
                        pool,
                        "yes" if tanh else "no",
                        f"{decay:g}",
                        f"{parameters[pool, tanh, decay]:,}",
                        *(cell(found[pool, tanh, decay][m]) for m in ("upstream", "10-shot")),
                    )
                    for pool, tanh, decay in cases
                ],
            ),
            Section(
                "One more token",
                ("tokens", "padded to 128", "seconds a step"),
                [(str(n), str(-(-n // 128) * 128), f"{padding[str(n)]:.3f}") for n in (256, 257)],
            ),
        ],
        findings=findings,
        paper=PAPER,
        method=f"{describe_vit(runs[0], sets)} Decays are exponents, the sum of rate x decay over the run; the body's is {BODY:g}. The "
        f"claim is equality, so look at the intervals: what they hold cannot be told apart here. Time: {padding['what']}, medians of "
        f"{padding['rounds']} rounds in turn.",
        values={f"{pool}, {'tanh' if tanh else 'linear'}, {decay:g}": found[pool, tanh, decay] for pool, tanh, decay in cases}
        | {"padding": padding},
        picture=_draw(cases, found, sets),
    )


def run(terms: Terms, sets: Upstream, pool: str, tanh: bool, decay: float, seed: int) -> Run:
    """One case, one seed."""
    made = vit(terms, sets, "w64", seed=seed, length="20k-images" if terms.quick else "100k-images")
    made = replace(made, model=replace(made.model, pool=pool, pre_logits=made.model.width if tanh else 0))
    name = f"{pool}{'-tanh' if tanh else ''}-decay{decay:g}"
    return replace(decayed(made, sets, body=BODY, head=decay), recipe=f"{name} seed {seed}", out=str(terms.out / f"{name}-{seed}"))


def measure_padding(*, quick: bool = False) -> dict[str, Any]:
    """Seconds of a training step with 256 and with 257 tokens, and on a GPU peak memory: blocks of g/14's width, in turn."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    width, depth, batch = (1408, 8, 32) if on_gpu else (352, 2, 4 if quick else 16)
    nets = {}
    for tokens, pool in ((256, "gap"), (257, "token")):
        config = ViTConfig(image_size=224, patch=14, width=width, depth=depth, heads=16, mlp_width=width * 48 // 11, pool=pool, classes=0)
        nets[tokens] = build(config).to(device)
    images = torch.randn(batch, 3, 224, 224, device=device)
    times: dict[int, list[float]] = {256: [], 257: []}
    memory = {}
    for _ in range(ROUNDS + 1):
        for tokens, net in nets.items():
            if on_gpu:
                before = torch.cuda.memory_allocated()  # the weights of both nets
                torch.cuda.reset_peak_memory_stats()
            begun = _now(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
                net(images).float().square().mean().backward()
            times[tokens].append(_now(device) - begun)
            if on_gpu:
                memory[tokens] = torch.cuda.max_memory_allocated() - before
            net.zero_grad()
    medians = {tokens: statistics.median(found[1:]) for tokens, found in times.items()}  # the first warms up
    result = {str(tokens): seconds for tokens, seconds in medians.items()}
    result |= {"time": medians[257] / medians[256], "rounds": ROUNDS}
    result["device"] = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} CPU threads"
    result["what"] = (
        f"forward and backward of {depth} blocks of width {width}, 16 heads, batch {batch}, {'bfloat16' if on_gpu else 'float32'}"
    )
    return result | ({"memory": memory[257] / memory[256]} if memory else {})


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _draw(cases: list[tuple[str, bool, float]], found: dict[tuple[str, bool, float], dict[str, Values]], sets: Upstream) -> Figure:
    figure = Figure(figsize=(10.5, 3.6), layout="constrained")
    labels = [(pool, tanh) for pool in POOLS for tanh in (False, True) if (pool, tanh, DECAYS[0]) in cases]
    for axes, (metric, title) in zip(figure.subplots(1, 2), (("upstream", sets.data), ("10-shot", f"{sets.probe}, 10-shot")), strict=True):
        plain(axes, title=title, ylabel="top-1, %")
        for shift, decay, colour in ((-0.12, DECAYS[0], COLOURS[0]), (0.12, DECAYS[1], COLOURS[1])):
            for place, (pool, tanh) in enumerate(labels):
                values = [100 * value for value in found[pool, tanh, decay][metric] if value is not None]
                label = None if place else f"head decay {decay:g}"
                axes.plot([place + shift] * len(values), values, "o", color=colour, alpha=0.6, ms=5, label=label)
                if values:
                    axes.hlines(statistics.fmean(values), place + shift - 0.09, place + shift + 0.09, color=colour, lw=2)
        axes.set_xticks(range(len(labels)), [f"{pool}\ntanh" if tanh else pool for pool, tanh in labels])
        axes.legend(frameon=False, fontsize=8)
    return figure
