"""`plan cost`: what every setting of a saved net takes on this machine, and which to use for a budget."""

import sys
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from manyscale.cli.parsing import plain_table, show
from manyscale.storage import make_folder


def cost(
    model: Positional[str],
    settings: tuple[str, ...] = (),
    batch: tuple[int, ...] = (8,),
    latency: str = "",
    gflops: float | None = None,
    throughput: float | None = None,
    accuracy: float | None = None,
    cascade: bool = False,
    measured: str = "",
    data: str = "",
    split: str = "val",
    rounds: int = 30,
    precision: Literal["auto", "bfloat16", "float32"] = "float32",
    compile: bool = False,
    seed: int = 0,
    workers: int = -1,
    device: str = "auto",
    out: str = "",
) -> None:
    """Measure every setting in turns, on images of its own size that lie on the device, and answer a budget.

    Args:
        model: a run's folder or a folder with a model.
        settings: such as 160/0.7 of a SuperViT, 192/window=12 of a Swin V2, 192 of a ViT; of a SuperViT by default its whole grid.
        batch: images at a time; a table for each. The picture, and a cascade, are of the first.
        latency: the most a batch may take (its median), such as 20ms.
        gflops: the most multiply-adds of an image, in 10^9.
        throughput: the least images a second.
        accuracy: the least top-1, such as 0.75; the fastest that reaches it.
        cascade: also the best cascade of two settings for the budget; without a budget the fastest that is as accurate as any setting.
        measured: an earlier costs.json of this model and machine, instead of measuring.
        data: a set by name or folder; empty: the one it was trained on.
        split: the held-out pictures; one half chooses temperatures and thresholds, the other is reported.
        rounds: how often every setting is run, after warming up.
        precision: float32, or bfloat16 where the device has it.
        compile: compile every setting, on a CPU with frozen weights: a copy of them for each.
        seed: of the images, the order in each round, and the halves.
        workers: loader processes.
        device: where to compute.
        out: a folder for costs.json, costs.png and cascade.json; empty: the run's.
    """
    from manyscale.plan import switch
    from manyscale.plan.picture import draw_costs
    from manyscale.ship.cascade import write_cascade
    from manyscale.ship.costs import Planner, best_cascade, curve

    if not batch:
        raise ValueError("field `batch`: give at least one number of images, such as 8")
    if settings and measured:
        raise ValueError("give --settings or --measured, not both: a file has its own settings")
    budget = switch.read_budget(latency, gflops, throughput, accuracy)
    bad: dict[str, str] = {}
    planner = Planner(
        model,
        bad.__setitem__,
        settings=None if measured else settings,
        data=data,
        split=split,
        device=device,
        precision=precision,
        compiled=compile,
        workers=workers,
        seed=seed,
    )
    folder = Path(out) if out else (Path(model) if Path(model).is_dir() else Path(model).parent)
    batches = tuple(dict.fromkeys(batch))
    tables = [planner.read(measured, size) for size in batches] if measured else []
    if not measured and (folder / "costs.json").exists():
        switch.check_model(folder / "costs.json", switch.read_costs(folder / "costs.json"), planner.mark)
    planner.check(budget, cascade=cascade, tables=tables, batches=batches, rounds=rounds)
    make_folder(folder)  # where it cannot be made, before anything is measured
    for size in () if measured else batches:
        about = f", and asking them about the pictures of {planner.scored.name}" if planner.scored and not tables else ""
        print(f"measuring {len(planner.settings)} settings, {rounds} rounds at batch {size}{about}", file=sys.stderr, flush=True)
        tables.append(planner.measure(size, rounds))
        switch.add_costs(folder / "costs.json", tables[-1])
    for table in tables:
        _print_costs(table)
    print("\n".join(f"left out {path}: {reason}" for path, reason in bad.items()), file=sys.stderr, end="\n" if bad else "")

    first, found, unmet = tables[0], None, []
    for table in tables if budget else []:
        try:
            print(switch.answer(table, budget))
        except ValueError as error:
            unmet.append(str(error))
    if cascade:
        try:
            found = best_cascade(first, planner.heard, budget)
        except ValueError as error:
            unmet.append(str(error))
    if found:
        write_cascade(folder / "cascade.json", found.cascade)
        print("\n".join(_words(found, first, planner.time_cascade(found.cascade, first.batch, rounds))))
    draw_costs(first, folder / "costs.png", curve(first, planner.heard) if found else (), found and (found.seconds, found.accuracy))
    written = ["costs.json"] * (not measured) + ["costs.png"] + ["cascade.json"] * bool(found)
    which = f"; picture and cascade are of batch {first.batch}" if len(tables) > 1 else ""
    print(f"wrote {', '.join(written)} in {folder}{which}", file=sys.stderr)
    if unmet:
        raise ValueError("\n".join(unmet))


def _print_costs(costs: Any) -> None:
    from manyscale.plan.switch import remarks, table

    header, *rows = table(costs)
    show(plain_table(header, rows, right=2, title=costs.key))
    ratios = {cell.setting: costs.speed_up(cell) / costs.saving(cell) for cell in costs.cells}
    least = min(ratios, key=ratios.__getitem__)
    print("* no other setting is as fast and better; ms and p95 of a batch; peak besides weights and images; speed-up over "
          f"{costs.full.setting};\n  the least speed-up / GFLOPs saved is {ratios[least]:.2f}, of {least}")  # fmt: skip
    if costs.data:
        print(f"  top-1 on {costs.data}, {costs.pictures:,} pictures; ECE before and after scaling by T, chosen on one half, of the other")
    else:
        print("  no accuracy: no data given, and no recipe.json that names some; the front is of time and GFLOPs")
    print("".join(f"{remark}\n" for remark in remarks(costs)))


def _words(found: Any, costs: Any, spent: tuple[float, list[float]] | None) -> list[str]:
    """A cascade, beside what one setting alone gives, and what it really took."""
    cascade = found.cascade
    first, second = cascade.settings
    lines = [
        f"cascade for {cascade.aim}: {first}, and {second} where {first} is less than {cascade.thresholds[0]:.4f} sure: "
        f"{cascade.shares[1]:.1%} of pictures go on; top-1 {cascade.accuracy:.2%} at {cascade.cost} on average"
    ]
    if found.alone:
        alone = f"alone, {found.alone.setting} has {found.alone.reported:.2%} at {found.alone_says}"
        lines.append(f"  {alone}: the cascade {found.gain} (on pictures that neither was chosen on)")
    if spent:
        seconds, shares = spent
        parts = [cell.p50 for setting in cascade.settings for cell in costs.cells if cell.setting == setting]
        expected = sum(share * part for share, part in zip(shares, parts, strict=True))
        went = f"{1e3 * seconds:.4g} ms on average where {shares[1]:.1%} go on"
        alone = f", {found.alone.setting} alone takes {1e3 * found.alone.p50:.4g} ms" if found.alone else ""
        lines.append(f"  run on real batches, resizing included: {went}; the settings' own times come to {1e3 * expected:.4g} ms{alone}")
    return lines
