"""A run of one stage or several: each stage is a run of its own, and starts from the weights of the one before."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mbib_timm.data import DataPool
from mbib_timm.environment import World, describe_environment, joined_world
from mbib_timm.errors import CheckpointError, MbibError
from mbib_timm.files import counted
from mbib_timm.methods import METHODS
from mbib_timm.methods.method_checks import name_error_in
from mbib_timm.recipe import Recipe
from mbib_timm.results.record import RECORD, Epoch, Inputs, is_finished, read_record, write_record
from mbib_timm.results.run_figures import draw_figures
from mbib_timm.results.run_text import print_report
from mbib_timm.results.runs import FinishedRun
from mbib_timm.training.checkpoint import load_checkpoint
from mbib_timm.training.provenance import extended, inputs_of
from mbib_timm.training.run import Run, TrainState
from mbib_timm.training.run_folder import WEIGHTS, RunFolder, place_of, same_computation
from mbib_timm.training.setup import require_named, set_up


def train(
    recipe: Recipe,
    name: str,
    pool: DataPool | None = None,
    epochs_asked: bool = True,
    resume_asked: bool = True,
) -> FinishedRun:
    """Train a recipe to the end, stage by stage, and write its results.

    A stage before the last is trained in a folder inside the run's, unless a finished run beside it has computed the
    same of the same data, start and plugins: then its weights are taken.

    A run that is resumed may have other epochs than before, at least those that it has done. From the next epoch on
    everything is as in a run of that many: learning rate, sampler, mixing. What was done before stays as it was, so the
    result is not that of a run which had as many from the start, and no stage or sweep takes it for such a one. Of
    several stages only the last may be extended.

    Args:
        recipe: what to train.
        name: name of the run, and of its folder unless the recipe names another.
        pool: holds opened data and resident images for the next run of this process.
        epochs_asked: somebody asks for the recipe's epochs; a run of others that is there is not extended without.
        resume_asked: somebody asks to resume, where the recipe does, and is told if there is nothing to resume.

    Returns:
        The run, with the record of its last stage.

    Raises:
        MbibError: the recipe, the data or the output folder do not allow the run; nothing is written.
        NonFiniteLossError: training diverged; the last good checkpoint is kept.
        LostProcessError: another process of the run has ended.
        LostDeviceError: the device has failed; the last good checkpoint is kept.
    """
    with joined_world(recipe.device, "; continue with --resume auto") as world:
        says_new = recipe.resume == "auto" and resume_asked
        pool = pool or DataPool()
        if recipe.previous is not None:
            with tempfile.TemporaryDirectory() as folder:
                _check_stages(recipe, pool, world, Path(folder))
        return _train(recipe, name, world, pool, epochs_asked=epochs_asked, says_new=says_new)


def _check_stages(recipe: Recipe, pool: DataPool, world: World, folder: Path) -> None:
    """Raise MbibError for what would stop a later stage, before the first begins.

    Each stage finds the one before it as it will in the run, a folder with a model, but its weights are untrained.

    Args:
        folder: an empty one, for these.
    """
    previous: Path | None = None
    before: Recipe | None = None
    for stage in recipe.chain():
        require_named(stage)
        splits = pool.open(stage)
        with _places_of_names(stage):
            setup = set_up(stage.replace_previous(before), splits, world, previous, pool)
        before = setup.recipe
        if stage is not recipe:
            previous = folder / f"stage {stage.stage + 1}"
            previous.mkdir()
            setup.write_result(RunFolder(previous), splits, previous.name)


def _train(
    recipe: Recipe,
    name: str,
    world: World,
    pool: DataPool,
    whole: Path | None = None,
    epochs_asked: bool = True,
    says_new: bool = False,
) -> FinishedRun:
    """Train a run, or a stage of one whose whole is in another folder, which holds all its stages.

    A run may be extended, to epochs that are asked for; such a stage may not. `says_new`: say so where there is nothing
    to resume.
    """
    recipe, folder, state = _find_folder(recipe, name, world, extend=whole is None)
    said = ""
    if state is not None:
        reached = TrainState.of(state)
        said = _check_epochs(recipe, folder, reached, epochs_asked) or _reached(folder, reached, recipe.epochs)
    elif says_new and not any(folder.path.glob("stage*-*")):
        said = f"nothing to resume in {folder.path}: starting"
    if said and world.is_main:
        print(said, flush=True)
    previous = None
    if recipe.previous is not None:
        previous = _previous(recipe, whole or folder.path, world, pool)
        recipe = recipe.replace_previous(recipe.previous.with_choices_of(RunFolder(previous).recipe(recipe.plugin)))
    if previous is not None and world.is_main:
        print(f"stage {recipe.stage + 1}: {_described(recipe)}, from {previous}", flush=True)

    def execute() -> tuple[FinishedRun, list[Epoch]]:
        with _places_of_names(recipe):
            run = Run(recipe, name, world, folder, state, pool, previous)
            return FinishedRun(folder.path, run.execute(), run.recipe), run.done.history

    try:
        # What is there must not be taken for a run that has stopped, while data are opened and images decoded.
        if world.is_main and (state is not None or any(folder.path.glob("stage*-*"))):
            folder.occupy()
        finished, history = execute()
        # The model, its graphs and the checkpoint are gone by now: exceptions that matplotlib's parser keeps hold the
        # frames that called it, and whatever runs next in this process needs the memory of what is in them.
        state = None
        if world.is_main:
            draw_figures(folder.path, history, finished.record)
            write_record(folder.path, finished.record)  # last: with it the run is finished
            print_report(folder.path, finished.record)
    finally:
        folder.end()
    world.gather([])  # the next stage, or the caller, reads in every process what the first one has written
    return finished


@contextmanager
def _places_of_names(stage: Recipe) -> Iterator[None]:
    """Say in which line of a plugin a stage's method uses a name that nothing defines, which is all that it takes."""
    try:
        yield
    except NameError as error:
        if (said := name_error_in(METHODS[stage.method["name"]], error)) is None:
            raise
        raise MbibError(f"method {stage.method['name']!r}: {said}") from None


