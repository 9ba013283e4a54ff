"""What a recipe names by its place: data, weights of models, class weights, code of plugins. Runs are the same where
these are."""

import hashlib
import importlib.util
import tokenize
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from mbib_timm.data import DataPool
from mbib_timm.errors import CheckpointError, MbibError
from mbib_timm.models.weights import WEIGHTS_FILES
from mbib_timm.recipe import DATA_PLACES, Recipe
from mbib_timm.recipe.checks import parse_class_weights
from mbib_timm.results.record import Inputs, RunRecord

# What a plugin's code may differ in.
NO_CODE = (tokenize.COMMENT, tokenize.NL)


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
    teachers = [_digest(Path(place)) for place in stage.method.get("teacher", ())]
    return Inputs(
        data,
        None if start is None else _digest(start),
        {Path(each).name: code_of(each) for each in stage.plugin},
        _digest(Path(stage.class_weights)) if kind == "file" else None,
        [digest for digest in teachers if digest is not None],
    )


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


def check_done(folder: Path, record: RunRecord, there: Recipe, recipe: Recipe, pool: DataPool) -> None:
    """Check that a finished run was given what a recipe names.

    Data are opened only where the recipe names another place than the run's recipe.

    Raises:
        CheckpointError: it was given something else.
    """
    if not record.inputs:
        return
    now = [
        _inputs(stage, pool.open(stage).digest if _places(stage) != _places(before) else given.data)
        for stage, before, given in zip(recipe.chain(), there.chain(), record.inputs, strict=True)
    ]
    if changed := changed_inputs(record.inputs, now):
        raise CheckpointError(
            f"{folder} holds a run from before {', '.join(changed)} changed; choose another --name for the sweep, or "
            "remove the folder"
        )


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


def code_of(plugin: str) -> str:
    """Return a digest of a plugin's code, without comments and blank lines; what it imports is not looked at.

    Args:
        plugin: as recipes have it: the path of a file, or the name of a module.
    """
    path = Path(plugin)
    if path.suffix != ".py":
        spec = importlib.util.find_spec(plugin)
        path = Path((spec.origin if spec else None) or "")
    try:
        with path.open("rb") as file:
            tokens = [token.string for token in tokenize.tokenize(file.readline) if token.type not in NO_CODE]
    except (OSError, SyntaxError, ValueError, tokenize.TokenError) as error:
        raise MbibError(f"plugin {plugin} cannot be read: {error}") from None
    return hashlib.sha256("\0".join(tokens).encode()).hexdigest()
