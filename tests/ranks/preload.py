# ruff: noqa: F401
"""What every rank of a test needs: imported once, by the server they are forked from."""

import tests.ranks.jobs
