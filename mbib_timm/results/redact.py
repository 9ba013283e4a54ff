"""Redaction: what a run wrote, without what it says of the machine: its folders, devices, workers."""

import contextlib
import dataclasses
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mbib_timm.environment import Environment
from mbib_timm.files import from_plain
from mbib_timm.recipe import KEYS, STAGES, TYPES, Recipe
from mbib_timm.results.record import RunRecord


def redact_recipe(recipe: Recipe) -> bytes:
    """Return a run's recipe as YAML, without the keys that say where it ran: folders, devices, workers.

    Of what it started from the name is left, and so it is of any path in the other keys.
    """
    computation = redact_value(recipe.computation())
    for keys in (computation, *computation.get(STAGES, ())):
        if "class_weights" in keys:
            keys["class_weights"] = last_part(keys["class_weights"])  # of a file
    start = recipe.chain()[0].initial_checkpoint
    if start is not None:
        computation["initial_checkpoint"] = last_part(start)
    return yaml.safe_dump(computation, sort_keys=False, allow_unicode=True).encode()


def redact_value(value: Any) -> Any:
    """Return a plain value with the last part alone of every path of the machine in it; `redact_text` does texts."""
    if isinstance(value, Mapping):
        redacted: dict[Any, Any] = {}
        for key, item in value.items():
            name = short = redact_value(key)
            while name in redacted:  # of two folders of one name
                name = f"{short}-{len(redacted) + 1}"
            redacted[name] = redact_value(item)
        return redacted
    if isinstance(value, list | tuple):
        return type(value)(map(redact_value, value))
    if not isinstance(value, str):
        return value
    scheme, colon, place = value.partition(":")
    if colon and scheme == "local-dir":
        return f"{scheme}:{last_part(place)}"
    # A path may hold anything, such as spaces, where it is all that there is.
    return last_part(value) if _WHOLE.match(value) else redact_text(value)


def redact_record(record: RunRecord) -> RunRecord:
    """Return a run's record without paths of the machine that it ran on; names of classes are none."""
    own: dict[str, Any] = {"class_names": None, "left_out": {}, "unread_classes": [], "unmeasured_classes": []}
    plain = redact_value({**dataclasses.asdict(record), **own})
    redacted: RunRecord = from_plain(RunRecord, plain)
    return dataclasses.replace(
        redacted,
        class_names=record.class_names,
        unread_classes=record.unread_classes,
        unmeasured_classes=record.unmeasured_classes,
        environment=redact_environment(record.environment),
        replaced_images=[Path(path).name for path in record.replaced_images],
        left_out_images=[Path(path).name for path in record.left_out_images],
        left_out={why: [Path(path).name for path in paths] for why, paths in record.left_out.items()},
    )


def redact_environment(environment: Environment) -> Environment:
    """Return an environment whose command has no paths of the machine."""
    return dataclasses.replace(environment, command=redact_command(environment.command))


def redact_command(command: str) -> str:
    """Return a command line without the flags, and their values, that say where a run reads and writes.

    Of any absolute path the last part is left.
    """
    # A plugin says what was run; of its path the last part is left.
    places = {
        f"--{name.replace('_', '-')}": TYPES[name]
        for name, item in KEYS.items()
        if item.metadata["location"] and name != "plugin"
    }
    kept: list[str] = []
    try:
        words = shlex.split(command)
    except ValueError:  # recorded before words with spaces were quoted
        words = command.split(" ")
    skip = False
    for word in words:
        name, equals, value = word.partition("=")
        flag = re.sub(r"^--(stage\d+\.)?(no-)?", "--", name)
        if skip:
            skip = False
        elif flag in places:
            skip = not equals and places[flag] not in (bool, bool | None)
        else:
            kept.append(f"{_redact_setting(name)}{equals}{_redact_setting(value)}")
    return shlex.join(kept)


def _redact_setting(text: str) -> str:
    """Return the value of a flag, which may be a list or a mapping in YAML, as `redact_value` does."""
    if text.startswith(("[", "{")):
        with contextlib.suppress(yaml.YAMLError):
            value = redact_value(yaml.safe_load(text))
            return yaml.safe_dump(
                value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6
            ).strip()
    return str(redact_value(text))


def redact_text(text: str) -> str:
    """Return a message, or a file's name, with the last part alone of every path of the machine in it."""
    home = str(Path.home())  # whose name may have spaces
    if len(home) > 1:
        text = text.replace(f"{home}/", "~/")
    return _WINDOWS.sub("", _INSIDE.sub("", text))


# What begins a path of the machine: its root, a home, a drive, a share, and the folders above this one.
_WHOLE = re.compile(r"(file://|/|~[\w.-]*/|\.\.[/\\]|[A-Za-z]:[/\\]|\\\\)")
# The folders of a path inside a text. What regular expressions are made of is left out: `group_by` may be one.
_PART = r"[^\s/\\'\":()\[\]*?^$|{}]+"
_INSIDE = re.compile(rf"(?:file://)?(?<![\w./])(?:~[\w.-]*|[A-Za-z]:|(?:\.\./)*\.\.)?/(?:{_PART}/)+")
_WINDOWS = re.compile(rf"(?<!\w)(?:[A-Za-z]:|\\)\\(?:{_PART}\\)+")


def last_part(path: str) -> str:
    """Return the last part of a path of any system."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]
