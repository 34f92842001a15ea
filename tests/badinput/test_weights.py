"""Bad weights (rows 10 to 27) in every verb that reads weights: refused by name, nothing run, nothing written."""

import json
import shutil

import pytest

import manyscale as ms
from tests.badinput.conftest import NET, WORDS
from tests.badinput.make_weights import MODELS, PICKLES, TENSORS, changed, foreign, number, row_12_namespace, row_18_nan

pytestmark = pytest.mark.badinput
FIELDS = ["--source", "timm", "--name", "swinv2_tiny"]


def words_for(entry: str, path, pictures, out) -> list:
    small = ["--device", "cpu", "--workers", "0"]
    return {
        "eval": ["eval", path, "--data", pictures, *small],
        "fewshot": ["fewshot", path, "--data", pictures, "--shots", "1", *small],
        "predict": ["predict", path, pictures / "val", "--out", out],
        "transfer": ["transfer", path, "--image-size", "32", "--out", out],
        "export": ["export", path, "--format", "torch", "--out", out],
        "train": ["train", "folder", "--data", pictures, *WORDS, "--epochs", "1", "--batch", "8", *small, "--init", path, "--out", out],
        "convert": ["convert", path, *FIELDS, "--out", out],
    }[entry]


def cases(rows, entries: dict[str, set[int] | None]) -> list:
    """Every row in every entry point; those in the set are fast enough for every day."""
    found = []
    for row in rows:
        for entry, fast in entries.items():
            marks = [pytest.mark.row(number(row)), *([] if fast is None or number(row) in fast else [pytest.mark.slow])]
            found.append(pytest.param(entry, row, marks=marks, id=f"{row.__name__}-{entry}"))
    return found


EVERYWHERE = {"eval": None, "predict": set(), "transfer": {14}, "train": {18}, "fewshot": set(), "export": set()}


@pytest.mark.parametrize(
    "entry, row",
    [
        *cases(PICKLES, {"convert": None, "eval": {10, 11}, "transfer": set()}),
        *cases(MODELS, EVERYWHERE),
        *cases(TENSORS, {"convert": {25}, "eval": {24, 25, 27}, "predict": set(), "transfer": set(), "train": set()}),
    ],
)
def test_every_row_in_every_verb(run, pictures, trained, proof, tmp_path, entry, row):
    made = tmp_path / "made"
    made.mkdir()
    whole = row(made, trained)
    for case, (path, said) in whole.items() if entry in ("convert", "eval") else list(whole.items())[:1]:
        before = {file: file.stat().st_size for file in made.rglob("*")}
        outcome = run(*words_for(entry, path, pictures, tmp_path / "out"))
        if row in PICKLES and entry != "convert":
            said = (path.name,)  # no other verb opens a pickle at all
        outcome.refused(*said)
        assert not proof.exists(), "code was run"
        assert {file: file.stat().st_size for file in made.rglob("*")} == before
        left = [file for file in (tmp_path / "out").rglob("*") if file.suffix in (".safetensors", ".pt2")]
        assert not left, f"{case}: {left}"
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


@pytest.mark.row(12)
def test_a_command_line_beside_the_weights_is_read(trained, tmp_path):
    path = row_12_namespace(tmp_path, trained)
    again = ms.convert(path, source="timm", name="swinv2_tiny", **NET)
    assert all(tensor.equal(foreign(trained)[name]) for name, tensor in ms.export_weights(again, "timm").items())


@pytest.mark.row(18)
def test_what_is_not_finite_is_read_where_it_is_asked_for(trained, tmp_path):
    path, _ = row_18_nan(tmp_path, trained)["nan"]
    assert not ms.load(path, allow_nonfinite=True).head.weight.isfinite().all()
    with pytest.raises(ValueError, match=r"NaN or infinity in head\.weight"):
        ms.load(path)
    weights = ms.export_weights(ms.load(path, allow_nonfinite=True), "timm")
    for allow in (True, False):
        if allow:
            ms.convert(weights, source="timm", name="swinv2_tiny", allow_nonfinite=True, **NET)
        else:
            with pytest.raises(ValueError, match=r"the state dict: NaN or infinity in head\.fc\.weight"):
                ms.convert(weights, source="timm", name="swinv2_tiny", **NET)


@pytest.mark.row(14)
def test_a_recipe_names_no_code(run, pictures, trained, proof, tmp_path):
    place = changed(trained, tmp_path / "model", lambda card: card)
    for values, said in (
        ({"_target_": "payload.go"}, "unknown field `_target_` of Run"),
        ({"input": {"_class_path": "payload.go"}}, "unknown field `_class_path` of Input"),
        ({"task": "payload.go"}, "field `task`: expected classify or"),
        ({"init": "payload.go", "optim": {"lr": "1e-4"}}, "field `lr`: expected float, found '1e-4'"),
    ):
        (place / "recipe.json").write_text(json.dumps(values))
        run("eval", place, "--data", pictures, "--workers", "0").refused("recipe.json", said)
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "recipe.json").write_text(json.dumps(values))
        run(*words_for("train", trained, pictures, tmp_path / "run")).refused("recipe.json", said)
    assert not proof.exists()
