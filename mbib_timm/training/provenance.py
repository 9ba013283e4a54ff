"""What a recipe names by its place: data, weights of models, class weights, code of plugins. Runs are the same where
these are."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import timm

from mbib_timm.data import SAMPLERS, DataPool, parse_sampler
from mbib_timm.errors import CheckpointError
from mbib_timm.files import from_plain
from mbib_timm.methods import METHODS
from mbib_timm.models.weights import WEIGHTS_FILES
from mbib_timm.recipe import DATA_PLACES, Recipe
from mbib_timm.recipe.checks import parse_class_weights
from mbib_timm.recipe.declared import named_models
from mbib_timm.recipe.plugins import code_behind
from mbib_timm.results.record import Inputs, RunRecord


def inputs_of(recipe: Recipe, pool: DataPool) -> list[Inputs]:
    """Return what each stage of a recipe is given.

    Raises:
        MbibError: data or weights that are not there.
    """
    return [_inputs(stage, pool.open(stage).digest) for stage in recipe.chain()]


def _inputs(stage: Recipe, data: str) -> Inputs:
    """Return what a stage is given, whose data have a digest."""
    start = start_of(stage)
    kind, _ = parse_class_weights(stage.class_weights)
    teachers = [_digest(Path(place)) for place in named_models(stage.method)]
    return Inputs(
        data,
        None if start is None else _digest(start),
        code_of_stage(stage),
        _digest(Path(stage.class_weights)) if kind == "file" else None,
        [digest for digest in teachers if digest is not None],
    )


def code_of_stage(stage: Recipe) -> dict[str, str]:
    """Return the digests of the code that a stage's method, samplers and network come from; see `code_behind`."""
    kind = METHODS[stage.method["name"]]
    samplers = [*parse_sampler(stage.choice("sampler")), *filter(None, [stage.cutmix_sampler])]
    models = [str(name).partition(".")[0] for name in (stage.model, stage.model_kwargs.get("backbone"))]
    others = [
        *(base.__module__ for base in kind.__mro__),
        *(SAMPLERS.module_of(name.partition(":")[0]) for name in samplers),
        *(timm.model_entrypoint(name).__module__ for name in models if timm.is_model(name)),
    ]
    return code_behind(stage.plugin, kind.__module__, others)


def _digest(place: Path) -> str | None:
    """Return the digest of a file, or of the weights in a folder; None if it is not there."""
    files = [place / name for name in WEIGHTS_FILES] if place.is_dir() else [place]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        return None
    state = file.stat()
    return _sha256(file, state.st_size, state.st_mtime_ns)


def changed_inputs(recorded: Sequence[Inputs], now: Sequence[Inputs]) -> list[str]:
    """Return what differs between what a run was given and what a recipe names now, in words.

    Nothing is said of what was not recorded.
    """
    pairs = list(zip(recorded, now, strict=False))
    words = {
        "its images or their labels": any(before.data != after.data for before, after in pairs),
        "the weights that it starts from": any(before.start != after.start for before, after in pairs),
        "its class weights": any(before.class_weights != after.class_weights for before, after in pairs),
        "its teachers": any(before.teachers != after.teachers for before, after in pairs),
    }
    return [*(word for word, differs in words.items() if differs), *changed_plugins(recorded, now)]


def changed_plugins(recorded: Sequence[Inputs], now: Sequence[Inputs]) -> list[str]:
    """Return the names of plugins whose code differs."""
    changed = [
        name
        for before, after in zip(recorded, now, strict=False)
        for name, digest in after.plugins.items()
        if before.plugins.get(name, digest) != digest
    ]
    return list(dict.fromkeys(changed))


def inputs_in(state: Mapping[str, Any]) -> list[Inputs]:
    """Return what each stage of a run was given, by a checkpoint of it. Raises ValueError where it holds no such."""
    found: list[Inputs] = from_plain(list[Inputs], state.get("inputs", []))
    return found


def continued(before: Sequence[Inputs], now: Sequence[Inputs]) -> tuple[list[Inputs], list[str]]:
    """Return what a run was given that goes on, and the names of plugins whose code has changed.

    Of the last stage, which goes on, that is what it began with, and code of plugins that has come since.
    """
    began, last = before[-1], now[-1]
    plugins, changed = dict(began.plugins), []
    for name, digest in last.plugins.items():
        known = plugins.get(name, "").split()
        if known[-1:] == [digest] or (not known and digest in plugins.values()):  # under another name
            continue
        plugins[name] = " ".join([*known, digest])
        changed.append(name)
    earlier = [replace(given, plugins=each.plugins) for given, each in zip(before[:-1], now, strict=False)]
    return [*earlier, replace(began, plugins=plugins)], changed


def check_begun(folder: Path, begun: Sequence[Inputs], recipe: Recipe) -> None:
    """Check that a run which has begun would go on with the code that it began with.

    Args:
        folder: of the run, or of a stage in it.
        begun: what it was given, by its checkpoint.
        recipe: by which it would go on.

    Raises:
        CheckpointError: it would go on with other code.
    """
    now = {digest for stage in recipe.chain() for digest in code_of_stage(stage).values()}
    if changed := [name for each in begun for name, digest in each.plugins.items() if digest not in now]:
        raise _changed(folder, list(dict.fromkeys(changed)))


def _changed(folder: Path, changed: Sequence[str]) -> CheckpointError:
    return CheckpointError(
        f"{folder} holds a run from before {', '.join(changed)} changed; choose another --name for the sweep, or "
        "remove the folder"
    )


def extended(
    folder: Path, instead: str = "choose another --name for the sweep, or remove the folder"
) -> CheckpointError:
    """Return an error of a run whose epochs were not planned from the start where such a run is wanted."""
    return CheckpointError(
        f"{folder} holds a run that was extended, and so differs from one of as many epochs from the start; {instead}"
    )


def check_done(folder: Path, record: RunRecord, there: Recipe, recipe: Recipe, pool: DataPool) -> None:
    """Check that a finished run was given what a recipe names.

    Data are opened only where the recipe names another place than the run's recipe.

    Raises:
        CheckpointError: it was given something else, or had fewer epochs at first.
    """
    if record.extended_from:
        raise extended(folder)
    if not record.inputs:
        return
    now = [
        _inputs(stage, pool.open(stage).digest if _places(stage) != _places(before) else given.data)
        for stage, before, given in zip(recipe.chain(), there.chain(), record.inputs, strict=True)
    ]
    if changed := changed_inputs(record.inputs, now):
        raise _changed(folder, changed)


def _places(stage: Recipe) -> list[str | None]:
    given = [getattr(stage, key) for key in DATA_PLACES]
    return [None if place is None else str(Path(place).resolve()) for place in given]


def start_of(stage: Recipe) -> Path | None:
    """Return the folder, or the file, of the weights that a stage names by their place; None where it names none."""
    if stage.initial_checkpoint is not None:
        return Path(stage.initial_checkpoint)
    place = stage.model.removeprefix("local-dir:")
    return None if place == stage.model else Path(place)


@cache
def _sha256(file: Path, size: int, changed: int) -> str:
    """Return the digest of a file, which has a size and a time of change."""
    return hashlib.sha256(file.read_bytes()).hexdigest()
