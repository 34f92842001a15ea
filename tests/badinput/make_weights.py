"""Weights and configurations that are none: rows 10 to 27 of the list of bad inputs, one function each.

Each writes files into a folder and returns {case: (path, what the message must say)}. A path is what a verb is given.
"""

import argparse
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import manyscale as ms

Cases = dict[str, tuple[Path, tuple[str, ...]]]


class Payload:
    """Unpickled, it would run a command that leaves the proof (see the fixture `proof`)."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch 'code ran'",)


def changed(model: Path, folder: Path, change: Callable[[dict], dict]) -> Path:
    """A copy of a model whose config.json is changed."""
    shutil.copytree(model, folder)
    card = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(change(card)))
    return folder


def reweighed(model: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    """A copy of a model whose tensors are changed."""
    shutil.copytree(model, folder)
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"manyscale": (folder / "config.json").read_text()})
    return folder


def foreign(model: Path) -> dict[str, torch.Tensor]:
    """The model's weights in timm's layout."""
    return ms.export_weights(ms.load(model), "timm")


# --- pickles, which only `convert` reads ------------------------------------------------------------------------------------------


def row_10_pickle(folder: Path, model: Path) -> Cases:
    torch.save({"model": foreign(model), "more": Payload()}, folder / "zip.pth")
    torch.save({"model": foreign(model), "more": Payload()}, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    (folder / "plain.ckpt").write_bytes(pickle.dumps(Payload(), protocol=4))
    said = ("refused",)
    return {name: (folder / name, (name, *said)) for name in ("zip.pth", "legacy.pt", "plain.ckpt")}


def row_11_distributed_checkpoint(folder: Path, model: Path) -> Cases:
    (folder / "dcp").mkdir()
    (folder / "dcp" / ".metadata").write_bytes(pickle.dumps(Payload()))
    (folder / "dcp" / "__0_0.distcp").write_bytes(b"\0" * 100)
    return {"dcp": (folder / "dcp", ("dcp", ".metadata", "pickle"))}


def row_13_numpy_scalar(folder: Path, model: Path) -> Cases:
    torch.save({"model": foreign(model), "best": np.float64(0.8)}, folder / "numpy.pth")
    return {"numpy": (folder / "numpy.pth", ("numpy.pth", "names code (numpy", "python -c"))}


def row_15_zero_stride(folder: Path, model: Path) -> Cases:
    whole = foreign(model)
    name = next(iter(whole))
    torch.save({"model": whole | {name: torch.zeros(1).expand(10**6, 10**6)}}, folder / "stride.pth")
    return {"stride": (folder / "stride.pth", ("stride.pth", f"model.{name}", "4,000,000,000,000 bytes, of which 4 are stored"))}


def row_16_sparse(folder: Path, model: Path) -> Cases:
    whole = foreign(model)
    name = next(iter(whole))
    torch.save({"model": whole | {name: torch.zeros(8, 3).to_sparse()}}, folder / "sparse.pth")
    return {"sparse": (folder / "sparse.pth", ("sparse.pth", f"model.{name} is sparse"))}


def row_17_deflated(folder: Path, model: Path) -> Cases:
    torch.save({"model": torch.zeros(16 << 20)}, folder / "whole.pth")
    with zipfile.ZipFile(folder / "whole.pth") as old, zipfile.ZipFile(folder / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.namelist():
            new.writestr(member, old.read(member))
    (folder / "whole.pth").unlink()
    np.savez_compressed(folder / "bomb.npz", a=np.zeros(32 << 20, dtype=np.float32))
    return {"pth": (folder / "bomb.pth", ("bomb.pth", "is compressed")), "npz": (folder / "bomb.npz", ("bomb.npz", "would unpack to"))}


PICKLES = (row_10_pickle, row_11_distributed_checkpoint, row_13_numpy_scalar, row_15_zero_stride, row_16_sparse, row_17_deflated)


def row_12_namespace(folder: Path, model: Path) -> Path:
    """This one is read."""
    torch.save({"model": foreign(model), "args": argparse.Namespace(lr=1e-3)}, folder / "namespace.pth")
    return folder / "namespace.pth"


# --- models of this package, which eval, predict, transfer and train --init read ---------------------------------------------------


def row_14_import_path(folder: Path, model: Path) -> Cases:
    keys = ("_target_", "_instantiator", "_class_path")
    found: Cases = {}
    for key in keys:
        inside = changed(model, folder / f"in{key}", lambda card, key=key: card | {"config": card["config"] | {key: "payload.go"}})
        found[f"{key} in config"] = (inside, ("config.json", f"unknown field `{key}`"))
    kind = changed(model, folder / "kind", lambda card: card | {"kind": "payload.go"})
    return {**found, "kind": (kind, ("config.json", "unknown kind of model `payload.go`"))}


def row_18_nan(folder: Path, model: Path) -> Cases:
    def spoil(tensors: dict[str, torch.Tensor], value: float) -> dict[str, torch.Tensor]:
        tensors["head.weight"].view(-1)[3] = value
        return tensors

    values = {"nan": float("nan"), "inf": float("inf")}
    places = {name: reweighed(model, folder / name, lambda tensors, value=value: spoil(tensors, value)) for name, value in values.items()}
    return {name: (place, ("model.safetensors", "NaN or infinity in head.weight")) for name, place in places.items()}


def row_19_wrong_shape(folder: Path, model: Path) -> Cases:
    more = changed(model, folder / "classes", lambda card: card | {"config": card["config"] | {"classes": 3}, "labels": []})
    said = ("model.safetensors", "head.weight is (2, 16), the model's (3, 16)")
    huge = changed(model, folder / "huge", lambda card: card | {"config": card["config"] | {"width": 10**6}})
    deep = changed(model, folder / "deep", lambda card: card | {"config": card["config"] | {"depths": [1, 10**9]}})
    return {"classes": (more, said), "huge": (huge, ("of another model",)), "deep": (deep, ("1,000,000,001 blocks",))}


def row_20_missing_and_extra(folder: Path, model: Path) -> Cases:
    place = reweighed(model, folder / "keys", lambda tensors: {name.replace("head.", "heads."): tensor for name, tensor in tensors.items()})
    return {"keys": (place, ("model.safetensors", "missing head.weight (2, 16)", "extra heads.weight (2, 16)"))}


def row_21_future_format(folder: Path, model: Path) -> Cases:
    place = changed(model, folder / "future", lambda card: card | {"format": 9, "manyscale": "7.0"})
    return {"future": (place, ("config.json", "format 9, written by manyscale 7.0", "upgrade"))}


def row_22_wrong_kind(folder: Path, model: Path) -> Cases:
    place = changed(model, folder / "vit", lambda card: card | {"kind": "vit"})
    odd = changed(model, folder / "odd", lambda card: card | {"kind": ["swin"], "labels": [1, 2]})
    labels = changed(model, folder / "labels", lambda card: card | {"labels": ["cat"]})
    said = ("config.json", "unknown field")
    return {"vit": (place, said), "odd": (odd, ("config.json", "unknown kind")), "labels": (labels, ("config.json", "field `labels`"))}


MODELS = (row_14_import_path, row_18_nan, row_19_wrong_shape, row_20_missing_and_extra, row_21_future_format, row_22_wrong_kind)


# --- .safetensors, which all of them read --------------------------------------------------------------------------------------------


def raw(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(shape: list, offsets: list, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def row_23_header_length(folder: Path, model: Path) -> Cases:
    raw(folder / "endless.safetensors", b"{}", length=2**63)
    with open(folder / "long.safetensors", "wb") as file:
        file.write(struct.pack("<Q", 200_000_000) + b"{")
        file.truncate(200_000_100)
    return {name: (folder / f"{name}.safetensors", (f"{name}.safetensors", "header")) for name in ("endless", "long")}


def row_24_layout(folder: Path, model: Path) -> Cases:
    headers = {
        "overlap": {"a": entry([2], [0, 8]), "b": entry([2], [4, 12])},
        "past_end": {"a": entry([2], [0, 8]), "b": entry([2], [8, 16])},
        "overflow": {"a": entry([2**62, 2**62], [0, 8])},
        "negative": {"a": entry([-1, 2], [0, 8])},
        "float_shape": {"a": entry([2.0], [0, 8])},
        "dtype": {"a": entry([2], [0, 8], "X99")},
        "other_bytes": {"a": entry([3], [0, 8])},
        "no_dict": {"a": 7},
        "axes": {"a": entry([1] * 100_000, [0, 4])},
    }
    named = {"overlap": "b", "past_end": "b", "dtype": "X99"}
    found = {}
    for name, header in headers.items():
        path = raw(folder / f"{name}.safetensors", header, bytes(12 if name == "overlap" else 8))
        found[name] = (path, (path.name, named.get(name, "'a'")))
    return found


def row_25_same_name_twice(folder: Path, model: Path) -> Cases:
    text = b'{"a":' + json.dumps(entry([1], [0, 4])).encode() + b',"a":' + json.dumps(entry([1], [0, 4])).encode() + b"}"
    return {"twice": (raw(folder / "twice.safetensors", text, bytes(4)), ("twice.safetensors", "`a` stands twice"))}


def row_26_large_header(folder: Path, model: Path) -> Cases:
    meta = raw(folder / "meta.safetensors", {"__metadata__": {"a": "x" * 2_000_000}, "a": entry([1], [0, 4])}, bytes(4))
    bomb = raw(folder / "bomb.safetensors", {"__metadata__": {"a": "x" * 40_000_000}, "a": entry([1], [0, 4])}, bytes(4))
    many = raw(folder / "many.safetensors", {f"t{i}": entry([1], [i, i + 1], "U8") for i in range(50_001)}, bytes(50_001))
    said = {"meta": (meta, "metadata of"), "bomb": (bomb, "a header of"), "many": (many, "50,001 tensors")}
    return {name: (path, (path.name, words)) for name, (path, words) in said.items()}


def row_27_bytes_to_spare(folder: Path, model: Path) -> Cases:
    whole = (model / "model.safetensors").read_bytes()
    contents = {"trailing": whole + b"\0", "seven": whole[:7], "nothing": b"", "less": whole[:-1]}
    for name, content in contents.items():
        (folder / f"{name}.safetensors").write_bytes(content)
    return {name: (folder / f"{name}.safetensors", (f"{name}.safetensors",)) for name in contents}


TENSORS = (row_23_header_length, row_24_layout, row_25_same_name_twice, row_26_large_header, row_27_bytes_to_spare)


def number(row: Callable) -> int:
    return int(row.__name__.split("_")[1])
