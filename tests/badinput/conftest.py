"""What the bad-input tests share: a warm process that forks for every case, a set and a model to spoil, and a count at the end."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import manyscale as ms
from manyscale.config import Preprocess
from tests.conftest import loud
from tests.pictures import make_set

MEMORY = 1 << 29  # bytes that a case may take beyond the imported engine
NET = {"image_size": 16, "patch": 2, "window": 4, "width": 8, "depths": (1, 1), "heads": (1, 2), "classes": 2}
WORDS = ["--image-size", "16", "--patch", "2", "--window", "4", "--width", "8", "--depths", "1", "1", "--heads", "1", "2"]


class Outcome(NamedTuple):
    """How a case ended."""

    code: int
    out: str
    err: str
    hung: bool
    peak: int

    def refused(self, *said: str, code: int = 2) -> "Outcome":
        """See that the process ended by itself with this code and one message, which says these things."""
        self.fine(code)
        for words in said:
            assert words in self.err, f"{words!r} is not in: {self.err[-3000:]}"
        return self

    def fine(self, code: int = 0) -> "Outcome":
        assert not self.hung, "it hung"
        assert "Traceback" not in self.err and "Warning" not in self.err, self.err[-4000:]
        assert self.code == code, (self.code, self.out[-1500:], self.err[-3000:])
        return self


class Warm:
    """The warm process; `run` is one command line in a child of it."""

    def __init__(self) -> None:
        root = Path(__file__).parents[2]
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
        words = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("child.py"))]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=root)
        assert json.loads(self.process.stdout.readline())["ready"]

    def ask(self, request: dict) -> dict:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


@pytest.fixture(scope="session")
def warm():
    process = Warm()
    yield process
    process.close()


@pytest.fixture
def run(warm, tmp_path):
    """run(word, ...): a command line in a child with limited memory and time."""

    def call(*words, memory: int = MEMORY, seconds: float = 60, **more) -> Outcome:
        out, err = tmp_path / ".out", tmp_path / ".err"
        request = {"words": list(map(str, words)), "cwd": str(tmp_path), "out": str(out), "err": str(err), "memory": memory}
        answer = warm.ask({**request, "seconds": seconds, **more})
        texts = (file.read_text(errors="surrogateescape") for file in (out, err))
        return Outcome(answer["code"], *texts, answer["hung"], answer["peak"])

    return call


@pytest.fixture
def proof(tmp_path) -> Path:
    """A file that appears where a payload's code runs, by import of `payload` or by a call of `payload.go`."""
    ran = f"open({str(tmp_path / 'code ran')!r}, 'w').close()"
    (tmp_path / "payload.py").write_text(f"{ran}\n\n\ndef go(*args, **more):\n    {ran}\n")
    return tmp_path / "code ran"


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A set of two classes: train has 8 pictures, val 4."""
    return make_set(tmp_path / "set", train=4, val=2)


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A model of the set's two classes."""
    model = loud(ms.create_model("swinv2_tiny", **NET)).eval()
    model.preprocess, model.labels = Preprocess(image_size=(16, 16), crop_ratio=1.0), ("cat", "dog")
    folder = tmp_path_factory.mktemp("trained") / "model"
    with torch.no_grad():
        ms.save(model, folder)
    return folder


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    mark = item.get_closest_marker("row")
    if mark and call.when == "call":
        report.rows = list(mark.args)


def pytest_terminal_summary(terminalreporter):
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, []) if hasattr(report, "rows")]
    rows = sorted({row for report in reports for row in report.rows})
    if reports:
        failed = sum(report.failed for report in reports)
        listed = ", ".join(map(str, rows))
        terminalreporter.write_line(f"bad input: {len(rows)} rows covered ({listed}), {len(reports)} cases, {failed} failures")
