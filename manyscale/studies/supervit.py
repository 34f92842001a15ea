"""SuperViT in miniature: one net for twelve costs, against nets that learnt at one size with all their tokens."""

from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from manyscale.config import Augment, Input, Run, Schedule, Setting, Supernet
from manyscale.data.loader import eval_batches
from manyscale.data.sources import DIGITS, open_splits
from manyscale.data.transforms import eval_transform
from manyscale.models import load
from manyscale.plan.count import count
from manyscale.plan.switch import front
from manyscale.recipes.supervit import supervit_cifar10
from manyscale.storage import read_json, write_json
from manyscale.studies.grid import Outcome, run_grid
from manyscale.studies.study import COLOURS, Section, Terms, Values, band, cell, compare, conclude, plain
from manyscale.tasks.supernet import score_settings
from manyscale.train.state import pick_device, pick_precision

NET = {"width": 64, "heads": 2, "mlp_width": 256}  # otherwise the recipe's
QUICK, FULL = (2_500, 10_000), (50_000, 200_000)  # pictures there are at most, and shown in all
PAPER = """SuperViT on ImageNet-1k, DeiT-S (its repository's table): 80.62 % at 224 px with all tokens and 4.60 billion multiply-adds,
80.50 % at keep rate 0.7 (3.01), 79.95 % at 0.5 (2.30), and 73.75 % at 128 px and 0.5 (0.74); DeiT-S itself 79.8 %. Nine of
the twelve settings are on the front of accuracy and cost: what is dominated is keeping every token at the three smaller
sizes."""


def study(terms: Terms) -> dict[str, Any]:
    """Train the net of many settings and one net per size, and run all of them at every setting."""
    base = supernet(terms, 0)
    settings, whole = base.model.settings, base.model.size[0]
    sizes = sorted(base.model.sizes)
    asked = [(size, seed) for size in (0, *reversed(sizes)) for seed in range(terms.seeds)]  # 0: the net of all
    runs = [alone(terms, size, seed) if size else supernet(terms, seed) for size, seed in asked]
    outcomes = dict(zip(asked, run_grid(runs, terms.console), strict=True))
    found: dict[tuple[int, Setting], Values] = {}
    for size in (0, *sizes):
        cells = [at_every_setting(terms, outcomes[size, seed], settings) for seed in range(terms.seeds)]
        for setting in settings:
            found[size, setting] = [each and each[str(setting)] for each in cells]

    costs = {setting: count(base.model, setting).macs / 1e6 for setting in settings}
    means = {setting: _mean(found[0, setting]) for setting in settings}
    best = [settings[i] for i in front([(costs[setting], means[setting]) for setting in settings])]
    rows = []
    for setting in settings:
        nets = (found[size, setting] for size in (0, whole, setting.size))
        left, cost = base.model.counts(setting)[-1], f"{costs[setting]:.1f}"
        rows.append((str(setting), str(left), cost, *map(cell, nets), "yes" if setting in best else ""))
    findings = [f"{len(best)} of {len(settings)} settings are on the front of mean accuracy and cost: {', '.join(map(str, best))}"]
    for setting in settings:
        claim = 0 if setting == settings[-1] else 1
        name = f"{setting}: the net of all settings over the one trained at {whole} px alone"
        findings.append(compare(name, found[0, setting], found[whole, setting], claim=claim))
    for setting in settings:
        if setting.size != whole:
            name = f"{setting}: over the one trained at {setting.size} px alone"
            findings.append(compare(name, found[0, setting], found[setting.size, setting]))
    return conclude(
        terms,
        "SuperViT: one net for twelve costs",
        sections=[
            Section("Top-1 %", ("setting", "patches at the end", "million multiply-adds", "one net for all", f"trained at {whole} px alone",
                                "trained at that size alone", "on the front"), rows),
        ],
        findings=findings,
        paper=PAPER,
        method=_describe(base),
        values={f"{size or 'all'}, {setting}": values for (size, setting), values in found.items()},
        picture=_draw(found, settings, costs, sizes),
    )  # fmt: skip


def supernet(terms: Terms, seed: int) -> Run:
    """The net of all settings."""
    run = supervit_cifar10()
    data = Input(
        data=terms.data, held_out=1_000 if terms.quick else 0, statistics="half", crop_ratio=1.0, workers=0, cache=True, resident=True
    )
    pictures = len(open_splits(replace(data, cache=False), 0).train)
    most, shown = QUICK if terms.quick else FULL
    share = min(1.0, most / pictures)
    epochs = max(1, round(shown / (share * pictures)))
    return replace(
        run,
        recipe=f"all settings seed {seed}",
        model=replace(run.model, positions="interpolated", **NET),
        supernet=Supernet(watch="corners"),
        input=replace(data, share=share),
        augment=Augment(scale=(0.5, 1.0), flip=0.0 if terms.data == DIGITS else 0.5),
        schedule=Schedule(epochs=epochs, warmup=epochs / 12, evaluate_every=epochs, save_minutes=2.0, keep=1),
        precision="float32",
        compile=terms.compile,
        seed=seed,
        out=str(terms.out / f"all-{seed}"),
        log_every=10,
    )


