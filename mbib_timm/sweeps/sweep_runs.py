"""The training of a sweep: its runs one after another, or several at once, and the results after each.

The runs of a process share opened data, resident images and the compiled step.
"""

import contextlib
import glob
import os
import re
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mbib_timm.data import DataPool
from mbib_timm.errors import BusyFolderError, CheckpointError, LostDeviceError, MbibError, few, first_line
from mbib_timm.files import check_folder, counted, printable_lines
from mbib_timm.models.zoo import data_set_of
from mbib_timm.recipe.plugins import load_plugin
from mbib_timm.results.record import RECORD, is_averaged, read_history, read_record
from mbib_timm.results.redact import redact_record, redact_text
from mbib_timm.sweeps.show_sweep import write_results
from mbib_timm.sweeps.side_by_side import Outcome, Task, side_by_side
from mbib_timm.sweeps.sweep import UNNAMED, Sweep
from mbib_timm.sweeps.sweep_plan import PlannedRun, in_a_path, plan
from mbib_timm.sweeps.sweep_results import FILE, Curve, SweepResults, SweepRun, read_results
from mbib_timm.training import train
from mbib_timm.training.setup import require_fit


def trainer() -> Task[PlannedRun]:
    """Return what trains one run after another in this process."""
    pool = DataPool()

    def train_missing(run: PlannedRun) -> Outcome:
        for stage in run.recipe.chain():
            for plugin in stage.plugin:  # a recipe that has come from another process
                load_plugin(plugin)
        try:
            if run.status(pool) != "done":  # another process may have done it by now
                train(run.recipe, run.name, pool, resume_asked=False)  # all are resumed, whether begun or not
        except BusyFolderError:
            return Outcome(busy=True)
        except LostDeviceError as error:
            return Outcome(failed=str(error), lost=True)
        except MbibError as error:
            return Outcome(failed=str(error))
        return Outcome()

    return train_missing


def _one_after_another(
    runs: Sequence[tuple[int, PlannedRun]], announce: Callable[[int, PlannedRun], None]
) -> Generator[tuple[PlannedRun, Outcome], None, None]:
    """Yield runs and how they ended, trained in this process; see `side_by_side`."""
    train_missing = trainer()
    for number, run in runs:
        announce(number, run)
        try:
            outcome = train_missing(run)
        except Exception as error:  # whatever a plugin does wrong: the other runs may be of others
            traceback.print_exc()
            outcome = Outcome(failed=f"{type(error).__name__}: {first_line(error)}")
        yield run, outcome


