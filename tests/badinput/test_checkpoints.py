"""Bad checkpoints of runs (rows 1 to 9, 28 to 30), by what the same `manyscale train` does in the run's folder afterwards.

How checkpoints are laid out is asked only here: `steps` gives the committed ones, oldest first.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.badinput.conftest import MEMORY, WORDS, Outcome
from tests.pictures import make_set

pytestmark = pytest.mark.badinput


def steps(run: Path) -> list[Path]:
    return sorted(path for path in run.glob("step_*") if path.is_dir())


def largest(step: Path) -> Path:
    return max((path for path in step.iterdir()), key=lambda path: path.stat().st_size)


def manifest(step: Path) -> Path:
    return step / "manifest.json"


def words_for(folder: Path) -> list[str]:
    words = ["train", "folder", "--data", folder / "set", *WORDS, "--epochs", "2", "--warmup", "0", "--batch", "8", "--evaluate-every", "1"]
    return [*map(str, words), "--workers", "0", "--device", "cpu", "--precision", "float32", "--out", str(folder / "run")]


@pytest.fixture(scope="module")
def finished(warm, tmp_path_factory) -> Path:
    """A run of two epochs with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("finished")
    make_set(folder / "set", train=4, val=2)
    request = {"words": words_for(folder), "cwd": str(folder), "out": str(folder / "o"), "err": str(folder / "e"), "memory": MEMORY}
    assert warm.ask({**request, "seconds": 60})["code"] == 0, (folder / "e").read_text()
    assert len(steps(folder / "run")) == 2
    return folder


@pytest.fixture
def again(finished, tmp_path, run) -> Callable[..., Outcome]:
    """again(spoil): the same command once more, in a copy of the run's folder that `spoil` was let loose on."""

    def call(spoil: Callable[[Path], object], **more) -> Outcome:
        shutil.copytree(finished / "run", tmp_path / "run", symlinks=True)
        shutil.copytree(finished / "set", tmp_path / "set", dirs_exist_ok=True)
        spoil(tmp_path / "run")
        words = words_for(tmp_path)
        words[words.index("--data") + 1] = str(finished / "set")  # the recipe's
        return run(*words, **more)

    return call


def flip(run: Path) -> None:
    path = largest(steps(run)[-1])
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def shorten(run: Path) -> None:
    path = largest(steps(run)[-1])
    os.truncate(path, path.stat().st_size - 7)


DAMAGE = {
    1: flip,
    2: shorten,
    3: lambda run: largest(steps(run)[-1]).write_bytes(b""),
    4: lambda run: largest(steps(run)[-1]).unlink(),
    5: lambda run: manifest(steps(run)[-1]).unlink(),
    6: lambda run: manifest(steps(run)[-1]).write_bytes(manifest(steps(run)[-1]).read_bytes()[:-20]),
}


@pytest.mark.parametrize(
    "row", [pytest.param(row, marks=[pytest.mark.row(row), *([pytest.mark.slow] if row > 2 else [])]) for row in DAMAGE]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(again, finished, tmp_path, row):
    last = steps(finished / "run")[-1].name
    outcome = again(DAMAGE[row]).fine()
    assert last in outcome.out + outcome.err, "it is named"
    assert steps(tmp_path / "run")[-1].name == last, "trained anew from the one before"
    one, two = (json.loads((folder / "run" / "summary.json").read_text()) for folder in (finished, tmp_path))
    assert one["best"] == two["best"] and one["steps"] == two["steps"]


@pytest.mark.row(7, 8, 9)
def test_what_does_not_belong_is_not_read(again, finished, tmp_path):
    def leave(run: Path) -> None:
        step = steps(run)[-1]
        (step / "leftover_rank_3.safetensors").write_bytes(b"\0" * 100)
        shutil.copytree(step, run / f".{step.name[:-1]}9")  # what an interrupted write leaves

    outcome = again(leave).fine()
    assert "damaged" not in outcome.out + outcome.err and steps(tmp_path / "run") == [
        tmp_path / "run" / path.name for path in steps(finished / "run")
    ]


@pytest.mark.row(28)
def test_links_to_themselves_and_to_nothing(again):
    def link(run: Path) -> None:
        os.symlink("step_00009999", run / "step_00009999")
        os.symlink("nowhere", run / "step_00009998")

    again(link).fine()


@pytest.mark.row(28)
@pytest.mark.parametrize("verb", ["eval", "transfer"])
def test_a_model_that_is_a_link_to_itself_is_named(run, trained, pictures, tmp_path, verb):
    shutil.copytree(trained, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    os.symlink("model.safetensors", tmp_path / "m" / "model.safetensors")
    words = {"eval": ["eval", tmp_path / "m", "--data", pictures], "transfer": ["transfer", tmp_path / "m", "--image-size", "32"]}[verb]
    run(*words).refused("m/model.safetensors", "no such file")


@pytest.mark.row(29)
def test_a_disk_that_fills_up_while_saving(again, tmp_path, finished):
    def unfinished(run: Path) -> None:
        shutil.rmtree(steps(run)[-1])

    before = steps(finished / "run")[0]
    size = largest(before).stat().st_size
    outcome = again(unfinished, file_bytes=size // 2)
    assert outcome.code not in (0, -9) and not outcome.hung and "Traceback" not in outcome.err, outcome
    kept = steps(tmp_path / "run")
    assert [path.name for path in kept] == [before.name] and largest(kept[0]).read_bytes() == largest(before).read_bytes()
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".step_")], "nothing half-written is left"


@pytest.mark.row(30)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_files_of_another_user(run, trained, name):
    """Written by the umask; where they cannot be read, mode and owner are told."""
    place = Path(tempfile.mkdtemp())
    try:
        shutil.copytree(trained, place / "m")
        place.chmod(0o755)
        umask = os.umask(0)
        os.umask(umask)
        assert (trained / name).stat().st_mode & 0o777 == 0o666 & ~umask
        (place / "m" / name).chmod(0o000)
        user = {"user": 65534} if os.geteuid() == 0 else {}
        outcome = run("transfer", place / "m", "--image-size", "32", "--out", place / "out", cwd=str(place), **user)
        outcome.refused(name, "mode is 0000", f"owner user {os.geteuid()}")
    finally:
        shutil.rmtree(place)
