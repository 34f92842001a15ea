"""Bits flip, files end early, blocks are zeros: all of it is found and named, and the checkpoint before is used."""

import os
import random
import shutil

import pytest

from manyscale.train.checkpoint import newest_checkpoint, save_checkpoint, verify
from tests.crash.conftest import counted
from tests.crash.states import loaded, save, tensors
from tests.ranks.team import together

pytestmark = pytest.mark.crash


def save_on_two(folder: str) -> None:
    from pathlib import Path

    from manyscale.ranks import joined

    with joined("cpu", 60) as ranks:
        save_checkpoint(Path(folder), 2, tensors(2), {"step": 2, "seed": 2}, ranks)


def damaged(content: bytes, chance: random.Random) -> bytes:
    """The content with a flipped bit, a missing end, or a block of zeros."""
    rotten = bytearray(content)
    place = chance.choice([place for place, byte in enumerate(content) if byte])  # where zeros are a change
    match chance.randrange(3):
        case 0:
            rotten[place] ^= 1 << chance.randrange(8)
        case 1:
            del rotten[place:]
        case 2:
            end = min(place + chance.choice((1, 16, 512)), len(rotten))
            rotten[place:end] = bytes(end - place)
    return bytes(rotten)


@pytest.mark.parametrize("shards", [1, 2])
def test_five_hundred_random_damages_are_found_and_named(shards, tmp_path):
    folder = tmp_path / "run"
    save(folder, 1)
    if shards == 1:
        save(folder, 2)
    else:
        together(tmp_path / "ranks", 2, save_on_two, str(folder))
    newest, chance = folder / "step_00000002", random.Random(shards)
    files = sorted(newest.iterdir())
    assert len(files) == shards + 2
    assert loaded(folder) == 2
    seen = set()
    for number in range(500):
        file = chance.choice(files)
        kept = file.read_bytes()
        file.write_bytes(damaged(kept, chance))
        said = verify(newest)
        assert file.name in said, (number, file.name, said)
        shares = [verify(newest, (rank, 3)) for rank in range(3)]
        assert any(file.name in each for each in shares), shares
        notes = []
        assert newest_checkpoint(folder, notes.append).name == "step_00000001"
        assert len(notes) == 1 and file.name in notes[0] and "step_00000002 is damaged" in notes[0]
        os.rename(folder / "damaged_step_00000002", newest)
        if number % 25 == 0:
            shutil.copytree(folder, tmp_path / "copy")
            assert loaded(tmp_path / "copy") == 1
            shutil.rmtree(tmp_path / "copy")
        file.write_bytes(kept)
        seen.add(file.name)
    assert verify(newest) == "" and loaded(folder) == 2
    assert len(seen) == len(files)
    counted(f"damages found, {shards} shards", 500)


@pytest.mark.parametrize("which", range(3))
def test_a_file_that_is_gone_or_was_exchanged_is_found(which, tmp_path):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    file = sorted(newest.iterdir())[which]
    shutil.copy(tmp_path / "step_00000001" / file.name, file)
    assert file.name in verify(newest)
    file.unlink()
    assert file.name in verify(newest)
    assert loaded(tmp_path) == 1


@pytest.mark.parametrize("before, after", [(b"  ", b" \t"), (b"{\n", b"{\r"), (b'": {', b'" :{'), (b"}\n", b"} ")])
def test_not_even_white_space_of_the_manifest_may_change(before, after, tmp_path):
    file = save(tmp_path, 1) / "manifest.json"
    file.write_bytes(file.read_bytes().replace(before, after, 1))
    assert verify(file.parent) == "manifest.json is not what was written"
