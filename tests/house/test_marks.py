"""A mark with a home (tests/conftest.py) is found nowhere else: there `-m` would pass over it in silence."""

import pytest

from tests.conftest import HOMES, TESTS


@pytest.mark.parametrize(("mark", "home"), HOMES.items())
def test_a_mark_stays_at_home(mark, home):
    marked = {file.relative_to(TESTS).parts[0] for file in TESTS.rglob("*.py") if f"mark.{mark}" in file.read_text()}
    assert marked == {home}
