"""Settings as plain values and back, strictly."""

import dataclasses
import difflib
import types
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def nearest(name: str, names: Any) -> str:
    """The sentence that suggests what `name` was meant to be: the nearest of `names`, or all of them where none is near."""
    names = sorted(names)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean `{close[0]}`?" if close else f"known: {', '.join(names)}"


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass of this file as plain dicts, lists and scalars, ready for JSON."""
    return dataclasses.asdict(config, dict_factory=lambda pairs: {name: _lists(value) for name, value in pairs})


def _lists(value: Any) -> Any:
    return [_lists(item) for item in value] if isinstance(value, tuple) else value


def from_dict(kind: type[T], values: Any, where: str = "") -> T:
    """The dataclass `kind` from what `to_dict` gave: strict keys, strict types, lists become tuples again.

    Args:
        where: what the errors call the place, such as a file's name.

    Raises:
        ValueError: an unknown field (with the nearest known one) or a missing one, a wrong type, or a value the class refuses.
    """
    prefix = f"{where}: " if where else ""
    if not isinstance(values, dict):
        raise ValueError(f"{prefix}expected fields of {kind.__name__}, found {values!r}")
    kinds = get_type_hints(kind)
    for name in values:
        if name not in kinds:
            raise ValueError(f"{prefix}unknown field `{name}` of {kind.__name__}; {nearest(name, kinds)}")
    for field in dataclasses.fields(kind):
        if field.name not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{prefix}field `{field.name}` of {kind.__name__} is missing")
    arguments = {name: _read(kinds[name], value, f"{prefix}field `{name}`") for name, value in values.items()}
    try:
        return kind(**arguments)
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from None


def _read(kind: Any, value: Any, where: str) -> Any:
    """`value` as `kind`, an annotation of this file: scalar, Literal, tuple, union or dataclass."""
    origin, arguments = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        return from_dict(kind, value, where)
    if (origin is Literal and value in arguments) or (kind is type(None) and value is None):
        return value
    if origin in (Union, types.UnionType):
        if isinstance(value, dict) and all(map(dataclasses.is_dataclass, arguments)):  # the class that knows most of the fields
            return from_dict(max(arguments, key=lambda option: len(get_type_hints(option).keys() & value.keys())), value, where)
        for option in arguments:
            try:
                return _read(option, value, where)
            except ValueError:
                continue
    if origin is tuple and isinstance(value, (list, tuple)):
        each = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
        if len(each) == len(value):
            return tuple(_read(option, item, where) for option, item in zip(each, value, strict=True))
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if kind in (int, str, bool) and type(value) is kind:
        return value
    expected = " or ".join(map(str, arguments)) if origin is Literal else getattr(kind, "__name__", str(kind))
    raise ValueError(f"{where}: expected {expected}, found {value!r}")
