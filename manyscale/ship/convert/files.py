"""Checkpoint files of others, read without running anything in them: tensors by name."""

import os
import re
import shlex
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

PICKLES = (".pth", ".pt", ".bin", ".ckpt")
RAW, AVERAGED = ("model", "state_dict"), ("model_ema", "state_dict_ema")  # where checkpoints of training keep their weights


def read(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """What a .safetensors, .npz, .pth, .pt, .bin or .ckpt file holds, on the CPU.

    Pickles go through torch.load(weights_only=True), which builds tensors and plain containers only; there is no way
    around it.

    Raises:
        ValueError: a missing, empty, half-written or unknown file, or a pickle that names code; the file and why.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: {'is a folder; name the file in it' if path.is_dir() else 'no such file'}")
    if path.suffix not in (".safetensors", ".npz", *PICKLES):
        raise ValueError(f"{path}: unknown kind of file; give one that ends in .safetensors, .npz, {', '.join(PICKLES)}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty; fetch it again")
    try:
        if path.suffix == ".safetensors":
            return load_file(path, device="cpu")
        if path.suffix == ".npz":
            return _read_npz(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols; what cannot be read raises
            content = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # damaged bytes make the readers raise almost anything
        # torch's own message goes on to advise weights_only=False: not passed on
        reason = str(error).split("WeightsUnpickler error: ")[-1].strip()
        code = re.search(r"GLOBAL (\S+)|(?:Trying to call|Can only (?:create|build)).* (\S+)", reason)
        if code:
            named = code[1] or code[2]
            hint = f". {_without_arguments(path)}" if named == "argparse.Namespace" else ""
            raise ValueError(f"{path}: refused, nothing was run: a pickle that names code ({named}), not tensors alone{hint}") from None
        reason = f"{type(error).__name__}: {reason}".splitlines()[0]
        raise ValueError(f"{path}: refused, not a checkpoint or only half of one ({reason}); fetch it again") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a state dict")
    return content


def choose(content: Mapping[str, Any], ema: bool | None, usual: tuple[str, ...], where: str) -> Mapping[str, Any]:
    """The state dict in what a file holds, which may be one, or a checkpoint of training; without `module.`, which DDP puts before names.

    Args:
        ema: True: the moving average of the weights, False: the raw ones, None: the first of `usual` that is there.

    Raises:
        ValueError: a file without what `ema` asks for, and what there is instead.
    """
    there = [key for key in (*RAW, *AVERAGED) if isinstance(content.get(key), Mapping)]
    keys = usual if ema is None else AVERAGED if ema else RAW
    key = next((key for key in keys if key in there), None)
    if key is None and (ema or (ema is False and there)):
        what, has = "moving average of the weights" if ema else "raw weights", ", ".join(there) or "one set of weights without a name"
        raise ValueError(f"{where}: no {what} in it ({' or '.join(keys)}), but {has}; leave `ema` out")
    state = content if key is None else content[key]
    if state and all(str(name).startswith("module.") for name in state):
        return {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state


def _without_arguments(path: Path) -> str:
    """How to be rid of the command line that training scripts keep beside their weights."""
    new = path.with_name(f"weights_of_{path.name}")
    code = (
        "import argparse, torch; torch.serialization.add_safe_globals([argparse.Namespace]); "
        f"whole = torch.load({str(path)!r}, map_location='cpu', weights_only=True); "
        f"torch.save({{key: whole[key] for key in {RAW + AVERAGED} if key in whole}}, {str(new)!r})"
    )
    command = shlex.join(["python", "-c", code])
    return f"It is a training's command line. This saves the weights without it, and runs nothing of the file either:\n{command}"


def _read_npz(path: Path) -> dict[str, Any]:
    """Arrays as tensors, without pickled ones; two raw bytes a number are bfloat16, which numpy does not know."""
    tensors = {}
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        for name in arrays.files:
            try:
                array = arrays[name]
            except ValueError:  # numpy's message goes on to advise allow_pickle: not passed on
                raise ValueError(f"{name} is no array of numbers") from None
            if array.dtype.kind == "V" and array.dtype.itemsize == 2:
                tensors[name] = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
            elif array.dtype.kind in "fiub":
                tensors[name] = torch.from_numpy(np.ascontiguousarray(array))
    return tensors
