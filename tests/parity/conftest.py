"""The parity table: printed at the end of `pytest -m parity`, and as markdown in the file $MANYSCALE_PARITY_TABLE."""

import os
from pathlib import Path

HEADER = ("peer", "model", "image", "window", "pretrained", "dtype", "max relative difference")


def pytest_terminal_summary(terminalreporter):
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, [])]
    rows = [value for report in reports for key, value in getattr(report, "user_properties", []) if key == "parity"]
    if not rows:
        return
    rows = [HEADER, *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    terminalreporter.section("parity with independent implementations")
    for row in rows:
        terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if path := os.environ.get("MANYSCALE_PARITY_TABLE"):
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        Path(path).write_text("\n".join([lines[0], "|---" * len(HEADER) + "|", *lines[1:]]) + "\n")
