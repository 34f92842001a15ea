"""Few-shot evaluation of saved models, and its verb: what it prints, writes and refuses."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import manyscale as ms
from manyscale.cli import main
from manyscale.config import Input, Preprocess, Run, to_dict
from manyscale.heads.pixels import MaskedImages, save_masked
from manyscale.ship.fewshot import probe
from manyscale.storage import write_json
from tests.conftest import loud

COLOURS = {"blue": (20, 20, 200), "green": (20, 200, 20), "red": (200, 20, 20)}
TINY = {"image_size": 16, "patch": 4, "width": 16, "depth": 2, "heads": 2, "mlp_width": 24, "classes": 0}
ON_CPU = {"workers": 0, "device": "cpu"}


def silent(path, reason):
    raise AssertionError(f"{path}: {reason}")


def fill(folder, counts):
    """Class folders of noisy 20 x 14 pictures, as many of each class as asked for."""
    generator = np.random.default_rng(sum(counts.values()))
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = (np.array(COLOURS[name]) + generator.normal(0, 25, (14, 20, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index:02d}.png")
    return folder


@pytest.fixture
def colours(tmp_path):
    fill(tmp_path / "colours" / "train", {"blue": 7, "green": 6, "red": 9})
    fill(tmp_path / "colours" / "val", {"blue": 4, "green": 5, "red": 4})
    return tmp_path / "colours"


@pytest.fixture
def saved(tmp_path):
    model = loud(ms.create_model("vit_base_patch16", **TINY))
    model.preprocess = Preprocess(image_size=(16, 16))
    ms.save(model, tmp_path / "model")
    return tmp_path / "model"


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    assert left.value.code == 2 and "Traceback" not in said.err, said
    return said.err


def test_the_verb(saved, colours, capsys, tmp_path):
    (colours / "val" / "red" / "torn.png").write_text("<html>")
    given = ["fewshot", str(saved), "--data", str(colours), "--workers", "0", "--device", "cpu"]
    main([*given, "--shots", "1", "5", "--l2", "1", "1024", "--out", str(tmp_path / "out" / "scores.json")])
    said = capsys.readouterr()
    assert "left out" in said.err and "torn.png" in said.err and "scores.json" in said.err
    rows = [line.split() for line in said.out.splitlines()]
    assert rows[0] == ["shots", "pictures", "l2", "top-1", "deviation"]
    assert [row[:3] for row in rows[1:5]] == [["1", "3", "1"], ["1", "3", "1024"], ["5", "15", "1"], ["5", "15", "1024"]]
    assert "13 pictures of 3 classes, 3 draws of the few" in said.out and "optimistic" in said.out and said.out.count(" best") >= 2
    written = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert written["bad_files"] == 1 and written["train_pictures"] == {"1": 3, "5": 15} and written["test_pictures"] == 13
    assert [(row["shots"], row["l2"], len(row["seeds"])) for row in written["rows"]] == [(1, 1, 3), (1, 1024, 3), (5, 1, 3), (5, 1024, 3)]
    assert [best["shots"] for best in written["best"]] == [1, 5] and written["rows"][2]["accuracy"] > 0.8
    shown = {f"{row['accuracy']:.2%}" for row in written["rows"]}
    assert shown == {row[3] for row in rows[1:5]}

    main([*given, "--shots", "1", "--seeds", "1", "--json-lines"])
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line).keys() == {"shots", "l2", "accuracy", "deviation", "seeds"} and json.loads(line)["deviation"] is None
    main([*given, "--shots", "1", "--seeds", "1"])
    out = capsys.readouterr().out
    assert "1 draw of the few" in out and "optimistic" not in out and "±" not in out


def test_a_class_too_small(saved, colours, capsys):
    given = ["fewshot", str(saved), "--data", str(colours), "--workers", "0", "--device", "cpu", "--shots", "5", "7"]
    assert "field `shots`: class green has 6 readable pictures in the train split, not 7" in refused(capsys, *given)
    main([*given, "--fewer", "--json-lines"])
    said = capsys.readouterr()
    assert "fewer than 7 pictures, all of them taken: green has 6\n" in said.err and len(said.out.splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--split", "train"], "field `split`: train holds the pictures that are learnt from; give val, test"),
        (["--split", "all"], "field `split`: all holds the pictures"),
        (["--split", "tset"], "has no split `tset`"),
        (["--shots", "0"], "field `shots`"),
        (["--seeds", "0"], "field `seeds`: 0 must be at least 1"),
        (["--l2", "-1"], "field `l2`"),
        (["--batch", "0"], "field `batch`: 0 must be at least 1"),
        (["--device", "abacus"], "field `device`: 'abacus'"),
        (["--data", "/no/such/place"], "no folder '/no/such/place'"),
        (["--data", ""], "there is no recipe.json that names its data; give --data"),
    ],
)
def test_wrong_words_are_explained(saved, colours, capsys, arguments, words):
    assert words in refused(capsys, "fewshot", saved, "--data", colours, "--shots", "1", "--workers", "0", *arguments)


def test_models_that_do_not_fit(tmp_path, colours, capsys):
    assert "/no/such/model: no such file" in refused(capsys, "fewshot", "/no/such/model", "--data", colours)
    clips = {"image_size": (4, 16, 16), "patch": (2, 4, 4), "window": (2, 2, 2), "width": 8, "depths": (1,), "heads": (1,), "classes": 0}
    ms.save(ms.create_model("swinv2_tiny", **clips), tmp_path / "clips")
    assert "a model of clips" in refused(capsys, "fewshot", tmp_path / "clips", "--data", colours)
    broken = loud(ms.create_model("vit_base_patch16", **TINY))
    broken.preprocess = Preprocess(image_size=(16, 16))
    with torch.no_grad():
        broken.norm.weight.fill_(3.4e38)  # finite, but what it multiplies is not
    ms.save(broken, tmp_path / "broken")
    said = refused(capsys, "fewshot", tmp_path / "broken", "--data", colours, "--shots", "1", "--workers", "0")
    assert "train pictures are NaN or infinite" in said


def test_statistics_of_a_model_that_brings_none(tmp_path, saved, colours, capsys):
    model = ms.load(saved)
    model.preprocess = None
    ms.save(model, tmp_path / "bare")
    given = ["fewshot", str(tmp_path / "bare"), "--data", str(colours), "--shots", "5", "--workers", "0", "--device", "cpu"]
    assert "give --statistics imagenet or half" in refused(capsys, *given)
    bare, half, own = (
        probe(str(path), silent, data=str(colours), shots=(5,), l2s=(1.0,), statistics=statistics, **ON_CPU).rows()
        for path, statistics in ((tmp_path / "bare", "imagenet"), (tmp_path / "bare", "half"), (saved, "half"))
    )
    model.preprocess = Preprocess(image_size=(16, 16), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    ms.save(model, tmp_path / "half")
    assert half == probe(str(tmp_path / "half"), silent, data=str(colours), shots=(5,), l2s=(1.0,), **ON_CPU).rows()
    assert bare == own == probe(str(saved), silent, data=str(colours), shots=(5,), l2s=(1.0,), **ON_CPU).rows(), "its own come first"


def test_what_a_run_held_out_is_scored(tmp_path, saved, monkeypatch):
    """A set without an evaluation split: the run's own is split as it was in training, however it is spelt; others all alike."""
    own, other = (fill(tmp_path / name, dict.fromkeys(COLOURS, 10)) for name in ("own", "other"))
    run = Run(input=Input(data=str(own), holdout=0.5, share=0.4), seed=3)
    write_json(saved / "recipe.json", to_dict(run))
    monkeypatch.chdir(tmp_path)
    options = {"shots": (5,), "seeds": 1, **ON_CPU}
    assert [probe(str(saved), silent, data=data, **options).test_pictures for data in ("", "own", "./own/", str(other))] == [15, 15, 15, 3]
    write_json(saved / "recipe.json", to_dict(replace(run, input=Input(data=str(tmp_path / "gone")))))
    assert probe(str(saved), silent, data="own", **options).test_pictures == 3


def test_encoders_half_weights_and_lone_files(tmp_path, colours):
    encoder = loud(ms.create_model("vit_base_patch16", **TINY, mask_token=True))
    encoder.preprocess = Preprocess(image_size=(16, 16))
    save_masked(MaskedImages(encoder), tmp_path / "simmim" / "best")
    options = {"data": str(colours), "shots": (1, 5), "l2s": (1.0,), **ON_CPU}
    whole = probe(str(tmp_path / "simmim"), silent, **options)
    assert whole.mean[1, 0] > 0.8
    assert probe(str(tmp_path / "simmim" / "best" / "model.safetensors"), silent, **options).rows() == whole.rows()
    ms.save(ms.load(tmp_path / "simmim").to(torch.bfloat16), tmp_path / "half")
    assert probe(str(tmp_path / "half"), silent, **options).mean[1, 0] > 0.8
