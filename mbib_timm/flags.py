"""Flags of commands: those of recipe keys and of methods' settings, read off their declarations; and the parser."""

import argparse
import dataclasses
import itertools
import re
import typing
from collections.abc import Iterable, Sequence
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NoReturn

from mbib_timm.errors import MbibError, shown
from mbib_timm.files import parse_yaml
from mbib_timm.options import option_types, without_none
from mbib_timm.recipe import KEYS, TYPES, Recipe, check_key
from mbib_timm.recipe.declared import find_method
from mbib_timm.recipe.keys import LARGEST_SEED, MOST_WORKERS

UNCHANGED = "when not given, as in the recipe, or in the one that the model was trained with"
LONGEST_ERROR = 500  # characters of an error of argparse, which cuts no value
DOTTED = re.compile(r"--([a-z][a-z0-9_-]*(?:\.[a-zA-Z0-9_-]+)+)(?:=(.*))?", re.DOTALL)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are ours: one line, with the nearest valid flag, and what a flag is that lacks its value.

    Attributes:
        shown: the recipe whose values the help shows, where there is one.
    """

    shown: Recipe | None = None

    def error(self, message: str) -> NoReturn:
        if lacks := re.fullmatch(r"argument (?:-\w/)?(--[\w-]+): expected (?:one|at least one) argument", message):
            message += f": {self._option_string_actions[lacks[1]].help}"
        raise MbibError(message if len(message) <= LONGEST_ERROR else f"{message[:LONGEST_ERROR]}...")


# Types of arguments


def name_value(text: str) -> tuple[str, Any]:
    """Parse ``name=value``, the value as YAML."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"expected name=value, got {shown(text)}")
    try:
        return name, parse_yaml(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{shown(value)} is not a valid value: {error}") from None


def mapping(text: str) -> dict[str, Any]:
    """Parse a YAML mapping, such as ``{cutout: 8}``."""
    expected = f"expected a mapping such as {{cutout: 8}}, got {shown(text)}"
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{expected}: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(expected)
    return value


def _whole(text: str, least: int, most: int | None = None) -> int:
    """Parse a whole number; without a largest one it is of 31 bits, which is what libraries count in."""
    value = int(text) if re.fullmatch("[0-9]{1,18}", text) else -1
    if why := _no_whole(value, text, least, most):
        raise argparse.ArgumentTypeError(why)
    return value


not_negative = partial(_whole, least=0)
positive = partial(_whole, least=1)
random_seed = partial(_whole, least=0, most=LARGEST_SEED)
workers = partial(_whole, least=0, most=MOST_WORKERS)
port = partial(_whole, least=1, most=65_535)


def _no_whole(value: int, given: object, least: int, most: int | None) -> str | None:
    """Return what to say of a number, as it was given, that is out of range; None for one within."""
    if least <= value <= (2**31 - 1 if most is None else most):
        return None
    short = most is None and len(shown(given).strip("'")) < 10
    allowed = f"of at least {least}" if short else f"from {least} to {most or 2**31 - 1}"
    return f"expected a whole number {allowed}, got {shown(given)}"


def place(text: str) -> Path:
    """Parse a path; an empty text, as of a variable that is not set, would mean the folder one is in."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got an empty text")
    return Path(text)


def share(text: str) -> float:
    """Parse a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if why := _no_share(value, text):
        raise argparse.ArgumentTypeError(why)
    return value


def _no_share(value: float, given: object) -> str | None:
    """Return what to say of a number, as it was given, that is not from 0 to 1; None for one that is."""
    return None if 0 <= value <= 1 else f"expected a number from 0 to 1, got {shown(given)}"


def check_prediction(top_k: object, threshold: object, batch_size: object, workers: object) -> None:
    """Raise MbibError for an argument of `predict` that the flag of its name would refuse; for workers None is one."""
    for name, value, least, most in (
        ("top_k", top_k, 1, None),
        ("batch_size", batch_size, 1, None),
        ("workers", 0 if workers is None else workers, 0, MOST_WORKERS),
    ):
        number = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else -1
        if why := _no_whole(number, value, least, most):
            raise MbibError(f"{name}: {why}")
    if why := _no_share(float(threshold) if isinstance(threshold, Real) else -1.0, threshold):
        raise MbibError(f"threshold: {why}")


# Flags of a recipe's keys


def flag(key: str) -> str:
    """Return the flag of a recipe key: ``--data-dir`` for ``data_dir``."""
    return f"--{key.replace('_', '-')}"


def add_recipe_flags(parser: Parser, keys: Iterable[str]) -> None:
    """Add the flags of keys that a command reads, in groups; those that are not given leave the recipe's value."""
    shown = parser.shown
    stages = [] if shown is None else shown.chain()
    for title, names in itertools.groupby(keys, key=lambda name: KEYS[name].metadata["group"]):
        group = parser.add_argument_group(title, None if shown else UNCHANGED)
        for name in names:
            values = [getattr(stage, name) for stage in stages]
            _add_flag(group, name, [value["name"] for value in values] if name == "method" else values)
        if title == "method":
            for number, stage in enumerate(stages, start=1):
                _add_method_flags(parser, f"stage{number}.method" if len(stages) > 1 else "method", stage.method)


def _add_method_flags(parser: Parser, place: str, method: dict[str, Any]) -> None:
    declared = find_method(method["name"])
    group = parser.add_argument_group(f"{place}: {declared.name} ({declared.title})", declared.citation or None)
    expected = option_types(declared.Settings)
    for item in dataclasses.fields(declared.Settings):
        group.add_argument(
            f"--{place}.{item.name.replace('_', '-')}",
            metavar=type_name(expected[item.name]),
            default=argparse.SUPPRESS,
            help=_described(item, [method[item.name]]),
        )


def _add_flag(group: Any, name: str, values: Sequence[Any]) -> None:
    item, expected = KEYS[name], without_none(TYPES[name])
    options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": _described(item, values)}
    if expected is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif name == "method":
        options["metavar"] = "NAME"
    elif name == "plugin":
        options |= {"action": "append", "metavar": "FILE"}
    elif typing.get_origin(expected) is list:
        (item_type,) = typing.get_args(expected)
        of_mappings = typing.get_origin(item_type) is dict
        options |= {"nargs": "+", "type": mapping if of_mappings else item_type}
        options["metavar"] = "{KEY: VALUE}" if of_mappings else "X"
    elif typing.get_origin(expected) is dict:
        options |= {"nargs": "*", "type": name_value, "metavar": "NAME=VALUE"}
    else:
        options |= {"type": expected, "metavar": expected.__name__.upper()}
    group.add_argument(flag(name), **options)


def type_name(expected: Any) -> str:
    expected = without_none(expected)
    return getattr(typing.get_origin(expected) or expected, "__name__", "VALUE").upper()


def _described(item: dataclasses.Field, values: Sequence[Any]) -> str:
    """Return an option's help: what it is, what it may be, and what it is now, in each stage where stages differ."""
    text = item.metadata["help"]
    if item.metadata["choices"]:
        text += f" ({', '.join(item.metadata['choices'])})"
    now = [" ".join(map(str, value)) if isinstance(value, list) else value for value in values]
    if len(set(map(str, now))) > 1:
        told = [f"stage{number} {value}" for number, value in enumerate(now, start=1) if value not in (None, "", {})]
        text += f" [{', '.join(told)}]"
    elif now and now[0] not in (None, "", {}):
        text += f" [{now[0]}]"
    return text.replace("%", "%%")


def recipe_overrides(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what was given as flags, by the address that `load_recipe` takes.

    Raises:
        MbibError: a value of another type, or out of its key's range.
    """
    given = {name: value for name, value in vars(arguments).items() if name in TYPES}
    pairs = [name for name in given if typing.get_origin(without_none(TYPES[name])) is dict and name != "method"]
    overrides = {name: _named(name, value) if name in pairs else value for name, value in given.items()}
    for name, value in overrides.items():
        check_key(name, {"name": value} if name == "method" else value)
    return {**overrides, **getattr(arguments, "dotted", {})}


def _named(name: str, pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    named = dict(pairs)
    if len(named) < len(pairs):
        raise MbibError(f"flag {flag(name)}: a name occurs twice: {', '.join(key for key, _ in pairs)}")
    return named


def take_dotted(argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Take flags such as ``--method.beta 3`` and ``--stage2.lr=0.1`` out of a command line; values are YAML."""
    dotted: dict[str, Any] = {}
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        match = DOTTED.fullmatch(word)
        if match is None:
            rest.append(word)
            continue
        text = match[2] if match[2] is not None else next(words, None)
        if text is None or text.startswith("--"):
            raise MbibError(f"flag --{match[1]} needs a value")
        try:
            dotted[match[1].replace("-", "_")] = parse_yaml(text)
        except ValueError as error:
            raise MbibError(f"flag --{match[1]}: {shown(text)} is not a valid value: {error}") from None
    return dotted, rest
