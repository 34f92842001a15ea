"""Checkpoint files: every kind that loads, and every kind of damage, refused with the file's name and without running it."""

import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import manyscale as ms

SMALL = {"width": 8, "depths": (1, 2), "heads": (1, 2), "image_size": 32, "window": 4, "classes": 5}


def convert(path: object) -> torch.nn.Module:
    return ms.convert(path, source="timm", name="swinv2_tiny", **SMALL)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return ms.export_weights(ms.create_model("swinv2_tiny", **SMALL), "timm")


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "a.pt", "a.bin", "a.ckpt"])
def test_every_kind_loads(name: str, weights: dict, tmp_path: Path) -> None:
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save({"state_dict": weights, "meta": {"epoch": 3}}, path)
    for given in (path, str(path)):
        for key, tensor in ms.export_weights(convert(given), "timm").items():
            assert torch.equal(tensor, weights[key])


class Bomb:
    """Unpickled, makes a folder: the proof that code ran."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle 2", "pickle 4"])
def test_code_is_refused_and_does_not_run(kind: str, weights: dict, tmp_path: Path) -> None:
    path, proof = tmp_path / "evil.pth", tmp_path / "code ran"
    content = {"model": weights, "bomb": Bomb(proof)}
    plain = kind.startswith("pickle")
    if plain:
        path.write_bytes(pickle.dumps(Bomb(proof), protocol=int(kind[-1])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(ValueError, match=r"evil\.pth: refused, n(othing was run.*mkdir|ot a checkpoint.*operand)"):
        convert(path)
    assert not proof.exists()
    if plain:  # the bomb is a real one
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert proof.exists()


@pytest.mark.parametrize("name", ["half.safetensors", "half.pth"])
@pytest.mark.parametrize("part", [0.01, 0.5, 0.999])
def test_half_written_files(name: str, part: float, weights: dict, tmp_path: Path) -> None:
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(ValueError, match=rf"{name}: (refused, not a checkpoint or only half of one|not a whole \.safetensors file)"):
        convert(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin"])
def test_files_that_are_something_else(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"page{suffix}"
    path.write_bytes(b"<html>404 not found</html>" * 10)
    with pytest.raises(ValueError, match=rf"page\{suffix}: (refused, not a checkpoint|not a whole \.safetensors file)"):
        convert(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"page\{suffix}: the file is empty"):
        convert(path)


def test_zip_without_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ValueError, match=r"other\.pth: refused, not a checkpoint"):
        convert(path)


def test_torchscript(tmp_path: Path) -> None:
    path = tmp_path / "script.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("script/constants.pkl", pickle.dumps(()))
        archive.writestr("script/code/x.py", "print('code')")
        archive.writestr("script/data.pkl", pickle.dumps({}))
        archive.writestr("script/version", "3")
    with pytest.raises(ValueError, match=r"script\.pt: "):
        convert(path)


@pytest.mark.parametrize("content", [[1, 2], 3, torch.zeros(3)])
def test_checkpoints_without_a_state_dict(content: object, tmp_path: Path) -> None:
    path = tmp_path / "list.pth"
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"list\.pth: holds a (list|int|Tensor), not a state dict"):
        convert(path)


def test_misfits_name_the_file(weights: dict, tmp_path: Path) -> None:
    path = tmp_path / "part.pth"
    torch.save({key: tensor for key, tensor in weights.items() if "norm" not in key}, path)
    with pytest.raises(ValueError, match=r"part\.pth does not hold swinv2_tiny(.|\n)*missing: patch_embed\.norm\.weight \(8,\)"):
        convert(path)


def test_places_without_a_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.pth: no such file"):
        convert(tmp_path / "gone.pth")
    with pytest.raises(ValueError, match="is a folder"):
        convert(tmp_path)
    (tmp_path / "weights.onnx").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"weights\.onnx: unknown kind of file.*\.safetensors, \.npz, \.pth"):
        convert(tmp_path / "weights.onnx")
