"""data index, verify and repair: everything wrong is found and named, whatever it does to the process that looks; nothing is lost."""

import faulthandler
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from manyscale.cli import main
from manyscale.data import repair
from manyscale.data import verify as verifying
from manyscale.data.crew import Fault, over_processes
from manyscale.data.repair import quarantine, undo
from tests.data.test_shards import flip, tarred


@pytest.fixture
def root(tmp_path) -> Path:
    """Two splits of two classes, twelve noisy JPEGs."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            (tmp_path / "set" / split / label).mkdir(parents=True)
            for i in range(3):
                noise = Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8))
                noise.save(tmp_path / "set" / split / label / f"{i}.jpg")
    return tmp_path / "set"


def run(*words) -> int:
    """The verb's exit code."""
    try:
        main(["data", *map(str, words)])
    except SystemExit as leaving:
        return leaving.code or 0
    return 0


def report(capsys, *words) -> tuple[int, set[tuple[str, str]], list[dict]]:
    """Exit code, (kind, file name) of everything found, and all records."""
    capsys.readouterr()
    code = run("verify", *words, "--json-lines", "--workers", 2)
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return code, {(one["kind"], one["path"]) for one in records}, records


def test_every_single_flipped_bit_is_found(root, capsys):
    assert run("index", root) == 0 and "12 pictures" in capsys.readouterr().out
    assert report(capsys, root) == (0, set(), [])
    path = root / "train" / "cat" / "0.jpg"
    whole = path.read_bytes()
    for bit in np.random.default_rng(1).choice(len(whole) * 8, 12, replace=False).tolist():
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        code, found, _ = report(capsys, root)
        assert code == 1 and {where for _, where in found} == {str(path)}, bit


