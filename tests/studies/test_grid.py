"""Grids of runs as real processes: they finish, diverge, fail, are stopped and go on."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from manyscale.studies.grid import run_grid
from manyscale.train.folder import only_one
from tests.conftest import shorter


def test_runs_end_diverge_and_are_not_run_again(micro, capsys):
    short = shorter(micro, epochs=1)
    well = replace(short, recipe="well", out=micro.out + "-well")
    wild = replace(short, recipe="wild", optim=replace(short.optim, lr=1e30, warmup_lr=1e30, clip=0.0), out=micro.out + "-wild")
    outcomes = run_grid([wild, well], Console(), jobs=2)
    assert [outcome.run.recipe for outcome in outcomes] == ["wild", "well"]
    assert outcomes[0].summary is None and "not finite" in outcomes[0].diverged
    assert outcomes[1].summary["best"]["accuracy"] >= 0 and not outcomes[1].diverged
    assert "held out" in (Path(well.out) / "log.txt").read_text()
    said = capsys.readouterr().out
    assert "well  accuracy 0." in said and "wild  diverged: step" in said
    began = time.monotonic()
    assert run_grid([wild, well], Console()) == outcomes
    assert time.monotonic() - began < 1.0 and "2 of 2 runs were finished before" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds another run"):  # the folder of a run that was asked for in other words
        run_grid([replace(well, seed=1)], Console())


def test_a_run_that_cannot_start_ends_the_grid_with_its_reason(micro):
    lost = replace(micro, input=replace(micro.input, data="nowhere"), out=micro.out + "-lost")
    with pytest.raises(ValueError, match=r"run-lost: field `data`: no folder 'nowhere'.*exit code 2"):
        run_grid([lost], Console())


GRID = """
import sys
from dataclasses import replace
from rich.console import Console
from manyscale.config import from_dict, Run
from manyscale.storage import read_json
from manyscale.studies.grid import run_grid
if __name__ == "__main__":
    run = from_dict(Run, read_json(sys.argv[1]))
    run_grid([replace(run, seed=seed, out=f"{run.out}-{seed}") for seed in (0, 1)], Console(), jobs=2)
"""


@pytest.mark.slow
def test_sigterm_saves_every_run_and_the_same_grid_goes_on(micro, tmp_path):
    from manyscale.config import to_dict
    from manyscale.storage import write_json

    long = shorter(micro, epochs=3, save_steps=1)
    write_json(tmp_path / "run.json", to_dict(long))
    (tmp_path / "grid.py").write_text(GRID)
    command = [sys.executable, str(tmp_path / "grid.py"), str(tmp_path / "run.json")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    folders = [Path(f"{long.out}-{seed}") for seed in (0, 1)]
    while not all(list(folder.glob("step_*")) for folder in folders):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    for folder in folders:
        assert list(folder.glob("step_*")) and not (folder / "summary.json").exists()
        with only_one(folder):  # no process is left behind
            pass
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "COLUMNS": "80"}, timeout=120)
    for folder in folders:
        assert "going on from step" in (folder / "log.txt").read_text()
        assert json.loads((folder / "summary.json").read_text())["steps"] == 15
