"""`bench`: how fast a net is on this machine, beside other packages' nets with the same weights."""

import sys
from functools import partial
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from manyscale.cli.parsing import parse, plain_table, show
from manyscale.config import Setting, Size, SuperViTConfig, Windows
from manyscale.config.memory import AttentionPath
from manyscale.presets import model_config
from manyscale.storage import origin, write_json


def _bench(
    model: Positional[str],
    against: tuple[str, ...] = ("timm",),
    image_size: Size | None = None,
    window: Windows | None = None,
    setting: str = "",
    attention: tuple[AttentionPath, ...] = ("auto",),
    batch: int = 8,
    dtype: Literal["float32", "bfloat16"] = "float32",
    train: bool = False,
    compile: bool = False,
    rounds: int = 15,
    threads: int = 0,
    device: str = "auto",
    out: str = "",
) -> None:
    """Time a net beside other packages' nets with the same weights: logits compared first, then all in turns.

    Args:
        model: a preset, such as swinv2_tiny, vit_small_patch16 or supervit_deit_small.
        against: packages, of timm, transformers and torchvision.
        image_size: pixels, where not the preset's.
        window: tokens, of a Swin, likewise.
        setting: of a SuperViT, such as 160/0.7; its peers run the whole net.
        attention: paths of this package's attention, each timed as a net of its own: auto fused sequential kernel.
        batch: images at a time.
        dtype: of weights and images; in training, of autocast.
        train: a forward and backward pass, instead of inference.
        compile: every net also compiled (a minute or more each, before anything is timed).
        rounds: how often every net is run, after warming up.
        threads: of the CPU; 0: as torch takes them.
        device: where to compute.
        out: a folder for bench.json and bench.png; empty: only the table.
    """
    import torch

    from manyscale.ship.bench import bench, draw
    from manyscale.train.state import pick_device

    if threads < 0:
        raise ValueError(f"field `threads`: {threads} must be 0 (as torch takes them) or more")
    given = {"image_size": image_size, "window": window}
    config = model_config(model, **{key: value for key, value in given.items() if value is not None}, drop_path=0.0)
    at = Setting.read(setting) if setting else None
    if at and not isinstance(config, SuperViTConfig):
        raise ValueError(f"field `setting`: {model} has no settings of its own; give --image-size and --window")
    if threads:
        torch.set_num_threads(threads)
    names = tuple(name for part in against for name in part.split(","))
    report = partial(print, file=sys.stderr, flush=True)
    found = bench(
        model, config, names, batch=batch, device=pick_device(device), precision=getattr(torch, dtype), training=train,
        compiled=compile, setting=at, paths=attention, report=report, rounds=rounds,
    )  # fmt: skip
    _print(found)
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
        write_json(Path(out) / "bench.json", _values(found))
        draw(found, Path(out) / "bench.png")
        report(f"wrote bench.json and bench.png in {out}")


def _print(found: Any) -> None:
    about = found.about
    what = f"{'training step' if about['training'] else 'inference'}, {about['precision']}, batch {about['batch']}"
    title = f"{found.model} at {about['setting'] or 'x'.join(map(str, about['image size']))}: {what}"
    header = ("", "ms", "spread", "images/s", "GFLOP/s", "of a product", "over the fastest peer", "peak MiB", "difference")
    rows = []
    for row in found.rows:
        rows.append((
            row.label, f"{1e3 * row.p50:.1f}", f"{1e3 * row.p25:.1f} - {1e3 * row.p75:.1f}", f"{found.batch / row.p50:.1f}",
            f"{2 * found.rate(row) / 1e9:.0f}", f"{found.rate(row) / found.product:.0%}", f"{found.ratio(row):.2f}",
            "" if row.peak is None else f"{row.peak / 2**20:.0f}", f"{row.difference:.1g}",
        ))  # fmt: skip
    show(plain_table(header, rows, right=1, title=title))
    print(
        f"median and quartiles of {about['rounds']} rounds in turns; {about['device']}, {about['threads']} threads, "
        f"torch {about['torch']};\n"
        f"a large matrix product: {2 * found.product / 1e9:.0f} GFLOP/s, a multiply-add as two;\n"
        "over the fastest peer: times as fast, compiled beside compiled; difference: from our logits in float32, of the largest"
    )


def _values(found: Any) -> dict[str, Any]:
    rows = [{**row._asdict(), "ratio": found.ratio(row), "of_product": found.rate(row) / found.product} for row in found.rows]
    return {"model": found.model, **origin(), **found.about, "product": found.product, "rows": rows}


def bench(arguments: list[str]) -> None:
    """Speed beside timm, transformers and torchvision, with the same weights: `bench swinv2_tiny --against timm`."""
    parse(_bench, "bench", arguments)
