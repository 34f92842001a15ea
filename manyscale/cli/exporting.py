"""`export`: a trained net as a file that other engines run."""

import sys
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from manyscale.cli.parsing import parse
from manyscale.config import Setting


def _export(
    model: Positional[str],
    format: Literal["torch", "onnx", "openvino"] = "onnx",
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    int8: bool = False,
    setting: str = "",
    data: str = "",
    split: str = "val",
    pictures: int = 2_000,
    out: str = "",
) -> None:
    """Write a trained net for another engine, for any batch of images of one size; the file is run and compared before it is kept.

    Args:
        model: a run's folder or a folder with a model.
        format: torch (torch.export), onnx (ONNX Runtime and others), or openvino.
        dtype: of the weights, and what is computed in; openvino's bfloat16 is computed in alone.
        int8: weights and activations in 8 bits, their ranges chosen on training pictures; says what it costs in accuracy.
        setting: size and cost: 160/0.7 of a SuperViT, 384/window=24 of a Swin V2, 384 of a ViT; empty: the net's own size, whole.
        data: the set that int8 is calibrated and scored on; empty: the one the net was trained on.
        split: what it is scored on.
        pictures: of that split, drawn at random; 0: all of them.
        out: a folder; empty: one in export/ beside the model.
    """
    from manyscale.models import load
    from manyscale.ship.evaluate import open_scored
    from manyscale.ship.export import calibration, export, score

    at = Setting.read(setting) if setting else None
    if pictures < 0:
        raise ValueError(f"field `pictures`: {pictures} must be 0 (all of the split) or more")
    net = load(model).float()
    words = [format, dtype if dtype != "float32" else "", "int8" if int8 else "", setting.replace("/", "-")]
    folder = Path(out or (Path(model) if Path(model).is_dir() else Path(model).parent) / "export" / "-".join(filter(None, words)))
    scored = open_scored(model, net, data, split) if int8 else None  # what is wrong with it is said before the work
    samples = calibration(model, net, at, data) if int8 else None
    written = export(net, folder, format=format, dtype=dtype, setting=at, calibration=samples)
    shape = " x ".join(map(str, written.card["images"]))
    print(f"wrote {folder}/{written.card['file']}: float32 images ({shape}) -> logits; export.json says how they are prepared")
    print(f"its logits differ from the net's by {written.difference:.1g} of the largest" + ", on random images" * int8)
    if scored:
        found = score(scored, net, folder, at, pictures=pictures, report=_left_out)
        print(f"accuracy on {found.pictures} pictures of {found.name}: {found.net:.4f} in float32, {found.file:.4f} in int8")


def _left_out(path: str, reason: str) -> None:
    print(f"left out {path}: {reason}", file=sys.stderr)


def export(arguments: list[str]) -> None:
    """A net as a file for torch.export, ONNX Runtime or OpenVINO, run and compared before it is kept."""
    parse(_export, "export", arguments)
