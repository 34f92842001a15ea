"""What a person types, and what they read when it was wrong: exit code 2, one message that names the fix, no traceback."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

import manyscale as ms
from manyscale.cli import VERBS, main
from manyscale.config import Preprocess, Run, SuperViTConfig, to_dict
from manyscale.models import build
from manyscale.storage import write_json
from tests.conftest import loud

MICRO = {"image_size": 32, "patch": 4, "window": 4, "width": 16, "depths": (1, 1), "heads": (2, 4), "classes": 10}


@pytest.fixture
def saved(tmp_path):
    model = loud(ms.create_model("swinv2_tiny", **MICRO))
    model.preprocess, model.labels = Preprocess(image_size=(32, 32), crop_ratio=1.0), tuple("0123456789")
    ms.save(model, tmp_path / "best")
    write_json(tmp_path / "best" / "recipe.json", to_dict(Run(recipe="digits")))
    return tmp_path


def refused(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as left:
        main([str(a) for a in arguments])
    said = capsys.readouterr()
    assert left.value.code == 2, said
    assert "Traceback" not in said.err
    return " ".join((said.err + said.out).replace("│", " ").split())


def test_help_answers_in_under_a_second():
    """Or, on a machine that has other things to do, in less than eight times what it takes to import the library that parses."""

    def seconds(*arguments: str) -> float:
        start = time.perf_counter()
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0
        return time.perf_counter() - start

    for arguments in (["--help"], ["train", "digits", "--help"], ["predict", "--help"]):
        pairs = [(seconds("-m", "manyscale", *arguments), seconds("-c", "import tyro")) for _ in range(3)]
        assert any(ours < max(1.0, 8 * library) for ours, library in pairs), (arguments, pairs)


def test_every_verb_has_help(capsys):
    main([])
    overview = capsys.readouterr().out
    for verb in VERBS:
        assert f"manyscale {verb}" in overview
    main(["--version"])
    assert capsys.readouterr().out == f"manyscale {ms.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], "unknown verb `trian`; did you mean `train`?"),
        (["train", "digts"], "unknown recipe `digts`; did you mean `digits`?"),
        (["train"], "give a recipe"),
        (["train", "digits", "--lr", "nan"], "field `lr`: nan is not a finite number"),
        (["train", "digits", "--lr", "-1"], "field `lr`: -1.0 must be positive"),
        (["train", "digits", "--window", "0"], "field `window`: 0 must be at least 1"),
        (["train", "digits", "--windw", "4"], "--window"),
        (["train", "digits", "--time", "soon"], "field `time`: 'soon' is not a duration; write 90s, 30m, 8h or 1h30m"),
        (["train", "digits", "--batch", "0"], "field `batch`: 0 must be at least 1"),
        (["train", "digits", "--accumulate", "7"], "field `accumulate`: 7 must divide the batch 64"),
        (["train", "digits", "--heads", "5", "6"], "field `heads`: 5 of stage 1 must divide its width"),
        (["train", "digits", "--bias", "tabel"], "tabel"),
        (["train", "folder", "--data", "/no/such/place"], "no folder '/no/such/place'"),
        (["predict", "/no/such/run", "x.png"], "/no/such/run: no such file or folder"),
        (["plan", "count", "swinv2_tinny"], "unknown model `swinv2_tinny`; did you mean `swinv2_tiny`?"),
        (["plan", "weather"], "unknown plan `weather`; known: cost, count"),
        (["plan", "count", "swinv2_tiny", "--window", "0"], "field `window`: 0 must be at least 1"),
        (["plan", "count", "supervit_deit_small", "--image-size", "160"], "give one with --setting 160"),
        (["plan", "count", "supervit_deit_small", "--setting", "100"], "100 must be a multiple of the patch 16"),
        (["convert", "/no/file.pth", "--source", "timm", "--name", "swinv2_tiny", "--out", "x"], "/no/file.pth"),
        (["eval", "/no/such/run"], "/no/such/run: no such file or folder"),
    ],
)
def test_wrong_words_are_explained(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MANYSCALE_DATA", str(tmp_path))
    assert words in refused(capsys, *arguments)
    assert not list(tmp_path.glob("runs/*/step_*"))


def test_a_batch_larger_than_the_set(capsys, tmp_path):
    assert "field `batch`: 4096 is more than the 1438 training images" in refused(
        capsys, "train", "digits", "--batch", "4096", "--out", tmp_path / "r"
    )


@pytest.mark.skipif(os.geteuid() != 0 and not Path("/proc/self").exists(), reason="needs a folder that nobody can write")
def test_a_folder_that_cannot_be_written(capsys):
    said = refused(capsys, "train", "digits", "--out", "/proc/self/runs")
    assert "/proc/self/runs" in said and "--out" in said


def pictures(folder: Path) -> Path:
    folder.mkdir()
    Image.new("RGB", (40, 30), (200, 30, 30)).save(folder / "a.png")
    Image.new("L", (1, 1)).save(folder / "b.jpg")
    (folder / "c.jpg").write_text("<html>404</html>")
    (folder / "d.png").touch()
    return folder


def test_predict_answers_for_every_file_and_leaves_a_sheet(saved, capsys):
    folder = pictures(saved / "pictures")
    main(["predict", str(saved), str(folder), "--top", "5"])
    out = capsys.readouterr().out
    assert "not an image" in out and "empty file" in out
    lines = [json.loads(line) for line in (saved / "predictions" / "predictions.jsonl").read_text().splitlines()]
    assert [Path(line["path"]).name for line in lines] == ["a.png", "b.jpg", "c.jpg", "d.png"]
    assert len(lines[0]["top"]) == 5 and "error" in lines[2] and "error" in lines[3]
    probabilities = [entry["probability"] for entry in lines[0]["top"]]
    assert probabilities == sorted(probabilities, reverse=True) and lines[0]["top"][0]["label"] in "0123456789"
    with Image.open(saved / "predictions" / "sheet.png") as sheet:
        assert sheet.size[0] > 100
    main(["predict", str(saved), str(folder / "a.png"), "--json-lines", "--out", str(saved / "elsewhere")])
    alone = json.loads(capsys.readouterr().out)["top"]
    assert [entry["label"] for entry in alone] == [entry["label"] for entry in lines[0]["top"]]
    assert [entry["probability"] for entry in alone] == pytest.approx(probabilities, abs=1e-5)


def test_a_simmim_run_paints_and_is_scored(tmp_path, capsys):
    run = tmp_path / "run"
    main(["train", "simmim_folder", "--tiny", "--epochs", "1", "--precision", "float32", "--out", str(run)])
    capsys.readouterr()
    folder = pictures(tmp_path / "pictures")
    main(["predict", str(run), str(folder)])
    out = capsys.readouterr().out
    assert "a.png: l1 " in out and "not an image" in out and "empty file" in out
    lines = [json.loads(line) for line in (run / "predictions" / "predictions.jsonl").read_text().splitlines()]
    assert [sorted(line) for line in lines] == [["l1", "path"]] * 2 + [["error", "path"]] * 2
    with Image.open(run / "predictions" / "sheet.png") as sheet:
        assert sheet.size[0] > 100
    assert "none of the 1 files could be read" in refused(capsys, "predict", run, folder / "d.png")
    main(["eval", str(run), "--json-lines", "--batch", "64"])
    scored = json.loads(capsys.readouterr().out)
    assert scored["l1"] == pytest.approx(json.loads((run / "summary.json").read_text())["best"]["l1"], abs=1e-6)


def test_compare_tells_runs_apart(tmp_path, capsys):
    for name, seed in (("one", "0"), ("two", "1")):
        main(["train", "digits", "--tiny", "--epochs", "1", "--batch", "359", "--seed", seed, "--out", str(tmp_path / name)])
    capsys.readouterr()
    main(["compare", str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(tmp_path / "both.png")])
    out = capsys.readouterr().out
    for name in ("one", "two"):
        assert f"{json.loads((tmp_path / name / 'summary.json').read_text())['best']['accuracy']:.4f}" in out
    with Image.open(tmp_path / "both.png") as picture:
        assert picture.width > 400
    assert "give the folder of a run" in refused(capsys, "compare", tmp_path)
    (tmp_path / "two" / "metrics.jsonl").write_text("")
    assert "not evaluated yet" in refused(capsys, "compare", tmp_path / "two")


def test_studies_are_named_alike_with_and_without_torch(capsys):
    from manyscale.cli.learning import STUDIES as listed
    from manyscale.studies import STUDIES as functions

    assert list(listed) == list(functions)
    assert "did you mean `norms`?" in refused(capsys, "study", "norm")
    assert "3 or more" in refused(capsys, "study", "norms", "--seeds", "0")
    assert "give a study" in refused(capsys, "study")


def test_predict_with_nothing_to_read(saved, capsys):
    folder = pictures(saved / "pictures")
    assert "none of the 2 files could be read" in refused(capsys, "predict", saved, folder / "c.jpg", folder / "d.png")
    (saved / "empty").mkdir()
    assert "no pictures below this folder" in refused(capsys, "predict", saved, saved / "empty")
    assert "give at least one picture" in refused(capsys, "predict", saved)


def test_transfer_and_eval_of_a_saved_model(saved, capsys):
    main(["transfer", str(saved), "--image-size", "64", "--window", "16", "--out", str(saved / "large")])
    out = capsys.readouterr().out
    assert "stage 2: window (16, 16) is larger than its grid: clipped to (8, 8)" in out
    assert ms.load(saved / "large").preprocess.image_size == (64, 64)
    main(["eval", str(saved / "large"), "--workers", "0", "--json-lines"])
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["pictures"] == 359 and 0 <= metrics["accuracy"] <= 1
    assert "has no split `test`" in refused(capsys, "eval", saved, "--split", "test")
    assert "field `window`" in refused(capsys, "transfer", saved, "--image-size", "64", "--window", "0", "--out", saved / "x")


def test_eval_refuses_other_classes(saved, capsys):
    for name in ("cat", "dog"):
        (saved / "pets" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (8, 8)).save(saved / "pets" / name / f"{i}.png")
    assert "the set's classes are not the model's: it has besides cat, dog" in refused(capsys, "eval", saved, "--data", saved / "pets")


def test_convert_brings_a_foreign_checkpoint_in(tmp_path, capsys):
    from safetensors.torch import save_file

    foreign = ms.export_weights(ms.create_model("swinv2_tiny", classes=10), target="timm")
    save_file({k: v.contiguous() for k, v in foreign.items()}, tmp_path / "timm.safetensors")
    main(["convert", str(tmp_path / "timm.safetensors"), "--source", "timm", "--name", "swinv2_tiny", "--out", str(tmp_path / "m")])
    assert "swinv2_tiny" in capsys.readouterr().out
    assert ms.load(tmp_path / "m")(torch.randn(1, 3, 64, 64)).shape == (1, 10)
    vit = ms.create_model("vit_tiny_patch16", classes=3, image_size=64, depth=1, pool="map")
    numpy.savez(tmp_path / "vit.npz", **{k: v.numpy() for k, v in ms.export_weights(vit, target="big_vision").items()})
    flags = ("--source", "big_vision", "--name", "vit_tiny_patch16", "--image-size", "64", "--statistics", "half")
    assert "missing: " in refused(capsys, "convert", tmp_path / "vit.npz", *flags, "--out", tmp_path / "v")  # of twelve blocks
    vit = ms.create_model("vit_tiny_patch16", classes=3, image_size=64, pool="map")
    numpy.savez(tmp_path / "vit.npz", **{k: v.numpy() for k, v in ms.export_weights(vit, target="big_vision").items()})
    main(["convert", str(tmp_path / "vit.npz"), *flags, "--out", str(tmp_path / "v")])
    assert ms.load(tmp_path / "v").preprocess.mean == (0.5, 0.5, 0.5)
    main(["transfer", str(tmp_path / "v"), "--image-size", "96", "--patch", "24", "--out", str(tmp_path / "w")])
    assert "patches (16, 16) -> (24, 24)" in capsys.readouterr().out
    assert ms.load(tmp_path / "w")(torch.randn(1, 3, 96, 96)).shape == (1, 3)
    (tmp_path / "half.pth").write_bytes(b"PK\x03\x04 half")
    assert "half.pth" in refused(
        capsys, "convert", tmp_path / "half.pth", "--source", "timm", "--name", "swinv2_tiny", "--out", tmp_path / "n"
    )
    assert not (tmp_path / "n").exists()


def test_plan_and_models_print_the_papers_numbers(capsys):
    main(["plan", "count", "swinv2_tiny"])
    assert "28,347,154" in capsys.readouterr().out
    main(["plan", "count", "supervit_deit_small"])
    assert re.search(r"224/0\.7 +138, 98, 70 +3\.013 +66%", capsys.readouterr().out)
    main(["plan", "count", "supervit_deit_small", "--setting", "224/0.7"])
    assert re.search(r"total +22,170,088 +3\.013", capsys.readouterr().out)
    main(["models", "swinv2*"])
    assert "3,001,940,680" in capsys.readouterr().out


def test_doctor_finds_this_machine_well(capsys):
    main(["doctor"])
    out = capsys.readouterr().out
    assert "one step of Swin V2" in out and "one step of ViT" in out and "FAIL" not in out


def test_batch_norms_are_recalibrated_on_a_set(tmp_path, capsys):
    shape = {"sizes": (16, 24), "patch": 8, "width": 16, "depth": 2, "heads": 2, "mlp_width": 16, "drop_blocks": (1,)}
    model = build(SuperViTConfig(**shape, classes=10, stem="conv", stem_width=4))
    model.preprocess = Preprocess(image_size=(24, 24))
    ms.save(model, tmp_path / "model")
    main(["transfer", str(tmp_path / "model"), "--recalibrate", "digits", "--out", str(tmp_path / "new")])
    new = ms.load(tmp_path / "new")
    assert new.config.stem_statistics == "per-size" and new.stem.norm1.mean.shape == (2, 4)
    assert not torch.allclose(new.stem.norm1.variance[0], new.stem.norm1.variance[1], rtol=1e-3)
    assert "wrote" in capsys.readouterr().out


@pytest.mark.slow
def test_any_number_of_sizes_is_typed(tmp_path):
    main(
        [
            "train",
            "supervit_folder",
            "--tiny",
            "--sizes",
            "16",
            "32",
            "--keeps",
            "0.5",
            "1",
            "--epochs",
            "1",
            "--batch",
            "359",
            "--out",
            str(tmp_path),
        ]
    )
    assert ms.load(tmp_path).config.sizes == (16, 32) and ms.load(tmp_path).config.keeps == (0.5, 1.0)
