"""What a result says it comes from."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import manyscale
from manyscale import storage
from manyscale.storage import origin

GIT = pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository whose only commit holds another file than the package's."""
    (tmp_path / "mine.txt").write_text("mine\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "mine.txt")
    git(tmp_path, "commit", "-q", "-m", "mine")
    package = tmp_path / "packages"
    package.mkdir()
    (package / "storage.py").write_text("")
    monkeypatch.setattr(storage, "__file__", str(package / "storage.py"))
    return tmp_path


@GIT
def test_a_checkout_is_named_by_its_commit(house: Path):
    git(house, "add", ".")
    git(house, "commit", "-q", "-m", "the package")
    commit = git(house, "rev-parse", "--short=10", "HEAD")
    assert origin()["manyscale"] == f"{manyscale.__version__}, commit {commit}"
    (house / "packages" / "storage.py").write_text("changed\n")
    assert origin()["manyscale"] == f"{manyscale.__version__}, commit {commit}-dirty"


@GIT
def test_a_repository_it_is_installed_in_is_not_its_own(house: Path):
    assert origin()["manyscale"] == manyscale.__version__


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert origin()["manyscale"] == manyscale.__version__


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("/here/manyscale/__main__.py", "manyscale bench swin_tiny"),
        ("/here/bin/manyscale", "manyscale bench swin_tiny"),
        ("tools/engines.py", "python tools/engines.py bench swin_tiny"),
    ],
)
def test_the_command_is_as_a_reader_would_type_it(monkeypatch: pytest.MonkeyPatch, program: str, said: str):
    monkeypatch.setattr(sys, "argv", [program, "bench", "swin_tiny"])
    assert origin()["command"] == said
    assert origin("manyscale study norms")["command"] == "manyscale study norms"
