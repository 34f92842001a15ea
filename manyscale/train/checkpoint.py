"""Checkpoints that are whole or absent: safetensors and JSON in a folder that appears by one rename, with a hash of every file.

    runs/<name>/step_00000123/{state.safetensors, state.json, manifest.json}

No PyTorch or safetensors reader notices a flipped bit; the manifest (xxh3-128, size) does, and the step before is used.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash
from safetensors.torch import save_file
from torch import Tensor

from manyscale.models.files import read_tensors
from manyscale.storage import read_json, sync, write, write_json

FORMAT = 1
PREFIX = "step_"
FILES = {"state.safetensors", "state.json"}


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], values: dict[str, Any]) -> Path:
    """Write one checkpoint: aside, synced, then renamed into place.

    Raises:
        OSError: the disk is full or read-only; earlier checkpoints stand.
    """
    final, aside = folder / f"{PREFIX}{step:08d}", folder / f".{PREFIX}{step:08d}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        write(aside / "state.safetensors", lambda path: save_file({k: t.detach().contiguous() for k, t in tensors.items()}, path))
        write_json(aside / "state.json", {"format": FORMAT, "values": values})
        write_json(aside / "manifest.json", {name: _fingerprint(aside / name) for name in sorted(FILES)})
        if final.exists():  # the same step again, after a fallback: the new one is as good
            os.replace(final, _unused(folder / f".old_{final.name}"))
        os.replace(aside, final)
        sync(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return final


def load_checkpoint(folder: Path, note: Callable[[str], None]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest checkpoint that is whole, or None. A damaged one is named through `note` and renamed, never deleted.

    Raises:
        ValueError: written by a newer version.
    """
    for path in reversed(checkpoints(folder)):
        damage = verify(path)
        if not damage:
            state = read_json(path / "state.json")
            if state["format"] > FORMAT:
                raise ValueError(f"{path}: format {state['format']}; this manyscale reads up to {FORMAT}: upgrade it")
            return read_tensors(path / "state.safetensors")[0], state["values"]
        aside = _unused(path.with_name(f"damaged_{path.name}"))
        os.replace(path, aside)
        note(f"checkpoint {path.name} is damaged ({damage}); kept as {aside.name}, going back to the one before")
    return None


def verify(path: Path) -> str:
    """What is wrong with a checkpoint, or an empty string."""
    try:
        manifest = read_json(path / "manifest.json")
    except ValueError as error:
        return str(error)
    if set(manifest) != FILES:
        return f"manifest.json lists {', '.join(manifest)}"
    for name, entry in manifest.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        found = _fingerprint(file)
        if entry != found:
            return f"{name} is not what was written: {found}, not {entry}"
    return ""


def checkpoints(folder: Path) -> list[Path]:
    """The committed checkpoints, oldest first."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if path.is_dir())


def tidy(folder: Path, keep: int) -> None:
    """Drop all but the newest `keep` checkpoints, and what interrupted writes left behind."""
    for path in [*checkpoints(folder)[:-keep], *folder.glob(f".{PREFIX}*"), *folder.glob(".old_*")]:
        if path.name.startswith(PREFIX):  # out of sight first: a half-deleted folder must not look like a checkpoint
            path = path.rename(_unused(path.with_name(f".old_{path.name}")))
        shutil.rmtree(path, ignore_errors=True)


def _unused(path: Path) -> Path:
    tries = (path.with_name(f"{path.name}{suffix}") for suffix in ("", *(f".{n}" for n in range(1, 1000))))
    return next(p for p in tries if not p.exists())


def _fingerprint(path: Path) -> dict[str, Any]:
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            state.update(block)
    return {"bytes": path.stat().st_size, "xxh3_128": state.hexdigest()}
