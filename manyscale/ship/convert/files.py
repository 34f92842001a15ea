"""Checkpoint files of others, read without running anything in them: tensors by name."""

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

PICKLES = (".pth", ".pt", ".bin", ".ckpt")


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
            raise ValueError(f"{path}: refused, nothing was run: a pickle that names code ({named}), not tensors alone") from None
        reason = f"{type(error).__name__}: {reason}".splitlines()[0]
        raise ValueError(f"{path}: refused, not a checkpoint or only half of one ({reason}); fetch it again") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a state dict")
    return content


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
