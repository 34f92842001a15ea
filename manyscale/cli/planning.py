"""Verbs that answer before you pay: plan, models, doctor."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from manyscale.cli.costing import cost
from manyscale.cli.parsing import choose, parse, plain_table, show
from manyscale.config import (
    Memory,
    NetConfig,
    Optim,
    Run,
    Setting,
    Size,
    SuperViTConfig,
    SwinConfig,
    ViTConfig,
    Windows,
    from_dict,
    read_bytes,
)
from manyscale.config.checks import require
from manyscale.config.memory import AttentionPath
from manyscale.presets import list_models, model_config
from manyscale.recipes import RECIPES
from manyscale.storage import read_json, write_json


def _count(
    model: Positional[str],
    image_size: Size | None = None,
    window: Windows | None = None,
    classes: int | None = None,
    setting: str = "",
) -> None:
    """Parameters and multiply-adds by stage, of a SuperViT the multiply-adds of all its settings, and of a run its speed.

    Args:
        model: a preset, such as swinv2_tiny, a pattern, such as "swinv2*", a paper's name, such as G/14, a recipe, or a run's folder.
        image_size: pixels, where not the preset's.
        window: tokens, likewise.
        classes: of the head, likewise.
        setting: how it is run, such as 160/0.7 of a SuperViT, 192/window=12 of a Swin V2, 192 of a ViT; empty: at its own size, whole.
    """
    from manyscale.plan import count as counting
    from manyscale.plan.runs import TRAINING, speed

    at = Setting.read(setting) if setting else None

    fields = {key: value for key, value in {"image_size": image_size, "window": window, "classes": classes}.items() if value is not None}
    for name, net in _nets(model).items():
        if image_size is not None and isinstance(net, SuperViTConfig):
            raise ValueError(f"field `image_size`: {name} has several; give one with --setting {image_size}")
        config = replace(net, **fields)
        header, *rows = counting.table(counting.count(config, at))
        show(plain_table(header, rows, right=3, title=f"{name} at {at}" if at else name))
        if isinstance(config, SuperViTConfig) and not at:
            whole = counting.count(config).macs
            costs = [(s, ", ".join(map(str, config.counts(s))), counting.count(config, s).macs) for s in config.settings]
            rows = [(str(s), left, f"{macs / 1e9:.3f}", f"{macs / whole:.0%}") for s, left, macs in costs]
            show(plain_table(("setting", "patches left", "GFLOPs", "of the whole"), rows, right=2))
        if isinstance(config, ViTConfig):
            parameters, flops = counting.as_table_2(config)
            print(f"as Table 2 of Scaling ViT counts (no pooling, no head, a multiply-add as two): {parameters:,} parameters, "
                  f"{flops / 1e9:.1f} GFLOPs\n")  # fmt: skip
    if rate := speed(Path(model)):
        flops = TRAINING * counting.count(config).macs * rate
        print(f"trained at {rate:,.0f} images/s: {flops / 1e12:.3g} TFLOP/s, {TRAINING} FLOPs for each multiply-add of an image")


def _nets(model: str) -> dict[str, NetConfig]:
    """The nets that `plan count` is asked about, by name: of a recipe and a run's folder the one that is trained.

    Raises:
        ValueError: nothing has that name.
    """
    if names := list_models(model):
        return {name: model_config(name) for name in names}
    if model in RECIPES:
        return {model: RECIPES[model]().model}
    if Path(model).is_dir():
        recipe = Path(model) / "recipe.json"
        return {model: from_dict(Run, read_json(recipe), str(recipe)).model}
    return {model: model_config(model)}


def _laws(
    files: Positional[tuple[str, ...]],
    metric: str = "",
    frontier: Literal["hull", "all"] = "hull",
    budget: float | None = None,
    unit: Literal["flops", "device-hours", "device-days"] = "flops",
    tflops: float = 0.0,
    bootstrap: int = 200,
    out: str = "",
) -> None:
    """Fit a scaling law to finished runs, and ask it what a budget buys.

    Args:
        files: CSV or JSON tables, and folders of runs.
        metric: the column or metric to fit, such as accuracy or inet10; empty: error or accuracy.
        frontier: which runs count: the lower hull, or all that no other beats.
        budget: compute, in the unit: which model, how many images, what error?
        unit: of compute.
        tflops: what a device really computes in a second, in 10^12: for hours and days (a TPUv3 core at 40 %: 24.6).
        bootstrap: samples for the bands.
        out: a folder for laws.json and laws.png.
    """
    from manyscale.plan import laws
    from manyscale.plan.budget import advise
    from manyscale.plan.runs import read_points

    if not files:
        raise ValueError("give at least one table or folder of runs")
    if unit != "flops" and tflops <= 0:
        raise ValueError(f"field `tflops`: compute in {unit} needs the rate of the device; give --tflops, such as 24.6 for a TPUv3 core")
    per_unit = 1.0 if unit == "flops" else tflops * 1e12 * {"device-hours": 3600, "device-days": 86400}[unit]
    points = read_points(files, metric, flops_per_unit=per_unit)
    fit = laws.fit(points, frontier, bootstrap=bootstrap)
    pairs = zip(fit.frontier, fit.residuals, strict=True)
    what, digits = ("loss", ".4g") if points[0].loss else ("error", ".2%")
    rows = [
        (p.model or p.label, f"{p.images:.3g}" if p.images else "", f"{p.compute:.4g}", f"{p.error:{digits}}", f"{r:+{digits}}")
        for p, r in pairs
    ]
    show(
        plain_table(
            ("model", "images", unit, what, "over the law"),
            rows,
            right=1,
            title=f"{len(fit.frontier)} of {len(points)} runs ({frontier})",
        )
    )
    print(f"\n{fit.law}   C in {unit}, rmse {fit.rmse:{digits}}")
    spreads = {name: fit.spread(name) for name in "abcd"} if fit.resampled else {}
    if spreads:
        print("95 % of the resampled laws: " + ", ".join(f"{name} {low:.3g} to {high:.3g}" for name, (low, high) in spreads.items()))
    advice = None if budget is None else advise(fit, budget, per_unit)
    if advice:
        band = " [{}]".format(", ".join(f"{bound:{digits}}" for bound in advice.band)) if advice.band else ""
        print(f"\n{budget:g} {unit}: {what} {advice.error:{digits}}{band}")
        print(f"  train {advice.model} on {advice.images:.3g} images" if advice.model else "  the runs do not say which model they were")
        if advice.larger > 1.5:
            print(f"  the trend asks for {advice.larger:.2g} times as much an image, a larger net than the runs': train one, and fit again")
        if advice.extrapolated:
            print(f"  EXTRAPOLATED: {advice.extrapolated}; the band holds only if the law does")
    if out:
        from manyscale.plan.picture import draw

        result = {"law": fit.law._asdict(), "bands": spreads, "rmse": fit.rmse, "frontier": [p._asdict() for p in fit.frontier]}
        result |= {"residuals": fit.residuals, "unit": unit, "mode": frontier, "advice": advice._asdict() if advice else None}
        write_json(Path(out) / "laws.json", result)
        draw(points, fit, unit, Path(out) / "laws.png", advice)
        print(f"\nwrote {out}/laws.json and laws.png")


def _memory(
    model: Positional[str],
    image_size: Size | None = None,
    window: Windows | None = None,
    classes: int | None = None,
    batch: int = 1,
    precision: Literal["bfloat16", "float32"] = "bfloat16",
    method: Literal["adamw", "adafactor", "sgd"] = "adamw",
    momentum: Literal["float32", "bfloat16"] = "float32",
    ema: bool = False,
    attention: AttentionPath = "auto",
    sequential: int | None = None,
    gpus: int = 1,
    gpus_per_node: int = 8,
    gpu_memory: str = "",
    check: bool = False,
) -> None:
    """What a training step takes of a GPU: by optimiser, by what is computed again, and over several GPUs by how the net is sharded.

    Args:
        model: a preset, a pattern, or a paper's name, as of `plan count`.
        image_size: pixels, where not the preset's; of a SuperViT one of its sizes.
        window: tokens, where not the preset's.
        classes: of the head, likewise.
        batch: images of each GPU.
        precision: of the activations; bfloat16 is autocast, with weights in float32.
        method: the optimiser of the step.
        momentum: how it is kept.
        ema: a moving average of the weights too.
        attention: the path of it; auto: the one that training takes.
        sequential: of a Swin, how many first stages attend in chunks, in the rows that do; by default 2, as in the paper.
        gpus: over which the net is trained.
        gpus_per_node: over which HSDP shards it.
        gpu_memory: of each, such as 40GB: what fits, the cheapest of that, and the largest batch.
        check: lay the net out on so many ranks that do nothing, and count the bytes of one: a few seconds, with torch.
    """
    from manyscale.plan import memory as planned

    limit = int(_bytes("gpu_memory", gpu_memory) * (1 - planned.FREE)) if gpu_memory else 0
    require(not gpu_memory or limit >= 2**20, "gpu_memory", f"{gpu_memory} is {limit:,} bytes; give a unit, such as 40GB")
    fields = {key: value for key, value in {"image_size": image_size, "window": window, "classes": classes}.items() if value is not None}
    unmet = []
    require(not check or gpus > 1, "check", "there is nothing to share out on one GPU; give --gpus, such as 64")
    for name in list_models(model) or [model]:
        several = isinstance(model_config(name), SuperViTConfig)
        config = model_config(name, **{key: value for key, value in fields.items() if not several or key != "image_size"})
        states = planned.memory(config, method, half=momentum == "bfloat16", ema=ema)
        job = planned.Job(config=config, states=states, precision=precision, batch=batch, size=image_size if several else None)
        stages = sequential
        if stages is None:
            stages = min(2, len(config.depths)) if isinstance(config, SwinConfig) and attention == "auto" else 0
        leans = planned.leans(Memory(attention=attention), stages)
        shardings = planned.shardings(gpus, gpus_per_node)
        if not limit and gpus == 1:
            _show_optimisers(name, config, ema)
        _show_steps(name, job, leans, shardings, limit)
        if check:
            _show_check(config, states, shardings, Optim(method=method, momentum=momentum), gpus, gpus_per_node)
        if limit:
            try:
                print("\n".join(planned.advise(job, leans, shardings, limit)) + "\n")
            except ValueError as error:
                unmet.append(f"{name}: {error}")
    if unmet:
        raise ValueError("\n".join(unmet))


def _bytes(field: str, text: str) -> int:
    try:
        return read_bytes(text)
    except ValueError as error:
        raise ValueError(f"field `{field}`: {error}") from None


def _show_optimisers(name: str, config: NetConfig, ema: bool) -> None:
    from manyscale.plan.memory import METHODS, memory

    rows = []
    for method, half in METHODS:
        found = memory(config, method, half=half, ema=ema)
        sizes = (found.weights, found.gradients, found.optimiser, found.total)
        rows.append((method, "bfloat16" if half else "float32", *(f"{size / 2**30:.2f}" for size in sizes), f"{found.per_parameter:.2f}"))
    header = ("method", "momentum", "weights", "gradients", "optimiser", "total GiB", "optimiser bytes / parameter")
    show(plain_table(header, rows, right=2, title=f"{name}: {found.parameters:,} parameters"))


def _show_steps(name: str, job: Any, leans: dict[str, Memory], shardings: Sequence[Any], limit: int) -> None:
    """A row for each way to keep less, a column for each sharding; where a limit is given, a star where it fits."""
    from manyscale.plan.activations import walk

    def gib(size: int) -> str:
        return f"{size / 2**30:.2f}"

    rows = [("weights, gradients, optimiser", "", "", *(gib(how.states(job.states)) for how in shardings))]
    for lean, memory in leans.items():
        kept, *peaks = walk(job.parts(memory))
        sizes = [job.takes(memory, how) for how in shardings]
        rows.append((lean, gib(kept), gib(max(peaks)), *("*" * (0 < size <= limit) + gib(size) for size in sizes)))
    window = f"/{job.config.window}" if isinstance(job.config, SwinConfig) else ""
    title = f"{name} at {job.size or job.config.image_size}{window}, batch {job.batch}, {job.precision}: GiB of a GPU"
    show(plain_table(("kept less by", "kept", "activations", *(how.name for how in shardings)), rows, right=1, title=title))
    print("kept: what the forward pass leaves for the backward pass; activations: the most alive of a step; then all of a GPU's, with\n"
          "weights, their copies in bfloat16, gradients and the optimiser" + "; * fits, with a tenth left free" * (limit > 0))  # fmt: skip


def _show_check(config: NetConfig, states: Any, shardings: Sequence[Any], optim: Optim, ranks: int, node: int) -> None:
    """What belongs to the weights on a rank, planned and counted."""
    from manyscale.ship.rehearse import rehearse

    began = time.perf_counter()
    found = rehearse(config, states, shardings, optim, ranks=ranks, node=min(node, ranks))
    took = time.perf_counter() - began
    rows = [(each.name, f"{each.planned / 2**30:.3f}", f"{each.found / 2**30:.3f}", f"{each.ratio:.3f}") for each in found]
    title = f"weights, gradients and moments of the first of {ranks} ranks, GiB"
    show(plain_table(("", "planned", "counted", "ratio"), rows, right=1, title=title))
    print(f"counted: laid out by torch, in {took:.1f} s; a weight is cut along its first axis, unevenly where the ranks do not divide it\n")


PLANS: dict[str, tuple[Callable[..., None], str]] = {
    "count": (_count, "MODEL|RECIPE|RUN [--image-size ...] [--window ...] [--classes ...] [--setting ...]"),
    "memory": (_memory, "MODEL [--image-size ...] [--window ...] [--batch ...] [--gpus 64] [--gpu-memory 40GB] [--ema]"),
    "cost": (cost, "RUN [--batch ...] [--latency 20ms | --gflops 2 | --throughput 500 | --accuracy 0.75] [--cascade]"),
    "laws": (_laws, "FILE|RUN ... [--metric ...] [--budget ...] [--out ...]"),
}


def plan(arguments: list[str]) -> None:
    """Answers before you pay: `plan count MODEL` (parameters, GFLOPs), `plan memory MODEL`, `plan cost RUN`, `plan laws FILE`."""
    choose("plan", "what to plan", PLANS, arguments)


def models(arguments: list[str]) -> None:
    """List the presets."""

    def run(pattern: Positional[str] = "*") -> None:
        """Names of presets with their parameters and GFLOPs.

        Args:
            pattern: shell-style, such as "swinv2*".
        """
        from manyscale.plan.count import count

        rows = []
        for name in list_models(pattern):
            config = model_config(name)
            counted = count(config)
            window = str(config.window) if isinstance(config, SwinConfig) else ""
            rows.append((name, f"{counted.parameters:,}", f"{counted.macs / 1e9:.1f}", str(config.image_size), window))
        show(plain_table(("name", "parameters", "GFLOPs", "image", "window"), rows, right=1))

    parse(run, "models", arguments)


def doctor(arguments: list[str]) -> None:
    """Versions, devices, one step of each model family, loader speed."""

    def run() -> None:
        """See whether this machine is ready."""
        from manyscale.ship.doctor import examine

        ill = 0
        for what, finding, well in examine():
            print(f"{'ok  ' if well else 'FAIL'}  {what:24} {finding}", flush=True)
            ill += not well
        if ill:
            raise SystemExit(1)

    parse(run, "doctor", arguments)
