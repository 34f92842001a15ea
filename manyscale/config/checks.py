"""What a setting says when its value is refused."""

import math


def require(holds: bool, field_name: str, message: str) -> None:
    """See that a field's value holds; a `ValueError` names the field and says why."""
    if not holds:
        raise ValueError(f"field `{field_name}`: {message}")


def finite(config: object, *names: str) -> None:
    """See that the fields `names` of `config` are finite numbers."""
    for name in names:
        value = getattr(config, name)
        require(math.isfinite(value), name, f"{value} is not a finite number; give one, such as 0.001")
