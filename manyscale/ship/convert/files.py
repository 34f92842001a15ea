"""Checkpoint files of others, read without running anything in them: tensors by name."""

import argparse
import os
import re
import shlex
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manyscale.models.files import read_tensors
from manyscale.storage import check_file

PICKLES = (".pth", ".pt", ".bin", ".ckpt")
ALLOWED = [argparse.Namespace]  # besides tensors: the command line that training scripts keep beside their weights; it holds values only
MOST_SHRUNK = 16  # times the size of its file: what arrays may unpack to
RAW, AVERAGED = ("model", "state_dict"), ("model_ema", "state_dict_ema")  # where checkpoints of training keep their weights


def read(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """What a .safetensors, .npz, .pth, .pt, .bin or .ckpt file holds, on the CPU.

    Pickles go through torch.load(weights_only=True), which builds tensors, plain containers and what `ALLOWED` lists; there
    is no way around it.

    Raises:
        ValueError: a missing, empty, half-written or unknown file, one that unpacks to far more than its size, a pickle that
            names code, or a tensor that is not dense and as large as what is stored of it; the file and why.
    """
    path = Path(path)
    if not path.is_file():
        kind = "is a folder; name the file in it" if path.is_dir() else "no such file"
        pickled = (path / ".metadata").exists()
        raise ValueError(
            f"{path}: {'refused: the .metadata of torch.distributed.checkpoint is a pickle; it was not opened' if pickled else kind}"
        )
    if path.suffix not in (".safetensors", ".npz", *PICKLES):
        raise ValueError(f"{path}: unknown kind of file; give one that ends in .safetensors, .npz, {', '.join(PICKLES)}")
    check_file(path)
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty; fetch it again")
    if path.suffix == ".safetensors":
        return read_tensors(path)[0]
    try:
        _check_packing(path)
        if path.suffix == ".npz":
            return _read_npz(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals(ALLOWED):
            warnings.simplefilter("ignore")  # of pickle protocols; what cannot be read raises
            content = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # damaged bytes make the readers raise almost anything
        # torch's own message goes on to advise weights_only=False: not passed on
        reason = str(error).split("WeightsUnpickler error: ")[-1].strip()
        code = re.search(r"GLOBAL (\S+)|(?:Trying to call|Can only (?:create|build)).* (\S+)", reason)
        if code:
            named = code[1] or code[2]
            hint = f". {_without_numpy(path)}" if named.startswith("numpy.") else ""
            raise ValueError(f"{path}: refused, nothing was run: a pickle that names code ({named}), not tensors alone{hint}") from None
        reason = f"{type(error).__name__}: {reason}".splitlines()[0]
        raise ValueError(f"{path}: refused, not a checkpoint or only half of one ({reason}); fetch it again") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a state dict")
    _check_dense(content, str(path))
    return content


def _check_packing(path: Path) -> None:
    """See that a zip file is what torch or numpy write: torch stores, numpy may compress, but numbers hardly shrink.

    Raises:
        ValueError: a bomb.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    packed = next((member.filename for member in members if member.compress_type != zipfile.ZIP_STORED), None)
    if packed and path.suffix != ".npz":
        raise ValueError(f"its member {packed!r} is compressed, which torch never does")
    whole = sum(member.file_size for member in members)
    if whole > max(MOST_SHRUNK * path.stat().st_size, 1 << 26):
        raise ValueError(f"it would unpack to {whole:,} bytes, more than {MOST_SHRUNK} times its size")


def _check_dense(content: Any, where: str, name: str = "") -> None:
    """See that every tensor is dense and no larger than what is stored of it: a few bytes may say they are 4 TB.

    Raises:
        ValueError: names the tensor that is not.
    """
    if isinstance(content, Tensor):
        if content.layout != torch.strided:
            raise ValueError(f"{where}: refused: {name} is sparse; only dense tensors are read")
        logical, stored = content.numel() * content.element_size(), content.untyped_storage().nbytes()
        if logical > stored:
            raise ValueError(f"{where}: refused: {name} {tuple(content.shape)} is {logical:,} bytes, of which {stored:,} are stored")
    elif isinstance(content, (Mapping, list, tuple)):
        for key, value in content.items() if isinstance(content, Mapping) else enumerate(content):
            _check_dense(value, where, f"{name}.{key}" if name else str(key))


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


def _without_numpy(path: Path) -> str:
    """How to be rid of the numbers of numpy that training scripts keep beside their weights."""
    new = path.with_name(f"weights_of_{path.name}")
    code = (
        "import argparse, numpy, torch; numbers = map(type, map(numpy.dtype, 'bhilqBHILQefd?')); "
        "torch.serialization.add_safe_globals([argparse.Namespace, numpy._core.multiarray.scalar, numpy.dtype, *numbers, "
        "(numpy._core.multiarray.scalar, 'numpy.core.multiarray.scalar')]); "
        f"whole = torch.load({str(path)!r}, map_location='cpu', weights_only=True); "
        f"torch.save({{key: whole[key] for key in {RAW + AVERAGED} if key in whole}}, {str(new)!r})"
    )
    command = shlex.join(["python", "-c", code])
    return f"Where these are numbers beside the weights, this saves the weights without them, and runs nothing of the file:\n{command}"


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
