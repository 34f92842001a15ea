"""Finished runs as points of a scaling law: from CSV and JSON tables, and from the folders that `train` leaves."""

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from manyscale.config import NetConfig, Run, ViTConfig, from_dict, nearest
from manyscale.plan.count import count
from manyscale.plan.laws import Point
from manyscale.presets import model_config
from manyscale.storage import JSON_BYTES, parse_json, read_json, read_text

TRAINING = 6  # FLOPs of training per multiply-add of the forward pass: twice for an addition, thrice for the backward pass


def training_flops(config: NetConfig, images: float) -> float:
    """What showing so many images to a net costs, forward and backward, in FLOPs (an addition is one)."""
    return TRAINING * count(config).macs * images


def read_points(paths: Sequence[str], metric: str = "", *, flops_per_unit: float = 1.0) -> list[Point]:
    """The runs of all files and folders.

    A table has a row a run: `compute`, or `model` (a preset, or the paper's name such as B/16; then `image_size` may be
    given) with `images` or `steps` and `batch`; and the metric. Rows whose metric is empty are left out. A folder holds a
    run, or runs below it, each with summary.json and recipe.json; of a trunk with branches the branches, since the trunk's
    own rate never came down.

    Args:
        metric: the column, or the metric of an evaluation. Empty: `error` or `accuracy`, whichever is there. What is
            called an error or a loss is one; anything else is an accuracy, in per cent where a number exceeds 1.
        flops_per_unit: what `compute` is counted in, where it follows from model and images.

    Raises:
        ValueError: a file that cannot be read, or a row that is no run; named with the fix.
    """
    points: list[Point] = []
    for path in map(Path, paths):
        if path.is_dir():
            folders = _folders(path)
            if not folders:
                raise ValueError(f"{path}: no run here or below: no summary.json")
            points += [_of_run(folder, metric, flops_per_unit) for folder in folders]
        elif path.name == "summary.json":
            points += [_of_run(folder, metric, flops_per_unit) for folder in _folders(path.parent)]
        else:
            points += _of_table(path, metric, flops_per_unit)
    return points


def _folders(path: Path) -> list[Path]:
    """The folders of finished runs at or below `path`."""
    if not (path / "summary.json").exists():
        below = sorted({file.parent for file in path.glob("*/**/summary.json")}, key=lambda folder: (len(folder.parts), folder))
        first = [folder for folder in below if not any(other in folder.parents for other in below)]
        return [found for folder in first for found in _folders(folder)]
    branches = read_json(path / "summary.json").get("branches")
    return [path] if branches is None else [path / name for name in branches]


def _of_run(folder: Path, metric: str, flops_per_unit: float) -> Point:
    summary, recipe = read_json(folder / "summary.json"), folder / "recipe.json"
    run = from_dict(Run, read_json(recipe), str(recipe))
    last = summary.get("last", {})  # not the best: what a run was before its end is no run of that compute
    name = metric or "accuracy"
    if not isinstance(last.get(name), (int, float)):
        raise ValueError(
            f"{folder}/summary.json: no metric `{name}`; {nearest(name, [key for key in last if key not in ('step', 'epoch')])}"
        )
    images = float(summary["steps"]) * run.batch
    compute = training_flops(run.model, images) / flops_per_unit
    return Point(compute, _as_error(name, last[name], 1.0), _words(run.model), images, str(folder))


def _words(net: NetConfig) -> str:
    """A net in a few words."""
    if isinstance(net, ViTConfig):
        return f"ViT {net.width} x {net.depth}, patch {net.patch}, {net.image_size} px"
    return f"Swin {net.width} x {'-'.join(map(str, net.depths))}, patch {net.patch}, {net.image_size} px"


def _of_table(path: Path, metric: str, flops_per_unit: float) -> list[Point]:
    rows = _read_rows(path)
    if not rows:
        raise ValueError(f"{path}: no rows")
    columns = list(rows[0])
    name = metric or next((known for known in ("error", "accuracy") if known in columns), "")
    if name not in columns:
        asked = f"no column `{name}`; {nearest(name, columns)}" if name else f"say which column to fit, --metric: {', '.join(columns)}"
        raise ValueError(f"{path}: {asked}")
    enough = "compute" in columns or ("model" in columns and ("images" in columns or "steps" in columns))
    if not enough:
        raise ValueError(f"{path}: needs a column `compute`, or `model` with `images` or `steps` and `batch`; it has {', '.join(columns)}")
    seen: dict[str, int] = {}
    for place, row in enumerate(rows, 2):
        first = seen.setdefault(json.dumps(row, sort_keys=True), place)
        if first != place:
            raise ValueError(f"{path}: row {place} is row {first} again; leave one out: it would count twice in the bands")
    filled = [(place, row) for place, row in enumerate(rows, 2) if str(row.get(name) or "").strip()]
    values = [_number(row, name, path, place) for place, row in filled]
    scale = 100.0 if values and max(values) > 1 else 1.0
    points = []
    for (place, row), value in zip(filled, values, strict=True):
        where = f"{path} row {place}"
        images = _images(row, path, place)
        if str(row.get("compute") or "").strip():
            compute = _number(row, "compute", path, place)
        else:
            fields = {"image_size": int(row["image_size"])} if str(row.get("image_size") or "").strip() else {}
            try:
                config = model_config(str(row["model"]), **fields)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            compute = training_flops(config, images) / flops_per_unit
        points.append(Point(compute, _as_error(name, value, scale), str(row.get("model") or ""), images, where))
    return points


def _read_rows(path: Path) -> list[dict[str, Any]]:
    text = read_text(path, JSON_BYTES)
    if path.suffix == ".json":
        rows = parse_json(text, str(path))
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{path}: expected a list of objects, one a run")
        return rows
    reader = csv.DictReader(text.splitlines())
    rows = list(reader)
    for place, row in enumerate(rows, 2):
        if None in row or None in row.values():
            raise ValueError(f"{path} row {place}: {len(reader.fieldnames or [])} columns are named, and not as many given")
    return rows


def _number(row: dict[str, Any], name: str, path: Path, place: int) -> float:
    try:
        value = float(row[name])
    except (TypeError, ValueError):
        raise ValueError(f"{path} row {place}: `{name}` is {row[name]!r}, not a number") from None
    if not math.isfinite(value):
        raise ValueError(f"{path} row {place}: `{name}` is {value}, not a finite number")
    return value


def _images(row: dict[str, Any], path: Path, place: int) -> float:
    if str(row.get("images") or "").strip():
        return _number(row, "images", path, place)
    if not str(row.get("steps") or "").strip():
        return 0.0
    batch = next((name for name in ("batch", "batch_equiv") if str(row.get(name) or "").strip()), "")
    if not batch:
        raise ValueError(f"{path} row {place}: `steps` without `batch`; give one of `batch` and `images`")
    return _number(row, "steps", path, place) * _number(row, batch, path, place)


def _as_error(name: str, value: float, scale: float) -> float:
    return value / scale if "error" in name or "loss" in name else 1 - value / scale
