"""Figure 2 of Swin V2: how loud each block's output is, by depth, for V1 and V2, before and after training."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from torch import Tensor

from manyscale.config import Run, SwinConfig
from manyscale.data.loader import eval_batches
from manyscale.data.sources import Part, open_splits
from manyscale.data.transforms import eval_transform, preprocess_for
from manyscale.models import Swin, build, load
from manyscale.plan.count import count
from manyscale.presets import model_config
from manyscale.storage import read_json, write_json
from manyscale.studies.grid import run_grid
from manyscale.studies.study import COLOURS, Section, Terms, Values, cell, compare_ratio, conclude, describe, plain, small

V1 = {"similarity": "dot", "norm": "pre", "bias": "table", "merge_norm": "before"}
VERSIONS = {"V1": V1, "V2": {}}
TRAINED = {  # growing in width and depth, as the papers' sizes do
    "width 32, depths 2, 4": {"width": 32, "heads": (2, 4), "depths": (2, 4)},
    "width 48, depths 2, 10": {"width": 48, "heads": (3, 6), "depths": (2, 10)},
    "width 64, depths 2, 18": {"width": 64, "heads": (4, 8), "depths": (2, 18)},
}
PRESETS = {"V1": ("swin_tiny", "swin_small", "swin_base", "swin_large"),
           "V2": ("swinv2_tiny", "swinv2_small", "swinv2_base", "swinv2_large", "swinv2_huge")}  # fmt: skip
PAPER = """After training, V1's amplitudes grow from layer to layer, the more the larger the net: between the extreme layers they differ
by up to 10,000 times where it grew from small to large; huge breaks down (its curve is of a net 40 epochs into SimMIM). V2's are much
milder at every size. If its plot shows variances, as signal propagation plots do, 10,000 there is 100 here."""


def study(terms: Terms) -> dict:
    """Measure presets as they start, and small nets of three sizes as they start and after training."""
    base = small(terms, pictures=3_000, shown=9_000) if terms.quick else small(terms, pictures=10_000, shown=60_000)
    sizes = list(TRAINED)[: 2 if terms.quick else 3]
    cases = [(name, version) for name in sizes for version in VERSIONS]

    def run(name: str, version: str, seed: int) -> Run:
        model = replace(base.model, **TRAINED[name], **VERSIONS[version])
        out = terms.out / f"{version}-{model.width}-{seed}"
        return replace(base, recipe=f"{version} {name} seed {seed}", model=model, seed=seed, out=str(out))

    terms.console.print("train V1 and V2 at growing size")
    outcomes = iter(run_grid([run(*case, seed) for case in cases for seed in range(terms.seeds)], terms.console))
    ended = {case: [next(outcomes) for _ in range(terms.seeds)] for case in cases}
    terms.console.print("measure them, and the papers' nets as they start")
    images = pictures(base, 64)
    small_nets = {}
    for (name, version), members in ended.items():
        for seed, outcome in enumerate(members):
            torch.manual_seed(seed)
            fresh = build(replace(run(name, version, seed).model, classes=10))
            after = loudness(load(outcome.run.out), images) if outcome.summary else []
            small_nets.setdefault(name, {}).setdefault(version, []).append({"start": loudness(fresh, images), "trained": after})
    presets: dict[str, list[float]] = {}  # empty where left out
    for name in [name for names in PRESETS.values() for name in names[: 2 if terms.quick else None]]:
        fits = 4 * count(model_config(name)).parameters < 0.6 * _free_memory()
        presets[name] = _preset(terms, name, base) if fits else []

    ratios: dict[tuple[str, str, str], Values] = {
        (name, version, when): [spread(net[when]) if net[when] else None for net in nets]
        for name, by in small_nets.items()
        for version, nets in by.items()
        for when in ("start", "trained")
    }
    findings = [
        compare_ratio(f"{name}, trained: loudest over quietest block, V1 over V2", *(ratios[name, v, "trained"] for v in VERSIONS), claim=1)
        for name in sizes
    ]
    growth = {v: _over(ratios[sizes[-1], v, "trained"], ratios[sizes[0], v, "trained"]) for v in VERSIONS}
    name = "growth of that ratio from the smallest to the largest trained net, V1 over V2"
    findings.append(compare_ratio(name, growth["V1"], growth["V2"], claim=1))
    rows = [(name, *(cell(ratios[name, v, when], scale=1, digits=2) for v in VERSIONS for when in ("start", "trained"))) for name in sizes]
    header = ("net", "V1, as it starts", "V1, trained", "V2, as it starts", "V2, trained")
    extremes = [
        (name, f"{min(x):.3f}", f"{max(x):.3f}", f"{spread(x):.2f}") if x else (name, "does not fit into the free memory", "", "")
        for name, x in presets.items()
    ]
    return conclude(
        terms,
        "Amplitudes: Figure 2 of Swin V2 in miniature",
        sections=[
            Section("Loudest over quietest block", header, rows),
            Section("The papers' nets as they start, one seed", ("preset", "quietest block", "loudest block", "ratio"), extremes),
        ],
        findings=findings,
        paper=PAPER,
        method=f"{describe(base)} Widths and depths are those of the table; V1 is dot product, pre-norm, table bias and a norm before each "
        "patch merging. Loudness is the root mean square of a block's output on the main branch, over pictures, places and channels; 64 "
        "held-out pictures for the small nets, 4 for the presets, which are measured at their own image size. The presets are not trained: "
        "that takes more than this machine has. V2's residual norms start at zero, so its blocks start as the identity.",
        values={"small": small_nets, "presets": presets},
        picture=_draw(small_nets, presets),
    )


@torch.no_grad()
def loudness(model: Swin, images: Tensor) -> list[float]:
    """The root mean square of every block's output, first to last."""
    found: list[float] = []
    blocks = [block for stage in model.stages for block in stage.blocks]
    hooks = [
        block.register_forward_hook(lambda module, given, out: found.append(out.float().square().mean().sqrt().item())) for block in blocks
    ]
    model.eval()(images)
    for hook in hooks:
        hook.remove()
    return found


