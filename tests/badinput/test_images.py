"""Bad pictures (rows 31 to 50) in every verb that reads pictures: named, left out, and nothing else happens."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.badinput.conftest import WORDS
from tests.badinput.make_images import FINE, NOISE, ROWS, encoded

pytestmark = pytest.mark.badinput
FAST = {"train": {31, 49}, "eval": {32, 50}, "predict": {33, 49}, "verify": set(ROWS) - {36, 38, 39, 40, 48}}


def cases():
    for row in ROWS:
        for entry, fast in FAST.items():
            marks = [pytest.mark.row(row), *([] if row in fast else [pytest.mark.slow])]
            yield pytest.param(entry, row, marks=marks, id=f"{ROWS[row].__name__}-{entry}")


def train_words(pictures, out, batch: int, *more) -> list:
    words = ["train", "folder", "--data", pictures, *WORDS, "--epochs", "1", "--warmup", "0", "--batch", batch]
    return [*words, "--workers", "0", "--device", "cpu", "--precision", "float32", "--out", out, *more]


@pytest.mark.parametrize("entry, row", list(cases()))
def test_every_row_in_every_verb(run, pictures, trained, tmp_path, entry, row):
    split = "train" if entry == "train" else "val"
    said = ROWS[row](pictures / split / "cat")
    bad = {str(pictures / split / "cat" / name) for name, kind in said.items() if not kind.startswith("(")}
    fine = {str(pictures / split / "cat" / name) for name in said} - bad
    if entry == "train":
        outcome = run(*train_words(pictures, tmp_path / "run", 8 + len(said))).fine()
        listed = tmp_path / "run" / "bad_files.jsonl"
        named = {json.loads(line)["path"] for line in listed.read_text().splitlines()} if listed.exists() else set()
        assert named == bad and (tmp_path / "run" / "best" / "model.safetensors").exists()
    elif entry == "eval":
        outcome = run("eval", trained, "--data", pictures, "--workers", "0", "--json-lines").fine()
        assert json.loads(outcome.out) | {"pictures": 4 + len(fine), "bad_files": len(bad)} == json.loads(outcome.out)
        assert all((path if path.isprintable() else ascii(path)) in outcome.err for path in bad)
    elif entry == "predict":
        folders = [pictures / "val" / label for label in ("cat", "dog")]
        outcome = run("predict", trained, *folders, "--out", tmp_path / "said", "--json-lines").fine()
        answers = {one["path"]: one for one in map(json.loads, outcome.out.splitlines())}
        assert {path for path, one in answers.items() if "error" in one} == bad and fine < set(answers) and len(answers) == 4 + len(said)
    else:
        outcome = run("data", "verify", pictures, "--json-lines", "--workers", "2").fine(1 if bad else 0)
        found = {one["path"]: one["kind"] for one in map(json.loads, outcome.out.splitlines())}
        expected = {str(pictures / split / "cat" / name): kind.strip("()") for name, kind in said.items() if kind != FINE}
        assert found == expected
    if entry != "train":
        assert all(line.isprintable() for line in outcome.err.splitlines())


@pytest.mark.parametrize("entry", [pytest.param("train", marks=pytest.mark.slow), "eval", "verify"])
@pytest.mark.row(34, 35)
def test_damage_that_decodes(run, pictures, trained, tmp_path, entry):
    """A flipped bit in a JPEG and in a WebP, and a zeroed block: other pixels without an error, found by their hash alone."""
    split = pictures / ("train" if entry == "train" else "val") / "cat"
    big = np.random.default_rng(0).integers(0, 256, (150, 150, 3), dtype=np.uint8)
    whole = {"flip.jpg": encoded(NOISE, "JPEG"), "flip.webp": encoded(NOISE, "WEBP", lossless=False)}
    whole["zero.jpg"] = encoded(Image.fromarray(big), "JPEG")
    for name, content in whole.items():
        (split / name).write_bytes(content)
    run("data", "index", pictures).fine()
    for name, content in whole.items():
        spoilt = bytearray(content)
        if name.startswith("flip"):
            spoilt[len(spoilt) * 3 // 4] ^= 0x04
        else:
            spoilt[len(spoilt) // 2 : len(spoilt) // 2 + 4096] = bytes(4096)
        (split / name).write_bytes(spoilt)
    bad = {str(split / name) for name in whole}
    if entry == "train":
        run(*train_words(pictures, tmp_path / "blind", 11)).fine()
        assert not (tmp_path / "blind" / "bad_files.jsonl").exists(), "without the index nobody sees it: that is the point"
        run(*train_words(pictures, tmp_path / "run", 11, "--verify")).fine()
        assert {json.loads(line)["path"] for line in (tmp_path / "run" / "bad_files.jsonl").read_text().splitlines()} == bad
        outcome = run(*train_words(pictures, tmp_path / "stop", 11, "--verify", "--bad-files", "stop"))
        outcome.refused("changed since it was indexed", str(split))
    elif entry == "eval":
        assert json.loads(run("eval", trained, "--data", pictures, "--workers", "0", "--json-lines").fine().out)["bad_files"] == 0
    else:
        outcome = run("data", "verify", pictures, "--json-lines").fine(1)
        assert {(one["path"], one["kind"]) for one in map(json.loads, outcome.out.splitlines())} == {(path, "changed") for path in bad}


@pytest.mark.row(31)
@pytest.mark.slow
def test_workers_leave_out_what_one_process_leaves_out(run, pictures, tmp_path):
    ROWS[31](pictures / "train" / "cat")
    words = train_words(pictures, tmp_path / "run", 12)
    words[words.index("--workers") + 1] = "2"
    run(*words).fine()
    assert len((tmp_path / "run" / "bad_files.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize("entry", ["predict", "verify"])
@pytest.mark.row(49)
def test_a_file_of_somebody_else(run, trained, pictures, entry):
    """Unreadable; run as another user where this one is root, whom no mode stops."""
    place = Path(tempfile.mkdtemp())
    try:
        shutil.copytree(pictures, place / "set")
        shutil.copytree(trained, place / "model")
        bad = place / "set" / "val" / "cat" / "0.png"
        place.chmod(0o777)
        bad.chmod(0)
        user = {"user": 65534} if os.geteuid() == 0 else {}
        if entry == "predict":
            good = place / "set" / "val" / "dog" / "0.png"
            outcome = run("predict", place / "model", bad, good, "--json-lines", "--out", place / "said", cwd=str(place), **user).fine()
        else:
            outcome = run("data", "verify", place / "set", "--json-lines", cwd=str(place), **user).fine(1)
        first = json.loads(outcome.out.splitlines()[0])
        assert first["path"] == str(bad) and "Permission denied" in (first.get("error") or first["reason"])
    finally:
        shutil.rmtree(place)
