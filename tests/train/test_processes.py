"""Real processes, really killed."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.train.kill_and_resume import RUN, compare, steps


@pytest.mark.slow
def test_kill_minus_nine_costs_nothing_but_time(tmp_path):
    whole, killed, at = compare(tmp_path, kills=2, seed=1)
    assert at, "it was never killed"
    assert killed == whole


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)])
def test_sigterm_and_ctrl_c_save_and_leave(tmp_path, number, code):
    # a process group of its own: Ctrl-C reaches the loader's workers too
    process = subprocess.Popen(
        [sys.executable, "-m", "manyscale", "train", *RUN, "--out", str(tmp_path)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        text=True, start_new_session=True,
    )  # fmt: skip
    while process.poll() is None and steps(tmp_path) < 2:
        time.sleep(0.02)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "saved step" in errors and "Traceback" not in errors
    saved = sorted(tmp_path.glob("step_*"))[-1]
    state = json.loads((saved / "state.json").read_text())["values"]
    assert state["step"] == int(saved.name.removeprefix("step_")) >= 2


def test_a_full_disk_is_said_in_one_line(tmp_path):
    """A file-size limit stands in for the full disk: the write fails in the middle of the checkpoint."""
    limited = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000));"
    )
    call = f"from manyscale.cli import main; main({['train', *RUN, '--workers', '0', '--out', str(tmp_path)]!r})"
    done = subprocess.run([sys.executable, "-c", limited + call], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("manyscale: ") and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("step_*")) and not list(tmp_path.glob(".step_*"))
