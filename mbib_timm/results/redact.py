"""Redaction: what a run wrote, without what it says of the machine: its folders, devices, workers."""

import dataclasses
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mbib_timm.environment import Environment
from mbib_timm.methods import METHODS
from mbib_timm.recipe import KEYS, STAGES, TYPES, Recipe
from mbib_timm.results.record import RunRecord


def redact_recipe(recipe: Recipe) -> bytes:
    """Return a run's recipe as YAML, without the keys that say where it ran: folders, devices, workers.

    Of what it started from the name is left.
    """
    computation = recipe.computation()
    for keys in (computation, *computation.get(STAGES, ())):
        if "model" in keys:
            keys["model"] = redact_model(keys["model"])
        if "method" in keys:
            keys["method"] = redact_method(keys["method"])
        if "class_weights" in keys:
            keys["class_weights"] = Path(keys["class_weights"]).name  # of a file
    start = recipe.chain()[0].initial_checkpoint
    if start is not None:
        computation["initial_checkpoint"] = Path(start).name
    return yaml.safe_dump(computation, sort_keys=False, allow_unicode=True).encode()


def redact_method(method: Mapping[str, Any]) -> dict[str, Any]:
    """Return a method with its settings, of folders of trained models the last part alone."""
    settings = dataclasses.fields(METHODS[method["name"]].Settings)
    places = {item.name for item in settings if item.metadata.get("place")}
    return {
        name: [redact_text(redact_model(place)) for place in value] if name in places else value
        for name, value in method.items()
    }


def redact_record(record: RunRecord) -> RunRecord:
    """Return a run's record without paths of the machine that it ran on."""
    return dataclasses.replace(
        record,
        model=redact_model(record.model),
        environment=redact_environment(record.environment),
        replaced_images=[Path(path).name for path in record.replaced_images],
        left_out_images=[Path(path).name for path in record.left_out_images],
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
        flag, equals, _ = word.partition("=")
        flag = re.sub(r"^--stage\d+\.", "--", flag)
        if skip:
            skip = False
        elif flag.replace("--no-", "--") in places:
            skip = not equals and places[flag.replace("--no-", "--")] not in (bool, bool | None)
        else:
            kept.append(redact_text(word))
    return shlex.join(kept)


def redact_text(text: str) -> str:
    """Return a message, or a file's name, with the last part alone of every absolute path in it."""
    return re.sub(r"(?<![\w./:])/(?:[^\s/'\":]+/)+", "", text)


def redact_model(name: str) -> str:
    """Return a model's name, of a folder on this machine the last part alone."""
    scheme, colon, place = name.partition(":")
    return f"{scheme}:{Path(place).name}" if colon and scheme == "local-dir" else name