def test_everything_that_can_be_wrong_has_a_name(root, capsys, tmp_path):
    assert run("index", root) == 0
    jpeg = (root / "train" / "cat" / "0.jpg").read_bytes()
    made = {
        "empty": ("train/cat/0.jpg", b""),
        "web-page": ("train/cat/1.jpg", b"<!DOCTYPE html><html>404</html>"),
        "not-an-image": ("train/cat/2.jpg", b"8BPS\0\x01"),
        "truncated": ("train/dog/0.jpg", jpeg[: len(jpeg) // 2]),
        "damaged": ("train/dog/1.jpg", jpeg[:40]),
        "new": ("train/cat/new.jpg", (root / "val" / "cat" / "0.jpg").read_bytes()),
        "other-file": ("train/cat/notes.txt", b"x"),
        "ending": ("train/dog/3.png", (root / "train" / "dog" / "2.jpg").read_bytes()),
    }
    for name, content in made.values():
        (root / name).write_bytes(content)
    Image.new("RGB", (70, 70)).save(root / "val" / "dog" / "0.jpg")
    frames = [Image.new("RGB", (9, 9), (shade, 0, 0)) for shade in (0, 99)]
    frames[0].save(root / "val" / "dog" / "many.gif", save_all=True, append_images=frames[1:])
    flip(root / "val" / "cat" / "1.jpg", 700)
    os.mkfifo(root / "val" / "dog" / "pipe.jpg")
    os.symlink("loop.jpg", root / "val" / "dog" / "loop.jpg")
    (root / "val" / "cat" / "2.jpg").unlink()
    (root / "val" / "emu").mkdir()
    code, found, records = report(capsys, root, "--max-pixels", 4000)
    expected = {(kind, str(root / name)) for kind, (name, _) in made.items()} | {
        ("new", str(root / "train/dog/3.png")),
        ("too-large", str(root / "val/dog/0.jpg")),
        ("several-pictures", str(root / "val/dog/many.gif")),
        ("new", str(root / "val/dog/many.gif")),
        ("changed", str(root / "val/cat/1.jpg")),
        ("not-a-file", str(root / "val/dog/pipe.jpg")),
        ("unreadable", str(root / "val/dog/loop.jpg")),
        ("missing", str(root / "val/cat/2.jpg")),
        ("empty-class", str(root / "val/emu")),
        ("classes", str(root / "val/emu")),
        ("duplicate", str(root / "val/cat/0.jpg")),
    }
    assert code == 1 and found == expected
    warnings = {"new", "other-file", "ending", "several-pictures", "duplicate"}
    assert all((one["level"] == "warning") == (one["kind"] in warnings) and one["reason"] for one in records)
    assert run("verify", root, "--out", tmp_path / "report.jsonl") == 1
    said = capsys.readouterr().out
    assert "looked at: " in said and len((tmp_path / "report.jsonl").read_text().splitlines()) == len(records)


def test_one_class_and_the_same_bytes_in_two_classes(root, capsys):
    shutil.copy(root / "train" / "cat" / "0.jpg", root / "train" / "dog" / "copy.jpg")
    shutil.copy(root / "train" / "cat" / "0.jpg", root / "train" / "cat" / "copy.jpg")  # twice in one class: no harm
    shutil.rmtree(root / "val" / "dog")
    code, found, _ = report(capsys, root)
    expected = {("duplicate", "train/dog/copy.jpg"), ("classes", "val/dog"), ("one-class", "val")}
    assert code == 1 and found == {(kind, str(root / name)) for kind, name in expected}


def test_a_decoder_that_crashes_or_hangs_costs_its_sample_alone(root, capsys, monkeypatch):
    def decode(content, path, max_pixels):
        if path.endswith("train/cat/1.jpg"):
            faulthandler.disable()  # pytest's would print
            os.abort()
        if path.endswith("val/dog/0.jpg"):
            time.sleep(60)
        if path.endswith("val/dog/2.jpg"):
            os._exit(3)

    monkeypatch.setattr(verifying, "decode_image", decode)
    started = time.monotonic()
    code, found, records = report(capsys, root, "--seconds", 0.5)
    assert time.monotonic() - started < 20 and code == 1
    assert found == {
        (kind, str(root / name)) for kind, name in (("crash", "train/cat/1.jpg"), ("hang", "val/dog/0.jpg"), ("crash", "val/dog/2.jpg"))
    }
    reasons = {one["path"]: one["reason"] for one in records}
    assert "SIGABRT" in reasons[str(root / "train/cat/1.jpg")] and "exit code 3" in reasons[str(root / "val/dog/2.jpg")]


def test_every_sample_is_answered_once_however_many_die():
    def work(sample):
        if sample % 7 == 3:
            os.kill(os.getpid(), 9)
        return sample * 2

    answers = list(over_processes(work, 100, workers=3, seconds=30))
    assert sorted(sample for sample, _ in answers) == list(range(100))
    for sample, answer in answers:
        assert answer == (Fault("crash", "its decoder died: SIGKILL") if sample % 7 == 3 else sample * 2)


def test_no_process_is_left_behind(root):
    before = set(os.listdir("/proc"))
    steps = over_processes(lambda sample: sample, 1000, workers=2, seconds=30)
    next(steps)
    steps.close()
    mine = [pid for pid in set(os.listdir("/proc")) - before if pid.isdigit() and Path(f"/proc/{pid}/stat").exists()]
    assert not [pid for pid in mine if Path(f"/proc/{pid}/stat").read_text().split()[3] == str(os.getpid())]


def test_tars_are_verified_too(tmp_path, root, capsys):
    tar = tmp_path / "set.tar"
    assert run("pack", root, tar) == 0 and run("verify", tar) == 0
    content = tar.read_bytes()
    place = content.index((root / "train" / "dog" / "1.jpg").read_bytes())
    flip(tar, place + 600)
    code, found, _ = report(capsys, tar)
    assert code == 1 and found == {("changed", f"{tar}:train/dog/1.jpg")}
    os.remove(f"{tar}.index.jsonl")
    tar.write_bytes(content[:-11_000])
    code, found, _ = report(capsys, tar)
    assert code == 1 and ("shard", str(tar)) in found
    folder = tmp_path / "many"
    folder.mkdir()
    shutil.copy(tar, folder / "bad.tar")
    tarred(folder / "good.tar", {"cat/1.jpg": b"", "dog/1.jpg": content[place : place + 100]})
    code, found, _ = report(capsys, folder)
    assert code == 1 and {("shard", f"{folder}/bad.tar"), ("empty", f"{folder}/good.tar:cat/1.jpg")} <= found


def test_an_index_elsewhere(tmp_path, root, capsys):
    before = sorted(root.rglob("*"))
    assert run("index", root, "--out", tmp_path / "i.jsonl") == 0 and sorted(root.rglob("*")) == before
    (root / "val" / "cat" / "0.jpg").unlink()
    assert report(capsys, root, "--index", tmp_path / "i.jsonl")[:2] == (1, {("missing", str(root / "val/cat/0.jpg"))})
    assert report(capsys, root)[0] == 0
    assert run("verify", root, "--index", tmp_path / "gone.jsonl") == 2


def snapshot(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_repair_moves_and_undo_puts_back(tmp_path, root, capsys):
    (root / "train" / "cat" / "0.jpg").write_bytes(b"")
    (root / "train" / "dog" / "b\nd.jpg").write_bytes(b"<html>")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "bad.jpg").write_bytes(b"x")
    os.symlink(tmp_path / "elsewhere", root / "train" / "cat" / "linked")
    os.symlink(tmp_path / "elsewhere" / "bad.jpg", root / "train" / "dog" / "link.jpg")  # the link is the set's, what it names is not
    before, outside = snapshot(root), snapshot(tmp_path / "elsewhere")
    assert run("repair", root, "--workers", 1) == 1, "one file could not be moved"
    said = capsys.readouterr()
    assert "left train/cat/linked/bad.jpg: it lies outside of the set" in said.err and "moved 3 files" in said.out
    assert snapshot(tmp_path / "elsewhere") == outside
    os.remove(root / "train" / "cat" / "linked")
    assert run("verify", root, "--workers", 1) == 0
    os.symlink(tmp_path / "elsewhere", root / "train" / "cat" / "linked")
    assert run("repair", root, "--undo") == 0
    assert snapshot(root) == before and not (root / ".quarantine").exists() and (root / "train" / "dog" / "link.jpg").is_symlink()
    assert run("repair", root, "--undo") == 2


def test_undo_overwrites_nothing(root, capsys):
    (root / "train" / "cat" / "0.jpg").write_bytes(b"")
    assert run("repair", root) == 0
    (root / "train" / "cat" / "0.jpg").write_bytes(b"new")
    assert run("repair", root, "--undo") == 1 and "another file has taken its place" in capsys.readouterr().err
    assert (root / "train" / "cat" / "0.jpg").read_bytes() == b"new"
    (root / "train" / "cat" / "0.jpg").unlink()
    assert run("repair", root, "--undo") == 0 and (root / "train" / "cat" / "0.jpg").read_bytes() == b""


@pytest.mark.parametrize("stop", range(4))
def test_a_repair_stopped_anywhere_is_undone(root, monkeypatch, stop):
    before = snapshot(root)
    keys = [f"train/cat/{i}.jpg" for i in range(3)]
    moves = []

    def move(old, new, real=repair._move):
        if len(moves) == stop:
            raise KeyboardInterrupt
        moves.append(old)
        real(old, new)

    monkeypatch.setattr(repair, "_move", move)
    try:
        quarantine(str(root), [(key, "empty", "empty file") for key in keys])
    except KeyboardInterrupt:
        assert stop < 3
    monkeypatch.undo()
    assert len(undo(str(root)).moved) == min(stop, 3) and snapshot(root) == before


@pytest.mark.parametrize("name", ["../../etc/x", "/etc/x", "train/../../x", "", 7])
def test_a_record_that_leads_out_of_the_set_is_refused(root, name, tmp_path):
    quarantine(str(root), [("train/cat/0.jpg", "empty", "empty file")])
    record = root / ".quarantine" / "0001" / "moved.jsonl"
    record.write_text(json.dumps({"name": name}) + "\n")
    with pytest.raises(ValueError, match="names no place in the set"):
        undo(str(root))
    shutil.rmtree(root / ".quarantine")
    os.symlink(tmp_path, root / ".quarantine")
    with pytest.raises(ValueError, match="a link; the quarantine lies in the set itself"):
        quarantine(str(root), [("train/cat/1.jpg", "empty", "empty file")])


def test_wrong_calls(root, capsys):
    for words, said in (
        (["verfy", root], "did you mean `verify`"),
        ([], "give what to do: index, verify, repair, pack"),
        (["verify", "digits"], "digits are part of scikit-learn"),
        (["verify", root / "gone"], "field `data`: no folder"),
        (["verify", root, "--seconds", "0"], "field `seconds`"),
        (["verify", root, "--workers", "0"], "field `workers`"),
        (["pack", root, root / "x.zip"], "the name of a .tar"),
    ):
        assert run(*words) == 2 and said in capsys.readouterr().err
    assert run("pack", root, root.parent / "set.tar") == 0 and run("repair", root.parent / "set.tar") == 2
