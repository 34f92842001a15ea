"""How long: of a clock (`seconds`), and of a run's parts in epochs, steps, images or per cent of it (`Duration`)."""

import math
import re
from functools import lru_cache

from manyscale.config.checks import require

Duration = float | str  # a number is of epochs; or 500 steps, 20k-steps, 1.5M images, 3 epochs, 5%
MANY = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9}
UNITS = ("steps", "epochs", "images", "%")
_FORM = re.compile(r"(\d+\.?\d*|\.\d+)\s*([kmb]?)[\s_-]*(steps?|epochs?|images?|%|)", re.IGNORECASE)


@lru_cache
def parts(duration: Duration) -> tuple[float, str]:
    """A duration as number and unit, one of `UNITS`.

    Raises:
        ValueError: anything else, negative or infinite.
    """
    found = _FORM.fullmatch(duration.strip()) if isinstance(duration, str) else None
    if found:
        number, many, unit = found.groups()
        unit = next(full for full in ("epochs", *UNITS) if full.startswith(unit.lower()))  # none: epochs
        return float(number) * MANY[many.lower()], unit
    if isinstance(duration, (int, float)) and 0 <= duration < math.inf:
        return float(duration), "epochs"
    raise ValueError(f"{duration!r} is not a duration; write 3 (epochs), 500-steps, 20k-steps, 1.5M-images or 5%")


def check_duration(name: str, duration: Duration, *, least: float = 0.0, percent: bool = True) -> None:
    """See that a field holds a duration.

    Raises:
        ValueError: it does not, is shorter than `least` of its unit, or in per cent where that says nothing.
    """
    try:
        number, unit = parts(duration)
    except ValueError as error:
        raise ValueError(f"field `{name}`: {error}") from None
    require(number > 0 if least else number >= 0, name, f"{duration!r} must be longer than nothing")
    require(
        unit != "%" or (percent and number <= 100),
        name,
        f"{duration!r}: " + ("at most 100%" if percent else "say it in steps, epochs or images"),
    )


def in_steps(duration: Duration, *, steps: int, steps_per_epoch: int, batch: int) -> int:
    """A duration in optimiser steps, of a run of `steps`; one of images is rounded up."""
    number, unit = parts(duration)
    return {
        "steps": lambda: round(number),
        "epochs": lambda: round(number * steps_per_epoch),
        "images": lambda: math.ceil(number / batch),
        "%": lambda: round(number / 100 * steps),
    }[unit]()


def seconds(duration: str) -> float:
    """A time such as `90s`, `30m`, `8h` or `1h30m` in seconds; empty: infinity.

    Raises:
        ValueError: anything else.
    """
    if not duration:
        return math.inf
    total, number = 0.0, ""
    for letter in duration.strip().lower():
        if letter.isdecimal() or letter == ".":
            number += letter
        elif letter in "dhms" and number.count(".") <= 1 and number.strip("."):
            total, number = total + float(number) * {"d": 86400, "h": 3600, "m": 60, "s": 1}[letter], ""
        else:
            break
    else:
        if not number and total > 0:
            return total
    raise ValueError(f"field `time`: {duration!r} is not a duration; write 90s, 30m, 8h or 1h30m")
