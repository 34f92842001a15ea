"""A model on disk: `model.safetensors` and `config.json`, never a pickle."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import manyscale
from manyscale.config import NetConfig, Preprocess, SuperViTConfig, SwinConfig, ViTConfig, from_dict, nearest, to_dict
from manyscale.models.build import Net, build
from manyscale.storage import read_json, write, write_json

FORMAT = 1  # of config.json; raised when an older reader would misread it
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


def load(path: Path | str) -> Net:
    """The model that `save` wrote, in evaluation mode, with its `preprocess` and `labels`.

    Args:
        path: the folder, a run's folder (its `best` is taken), or the .safetensors file alone.

    Raises:
        ValueError: not a file of this package, of a newer version, half-written, or of another model; named with the fix.
    """
    path = Path(path)
    if path.is_dir():
        folder = path if (path / "config.json").exists() or not (path / "best").is_dir() else path / "best"
        if not (folder / "config.json").exists():
            raise ValueError(f"{path}: no config.json here or in best/; give a folder that `train`, `convert` or `ms.save` wrote")
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
        try:
            card, where = json.loads(metadata["manyscale"]), str(path)
        except ValueError:
            raise ValueError(f"{path}: its metadata are not the JSON that this package writes") from None
    else:
        where = str(path.with_name("config.json"))
    model = build(_config(card, where))
    check_tensors(model, tensors, str(path))
    model.load_state_dict(tensors, assign=True)  # in the dtype they were saved in
    model.preprocess = from_dict(Preprocess, card["preprocess"], where) if card.get("preprocess") else None
    model.labels = tuple(card.get("labels", ()))
    return model.eval()


def _config(card: dict[str, Any], where: str) -> NetConfig:
    if not isinstance(card.get("format"), int) or not isinstance(card.get("labels", []), list):
        raise ValueError(f"{where}: not a configuration of this package: its `format` or `labels` are not what `ms.save` writes")
    if card["format"] > FORMAT:
        writer = card.get("manyscale", "a newer version")
        raise ValueError(
            f"{where}: format {card['format']}, written by manyscale {writer}; this one reads up to {FORMAT}: upgrade manyscale"
        )
    kind = card.get("kind", "")
    if kind not in KINDS:
        raise ValueError(f"{where}: unknown kind of model `{kind}`; {nearest(str(kind), KINDS)}")
    return from_dict(KINDS[kind], card.get("config"), where)


def read_tensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors and the metadata of a .safetensors file.

    Raises:
        ValueError: no such file, or not whole.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole .safetensors file, perhaps half-written: {error}") from None


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
        raise ValueError(f"{where}: these weights are of another model:\n  " + "\n  ".join(wrong))