def _described(stage: Recipe) -> str:
    return f"{stage.method['name']}, {counted(stage.epochs, 'epoch')}" if stage.epochs else str(stage.method["name"])


def _previous(recipe: Recipe, path: Path, world: World, pool: DataPool) -> Path:
    """Return the folder of the finished stage before, trained now in the run's if there is none."""
    wanted = recipe.previous
    assert wanted is not None
    number = wanted.stage + 1
    own = path / f"stage{number}-{wanted.method['name']}"
    given = inputs_of(wanted, pool)
    found = [str(folder) for folder in _finished(wanted, given, world.world_size, path, own)] if world.is_main else []
    found = world.gather(found[:1])
    if found:
        if world.is_main:
            print(f"stage {number}: {_described(wanted)}: done, in {found[0]}", flush=True)
        return Path(found[0])
    if world.is_main:
        print(f"stage {number}: {_described(wanted)}", flush=True)
    wanted = wanted.everywhere(output=str(own.parent), resume="auto").replace(experiment=own.name)
    _train(wanted, own.name, world, pool, whole=path)
    return own


def _finished(wanted: Recipe, given: list[Inputs], processes: int, path: Path, own: Path) -> Iterator[Path]:
    """Yield the folders of finished runs that have computed the same of the same inputs, the run's own first.

    By as many processes: with their number the batch of an update changes.
    """
    beside = sorted(path.parent.glob(f"*/{RECORD}")) + sorted(path.parent.glob(f"*/stage*-*/{RECORD}"))
    for folder in (own, *(file.parent for file in beside)):
        if not is_finished(folder) or not (folder / WEIGHTS).is_file():
            continue
        try:
            there, record = RunFolder(folder).recipe(wanted.plugin), read_record(folder)
            is_whole = record.epochs == there.epochs and not record.extended_from
            is_alike = record.inputs == given and record.environment.processes == processes
            if same_computation(wanted, there) and is_whole and is_alike:
                yield folder
        except MbibError:  # another program's folder, or a run of a plugin that is not here
            continue


