"""Bad settings, JSON and words (rows 81 to 83): exit code 2 before any work, the file or field named."""

import json

import pytest

from tests.badinput.conftest import WORDS
from tests.badinput.make_weights import changed

pytestmark = pytest.mark.badinput

PYTHON = "!!python/object/apply:os.system [\"touch 'code ran'\"]"
LAUGHS = "a: &a [x,x]\nb: &b [*a,*a]\nc: [*b,*b]\n"
YAML = {"object": PYTHON, "laughs": LAUGHS, "nested": "[" * 20_000, "twice": "lr: 1\nlr: 2\n"}


@pytest.mark.row(81)
def test_yaml_is_no_format_of_ours(run, pictures, trained, proof, tmp_path):
    """Nothing reads YAML: where a file or a value of it is given, it is no JSON, or no number."""
    for case, text in YAML.items():
        place = changed(trained, tmp_path / case, lambda card: card)
        (place / "config.json").write_text(text)
        run("eval", place, "--data", pictures, "--workers", "0").refused("config.json", "not JSON")
    folder = ["train", "folder", "--data", pictures, *WORDS, "--out", tmp_path / "out"]
    run(*folder, "--lr", PYTHON).fine(2)
    run(*folder, "--epochs", "1e1").fine(2)
    assert not proof.exists() and not (tmp_path / "out").exists()


JSON = {
    "nan": ('{"format": NaN}', "NaN is no finite number"),
    "infinity": ('{"format": 1e999}', "1e999 is no finite number"),
    "twice": ('{"format": 1, "format": 1}', "`format` stands twice"),
    "nested": ('{"a": ' + "[" * 200_000 + "]" * 200_000 + "}", "nested too deeply"),
    "huge": ('{"format": ' + "9" * 10_000 + "}", "a number of 10000 digits"),
    "large": ('{"format": ' + "9" * 400 + "}", "a number of 400 digits"),
    "list": ("[1]", "expected a JSON object"),
    "binary": ("\udcff\udcfe", "not text"),
    "half": ('{"format": 1', "perhaps half-written"),
}


OTHERS = ("recipe.json", "cascade.json", "safetensors", "index", "table.json")


@pytest.mark.parametrize("entry", ["config.json", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
@pytest.mark.row(82)
def test_json_is_read_strictly(run, pictures, trained, tmp_path, entry):
    for case, (text, said) in JSON.items():
        if entry in ("safetensors", "index", "table.json") and case == "list":
            continue
        place = changed(trained, tmp_path / case, lambda card: card)
        words = ["eval", place, "--data", pictures, "--workers", "0"]
        if entry == "cascade.json":
            words = ["predict", place, pictures / "val", "--cascade", place / entry, "--out", tmp_path / "out"]
        elif entry == "safetensors":
            from tests.badinput.make_weights import raw

            words = ["eval", raw(place / "a.safetensors", text.encode("utf-8", "surrogateescape")), "--data", pictures]
        elif entry == "index":
            (pictures / "index.jsonl").write_text(text, errors="surrogateescape")
            words = ["data", "verify", pictures]
        elif entry == "table.json":
            words = ["plan", "laws", place / entry]
        if entry.endswith(".json"):
            (place / entry).write_text(text, errors="surrogateescape")
        name = {"safetensors": "a.safetensors", "index": "index.jsonl"}.get(entry, entry)
        run(*words).refused(name, *([] if case == "binary" else [said]))


@pytest.mark.row(82)
def test_a_file_without_an_end(run, pictures, trained, tmp_path):
    import os

    place = changed(trained, tmp_path / "m", lambda card: card)
    (place / "config.json").unlink()
    os.mkfifo(place / "config.json")
    run("eval", place, "--data", pictures, seconds=10).refused("config.json: not a regular file")
    (place / "config.json").unlink()
    with open(place / "config.json", "wb") as file:
        file.truncate(1 << 40)  # sparse: no bytes on the disk
    run("eval", place, "--data", pictures, seconds=10).refused("config.json: more than 67,108,864 bytes")


@pytest.mark.row(83)
def test_wrong_words(run, pictures, trained, tmp_path):
    out = tmp_path / "out"
    train = ["train", "folder", "--data", pictures, *WORDS, "--out", out]
    run(*train, "--batchh", "4").fine(2)
    assert "--batch" in run(*train, "--batchh", "4").err + run(*train, "--batchh", "4").out, "the nearest option is named"
    for words, said in (
        ([*train, "--batch", "-4"], "batch"),
        ([*train, "--lr", "nan"], "lr"),
        ([*train, "--lr", "inf"], "lr"),
        (["trian", "folder"], "did you mean `train`?"),
        (["train", "foldr"], "did you mean `folder`?"),
        (["eval", trained, "--data", pictures, "--batch", "0"], "field `batch`"),
        (["data", "verify", pictures, "--max-pixels", "0"], "field `max_pixels`"),
    ):
        outcome = run(*words).fine(2)
        assert said in outcome.err + outcome.out, (words, outcome)
    assert not out.exists()
    out.mkdir()
    (out / "recipe.json").write_text(json.dumps({"task": "simmim"}))
    run(*train, "--epochs", "1").refused(str(out), "--out another folder")
    assert [path.name for path in out.iterdir() if not path.name.startswith(".")] == ["recipe.json"]
