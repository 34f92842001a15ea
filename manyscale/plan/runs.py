"""Finished runs as points of a scaling law: from CSV and JSON tables, and from the folders that `train` leaves."""

import csv
import json
import math
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from statistics import median
from typing import Any

from manyscale.config import NetConfig, Run, SwinConfig, ViTConfig, from_dict, nearest
from manyscale.plan.count import count
from manyscale.plan.laws import Point
from manyscale.presets import model_config
from manyscale.storage import JSON_BYTES, parse_json, read_json, read_text

TRAINING = 6  # FLOPs of training per multiply-add of the forward pass: twice for an addition, thrice for the backward pass
COLUMNS = ("model", "image_size", "images", "steps", "batch", "batch_equiv", "compute", "error", "accuracy")  # that a table may have


def training_flops(config: NetConfig, images: float) -> float:
    """What showing so many images to a net costs, forward and backward, in FLOPs (an addition is one)."""
    return TRAINING * count(config).macs * images


def speed(folder: Path) -> float:
    """Images per second that the run in a folder was trained at, the median of what it logged; 0 where it logged nothing, or is no run."""
    log = folder / "metrics.jsonl"
    records = [parse_json(line, str(log)) for line in read_text(log, JSON_BYTES).splitlines()] if log.is_file() else []
    return median([record["images_per_second"] for record in records if "images_per_second" in record] or [0.0])


def read_points(paths: Sequence[str], metric: str = "", *, flops_per_unit: float = 1.0) -> list[Point]:
    """The runs of all files and folders.

    A table has a row a run: `compute`, or `model` (a preset, or the paper's name such as B/16; then `image_size` may be
    given) with `images` or `steps` and `batch`; and the metric. Rows whose metric is empty are left out. A folder holds a
    run, or runs below it, each with summary.json and recipe.json; of a trunk with branches the branches, since the trunk's
    own rate never came down.

    Args:
        metric: the column, or the metric of an evaluation. Empty: `error` or `accuracy`, whichever is there. What is
            called a loss is taken as it is; what is called an error is one, and anything else an accuracy, both in per cent
            where a number exceeds 1.
        flops_per_unit: what `compute` is counted in, where it follows from model and images.

    Raises:
        ValueError: a file that cannot be read, a row that is no run, or a run given twice; named with the fix.
    """
    points: list[Point] = []
    seen: dict[str, str] = {}  # folders and rows, and where they were given first
    for path in map(Path, paths):
        if not path.is_dir() and path.name != "summary.json":
            points += _of_table(path, metric, flops_per_unit, seen)
            continue
        folders = _folders(path if path.is_dir() else path.parent)
        if not folders:
            raise ValueError(f"{path}: no run here or below: no summary.json")
        for folder in folders:
            _once(str(folder.resolve()), str(folder), seen)
            points.append(_of_run(folder, metric, flops_per_unit))
    return points


def _once(run: str, where: str, seen: dict[str, str]) -> None:
    if run in seen:
        raise ValueError(f"{where} is {seen[run]} again; leave one out: it would count twice in the bands")
    seen[run] = where


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
    if not isinstance(summary.get("steps"), int) or summary["steps"] < 1:
        raise ValueError(
            f"{folder}/summary.json: `steps` is {summary.get('steps')!r}, not the number of steps; only finished runs are points"
        )
    images = float(summary["steps"]) * run.batch
    compute = training_flops(run.model, images) / flops_per_unit
    return Point(compute, _as_error(name, last[name], 1.0), _words(run.model, folder), images, str(folder), loss="loss" in name)


def _words(net: NetConfig, folder: Path) -> str:
    """A net in a few words."""
    if isinstance(net, ViTConfig):
        return f"ViT {net.width} x {net.depth}, patch {net.patch}, {net.image_size} px"
    if not isinstance(net, SwinConfig):
        raise ValueError(f"{folder}: a net of many settings, several of them in a step, is no point of one compute; leave it out")
    return f"Swin {net.width} x {'-'.join(map(str, net.depths))}, patch {net.patch}, {net.image_size} px"


def _of_table(path: Path, metric: str, flops_per_unit: float, seen: dict[str, str]) -> list[Point]:
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
    for column in columns:
        if column not in COLUMNS and column != name and (meant := get_close_matches(column, COLUMNS, 1, 0.85)) and meant[0] not in columns:
            raise ValueError(f"{path}: column `{column}`: did you mean `{meant[0]}`? Rename it, or leave it out")
    for place, row in enumerate(rows, 2):
        _once(json.dumps(row, sort_keys=True), f"{path} row {place}", seen)
    filled = [(place, row) for place, row in enumerate(rows, 2) if _given(row, name)]
    values = [_number(row, name, path, place) for place, row in filled]
    loss = "loss" in name
    scale = 100.0 if values and max(values) > 1 and not loss else 1.0
    points = []
    for (place, row), value in zip(filled, values, strict=True):
        where = f"{path} row {place}"
        images = _images(row, path, place)
        if _given(row, "compute"):
            compute = _number(row, "compute", path, place)
        elif not (_given(row, "model") and images):
            raise ValueError(f"{where}: no `compute`, and no `model` with `images` or `steps`; give one or the other")
        else:
            fields = {"image_size": round(_positive(row, "image_size", path, place))} if _given(row, "image_size") else {}
            try:
                config = model_config(str(row["model"]), **fields)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            compute = training_flops(config, images) / flops_per_unit
        points.append(Point(compute, _as_error(name, value, scale), str(row.get("model") or ""), images, where, loss))
    return points


def _read_rows(path: Path) -> list[dict[str, Any]]:
    text = read_text(path, JSON_BYTES).removeprefix("\ufeff")  # which spreadsheets write
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


def _given(row: dict[str, Any], name: str) -> bool:
    return row.get(name) is not None and str(row[name]).strip() != ""


def _positive(row: dict[str, Any], name: str, path: Path, place: int) -> float:
    value = _number(row, name, path, place)
    if value <= 0:
        raise ValueError(f"{path} row {place}: `{name}` is {value:g}, which must be positive")
    return value


def _number(row: dict[str, Any], name: str, path: Path, place: int) -> float:
    try:
        value = float(row[name])
    except (TypeError, ValueError):
        raise ValueError(f"{path} row {place}: `{name}` is {row[name]!r}, not a number") from None
    if not math.isfinite(value):
        raise ValueError(f"{path} row {place}: `{name}` is {value}, not a finite number")
    return value


def _images(row: dict[str, Any], path: Path, place: int) -> float:
    if _given(row, "images"):
        return _positive(row, "images", path, place)
    if not _given(row, "steps"):
        return 0.0
    batch = next((name for name in ("batch", "batch_equiv") if _given(row, name)), "")
    if not batch:
        raise ValueError(f"{path} row {place}: `steps` without `batch`; give one of `batch` and `images`")
    return _positive(row, "steps", path, place) * _positive(row, batch, path, place)


def _as_error(name: str, value: float, scale: float) -> float:
    return value / scale if "error" in name or "loss" in name else 1 - value / scale