def run_sweep(
    sweep: Sweep,
    overrides: Mapping[str, Any],
    results: Path,
    *,
    seeds: Sequence[int] | None = None,
    only: Sequence[str] = ("",),
    jobs: int = 1,
    dry_run: bool = False,
) -> bool:
    """Run what is missing of a sweep; write its results after every run, and print its table.

    Several processes may work on one sweep, each on a device of its own: a run that another process trains is left
    to it.

    Args:
        sweep: what to run.
        overrides: of all runs, by address.
        results: folder of all results; the sweep's own is in it, and holds the runs of all seeds that there are. Runs
            whose folders are gone keep their rows there until they have been trained again.
        seeds: run these in the place of the sweep's own.
        only: run only those whose label contains one of these, in which spaces are as good as underscores.
        jobs: runs that are trained at once, in processes of their own when more than one.
        dry_run: list the runs, and stop.

    Returns:
        True if every run came to its end.

    Raises:
        MbibError: the sweep cannot be, or a method does not fit its network; nothing has been run.
        LostDeviceError: the device has failed; the same command goes on with the rest.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise MbibError("a sweep runs in one process: start one per device with --device, without torchrun")
    chosen = sweep.seeds if seeds is None else seeds
    asked = list(dict.fromkeys([*([] if sweep.of_recipes else sweep.seeds), *chosen]))
    whole = plan(replace(sweep, seeds=asked), overrides)
    folder = results / Path(whole[0].recipe.output).name
    found = read_results(folder).runs if (folder / FILE).is_file() else []
    further = sorted(_finished_seeds(whole, found) - set(asked))
    if further:
        whole = plan(replace(sweep, seeds=[*asked, *further]), overrides)
    of_seeds = [run for run in whole if run.recipe.seed in chosen]
    for part in only:
        if not any(in_a_path(part) in run.label for run in of_seeds):
            there = few([run.label for run in of_seeds])
            raise MbibError(f"sweep {sweep.name} has no run whose name contains {part!r}; its runs: {there}")
    runs = [run for run in of_seeds if any(in_a_path(part) in run.label for part in only)]
    pool = DataPool()
    states = _states(whole, pool)
    done = {run.label for run, state in zip(whole, states, strict=True) if state == "done"}
    _require_fit([run for run in runs if run.label not in done])
    if dry_run:
        for run, state in zip(whole, states, strict=True):
            if run in runs:
                print(f"{state:<8} {run.label}")
        return True
    check_folder(folder)
    if sweep.of_recipes and sweep.name == UNNAMED:
        labels = {run.label for run in whole}
        found = [run for run in found if run.label in labels]
    _require_room(folder, found, whole)
    kept = {run.label: run for run in found}
    text = ""
    failed: dict[str, str] = {}
    busy: list[PlannedRun] = []

    def write() -> str:
        # What is done by now, here or by another process: the table is always that of the whole sweep. Again where
        # another process has finished a run while this one drew: its table would be replaced by one without that run.
        content, written = "", 0
        while len(finished := [run for run in whole if run.label in done or run.is_done()]) > written:
            labels = {run.label for run in finished}  # what failed here may have come to its end elsewhere
            left = {label: reason for label, reason in failed.items() if label not in labels}
            by_label = kept | {run.label: _sweep_run(run) for run in finished}
            rows = [by_label[run.label] for run in whole if run.label in by_label]
            content = write_results(folder, _collect(sweep, folder.name, rows, len(whole), left))
            written = len(finished)
        return content

    def announce(number: int, run: PlannedRun, state: str = "") -> None:
        print(f"run {number} of {len(runs)}: {run.label}{state}", flush=True)

    missing = []
    for number, run in enumerate(runs, start=1):
        if run.label in done:
            announce(number, run, " (done)")
        else:
            missing.append((number, run))
    trained = _one_after_another(missing, announce) if jobs == 1 else side_by_side(trainer, missing, jobs, announce)
    with contextlib.closing(trained):  # whatever ends this ends the processes too
        for run, outcome in trained:
            of_several = f"{run.label}: " if jobs > 1 else ""
            if outcome.busy:
                busy.append(run)
                print(f"{of_several}another process is training it", flush=True)
                continue
            if outcome.lost and jobs == 1:  # this process cannot use its device for another run
                write()
                raise LostDeviceError(str(outcome.failed))
            if outcome.failed is not None:
                failed[run.label] = outcome.failed
                print(f"{of_several}failed: {printable_lines(outcome.failed)}", flush=True)
            text = write()
    if busy or not text:
        text = write()
    if text:
        print(f"\n{text}\n{folder}")
    left = [run.label for run in busy if not run.is_done()]
    for label in left:
        print(f"left to another process: {label}")
    for label, reason in failed.items():
        print(f"failed: {label}: {printable_lines(reason)}")
    return not failed and not left


def _finished_seeds(runs: Sequence[PlannedRun], found: Sequence[SweepRun]) -> set[int]:
    """Return the seeds of which there are finished runs of some configurations, in folders or in kept results."""
    outputs = {run.configuration: Path(run.recipe.output) for run in runs}
    seeds = {run.seed for run in found if run.configuration in outputs}
    for configuration, output in outputs.items():
        for record in output.glob(f"{glob.escape(configuration)}-seed*/{RECORD}"):
            seed = record.parent.name.removeprefix(f"{configuration}-seed")
            seeds |= {int(seed)} if re.fullmatch(r"0|[1-9]\d*", seed, re.ASCII) else set()
    return seeds


def _states(runs: Sequence[PlannedRun], pool: DataPool) -> list[str]:
    """Return each run's status; raise CheckpointError of the first that cannot go on, with the others' names."""
    states: list[str] = []
    failed: dict[str, CheckpointError] = {}
    for run in runs:
        try:
            states.append(run.status(pool))
        except CheckpointError as error:
            failed[run.label] = error
    if failed:
        first, *others = failed
        more = f"; {counted(len(others), 'more run')} cannot go on either: {few(others)}" if others else ""
        raise CheckpointError(f"{failed[first]}{more}")
    return states


def _require_fit(runs: Sequence[PlannedRun]) -> None:
    """Raise MbibError where a method does not fit its network: before the first run, and not hours later."""
    stages = [(run.configuration, stage) for run in runs for stage in run.recipe.chain()]
    pairs = {repr((stage.model, stage.model_kwargs, stage.method)): (name, stage) for name, stage in stages}
    for name, stage in pairs.values():
        try:
            require_fit(stage)
        except MbibError as error:
            raise MbibError(f"{name}: {error}") from None


def _require_room(folder: Path, found: Sequence[SweepRun], whole: Sequence[PlannedRun]) -> None:
    """Raise MbibError where a sweep's results, written into a folder, would replace those of another."""
    planned = {run.label: run for run in whole}
    lost = [run.label for run in found if run.label not in planned or not planned[run.label].computed(run)]
    if lost:
        raise MbibError(
            f"{folder} holds results of another sweep, which this one would replace ({few(lost, 2)}); choose another "
            "--name, or remove the folder"
        )


