"""A model on disk: `model.safetensors` and `config.json`, never a pickle."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import manyscale
from manyscale.config import NetConfig, Preprocess, SuperViTConfig, SwinConfig, ViTConfig, from_dict, nearest, to_dict
from manyscale.models.build import Net, build
from manyscale.storage import check_file, parse_json, read_json, write, write_json

FORMAT = 1  # of config.json; raised when an older reader would misread it
MAX_HEADER, MAX_METADATA, MAX_TENSORS = 32 << 20, 1 << 20, 50_000  # of a .safetensors file
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
KINDS = {"swin": SwinConfig, "vit": ViTConfig, "supervit": SuperViTConfig}


def save(model: Net, folder: Path | str) -> None:
    """Write `model.safetensors` and `config.json` into `folder`. Each holds the whole configuration, so each stands alone.

    Raises:
        OSError: the folder cannot be written; files already there are kept.
    """
    folder = Path(folder)
    card = {
        "format": FORMAT,
        "manyscale": manyscale.__version__,
        "kind": next(name for name, kind in KINDS.items() if kind is type(model.config)),
        "config": to_dict(model.config),
        "preprocess": to_dict(model.preprocess) if model.preprocess else None,
        "labels": list(model.labels),
    }
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    write(folder / "model.safetensors", lambda path: save_file(tensors, path, {"manyscale": json.dumps(card)}))
    write_json(folder / "config.json", card)


def load(path: Path | str, *, allow_nonfinite: bool = False) -> Net:
    """The model that `save` wrote, in evaluation mode, with its `preprocess` and `labels`.

    Args:
        path: the folder, a run's folder (its `best` is taken), or the .safetensors file alone.
        allow_nonfinite: whether weights may be NaN or infinite, to look at what went wrong.

    Raises:
        ValueError: not a file of this package, of a newer version, half-written, of another model, or with weights that are NaN or
            infinite; named with the fix.
    """
    path = Path(path)
    if path.is_dir():
        folder = path if (path / "config.json").exists() or not (path / "best").is_dir() else path / "best"
        if not (folder / "config.json").exists():
            below = sorted(str(best.parent) for best in path.glob("*/best") if (best / "config.json").exists())
            more = f"; it holds {', '.join(below[:9])}: give one of these" if below else ""
            if (path / ".metadata").exists():
                more = "; its .metadata is a pickle of torch.distributed.checkpoint and is not opened"
            raise ValueError(f"{path}: no config.json here or in best/; give a folder that `train`, `convert` or `ms.save` wrote{more}")
        card, path = read_json(folder / "config.json"), folder / "model.safetensors"
    elif path.suffix == ".safetensors":
        card = None
    elif path.exists():
        raise ValueError(
            f"{path}: not a .safetensors file; foreign checkpoints come in by `manyscale convert FILE --source ... --name ...`"
        )
    else:
        raise ValueError(f"{path}: no such file or folder")
    tensors, metadata = read_tensors(path)
    if card is None:
        if "manyscale" not in metadata:
            raise ValueError(f"{path}: not written by this package; bring it in by `manyscale convert FILE --source ... --name ...`")
        card, where = parse_json(metadata["manyscale"], f"{path}: its metadata"), str(path)
    else:
        where = str(path.with_name("config.json"))
    config = _config(card, where)
    blocks = sum(getattr(config, "depths", (getattr(config, "depth", 0),)))
    if blocks > len(tensors):  # before so many are made
        raise ValueError(f"{where}: {blocks:,} blocks, and only {len(tensors):,} tensors in {path}: these weights are of another model")
    with torch.device("meta"):  # no memory until the weights are known to fit
        model = build(config)
    check_tensors(model, tensors, str(path))
    if not allow_nonfinite:
        check_finite(tensors, str(path))
    model.load_state_dict(tensors, assign=True)  # in the dtype they were saved in
    model.preprocess = from_dict(Preprocess, card["preprocess"], where) if card.get("preprocess") else None
    model.labels = tuple(card.get("labels", ()))
    return model.eval()


def _config(card: dict[str, Any], where: str) -> NetConfig:
    if not isinstance(card, dict) or type(card.get("format")) is not int or not isinstance(card.get("labels", []), list):
        raise ValueError(f"{where}: not a configuration of this package: its `format` or `labels` are not what `ms.save` writes")
    if card["format"] > FORMAT:
        writer = card.get("manyscale", "a newer version")
        raise ValueError(
            f"{where}: format {card['format']}, written by manyscale {writer}; this one reads up to {FORMAT}: upgrade manyscale"
        )
    kind = str(card.get("kind", ""))
    if kind not in KINDS:
        raise ValueError(f"{where}: unknown kind of model `{kind}`; {nearest(kind, KINDS)}")
    config, labels = from_dict(KINDS[kind], card.get("config"), where), card.get("labels", [])
    if not all(isinstance(label, str) for label in labels) or len(labels) not in (0, config.classes):
        raise ValueError(f"{where}: field `labels`: expected the names of {config.classes} classes, or none, found {len(labels)} values")
    return config


def read_tensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors and the metadata of a .safetensors file.

    Raises:
        ValueError: no such file, not whole, or a header as `check_header` refuses it.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    check_file(path)
    check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole .safetensors file, perhaps half-written: {error}") from None


def check_header(path: Path) -> None:
    """See what a .safetensors file says of its tensors before it is mapped: the format's library takes a name twice, and any number.

    Format: https://github.com/huggingface/safetensors#format.

    Raises:
        ValueError: not whole, a name twice, too many tensors or metadata, or a tensor whose shape is not that of its bytes.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{path}: not a whole .safetensors file, perhaps half-written: {size:,} bytes are less than its header's")
        if length > MAX_HEADER:
            raise ValueError(f"{path}: a header of {length:,} bytes; at most {MAX_HEADER:,} are read")
        header = parse_json(file.read(length), f"{path}: not a whole .safetensors file: its header")
    if not isinstance(header, dict):
        raise ValueError(f"{path}: not a whole .safetensors file: its header is no JSON object")
    metadata = len(json.dumps(header.pop("__metadata__", {})))
    if metadata > MAX_METADATA or len(header) > MAX_TENSORS:
        what = f"{len(header):,} tensors and metadata of {metadata:,} bytes"
        raise ValueError(f"{path}: {what}; at most {MAX_TENSORS:,} and {MAX_METADATA:,} are read")
    for name, entry in header.items():
        if problem := _misfit(entry, size - 8 - length):
            raise ValueError(f"{path}: not a whole .safetensors file: tensor {name[:100]!r} {problem}")


