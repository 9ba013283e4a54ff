"""Declared options: typed, ranged, documented fields of a frozen dataclass, from which files, flags and help are read.

The keys of a recipe and the settings of a method are declared and checked alike.
"""

import contextlib
import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from mbib_timm.errors import MbibError, unknown_name


def option(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] | None = None,
    **metadata: Any,
) -> Any:
    """Declare an option: its default, its help text and the values it accepts. For lists, limits hold for each item.

    Args:
        default: value when none is given.
        help: one line for ``--help``.
        minimum: smallest value accepted.
        above: value that must be exceeded.
        maximum: largest value accepted.
        below: value that must not be reached.
        choices: the strings accepted.
        metadata: what else is known of it; ``place=True`` of a method's setting: it names trained models, and a folder
            among them is kept as an absolute path, and published by its last part.
    """
    metadata |= dict(help=help, minimum=minimum, above=above, maximum=maximum, below=below, choices=choices)
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@cache
def option_types(declared: type) -> dict[str, Any]:
    """Return the type of each option of a dataclass, by name."""
    hints = typing.get_type_hints(declared)
    return {item.name: hints[item.name] for item in dataclasses.fields(declared)}


def default_of(item: dataclasses.Field) -> Any:
    """Return an option's default."""
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()


def check_options(instance: Any, where: str) -> None:
    """Turn the values of a frozen dataclass of options into their types, in place, and check their ranges.

    Args:
        instance: of a dataclass whose fields are declared by `option`; others are left alone.
        where: names an option in messages, such as ``recipe key {!r}``.

    Raises:
        MbibError: a value of another type, or out of range; names the option.
    """
    declared: Any = type(instance)
    expected = option_types(declared)
    for item in dataclasses.fields(instance):
        if "help" not in item.metadata:
            continue
        value = check_option(item, expected[item.name], getattr(instance, item.name), where.format(item.name))
        if item.metadata.get("place"):
            own = default_of(item)
            value = [each if each in own else _absolute(each) for each in value]
        object.__setattr__(instance, item.name, value)


def check_option(item: dataclasses.Field, expected: Any, value: Any, where: str) -> Any:
    """Return a value of an option as its type.

    Args:
        item: the option.
        expected: its type, see `option_types`.
        value: to check.
        where: names the option in messages.

    Raises:
        MbibError: a value of another type, or out of range.
    """
    value = _typed(where, value, expected)
    for each in value if isinstance(value, list) else (value,):
        _check_range(where, each, item.metadata)
    return value


def _absolute(place: str) -> str:
    """Return an existing folder as an absolute path: the same from anywhere. Anything else is a name."""
    folder = Path(place.removeprefix("local-dir:"))
    return str(folder.resolve()) if folder.is_dir() else place


def build_options(declared: type, values: Mapping[str, Any], owner: str) -> Any:
    """Build a dataclass of settings from names and values, checked.

    Args:
        declared: a frozen dataclass whose fields are declared by `option`.
        values: by name; what is not given keeps its default.
        owner: whose settings they are, for messages, such as ``method 'mbib'``.

    Raises:
        MbibError: an unknown name, with the nearest valid one; a value of another type or out of range.
    """
    valid = option_types(declared)
    for name in values:
        if name not in valid:
            if not valid:
                raise MbibError(f"unknown setting {name!r}: {owner} has none")
            raise unknown_name(f"setting of {owner}:", str(name), valid)
    built = declared(**values)
    check_options(built, f"setting {{!r}} of {owner}")
    return built


def _typed(where: str, value: Any, expected: Any) -> Any:
    """Return `value` as the expected type, or raise MbibError."""
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin is types.UnionType:
        if value is None:
            return None
        return _typed(where, value, arguments[0])
    if expected == list[str] and isinstance(value, str):
        return [value]
    if origin is list and isinstance(value, list | tuple):
        return [_typed(where, item, arguments[0]) for item in value]
    if origin is dict and isinstance(value, Mapping):
        return dict(value)
    if expected is float and isinstance(value, str):
        # YAML reads 3e-4 (no dot) as a string.
        with contextlib.suppress(ValueError):
            value = float(value)
    if expected is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise MbibError(f"{where}: expected a finite number, got {value}")
        return float(value)
    if expected is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if expected in (str, bool) and isinstance(value, expected):
        return value
    wanted = f"list of {arguments[0].__name__}" if origin is list else (origin or expected).__name__
    raise MbibError(f"{where}: expected {wanted}, got {value!r}")


def _check_range(where: str, value: Any, limits: Mapping[str, Any]) -> None:
    if value is None:
        return
    if limits["choices"] and value not in limits["choices"]:
        raise unknown_name(f"value of {where}", str(value), limits["choices"])
    if isinstance(value, int | float):
        if limits["minimum"] is not None and value < limits["minimum"]:
            raise MbibError(f"{where}: expected at least {limits['minimum']:g}, got {value:g}")
        if limits["above"] is not None and value <= limits["above"]:
            raise MbibError(f"{where}: expected more than {limits['above']:g}, got {value:g}")
        if limits["maximum"] is not None and value > limits["maximum"]:
            raise MbibError(f"{where}: expected at most {limits['maximum']:g}, got {value:g}")
        if limits["below"] is not None and value >= limits["below"]:
            raise MbibError(f"{where}: expected less than {limits['below']:g}, got {value:g}")


def is_number(text: str) -> bool:
    """Return whether a text is a number, infinity and nan among them."""
    try:
        float(text)
    except ValueError:
        return False
    return True