def _find_folder(
    recipe: Recipe, name: str, world: World, extend: bool
) -> tuple[Recipe, RunFolder, dict[str, Any] | None]:
    """Return the recipe, the run's folder and the state to resume from, or None to start from the beginning.

    A run that is resumed keeps the loader and the precision that it chose when it started; with `extend` it may have
    other epochs.
    """
    folder = RunFolder(place_of(recipe.output, name if recipe.experiment is None else recipe.experiment))
    checkpoint = None
    if recipe.resume not in (None, "auto"):
        path = Path(str(recipe.resume))
        if not path.exists():
            raise CheckpointError(f"nothing to resume at {path}; --resume auto looks in {folder.path}")
        checkpoint = path if path.is_file() else None
        folder = RunFolder(path.parent if path.is_file() else path)
    if recipe.resume is None:
        if world.is_main:
            folder.require_free()
        return recipe, folder, None
    if world.is_main:
        folder.require_idle()  # before anything is said of what is resumed, or that nothing is
    if not folder.has_checkpoint():
        if recipe.resume != "auto" and not any(folder.path.glob("stage*-*")):
            raise CheckpointError(f"nothing to resume in {folder.path}: it holds no checkpoint")
        return recipe, folder, None
    recipe = folder.agree(recipe, extend)
    warn: Callable[[str], None] = print if world.is_main else lambda text: None
    state = load_checkpoint(checkpoint) if checkpoint else folder.newest(warn)
    if conditions := folder.changed_conditions(describe_environment(world), recipe.amp):
        warn(conditions)
    if not extend and len(TrainState.of(state).ends_with(recipe.epochs)) > 1:
        raise extended(folder.path, "remove the folder, and the stage is trained again")
    return recipe, folder, state


def _reached(folder: RunFolder, reached: TrainState, epochs: int) -> str:
    """Return a line on where a run goes on; empty for one that trains nothing."""
    if epochs == 0:
        return ""
    where = f"after epoch {reached.epoch}" if reached.epoch else "before epoch 1"
    if reached.part is not None:
        where = f"within epoch {reached.epoch + 1}"
    return f"resumed from {folder.path} {where} of {epochs}"


def _check_epochs(recipe: Recipe, folder: RunFolder, reached: TrainState, epochs_asked: bool) -> str:
    """Return a line on a run that goes on for other epochs than it has had until now; empty for the same.

    Raises:
        CheckpointError: it has begun more of them, is within one, or nobody asks for others.
    """
    before = folder.recipe(recipe.plugin).epochs
    done = reached.epoch + (reached.part is not None)  # those that have begun
    if done > recipe.epochs:
        raise CheckpointError(
            f"{folder.path} has begun {counted(done, 'epoch')}, more than the {recipe.epochs} asked for: expected at "
            f"least {done}, or another folder (--experiment)"
        )
    if before == recipe.epochs:
        return ""
    if reached.part is not None:
        raise CheckpointError(
            f"{folder.path} was stopped within epoch {done}, whose schedule is that of {before} epochs: continue "
            f"with --epochs {before} until that epoch has ended, or choose another folder (--experiment)"
        )
    if not epochs_asked:
        flag = "--epochs" if recipe.previous is None else f"--stage{recipe.stage + 1}.epochs"
        raise CheckpointError(
            f"{folder.path} holds a run of {before} epochs, and the recipe has {recipe.epochs}: give {flag} "
            f"{recipe.epochs} to train on, or {flag} {before} to keep to the run's"
        )
    schedule = f"epoch {done + 1} and later follow the schedule of {recipe.epochs}"
    return f"{folder.path}: from {before} to {recipe.epochs} epochs; {schedule}"
