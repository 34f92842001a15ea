"""Counts what the tests of this folder tried, and says so at the end."""

import os
from collections import Counter

import pytest

COUNTS: Counter[str] = Counter()


def counted(what: str, number: int = 1) -> None:
    COUNTS[what] += number


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """What a killed process wrote is there, synced or not; and who loses power here has a model of the disk."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


def pytest_terminal_summary(terminalreporter) -> None:
    if COUNTS:
        terminalreporter.write_sep("-", "what was tried")
        for what, number in COUNTS.items():
            terminalreporter.write_line(f"{number:6,}  {what}")
