"""Bad sets in folders and tars (rows 74 to 80), in every verb that opens one."""

import json
from pathlib import Path

import pytest

from tests.badinput.conftest import WORDS
from tests.badinput.make_shards import ROWS, contents, tarred
from tests.badinput.make_weights import number

pytestmark = pytest.mark.badinput
FAST = {"train": set(), "eval": {75, 76, 79}, "verify": {74, 76, 78}, "index": {77}}


def words_for(entry: str, data, trained, out) -> list:
    small = ["--device", "cpu", "--workers", "0"]
    train = ["train", "folder", "--data", data, *WORDS, "--epochs", "1", "--warmup", "0", "--batch", "8", *small, "--out", out]
    verb = ["data", entry, data]
    return {"train": train, "eval": ["eval", trained, "--data", data, *small], "verify": [*verb, "--json-lines"], "index": verb}[entry]


def cases() -> list:
    made = []
    for row in ROWS:
        for entry, fast in FAST.items():
            marks = [pytest.mark.row(number(row)), *([] if number(row) in fast else [pytest.mark.slow])]
            made.append(pytest.param(entry, row, marks=marks, id=f"{row.__name__}-{entry}"))
    return made


@pytest.mark.parametrize("entry, row", cases())
def test_every_row_in_every_verb(run, pictures, trained, proof, tmp_path, entry, row):
    made = tmp_path / "made"
    made.mkdir()
    for name, case in row(made, pictures).items():
        outcome = run(*words_for(entry, case.data, trained, tmp_path / "out"), seconds=30)
        if entry == "index":
            label = number(row) == 74  # what a label is, an index does not ask
            outcome.fine() if case.trains or label else outcome.refused(*case.said)
        elif entry == "verify" and number(row) != 79:
            found = [json.loads(line) for line in outcome.out.splitlines()] if outcome.code < 2 else []
            text = outcome.out if found else outcome.err
            assert all(words in text for words in case.said), (name, text)
            outcome.fine(2 if not found else int(any(one["level"] == "bad" for one in found)))
            assert found or "twice" in text, name
        elif case.trains:
            outcome.fine()
        else:
            outcome.refused(*case.said)
            assert not list((tmp_path / "out").rglob("step_*")), name
    assert not proof.exists(), "code was run"
    extracted = [place / name for place in (tmp_path, made, tmp_path.parent, Path("/tmp")) for name in ("up.png", "absolute.png", "train")]
    assert not [path for path in extracted if path.exists()]


@pytest.mark.row(76)
def test_an_index_knows_how_many_there_were(run, pictures, trained, tmp_path):
    """Of a shard that lost its end after it was indexed every member is named; nothing is silently fewer."""
    tar = tarred(tmp_path / "set.tar", contents(pictures))
    run("data", "index", tar).fine()
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    run("eval", trained, "--data", tar, "--workers", "0").refused("set.tar: changed since it was indexed", "bytes then")
    found = [json.loads(line) for line in run("data", "verify", tar, "--json-lines").fine(1).out.splitlines()]
    assert sum(one["kind"] == "missing" for one in found) == len(contents(pictures)) and found[-1]["path"].startswith(str(tar))


@pytest.mark.row(77)
def test_more_members_than_are_read(run, pictures, trained, tmp_path):
    before = tmp_path / "before.py"
    before.write_text("from manyscale.data import shards\nshards.MAX_MEMBERS = 11\n")
    tar = tarred(tmp_path / "set.tar", contents(pictures))
    run("eval", trained, "--data", tar, "--workers", "0", before=str(before)).refused("set.tar", "more than 11 members")


@pytest.mark.parametrize("entry", ["train", "eval"])
@pytest.mark.row(80)
def test_a_shard_that_changed_after_its_index(run, pictures, trained, tmp_path, entry):
    tar = tarred(tmp_path / "set.tar", contents(pictures))
    run("data", "index", tar).fine()
    content = bytearray(tar.read_bytes())
    content[-15_000] ^= 1  # in a picture
    tar.write_bytes(content)
    outcome = run(*words_for(entry, tar, trained, tmp_path / "out"))
    outcome.refused(str(tar), "changed since it was indexed, at", f"manyscale data index {tar}")
    assert not list((tmp_path / "out").rglob("*.safetensors")), "before the first step"


@pytest.mark.row(78)
def test_members_are_never_extracted(run, pictures, tmp_path):
    """Not even under their good names: a training leaves nothing of a shard on the disk."""
    tar = tarred(tmp_path / "set.tar", contents(pictures))
    run(*words_for("train", tar, None, tmp_path / "out")).fine()
    assert not [path for path in tmp_path.rglob("*.png") if not {"set", "out"} & set(path.relative_to(tmp_path).parts)]
    assert sorted(path.name for path in Path(tmp_path / "out").glob("*.png")) == ["curves.png", "samples.png"]