def _misfit(entry: Any, size: int) -> str:
    """What is wrong with a tensor's entry in the header of a file with `size` bytes of tensors."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return "is not described by dtype, shape and data_offsets"
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not all(isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers) for numbers in (shape, offsets)):
        return f"has the shape {shape} at {offsets}"
    if len(offsets) != 2 or not offsets[0] <= offsets[1] <= size:
        return f"lies at {offsets}, outside of the file's {size:,} bytes"
    if len(shape) > 16:
        return f"has {len(shape):,} axes"
    if str(entry["dtype"]) not in BYTES:
        return ""  # a rare dtype, or none: the library knows
    wanted, found = math.prod(shape) * BYTES[entry["dtype"]], offsets[1] - offsets[0]
    return "" if wanted == found else f"of {entry['dtype']} {shape} takes {wanted:,} bytes, and has {found:,}"


def check_finite(tensors: Mapping[str, Any], where: str) -> None:
    """See that no tensor holds NaN or infinity.

    Raises:
        ValueError: names those that do.
    """
    bad = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if bad:
        more = f" and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise ValueError(
            f"{where}: NaN or infinity in {', '.join(bad[:10])}{more}; did its run diverge? `allow_nonfinite` loads them all the same"
        )


def check_tensors(model: Net, tensors: dict[str, Any], where: str) -> None:
    """See that `tensors` are the model's, by name and shape.

    Raises:
        ValueError: one message that lists every missing, extra and misshapen tensor.
    """
    own = model.state_dict()
    wrong = [f"missing {name} {tuple(own[name].shape)}" for name in own if name not in tensors]
    wrong += [f"extra {name} {tuple(tensors[name].shape)}" for name in tensors if name not in own]
    both = (name for name in own if name in tensors and own[name].shape != tensors[name].shape)
    wrong += [f"{name} is {tuple(tensors[name].shape)}, the model's {tuple(own[name].shape)}" for name in both]
    if wrong:
        wrong[100:] = [f"and {len(wrong) - 100} more"] if len(wrong) > 100 else []
        raise ValueError(f"{where}: these weights are of another model:\n  " + "\n  ".join(wrong))
