"""Verbs that answer before you pay: plan, models, doctor."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from manyscale.cli.costing import cost
from manyscale.cli.parsing import parse, plain_table, show
from manyscale.config import Setting, Size, SuperViTConfig, SwinConfig, ViTConfig, Windows, nearest
from manyscale.presets import list_models, model_config
from manyscale.storage import write_json


def _count(
    model: Positional[str],
    image_size: Size | None = None,
    window: Windows | None = None,
    classes: int | None = None,
    setting: str = "",
) -> None:
    """Parameters and multiply-adds by stage, and of a SuperViT the multiply-adds of all its settings.

    Args:
        model: a preset, such as swinv2_tiny, a pattern, such as "swinv2*", or a paper's name, such as G/14.
        image_size: pixels, where not the preset's.
        window: tokens, likewise.
        classes: of the head, likewise.
        setting: how it is run, such as 160/0.7 of a SuperViT, 192/window=12 of a Swin V2, 192 of a ViT; empty: at its own size, whole.
    """
    from manyscale.plan import count as counting

    at = Setting.read(setting) if setting else None

    fields = {key: value for key, value in {"image_size": image_size, "window": window, "classes": classes}.items() if value is not None}
    for name in list_models(model) or [model]:
        if image_size is not None and isinstance(model_config(name), SuperViTConfig):
            raise ValueError(f"field `image_size`: {name} has several; give one with --setting {image_size}")
        config = model_config(name, **fields)
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
    rows = [
        (p.model or p.label, f"{p.images:.3g}" if p.images else "", f"{p.compute:.4g}", f"{p.error:.2%}", f"{r:+.2%}") for p, r in pairs
    ]
    show(
        plain_table(
            ("model", "images", unit, "error", "over the law"),
            rows,
            right=1,
            title=f"{len(fit.frontier)} of {len(points)} runs ({frontier})",
        )
    )
    print(f"\n{fit.law}   C in {unit}, rmse {100 * fit.rmse:.2f} points")
    spreads = {name: fit.spread(name) for name in "abcd"} if fit.resampled else {}
    if spreads:
        print("95 % of the resampled laws: " + ", ".join(f"{name} {low:.3g} to {high:.3g}" for name, (low, high) in spreads.items()))
    advice = None if budget is None else advise(fit, budget, per_unit)
    if advice:
        band = " [{:.1%}, {:.1%}]".format(*advice.band) if advice.band else ""
        print(f"\n{budget:g} {unit}: error {advice.error:.1%}{band}")
        print(f"  train {advice.model} on {advice.images:.3g} images" if advice.model else "  the runs do not say which model they were")
        if advice.extrapolated:
            print(f"  EXTRAPOLATED: {advice.extrapolated}; the band holds only if the law does")
    if out:
        from manyscale.plan.picture import draw

        result = {"law": fit.law._asdict(), "bands": spreads, "rmse": fit.rmse, "frontier": [p._asdict() for p in fit.frontier]}
        result |= {"residuals": fit.residuals, "unit": unit, "mode": frontier, "advice": advice._asdict() if advice else None}
        write_json(Path(out) / "laws.json", result)
        draw(points, fit, unit, Path(out) / "laws.png", advice)
        print(f"\nwrote {out}/laws.json and laws.png")


def _memory(model: Positional[str], classes: int | None = None, ema: bool = False) -> None:
    """Weights, gradients and optimiser state of training, by optimiser.

    Args:
        model: a preset, a pattern, or a paper's name, as of `plan count`.
        classes: of the head, where not the preset's.
        ema: a moving average of the weights too.
    """
    from manyscale.plan.memory import METHODS, memory

    for name in list_models(model) or [model]:
        config = model_config(name, **({} if classes is None else {"classes": classes}))
        rows = []
        for method, half in METHODS:
            found = memory(config, method, half=half, ema=ema)
            sizes = (found.weights, found.gradients, found.optimiser, found.total)
            rows.append(
                (method, "bfloat16" if half else "float32", *(f"{size / 2**30:.2f}" for size in sizes), f"{found.per_parameter:.2f}")
            )
        header = ("method", "momentum", "weights", "gradients", "optimiser", "total GiB", "optimiser bytes / parameter")
        show(plain_table(header, rows, right=2, title=f"{name}: {found.parameters:,} parameters"))
    print("activations come on top, with batch and image size")


PLANS: dict[str, tuple[Callable[..., None], str]] = {
    "count": (_count, "MODEL [--image-size ...] [--window ...] [--classes ...] [--setting ...]"),
    "memory": (_memory, "MODEL [--classes ...] [--ema]"),
    "cost": (cost, "RUN [--batch ...] [--latency 20ms | --gflops 2 | --throughput 500 | --accuracy 0.75] [--cascade]"),
    "laws": (_laws, "FILE|RUN ... [--metric ...] [--budget ...] [--out ...]"),
}


def plan(arguments: list[str]) -> None:
    """Answers before you pay: `plan count MODEL` (parameters, GFLOPs), `plan memory MODEL`, `plan cost RUN`, `plan laws FILE`."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("\n".join(f"manyscale plan {name} {usage}" for name, (_, usage) in PLANS.items()))
        if not arguments:
            raise ValueError(f"give what to plan: {', '.join(PLANS)}")
        return
    if arguments[0] not in PLANS:
        raise ValueError(f"unknown plan `{arguments[0]}`; {nearest(arguments[0], PLANS)}")
    parse(PLANS[arguments[0]][0], f"plan {arguments[0]}", arguments[1:])


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
