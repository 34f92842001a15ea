"""Every call on files in turn fails: the error is said, or nothing comes of it; what stood still stands, and the next save works."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from manyscale.ranks import ALONE
from manyscale.train.checkpoint import Writer
from tests.crash.conftest import counted
from tests.crash.disk import Fault, Record
from tests.crash.states import SCENES, SHARD, goes_on, loaded, names, save, tensors

pytestmark = pytest.mark.crash
FAULTS = [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EINTR, errno.ESTALE, None]
LASTING = (errno.ENOSPC, errno.EROFS, None)  # until somebody cleans up
QUICK = {("save", errno.ENOSPC), ("quarantine", errno.ESTALE)}
CASES = [
    pytest.param(name, fault, marks=[] if (name, fault) in QUICK else pytest.mark.slow, id=f"{name}, {errno.errorcode.get(fault, 'short')}")
    for name in SCENES
    for fault in FAULTS
]


def number_of_calls(before: Path, root: Path, act) -> int:
    shutil.copytree(before, root)
    with Record(root) as record:
        act(root / "run")
    shutil.rmtree(root)
    return len(record.calls)


@pytest.mark.parametrize(("name", "fault"), CASES)
def test_every_call_on_files_can_fail(name, fault, tmp_path):
    scene, before, root = SCENES[name], tmp_path / "before", tmp_path / "failing"
    before.mkdir()
    scene.prepare(before / "run")
    for number in range(number_of_calls(before, root, scene.act)):
        for lasting in (False, True) if fault in LASTING else (False,):
            shutil.copytree(before, root)
            folder, failure = root / "run", None
            disk = Fault(root, number, fault, lasting)
            try:
                with disk:
                    scene.act(folder)
            except OSError as error:
                failure = error
            except ValueError as error:  # what `read_json` makes of it
                failure = error
                assert "cannot be read" in str(error)
            case = (number, lasting, disk.struck, repr(failure), names(folder))
            assert disk.struck, case
            found = loaded(folder)
            lost = folder / "damaged_step_00000001"  # a lost block is damage, of the last one too
            if found is None and fault == errno.EIO and lost.exists():
                assert disk.hit.kind in ("read", "open", "stat"), case
                os.rename(lost, folder / "step_00000001")
                found = loaded(folder)
            assert found in scene.outcomes, case
            assert failure or found == scene.outcomes[-1], case  # never silently nothing
            assert fault is not None or not failure, case  # who writes on after a short write
            if not lasting and failure:
                new = set(names(folder)) - set(names(before / "run"))
                assert not [left for left in new if left.startswith(".step_")] or _could_not_be_removed(disk), case
            scene.also(folder)
            goes_on(folder, case)
            shutil.rmtree(root)
            counted(f"calls that failed, {name}")


def _could_not_be_removed(disk: Fault) -> bool:
    return disk.hit.kind in ("rmdir", "unlink", "list", "open", "stat")


@pytest.mark.parametrize("beside", [pytest.param(True), pytest.param(False, marks=pytest.mark.slow)])
def test_a_save_that_failed_beside_the_training_is_said_at_the_next(beside, tmp_path):
    """In the training's thread, once; and the training may go on and save."""
    before, root = tmp_path / "before", tmp_path / "failing"
    save(before / "run", 1)

    def act(folder: Path) -> None:
        writer = Writer(ALONE, beside=beside)
        writer.save(folder, 2, tensors(2), {"step": 2, "seed": 2}, keep=2)
        writer.wait()

    for number in range(number_of_calls(before, root, act)):
        for how in ("save", "wait"):
            shutil.copytree(before, root)
            folder, writer, said, disk = root / "run", Writer(ALONE, beside=beside), [], Fault(root, number, errno.ENOSPC)
            with disk:
                try:
                    writer.save(folder, 2, tensors(2), {"step": 2, "seed": 2}, keep=2)
                    assert beside or not writer.failure
                    if how == "wait":
                        writer.wait()
                    else:
                        writer.save(folder, 3, tensors(3), {"step": 3, "seed": 3}, keep=2)
                except OSError as error:
                    said.append(error.errno)
                writer.wait()
            assert disk.struck and said in ([], [errno.ENOSPC])
            newest = loaded(folder)
            assert newest in ((1, 2) if said else (2 if how == "wait" else 3,)), (number, said, newest)
            writer.save(folder, 4, tensors(4), {"step": 4, "seed": 4}, keep=1)
            writer.wait()
            assert loaded(folder) == 4 and names(folder) == ["step_00000004"]
            shutil.rmtree(root)
            counted("calls that failed beside the training")


def test_what_cannot_be_read_now_is_not_called_damaged(tmp_path):
    """A stale handle or too many open files say nothing about a checkpoint; a lost block does."""
    save(tmp_path / "run", 1)
    save(tmp_path / "run", 2)
    with Record(tmp_path) as record:
        loaded(tmp_path / "run")
    reads = [number for number, call in enumerate(record.calls) if call.kind == "read" and call.paths[0].endswith((SHARD, "manifest.json"))]
    for number in reads[:3]:
        for fault in (errno.ESTALE, errno.EMFILE, errno.EACCES):
            with pytest.raises(OSError, match=r".+"), Fault(tmp_path, number, fault):
                loaded(tmp_path / "run")
            assert names(tmp_path / "run") == ["step_00000001", "step_00000002"]
    notes = []
    with Fault(tmp_path, reads[0], errno.EIO):
        assert loaded(tmp_path / "run", notes.append) == 1
    assert "cannot be read: Input/output error" in notes[0]
