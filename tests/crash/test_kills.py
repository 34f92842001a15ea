"""Real runs, really tormented; `make soak` does it for 10,000 steps, and `python -m tests.crash.soak --kills 200` kills more often."""

import pytest

from tests.crash.conftest import counted
from tests.crash.soak import KINDS, tormented

pytestmark = [pytest.mark.crash, pytest.mark.slow]


@pytest.mark.parametrize(("seed", "ranks", "beside"), [(0, 1, True), (1, 1, False), (2, 2, True)])
def test_kill_minus_nine_at_random_costs_nothing_but_time(seed, ranks, beside, tmp_path):
    torment = tormented(tmp_path, 150, 8, seed=seed, ranks=(ranks,), kinds=("kill",), strikes=8, beside=beside)
    assert torment.counts["kill"] >= 6
    counted(f"kill -9, {ranks} ranks", torment.counts["kill"])


def test_every_kind_of_fault_costs_nothing_but_time(tmp_path):
    torment = tormented(tmp_path, 300, 12, seed=3, strikes=8)
    assert len(torment.counts) >= len(KINDS) - 1
    for kind, number in torment.counts.items():
        counted(f"sittings that ended so: {kind}", number)
