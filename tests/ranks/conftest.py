"""What one process does by itself, once, for all tests that compare ranks with it."""

import pytest

from manyscale.config import Run
from tests.conftest import micro_run
from tests.ranks.jobs import spread, train_all, twenty_steps
from tests.ranks.team import together


@pytest.fixture(scope="session")
def alone(tmp_path_factory) -> Run:
    """The run of `twenty_steps`, trained."""
    folder = tmp_path_factory.mktemp("alone")
    run = spread(twenty_steps(micro_run(folder)), "alone")
    together(folder / "1", 1, train_all, [run])
    return run
