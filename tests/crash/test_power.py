"""Power is lost after every change on the disk: the newest checkpoint whose save had returned is always there."""

import os
import random
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest

from manyscale import storage
from manyscale.train import checkpoint
from manyscale.train.checkpoint import copy_checkpoint, newest_checkpoint, tidy
from tests.crash.conftest import counted
from tests.crash.disk import CHANGES, Call, Record
from tests.crash.power import Power
from tests.crash.states import SHARD, flip, loaded, names, save

pytestmark = pytest.mark.crash
WAYS = ("none", "names", "part", "part", "part")


def a_life(folder: Path, returned) -> None:
    """A run's checkpoints, in a folder that is not there yet: first, more with only one kept, one again, one after damage, a branch."""
    for step, seed in ((1, 1), (2, 2), (3, 3), (3, 33)):
        path = save(folder, step, seed)
        returned(folder, seed)
        tidy(folder, 1, whole=path)
    save(folder, 4)
    returned(folder, 4)
    returned(folder, 33)  # 4 is lost, by other means
    flip(folder / "step_00000004" / SHARD)
    newest_checkpoint(folder, lambda text: None)
    path = save(folder, 4, 44)
    returned(folder, 44)
    tidy(folder, 1, whole=path)
    branch = folder.with_name("branch")
    copy_checkpoint(path, branch, {"more": 1})
    returned(branch, 44)
    save(folder, 5)  # power may be lost only after a branch was begun, too


def losses(root: Path, ways: tuple[str, ...] = WAYS, whole: bool = False) -> tuple[int, list[str]]:
    """How often power was lost, and what was lost with it."""
    disk, chance, number, failures = root / "disk", random.Random(0), 0, []
    disk.mkdir()
    with Record(disk) as record:

        def returned(folder: Path, seed: int) -> None:
            record.calls.append(Call("returned", (str(folder), str(seed))))

        a_life(disk / "runs" / "run", returned)
    calls = [call for call in record.calls if call.kind in CHANGES or call.kind == "returned"]
    shutil.rmtree(disk)
    disk.mkdir()
    power, there, after = Power(disk), {}, root / "after"
    seeds = {"run": [None, 1, 2, 3, 33, 4, 44, 5], "branch": [None, 44]}
    for place, call in enumerate(calls):
        if call.kind == "returned":
            there[Path(call.paths[0]).name] = int(call.paths[1])
            continue
        power.replay(call)
        for way in ways:
            power.lost(after, way, chance)
            number += 1
            for name, order in seeds.items():
                least, folder = order.index(there.get(name)), after / "runs" / name
                try:
                    found = loaded(folder)
                    assert order.index(found) >= least, f"{found} is found, where {there[name]} was saved: {names(folder)}"
                    if whole and way == "none":
                        save(folder, 9)
                        assert loaded(folder) == 9
                except AssertionError as error:
                    failures.append(f"after {place} ({call.kind} {call.paths[0]}), {way}: {error}")
            shutil.rmtree(after)
    return number, failures


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_loss_of_power_at_any_point_loses_nothing_that_was_saved(whole, tmp_path):
    number, failures = losses(tmp_path, WAYS if whole else ("none",), whole)
    assert not failures, failures[:3]
    counted("losses of power", number)


@pytest.mark.slow
@pytest.mark.parametrize("forgotten", ["shards", "JSON", "names", "the run's own folder", "all"])
def test_a_forgotten_fsync_is_found(forgotten, tmp_path, monkeypatch):
    real, sync = os.fsync, storage.sync

    def skipped(path: str) -> bool:
        name = Path(path).name
        return {
            "shards": name.endswith(".safetensors"),
            "JSON": name.endswith(".json"),
            "names": Path(path).is_dir(),
            "the run's own folder": name in ("runs", "disk"),
            "all": True,
        }[forgotten]

    monkeypatch.setattr(os, "fsync", lambda file: None if skipped(os.readlink(f"/proc/self/fd/{file}")) else real(file))
    for module in (storage, checkpoint):
        monkeypatch.setattr(module, "sync", lambda path: nullcontext() if skipped(str(path)) else sync(path))
    _, failures = losses(tmp_path)
    assert failures
    counted("forgotten fsyncs that were found")
