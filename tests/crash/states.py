"""Small states to save, told apart bit by bit, and what is done with them in the tests of crashes, faults and power loss."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from manyscale.train.checkpoint import copy_checkpoint, load_checkpoint, newest_checkpoint, save_checkpoint, tidy

SHARD = "shard-00001-model-00001-of-00001.safetensors"


def tensors(step: int) -> dict[str, torch.Tensor]:
    chance = torch.Generator().manual_seed(step)
    noise = torch.randn(300, generator=chance)
    return {"model.a": noise, "model.b": noise[:15].view(3, 5).bfloat16(), "optimiser.a.step": torch.tensor(float(step))}


def save(folder: Path, step: int, seed: int | None = None) -> Path:
    """A checkpoint of a step; with a seed, of other content."""
    return save_checkpoint(folder, step, tensors(step if seed is None else seed), {"step": step, "seed": step if seed is None else seed})


def loaded(folder: Path, note: Callable[[str], None] = lambda text: None) -> int | None:
    """The seed of what a folder gives, whose every bit is checked; None where there is nothing."""
    found = load_checkpoint(folder, note)
    if found is None:
        return None
    there, values = found
    expected = tensors(values["seed"])
    assert there.keys() == expected.keys()
    for name, tensor in expected.items():
        assert there[name].dtype == tensor.dtype and there[name].shape == tensor.shape
        assert torch.equal(there[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
    return values["seed"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def flip(file: Path, place: int = -3) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


@dataclass(frozen=True)
class Scene:
    """Something that is done to a run's folder, and what may be found there afterwards."""

    prepare: Callable[[Path], Any]
    act: Callable[[Path], Any]
    outcomes: tuple[int | None, ...]  # the last: where nothing came between
    also: Callable[[Path], None] = lambda folder: None  # holds whatever happened


def _steps(*steps: int) -> Callable[[Path], Any]:
    return lambda folder: [save(folder, step) for step in steps]


def _damaged(folder: Path) -> None:
    _steps(1, 2)(folder)
    flip(folder / "step_00000002" / SHARD)


def _untidy(folder: Path) -> None:
    _steps(1, 2, 3, 4)(folder)
    shutil.copytree(folder / "step_00000001", folder / ".step_00000005")
    (folder / ".step_00000005" / "manifest.json").unlink()
    shutil.copytree(folder / "step_00000001", folder / ".old_step_00000000")


def _damaged_and_saved_again(folder: Path) -> None:
    newest_checkpoint(folder, lambda text: None)
    tidy(folder, 1, whole=save(folder, 2, seed=22))


def _copied(folder: Path) -> None:
    copy_checkpoint(folder.parent / "trunk" / "step_00000007", folder, {"extra": 1})


def _trunk_stands(folder: Path) -> None:
    assert loaded(folder.parent / "trunk") == 7


SCENES = {
    "first save": Scene(lambda folder: None, _steps(1), (None, 1)),
    "save": Scene(_steps(1), _steps(2), (1, 2)),
    "save and tidy": Scene(_steps(1, 2), lambda folder: tidy(folder, 1, whole=save(folder, 3)), (2, 3)),
    "same step again": Scene(_steps(2), lambda folder: tidy(folder, 1, whole=save(folder, 2, seed=22)), (2, 22)),
    "tidy": Scene(_untidy, lambda folder: tidy(folder, 2), (4,)),
    "quarantine": Scene(_damaged, lambda folder: newest_checkpoint(folder, lambda text: None), (1,)),
    "quarantine and save": Scene(_damaged, _damaged_and_saved_again, (1, 22)),
    "copy": Scene(lambda folder: save(folder.parent / "trunk", 7), _copied, (None, 7), _trunk_stands),
}


def goes_on(folder: Path, case: object) -> None:
    """See that a run saves, loads and tidies on in a folder in which something went wrong, and that nothing of that is left over."""
    save(folder, 9)
    assert loaded(folder) == 9, case
    tidy(folder, 1)
    assert [left for left in names(folder) if not left.startswith("damaged_")] == ["step_00000009"], case