def _collect(sweep: Sweep, name: str, runs: list[SweepRun], planned: int, failed: Mapping[str, str]) -> SweepResults:
    """Return what a sweep has found: its finished runs, in the order of the plan, and why others did not finish."""
    paper = sweep.paper
    return SweepResults(
        name=name,
        title=sweep.title,
        recipe=redact_text(sweep.recipe),
        axes={axis: [value.name for value in sweep.values(axis)] for axis in sweep.axes},
        labels={axis: sweep.label(axis) for axis in sweep.axes},
        heads=sweep.heads,
        figure=sweep.figure,
        paper=None if paper is None else replace(paper, recipe=redact_text(paper.recipe or sweep.recipe)),
        planned=planned,
        runs=runs,
        failed={label: redact_text(reason) for label, reason in failed.items()},
    )


def _sweep_run(planned: PlannedRun) -> SweepRun:
    """Return what a sweep keeps of a finished run."""
    folder = planned.folder().path
    record, history = redact_record(read_record(folder)), read_history(folder)
    same_data = data_set_of(record.name, record.class_counts, record.class_names) is not None
    settings = dict(planned.settings)
    if same_data and settings.get("dataset") == "folder":
        del settings["dataset"]
    return SweepRun(
        label=planned.label,
        configuration=planned.configuration,
        coordinates=planned.coordinates,
        seed=record.seed,
        method=record.method,
        stages=record.stages,
        chosen=record.chosen,
        epochs=planned.epochs,
        recipe_epochs=planned.recipe_epochs,
        settings=settings,
        dataset=record.dataset,
        images=record.result.prediction.images,
        split=record.result.split,
        heads={head: metrics.accuracies() for head, metrics in record.result.heads.items()},
        curve=Curve(
            epoch=[row.epoch for row in history],
            train_loss=[float(f"{row.losses['loss']:.5g}") for row in history],
            val_top1=[None if row.val is None else row.val["top1"] for row in history],
        ),
        training_seconds=round(record.training_seconds, 1),
        environment=record.environment,
        origin=record.origin,
        computation=planned.computation,
        stage_epochs=[stage.epochs for stage in planned.recipe.chain()],
        chosen_on=record.chosen_on,
        averaged=is_averaged(history),
    )
