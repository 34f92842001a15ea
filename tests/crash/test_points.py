"""Every change on the disk in turn is the last thing that happens: what is found again is the old or the new, and nothing is in the way."""

import shutil
from pathlib import Path

import pytest

from manyscale.train.checkpoint import checkpoints, tidy, verify
from tests.crash.conftest import counted
from tests.crash.disk import CRASHED, Crash, Record, end_at, points
from tests.crash.states import SCENES, SHARD, flip, goes_on, loaded, names, save

pytestmark = pytest.mark.crash
QUICK = ("save", "same step again", "tidy", "quarantine")
MARKED = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SCENES]


def damaged(folder: Path) -> set[str]:
    return {path.name for path in checkpoints(folder) if verify(path)}


@pytest.mark.parametrize("name", MARKED)
def test_every_point_at_which_a_process_can_die(name, tmp_path):
    scene = SCENES[name]
    before = tmp_path / "before"
    before.mkdir()
    scene.prepare(before / "run")
    shutil.copytree(before, tmp_path / "dry")
    with Record(tmp_path / "dry") as record:
        scene.act(tmp_path / "dry" / "run")
    assert loaded(tmp_path / "dry" / "run") == scene.outcomes[-1]
    seen = set()
    for point in points(record.calls):
        root = tmp_path / "crashed"
        shutil.copytree(before, root)
        folder = root / "run"
        broken = damaged(folder)
        assert end_at(Crash(root, point), lambda folder=folder: scene.act(folder)) == CRASHED, point
        assert damaged(folder) <= broken, point  # nor does anything half-deleted look like a checkpoint
        found = loaded(folder)
        assert found in scene.outcomes, (point, found, names(folder))
        seen.add(found)
        scene.also(folder)
        goes_on(folder, point)
        shutil.rmtree(root)
        counted(f"crash points, {name}")
    assert seen == set(scene.outcomes)


def test_what_a_dead_save_left_is_in_nobodys_way(tmp_path):
    """The run goes on and comes to the same step; nothing of the first try is in the second."""
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "step_00000001", tmp_path / ".step_00000002")
    (tmp_path / ".step_00000002" / "shard-00001-model-00002-of-00002.safetensors").write_bytes(b"torn")
    assert names(save(tmp_path, 2)) == names(tmp_path / "step_00000001")
    assert loaded(tmp_path) == 2 and names(tmp_path) == ["step_00000001", "step_00000002"]


def test_the_newest_that_is_whole_is_never_dropped(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    for step in (2, 3):
        flip(tmp_path / f"step_{step:08d}" / SHARD)
    tidy(tmp_path, 1)
    assert names(tmp_path) == ["step_00000001", "step_00000003"] and loaded(tmp_path) == 1