def alone(terms: Terms, size: int, seed: int) -> Run:
    """The same net, shown as many pictures, all of them at one size and with every token."""
    run = supernet(terms, seed)
    model = replace(run.model, sizes=(size,), keeps=(1.0,))
    return replace(run, recipe=f"{size} px seed {seed}", model=model, out=str(terms.out / f"alone-{size}-{seed}"))


def at_every_setting(terms: Terms, outcome: Outcome, settings: tuple[Setting, ...]) -> dict[str, float] | None:
    """Top-1 of a run's net at every setting, whatever it learnt, kept in its folder; None where it diverged."""
    if outcome.summary is None:
        return None
    file = Path(outcome.run.folder) / "settings.json"
    if not file.exists():
        terms.console.print(f"  {outcome.run.recipe} at every setting")
        model, device = load(outcome.run.folder), pick_device(outcome.run.device)
        source = open_splits(outcome.run.input, outcome.run.seed).val
        preprocess = replace(model.preprocess, image_size=(max(s.size for s in settings),) * 2)
        batches = eval_batches(source, eval_transform(preprocess), batch=256, workers=0)
        scores = score_settings(model.to(device), batches, settings, device, pick_precision("float32", device), lambda path, reason: None)
        write_json(file, {str(setting): scores[f"accuracy {setting}"] for setting in settings})
    return read_json(file)


def _describe(run: Run) -> str:
    model, optim = run.model, run.optim
    sizes, drops, keeps = (", ".join(map(str, values)) for values in (model.sizes, model.drop_blocks, model.keeps))
    return (
        f"ViT of width {model.width}, {model.depth} blocks, {model.heads} heads, patch {model.patch}, at {sizes} px; blocks {drops} (from "
        f"0) drop tokens, keep rates {keeps}. One position table, resized to every size, so that nets of one size have positions at the "
        f"others. {run.input.data}, {run.input.share:.0%} of its training pictures, {run.schedule.epochs} epochs, batch {run.batch}, "
        f"{run.precision}, AdamW, rate {optim.lr:g}, decay {optim.weight_decay:g}, crops of at least {run.augment.scale[0]:.0%} of the "
        "area. The net of all settings makes the paper's four passes a step, the others one, at one size with every token, on as many "
        f"pictures: at the largest size that is {_passes(run):.2f} times less computing. Every net is run at every setting, once, at the "
        "end, on held-out pictures."
    )


def _passes(run: Run) -> float:
    """What a step of the paper's costs on average, in passes of the whole net at the largest size."""
    model = run.model
    macs = {setting: count(model, setting).macs for setting in model.settings}
    *smaller, largest = sorted(model.sizes)
    dropping = [keep for keep in model.keeps if keep < 1]

    def pair(size: int) -> float:
        return macs[Setting(size=size)] + fmean(macs[Setting(size=size, keep=keep)] for keep in dropping)

    return (pair(largest) + fmean(map(pair, smaller))) / macs[Setting(size=largest)]


def _mean(values: Values) -> float:
    return fmean(value or 0.0 for value in values)


def _draw(found: dict[tuple[int, Setting], Values], settings: tuple[Setting, ...], costs: dict[Setting, float], sizes: list[int]) -> Figure:
    figure = Figure(figsize=(10.5, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, others, title in ((left, [max(sizes)] * len(sizes), f"against one trained at {max(sizes)} px"),
                                (right, sizes, "against one trained at that size")):  # fmt: skip
        plain(axes, xlabel="million multiply-adds", xscale="log", title=title)
        for size, other, colour in zip(sizes, others, COLOURS, strict=False):
            here = [setting for setting in settings if setting.size == size]
            x = [costs[setting] for setting in here]
            band(axes, x, [found[0, setting] for setting in here], colour, f"one net for all, {size} px")
            axes.plot(x, [100 * _mean(found[other, setting]) for setting in here], "--", color=colour, marker="o", ms=3, lw=1, alpha=0.7)
        ticks = [costs[setting] for setting in settings if setting.is_full]
        axes.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
        axes.minorticks_off()
    left.plot([], [], "--", color="#6b7680", label="trained alone, at the size in the title")
    left.set_ylabel("top-1, %")
    left.legend(frameon=False, fontsize=8)
    return figure
