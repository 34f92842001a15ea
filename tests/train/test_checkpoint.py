import errno
import os
import random
import stat
import threading

import pytest
import torch
from safetensors.torch import load_file

from manyscale.ranks import ALONE
from manyscale.train import checkpoint
from manyscale.train.checkpoint import Writer, checkpoints, load_checkpoint, save_checkpoint, tidy, verify

SHARD = "shard-00001-model-00001-of-00001.safetensors"
TENSORS = {"model.a": torch.arange(1000.0), "optimiser.a.step": torch.tensor(3.0), "model.b": torch.randn(3, 5).bfloat16()}


def test_round_trip_and_no_pickle_anywhere(tmp_path):
    path = save_checkpoint(tmp_path, 7, TENSORS, {"step": 7})
    tensors, values = load_checkpoint(tmp_path, print)
    assert values == {"step": 7}
    assert all(torch.equal(tensors[k], TENSORS[k]) and tensors[k].dtype == TENSORS[k].dtype for k in TENSORS)
    assert sorted(p.name for p in path.iterdir()) == ["manifest.json", SHARD, "state.json"]
    assert load_file(path / SHARD).keys() == TENSORS.keys()
    mode = stat.S_IMODE((path / SHARD).stat().st_mode)
    assert mode & stat.S_IRUSR and mode == stat.S_IMODE((path / "state.json").stat().st_mode)  # by the umask, not 0600


@pytest.mark.parametrize("seed", range(40))
def test_any_flip_truncation_or_zeroed_block_is_found_named_and_stepped_over(tmp_path, seed):
    save_checkpoint(tmp_path, 1, TENSORS, {"step": 1})
    newest = save_checkpoint(tmp_path, 2, TENSORS, {"step": 2})
    chance = random.Random(seed)
    file = newest / chance.choice([SHARD, "state.json", "manifest.json"])
    content = bytearray(file.read_bytes())
    place = chance.choice([i for i, byte in enumerate(content) if byte])  # where zeros are a change
    match seed % 3:
        case 0:
            content[place] ^= 1 << chance.randrange(8)
        case 1:
            content = content[:place]
        case 2:
            content[place : place + 16] = b"\0" * len(content[place : place + 16])
    file.write_bytes(content)
    notes = []
    found = load_checkpoint(tmp_path, notes.append)
    assert found[1]["step"] == 1 and len(notes) == 1 and "step_00000002" in notes[0] and file.name in notes[0]
    assert (tmp_path / "damaged_step_00000002").exists()


def test_a_missing_file_is_damage(tmp_path):
    path = save_checkpoint(tmp_path, 1, TENSORS, {})
    (path / "state.json").unlink()
    assert verify(path) == "state.json, which manifest.json lists, is missing"


class Crash(BaseException):
    pass


def test_a_crash_at_any_call_leaves_the_step_before_or_the_new_one(tmp_path, monkeypatch):
    """Every write, sync and rename in turn is the last thing that happens."""
    points = 0
    while True:
        folder = tmp_path / str(points)
        save_checkpoint(folder, 1, TENSORS, {"step": 1})
        left = [points]

        def bomb(real, left=left):
            def call(*args, **kwargs):
                if left[0] == 0:
                    raise Crash
                left[0] -= 1
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in ("replace", "fsync", "open"):
                patch.setattr(os, name, bomb(getattr(os, name)))
            patch.setattr(checkpoint.dcp, "save", bomb(checkpoint.dcp.save))
            patch.setattr(checkpoint.shutil, "rmtree", lambda *a, **k: None)  # a killed process cleans nothing up
            try:
                save_checkpoint(folder, 2, TENSORS, {"step": 2})
                tidy(folder, 1)
                finished = True
            except Crash:
                finished = False
        tensors, values = load_checkpoint(folder, print)
        assert values["step"] in ((2,) if finished else (1, 2))
        assert torch.equal(tensors["model.a"], TENSORS["model.a"])
        save_checkpoint(folder, 3, TENSORS, {"step": 3})  # what was left behind is in nobody's way
        tidy(folder, 1)
        assert [p.name for p in folder.iterdir()] == ["step_00000003"]
        if finished:
            break
        points += 1
    assert points >= 15


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, TENSORS, {"step": 1})

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path, 2, TENSORS, {"step": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]
    assert load_checkpoint(tmp_path, print)[1] == {"step": 1}


def test_tidy_keeps_the_newest(tmp_path):
    for step in range(1, 6):
        save_checkpoint(tmp_path, step, TENSORS, {})
    tidy(tmp_path, 2)
    assert [p.name for p in checkpoints(tmp_path)] == ["step_00000004", "step_00000005"]


def test_a_checkpoint_of_a_newer_version_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    save_checkpoint(tmp_path, 1, TENSORS, {})
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"format 2.*upgrade"):
        load_checkpoint(tmp_path, print)


def test_what_is_written_beside_the_training_is_what_was_there(tmp_path, monkeypatch):
    """Whatever later steps do to the tensors; one failure is raised at the next save, and the one after that succeeds."""
    writer, tensors, gate = Writer(ALONE), {name: tensor.clone() for name, tensor in TENSORS.items()}, threading.Event()
    real = checkpoint.save_checkpoint
    monkeypatch.setattr(checkpoint, "save_checkpoint", lambda *arguments: (gate.wait(10), real(*arguments))[1])
    writer.save(tmp_path, 1, tensors, {"step": 1}, keep=2)
    for tensor in tensors.values():
        tensor.zero_()
    assert not checkpoints(tmp_path)
    gate.set()
    writer.wait()
    found, values = load_checkpoint(tmp_path, print)
    assert values == {"step": 1} and all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        writer.save(tmp_path, 2, tensors, {"step": 2}, keep=2)
        writer.thread.join()
    with pytest.raises(OSError, match="No space"):
        writer.save(tmp_path, 3, tensors, {"step": 3}, keep=2)
    writer.save(tmp_path, 3, tensors, {"step": 3}, keep=2)
    writer.wait()
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000001", "step_00000003"]


def test_which_checkpoints_stay(tmp_path):
    for step in range(1, 13):
        save_checkpoint(tmp_path, step, TENSORS, {})
    for file in checkpoints(tmp_path)[-1].glob("*.safetensors"):
        file.write_bytes(b"damaged")
    tidy(tmp_path, 1, every=5, best=3)
    left = [int(path.name[-2:]) for path in checkpoints(tmp_path)]
    assert left == [3, 5, 10, 11, 12]  # 11 is the newest that is whole
    tidy(tmp_path, 1, whole=tmp_path / "step_00000010")
    assert [int(path.name[-2:]) for path in checkpoints(tmp_path)] == [10, 12]
