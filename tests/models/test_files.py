import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

import manyscale as ms
from manyscale.config import Preprocess
from manyscale.models import files
from tests.conftest import loud

MICRO = {"image_size": 32, "patch": 4, "window": 4, "width": 16, "depths": (2, 1), "heads": (2, 4), "classes": 5}


@pytest.fixture
def saved(tmp_path):
    model = loud(ms.create_model("swinv2_tiny", **MICRO)).eval()
    model.preprocess, model.labels = Preprocess(image_size=(32, 32), crop_ratio=1.0), tuple("abcde")
    ms.save(model, tmp_path / "m")
    return model, tmp_path / "m"


def test_save_and_load_give_the_same_function(saved):
    model, folder = saved
    x = torch.randn(2, 3, 32, 32)
    for path in (folder, folder / "model.safetensors", str(folder)):
        again = ms.load(path)
        assert torch.equal(again(x), model(x))
        assert again.config == model.config and again.preprocess == model.preprocess and again.labels == model.labels
        assert not again.training
    alone = shutil.copy(folder / "model.safetensors", folder.parent / "alone.safetensors")
    assert torch.equal(ms.load(alone)(x), model(x))
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_a_half_written_file_is_named(saved):
    _, folder = saved
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a whole .safetensors file"):
        ms.load(folder)
    (folder / "config.json").write_text('{"format": 1, "conf')
    with pytest.raises(ValueError, match=r"config\.json: not JSON, perhaps half-written"):
        ms.load(folder)


def test_a_pickle_is_refused_and_its_code_does_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "weights.pth").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="manyscale convert"):
        ms.load(tmp_path / "weights.pth")
    assert not (tmp_path / "ran").exists()


def test_another_models_weights_are_refused_with_every_difference(saved, tmp_path):
    _, folder = saved
    other = ms.create_model("swinv2_tiny", **{**MICRO, "classes": 7, "depths": (2, 2)})
    ms.save(other, tmp_path / "other")
    shutil.copy(tmp_path / "other" / "config.json", folder / "config.json")
    with pytest.raises(ValueError, match=r"another model") as caught:
        ms.load(folder)
    text = str(caught.value)
    assert "head.weight is (5, 32), the model's (7, 32)" in text
    assert "missing stages.1.blocks.1.attention.branch.qkv.weight (96, 32)" in text
    assert text.count("missing stages.1.blocks.1.") == len([n for n in other.state_dict() if n.startswith("stages.1.blocks.1.")])


def test_a_newer_format_kind_or_field_is_refused(saved):
    _, folder = saved
    card = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"format": 9, "manyscale": "7.0"}, "format 9, written by manyscale 7.0; this one reads up to 1: upgrade"),
        ({"kind": "swim"}, "unknown kind of model `swim`; did you mean `swin`"),
        ({"config": {**card["config"], "windw": 3}}, "unknown field `windw` of SwinConfig; did you mean `window`"),
        ({"config": {**card["config"], "window": "8"}}, "field `window`: expected"),
    ):
        (folder / "config.json").write_text(json.dumps({**card, **change}))
        with pytest.raises(ValueError, match=r"config\.json") as caught:
            ms.load(folder)
        assert message in str(caught.value)


def test_wrong_paths_are_explained(tmp_path):
    (tmp_path / "foreign.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    for path, message in (
        (tmp_path, "no config.json here or in best/"),
        (tmp_path / "nothing", "no such file or folder"),
        (tmp_path / "foreign.safetensors", "not written by this package"),
    ):
        with pytest.raises(ValueError, match=r"manyscale convert|no ") as caught:
            ms.load(path)
        assert message in str(caught.value)


def test_a_failed_save_keeps_what_was_there(saved, monkeypatch):
    model, folder = saved
    before = (folder / "model.safetensors").read_bytes()

    def full(*args):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        ms.save(loud(model, 1), folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
