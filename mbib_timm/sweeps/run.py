"""Many runs in one process, one after another: they share opened data, resident images and the compiled step."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mbib_timm.data import DataPool
from mbib_timm.errors import BusyFolderError, MbibError
from mbib_timm.sweeps.definition import Sweep
from mbib_timm.sweeps.plan import PlannedRun, plan
from mbib_timm.sweeps.results import collect
from mbib_timm.sweeps.table import write_results
from mbib_timm.training import train


def run_sweep(
    sweep: Sweep,
    overrides: Mapping[str, Any],
    results: Path,
    *,
    seeds: Sequence[int] | None = None,
    only: str = "",
    dry_run: bool = False,
) -> bool:
    """Run what is missing of a sweep; write its results after every run, and print its table.

    Several processes may work on one sweep, each on a device of its own: a run that another process trains is left
    to it.

    Args:
        sweep: what to run.
        overrides: of all runs, by address.
        results: folder of all results; the sweep's own is in it, and holds the runs of all seeds that there are.
        seeds: run these in the place of the sweep's own.
        only: run only those whose label contains this.
        dry_run: list the runs, and stop.

    Returns:
        True if every run came to its end.

    Raises:
        MbibError: the sweep cannot be; nothing has been run.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise MbibError("a sweep is one process: start one for each device, with --device, not torchrun")
    chosen = sweep.seeds if seeds is None else seeds
    whole = plan(replace(sweep, seeds=list(dict.fromkeys([*sweep.seeds, *chosen]))), overrides)
    runs = [run for run in whole if only in run.label and run.recipe.seed in chosen]
    if not runs:
        raise MbibError(f"sweep {sweep.name} has no run whose name contains {only!r}")
    states = [run.status() for run in whole]
    done = {run.label for run, state in zip(whole, states, strict=True) if state == "done"}
    if dry_run:
        for run, state in zip(whole, states, strict=True):
            if run in runs:
                print(f"{state:<8} {run.label}")
        return True
    folder = results / Path(whole[0].recipe.output).name
    pool, text = DataPool(), ""
    failed: dict[str, str] = {}
    busy: list[PlannedRun] = []

    def write() -> str:
        # What is done by now, here or by another process: the table is always that of the whole sweep. Again where
        # another process has finished a run while this one drew: its table would be replaced by one without that run.
        content, written = "", 0
        while len(finished := [run for run in whole if run.label in done or run.is_done()]) > written:
            labels = {run.label for run in finished}  # what failed here may have come to its end elsewhere
            left = {label: reason for label, reason in failed.items() if label not in labels}
            content = write_results(folder, collect(sweep, finished, len(whole), left))
            written = len(finished)
        return content

    for number, run in enumerate(runs, start=1):
        print(f"run {number} of {len(runs)}: {run.label}" + (" (done)" if run.label in done else ""), flush=True)
        if run.label in done:
            continue
        try:
            if run.status() != "done":  # another process may have done it meanwhile
                train(run.recipe, run.name, pool)
        except BusyFolderError:
            busy.append(run)
            print("another process trains it", flush=True)
            continue
        except MbibError as error:
            failed[run.label] = str(error)
            print(f"failed: {error}", flush=True)
        text = write()
    if busy or not text:
        text = write()
    if text:
        print(f"\n{text}\n{folder}")
    left = [run.label for run in busy if not run.is_done()]
    for label in left:
        print(f"left to another process: {label}")
    for label, reason in failed.items():
        print(f"failed: {label}: {reason}")
    return not failed and not left