def spread(found: list[float]) -> float:
    """The loudest over the quietest."""
    return max(found) / min(found)


def _over(left: Values, right: Values) -> Values:
    return [None if a is None or b is None else a / b for a, b in zip(left, right, strict=True)]


def pictures(run: Run, wanted: int, size: int = 32) -> Tensor:
    """(wanted, 3, size, size): held-out pictures of all classes, prepared as the run's evaluation prepares them."""
    splits = open_splits(replace(run.input, cache=False), 0)
    transform = eval_transform(preprocess_for(run.input, (size, size), splits.train))
    spaced = np.linspace(0, len(splits.val) - 1, wanted).round().astype(int)  # they lie class by class
    return next(eval_batches(Part(splits.val, spaced), transform, batch=wanted, workers=0)).images


def _preset(terms: Terms, name: str, base: Run) -> list[float]:
    file = terms.out / f"{name}.json"
    if not file.exists():
        config: SwinConfig = model_config(name, classes=0)
        torch.manual_seed(0)
        with torch.device("meta"):
            model = build(config)
        model = model.to_empty(device="cpu")
        model.initialise()
        write_json(file, {"loudness": loudness(model, pictures(base, 4, config.size[0]))})
        terms.console.print(f"  {name}")
    return read_json(file)["loudness"]


def _free_memory() -> int:
    """Bytes this machine could give now; very many where it does not say."""
    file = Path("/proc/meminfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), 2**63)


def _draw(small_nets: dict, presets: dict) -> Figure:
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    plain(left, title="small nets, trained", xlabel="block", yscale="log", ylabel="root mean square")
    plain(right, title="the papers' nets, as they start", xlabel="block", yscale="log")
    for width, (name, by) in enumerate(small_nets.items(), 1):
        for version, colour in (("V1", COLOURS[1]), ("V2", COLOURS[0])):
            for number, net in enumerate(by[version]):
                if net["trained"]:
                    label = f"{version}, {name}" if number == 0 else None
                    left.plot(range(1, len(net["trained"]) + 1), net["trained"], color=colour, lw=0.6 * width, alpha=0.8, label=label)
    for name, found in ((name, found) for name, found in presets.items() if found):
        colour = COLOURS[0] if name.startswith("swinv2") else COLOURS[1]
        width = 0.7 + 0.5 * [*PRESETS["V2" if name.startswith("swinv2") else "V1"]].index(name)
        right.plot(range(1, len(found) + 1), found, color=colour, lw=width, alpha=0.8, label=name)
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(LogLocator(base=2))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
