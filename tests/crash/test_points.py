"""Every change on the disk in turn is the last thing that happens: what is found again is the old or the new, and nothing is in the way."""

import json
import shutil
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist

from manyscale.ranks import Ranks
from manyscale.train.checkpoint import checkpoints, save_checkpoint, tidy, verify
from tests.crash.conftest import counted
from tests.crash.disk import CRASHED, Crash, Disk, Point, Record, begun, ended, points
from tests.crash.states import SCENES, SHARD, flip, goes_on, loaded, names, save, tensors

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
        assert ended(begun(Crash(root, point), lambda folder=folder: scene.act(folder))) == CRASHED, point
        assert damaged(folder) <= broken, point  # nor does anything half-deleted look like a checkpoint
        found = loaded(folder)
        assert found in scene.outcomes, (point, found, names(folder))
        seen.add(found)
        scene.also(folder)
        goes_on(folder, point)
        shutil.rmtree(root)
        counted(f"crash points, {name}")
    assert seen == set(scene.outcomes)


def save_by_two(store: Path, folder: Path, rank: int) -> None:
    """What one of two ranks does, of whom each writes some of the tensors."""
    dist.init_process_group("gloo", store=dist.FileStore(str(store), 2), rank=rank, world_size=2, timeout=timedelta(seconds=20))
    whole = save_checkpoint(folder, 2, tensors(2), {"step": 2, "seed": 2}, Ranks(rank, 2, rank, 2, dist.group.WORLD))
    if rank == 0:
        tidy(folder, 1, whole=whole)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_every_point_at_which_one_of_two_ranks_can_die(victim, tmp_path):
    """The other ends by itself, with an error if it had anything left to do with the dead one."""
    before, root, store = tmp_path / "before", tmp_path / "root", tmp_path / "store"
    save(before / "run", 1)

    def both(disk: Disk) -> list[int]:
        shutil.copytree(before, root)
        disks = [disk if rank == victim else Disk(root) for rank in range(2)]
        children = [begun(one, partial(save_by_two, store, root / "run", rank)) for rank, one in enumerate(disks)]
        codes = [ended(child) for child in children]
        store.unlink(missing_ok=True)
        return codes

    class Told(Record):  # the points come back from the child
        def __exit__(self, *error: object) -> None:
            super().__exit__(*error)
            (tmp_path / "points").write_text(json.dumps([[point.number, point.kind, point.share] for point in points(self.calls)]))

    assert both(Told(root)) == [0, 0] and loaded(root / "run") == 2
    shutil.rmtree(root)
    seen = set()
    for point in (Point(*parts) for parts in json.loads((tmp_path / "points").read_text())):
        codes = both(Crash(root, point))
        assert codes[victim] == CRASHED and codes[1 - victim] in (0, 70), (point, codes)
        assert not damaged(root / "run"), point
        found = loaded(root / "run")
        assert found in (1, 2), point
        seen.add(found)
        goes_on(root / "run", point)
        shutil.rmtree(root)
        counted(f"crash points, rank {victim} of two")
    assert seen == ({1, 2} if victim == 0 else {1})


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
