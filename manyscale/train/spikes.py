"""When a loss jumps: how far above the last ones it is, in deviations that the jump itself does not move."""

import math
import statistics
from collections.abc import Sequence

WINDOW, LEAST = 100, 20  # losses that are looked back on: at most, and at least


def height(recent: Sequence[float], loss: float) -> float:
    """How many robust deviations (1.4826 x the median distance from the median) a loss is above recent ones; 0 where they are too few."""
    if len(recent) < LEAST:
        return 0.0
    middle = statistics.median(recent)
    deviation = 1.4826 * statistics.median(abs(one - middle) for one in recent)
    return (loss - middle) / max(deviation, 1e-3 * abs(middle), math.ulp(1.0))


def past(step: int, ranges: Sequence[Sequence[int]]) -> int:
    """The first step from `step` on that is in none of the ranges [first, past the last]."""
    for first, end in sorted(ranges):
        if first <= step < end:
            step = end
    return step
