"""Declared options: typed, ranged, documented fields of a frozen dataclass, from which files, flags and help are read.

The keys of a recipe and the settings of a method are declared and checked alike.
"""

import contextlib
import dataclasses
import math
import operator
import types
import typing
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from mbib_timm.errors import MbibError, shown, unknown_name

# What no option needs more of: characters of a text, items of a list, and values in a mapping with all that is in them.
LONGEST_TEXT, LONGEST_LIST, MOST_VALUES, DEEPEST = 4096, 1000, 10_000, 20
# Numbers are those of float32, with which everything is computed, and integers of 64 bits.
LARGEST_INT, LARGEST_FLOAT, SMALLEST_FLOAT = 2**63 - 1, 3.4e38, 1.2e-38


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
        metadata: anything else about the option. ``place=True`` marks a method's setting that names trained models,
            of type ``list[str]``, ``str`` or ``str | None``: a folder among them is saved as an absolute path, and only
            its last part is published. The run records what they were trained on.
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


def without_none(expected: Any) -> Any:
    """Return a type, of ``X | None`` X."""
    if typing.get_origin(expected) not in (types.UnionType, typing.Union):
        return expected
    others = [each for each in typing.get_args(expected) if each is not types.NoneType]
    return others[0] if len(others) == 1 else expected


def check_declared(declared: type, where: str) -> None:
    """Raise MbibError for an option of a type that there is not, or whose default is not of its type and in its range.

    Args:
        declared: a dataclass of options.
        where: names an option in messages, such as ``setting {!r}``.
    """
    try:
        expected = option_types(declared)
    except (NameError, TypeError) as error:  # of annotations in quotes
        raise MbibError(f"{where.format(declared.__name__)}: its types cannot be read: {error}") from None
    for item in dataclasses.fields(declared):
        kind, place = expected[item.name], where.format(item.name)
        if not _is_known(kind):
            name = kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)
            raise MbibError(
                f"{place}: expected the type float, int, str, bool, list[...] of such a type, dict[str, ...], or "
                f"one of these | None; got {name}"
            )
        check_option(item, kind, default_of(item), f"{place}: default")


def _is_known(expected: Any) -> bool:
    expected = without_none(expected)
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    return expected in (float, int, str, bool) or origin is dict or (origin is list and _is_known(arguments[0]))


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
            defaults = own if isinstance(own, list) else [own]
            if isinstance(value, list):
                value = [each if each in defaults else _absolute(each) for each in value]
            elif value is not None and value not in defaults:
                value = _absolute(value)
        object.__setattr__(instance, item.name, value)


def check_option(item: dataclasses.Field, expected: Any, value: Any, where: str) -> Any:
    """Return a value of an option as its type, see `option_types`; `where` names the option in messages.

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
    if (inner := without_none(expected)) is not expected:
        return None if value is None else _typed(where, value, inner)
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if expected == list[str] and isinstance(value, str):
        value = [value]
    if origin is list and isinstance(value, list | tuple):
        if len(value) > LONGEST_LIST:
            raise MbibError(f"{where}: expected at most {LONGEST_LIST:,} values, got {len(value):,}")
        return [_typed(where, item, arguments[0]) for item in value]
    if origin is dict and isinstance(value, Mapping):
        _check_plain(where, value)
        return dict(value)
    if expected is float and isinstance(value, str):
        # YAML reads 3e-4 (no dot) as a string.
        with contextlib.suppress(ValueError):
            value = float(value)
    if expected is float and isinstance(value, int | float) and not isinstance(value, bool):
        _check_number(where, value)
        return float(value)
    if expected is int and isinstance(value, int) and not isinstance(value, bool):
        _check_number(where, value)
        return value
    if expected is str and isinstance(value, str):
        _check_text(where, value)
        return value
    if expected is bool and isinstance(value, bool):
        return value
    wanted = f"list of {arguments[0].__name__}" if origin is list else (origin or expected).__name__
    raise MbibError(f"{where}: expected {wanted}, got {shown(value)}")


def _check_text(where: str, text: str) -> None:
    if not text:
        raise MbibError(f"{where}: expected a text, got an empty one")
    if len(text) > LONGEST_TEXT:
        raise MbibError(f"{where}: expected at most {LONGEST_TEXT:,} characters, got {len(text):,}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise MbibError(f"{where}: expected text in UTF-8, got {shown(text)}") from None
    if "\0" in text:
        raise MbibError(f"{where}: expected text without NUL, got {shown(text)}")


def _check_number(where: str, value: float) -> None:
    if isinstance(value, int):
        if abs(value) > LARGEST_INT:
            raise MbibError(f"{where}: expected a number of at most 64 bits, got {shown(value)}")
        return
    if not math.isfinite(value):
        raise MbibError(f"{where}: expected a finite number, got {value}")
    if abs(value) > LARGEST_FLOAT or 0 < abs(value) < SMALLEST_FLOAT:
        raise MbibError(f"{where}: expected a number that float32 holds, got {value}")


def _check_plain(whole: str, content: Mapping[Any, Any]) -> None:
    """Raise MbibError unless a mapping is of names to plain values, as recipe.yaml can hold and a function can take.

    A YAML file may name a part of itself again and again, inside itself too: what there would be is counted.
    """
    waiting: list[tuple[str, Any, int]] = [(whole, content, 0)]
    for _ in range(MOST_VALUES):
        if not waiting:
            return
        where, value, depth = waiting.pop()
        if depth > DEEPEST:
            raise MbibError(f"{whole}: expected at most {DEEPEST} nested values")
        if isinstance(value, Mapping):
            for name in value:
                if not isinstance(name, str):
                    raise MbibError(f"{where}: expected names, got {shown(name)} for one")
                _check_text(where, name)
            waiting += [(f"{where}: {name}", item, depth + 1) for name, item in value.items()]
        elif isinstance(value, list | tuple):
            waiting += [(where, item, depth + 1) for item in value]
        elif isinstance(value, str):
            if value:
                _check_text(where, value)
        elif isinstance(value, int | float):
            _check_number(where, value)
        elif value is not None:
            raise MbibError(f"{where}: expected numbers, texts, lists and mappings, got {shown(value)}")
    raise MbibError(f"{whole}: expected at most {MOST_VALUES:,} values")


def _check_range(where: str, value: Any, limits: Mapping[str, Any]) -> None:
    if value is None:
        return
    if limits["choices"] and value not in limits["choices"]:
        raise unknown_name(f"value of {where}", value, limits["choices"])
    if isinstance(value, int | float):
        for kind, (words, is_right) in LIMITS.items():
            if limits[kind] is not None and not is_right(value, limits[kind]):
                raise MbibError(f"{where}: expected {words} {_number(limits[kind])}, got {_number(value)}")


LIMITS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "minimum": ("at least", operator.ge),
    "above": ("more than", operator.gt),
    "maximum": ("at most", operator.le),
    "below": ("less than", operator.lt),
}


def _number(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else f"{value:,}"


def is_number(text: str) -> bool:
    """Return whether a text is a number, infinity and nan among them."""
    try:
        float(text)
    except ValueError:
        return False
    return True
