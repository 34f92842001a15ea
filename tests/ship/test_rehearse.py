"""A net laid out on ranks that do not exist, beside the closed form."""

import subprocess
import sys

import pytest

from manyscale.config import Optim
from manyscale.plan import memory
from manyscale.presets import model_config
from manyscale.ship.rehearse import rehearse


def test_a_net_is_laid_out_on_ranks_that_do_not_exist():
    """Whole weights, moments shared out by whole tensors, everything cut: what the closed form says, but for what does not divide."""
    config = model_config("swinv2_tiny")
    shardings = memory.shardings(16, 4)
    found = rehearse(config, memory.memory(config, "adamw", ema=True), shardings, Optim(), ranks=16, node=4)
    ratios = {each.name: each.ratio for each in found}
    assert ratios["DDP"] == 1 and 0.99 < ratios["HSDP"] < 1.02 and all(0.95 < ratio < 1.05 for ratio in ratios.values()), ratios


@pytest.mark.slow
def test_the_largest_net_is_laid_out_in_seconds():
    """`plan memory --check` and the closed form agree within 2 %."""
    command = [sys.executable, "-m", "manyscale", "plan", "memory", "swinv2_giant", "--check", "--gpus", "512"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    table = [line.split() for line in said.splitlines() if line.startswith(("DDP", "ZeRO-", "HSDP"))]
    assert [row[0] for row in table] == ["DDP", "ZeRO-1", "ZeRO-2", "HSDP", "ZeRO-3"]
    assert all(0.98 < float(row[3]) < 1.02 for row in table) and float(table[-1][2]) < 0.1 < 5 < float(table[3][2])
