"""The runs of a sweep: every recipe resolved, every folder named, and what is done of each."""

import hashlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mbib_timm.data import DataPool
from mbib_timm.errors import CheckpointError, MbibError, shown
from mbib_timm.files import printable
from mbib_timm.models.origin import starts_from_weights
from mbib_timm.options import default_of
from mbib_timm.recipe import (
    COMPUTING,
    KEYS,
    STAGES,
    Recipe,
    check_given,
    find_recipe,
    in_proportion,
    load_recipe,
    longest_epochs,
    read_recipe,
    recipe_name,
)
from mbib_timm.results.record import Inputs, is_finished, read_record
from mbib_timm.sweeps.sweep import PER_RUN, Sweep, key_of
from mbib_timm.sweeps.sweep_results import SweepRun
from mbib_timm.training.provenance import check_begun, check_done, code_of_stage, extended, inputs_in
from mbib_timm.training.run import TrainState
from mbib_timm.training.run_folder import RunFolder

# Runs that a sweep may have; and the bytes of the name of a run's folder.
MOST_RUNS, LONGEST_LABEL = 1000, 240


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep.

    Attributes:
        label: name of its folder.
        configuration: the label without the seed: runs of one configuration differ in it alone.
        coordinates: the value of each axis, by the axis's name.
        name: of the recipe, as `recipe_name` has it.
        recipe: resolved, with the folder that it writes to.
        recipe_epochs: epochs that the sweep or its recipe asks for by itself, of the longest stage.
        settings: what was set from outside and computes something else, by address; without the epochs.
    """

    label: str
    configuration: str
    coordinates: dict[str, str]
    name: str
    recipe: Recipe
    recipe_epochs: int
    settings: dict[str, Any]

    @property
    def epochs(self) -> int:
        """Epochs of the longest stage."""
        return longest_epochs(self.recipe)

    def folder(self) -> RunFolder:
        """Return the run's folder."""
        return RunFolder(Path(self.recipe.output) / self.label)

    @property
    def computation(self) -> str:
        """Digest of all that decides what is computed, where it is no default; the inputs are not in it."""
        given = [
            {name: value for name in COMPUTING if (value := getattr(stage, name)) != default_of(KEYS[name])}
            for stage in self.recipe.chain()
        ]
        return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:16]

    def computed(self, run: SweepRun) -> bool:
        """Return whether a run of kept results is this one, as far as they say."""
        return run.computation in ("", self.computation)

    def is_done(self) -> bool:
        """Return whether the run has come to its end."""
        return is_finished(self.folder().path)

    def status(self, pool: DataPool) -> str:
        """Return ``done``, ``partial`` or ``missing``.

        Args:
            pool: opens the recipe's data, where they lie in another place than the run's.

        Raises:
            CheckpointError: another recipe's run, or one of other data, another start, other code or fewer epochs at
                first.
            BusyFolderError: so it is, and another process trains there.
        """
        folder = self.folder()
        if self.is_done():
            folder.agree(self.recipe, instead="--name")
            check_done(folder.path, read_record(folder.path), folder.recipe(self.recipe.plugin), self.recipe, pool)
            return "done"
        stages = [RunFolder(path) for path in folder.path.glob("stage*-*")]
        if folder.has_checkpoint():
            folder.agree(self.recipe, instead="--name")
        has_code = any(map(code_of_stage, self.recipe.chain()))
        for place in (folder, *stages) if has_code else (folder,):
            reached, given = _begun(place)
            try:
                check_begun(place.path, given, self.recipe)
                if place is folder and len(reached.ends_with(self.recipe.epochs)) > 1:
                    raise extended(place.path)
            except CheckpointError:
                place.require_idle()  # as `agree` does
                raise
        return "partial" if stages or folder.has_checkpoint() else "missing"


def _begun(folder: RunFolder) -> tuple[TrainState, list[Inputs]]:
    """Return how far a run has come that goes on, or a stage, and what it was given; nothing where nothing says so: it
    begins, or fails by itself."""
    if is_finished(folder.path):
        return TrainState(), read_record(folder.path).inputs  # in a moment, where a checkpoint takes its time
    if not folder.has_checkpoint():
        return TrainState(), []
    try:
        state = folder.newest(lambda text: None)
        reached = TrainState.of(state)
        return reached, inputs_in(state) if reached.has_trained else []
    except (CheckpointError, ValueError):
        return TrainState(), []


def on_recipe(sweep: Sweep, recipe: str) -> Sweep:
    """Return a sweep on another base recipe, under a name that says so: ``figure4_weights-mbib_resnet20.digits``.

    An axis that was a part of the old recipe's name and is none of the new one's has to be a recipe key, with a list of
    values. The paper's numbers stay where they are for this recipe.
    """
    recipe = recipe.removesuffix(".yaml") if not Path(recipe).is_file() else recipe
    if recipe == sweep.recipe:
        return sweep
    for axis in sweep.placeholders():
        # A method is no such key: with it the recipe names the model.
        is_key = axis in KEYS and axis != "method" and not isinstance(sweep.axes[axis], Mapping)
        if f"{{{axis}}}" not in recipe and not is_key:
            raise MbibError(
                f"sweep {sweep.name} varies the {axis} by the recipe's name: --recipe {recipe!r} needs a place for "
                f"it, as in {sweep.recipe!r}"
            )
    paper = sweep.paper if sweep.paper is not None and sweep.paper.recipe == recipe else None
    folder, _, named = (recipe_name(Path(recipe)) if Path(recipe).is_file() else recipe).rpartition("/")
    fixed = re.sub(r"{.*?}_?", "", f"{named}.{folder}").strip(".")
    return replace(sweep, recipe=recipe, name=f"{sweep.name}-{fixed}", paper=paper)


def plan(sweep: Sweep, overrides: Mapping[str, Any]) -> list[PlannedRun]:
    """Resolve every run of a sweep; all configurations of one seed come before those of the next.

    With other ``epochs`` than its own, a recipe's warm-up and milestones move in proportion. The runs' folder is named
    after the sweep, and with ``-20e`` after epochs that are not the recipes' own: a short sweep never meets a full one.

    Args:
        sweep: what to run.
        overrides: of all runs, by address; the sweep's axes come after them.

    Raises:
        MbibError: an unknown recipe, a value that a recipe does not take, an override that an axis sets in every run,
            or two runs of one name.
    """
    for address in overrides:
        if key_of(address) in PER_RUN:
            raise MbibError(f"recipe key {address!r} is set by the sweep itself; see --seeds")
        for axis in sweep.axes:
            if all(address in value.settings for value in sweep.values(axis)):
                raise MbibError(
                    f"recipe key {address!r} has no effect: every value of axis {axis!r} of sweep {sweep.name} sets it"
                )
    number = len(sweep.seeds) * math.prod(len(values) for values in sweep.axes.values())
    if number > MOST_RUNS:
        raise MbibError(
            f"sweep {sweep.name} has {number:,} runs; expected at most {MOST_RUNS:,}: fewer values, axes or seeds"
        )
    runs = list(_runs(sweep, {**sweep.set, **overrides}))
    check_given((run.recipe for run in runs), overrides)
    for label, times in Counter(run.label for run in runs).items():
        if times > 1:
            raise MbibError(f"sweep {sweep.name} has two runs named {label}")
        if len(label.encode()) > LONGEST_LABEL:
            raise MbibError(
                f"sweep {sweep.name}: {shown(label)} is too long for a folder's name; give the values of its axes "
                "names: axis: {name: {key: value}}"
            )
    with_start = [run for run in runs if starts_from_weights(run.recipe)]
    if 0 < len(with_start) < len(runs):
        scratch = next(run for run in runs if run not in with_start)
        raise MbibError(
            f"sweep {sweep.name}: {with_start[0].label} starts from trained weights and {scratch.label} from scratch, "
            "and results of the two never share a table; run a sweep of each"
        )
    epochs = {run.epochs for run in runs}
    as_asked = all(run.epochs == run.recipe_epochs for run in runs)
    folder = sweep.name if as_asked or len(epochs) > 1 else f"{sweep.name}-{epochs.pop()}e"
    return [replace(run, recipe=run.recipe.everywhere(output=str(Path(run.recipe.output) / folder))) for run in runs]


def _runs(sweep: Sweep, overrides: Mapping[str, Any]) -> Iterator[PlannedRun]:
    places = sweep.placeholders()
    for seed in sweep.seeds:
        for point in itertools.product(*(sweep.values(axis) for axis in sweep.axes)):
            by_axis = dict(zip(sweep.axes, point, strict=True))
            path = find_recipe(sweep.recipe_at(by_axis))
            of_axes = {address: value for each in point for address, value in each.settings.items()}
            given_all = {**overrides, **of_axes}
            own = load_recipe(path, {STAGES: given_all[STAGES]} if STAGES in given_all else {})
            recipe = load_recipe(path, _with_epochs(path, own, given_all))
            name = recipe_name(path)
            values = [f"{axis}={in_a_path(each.name)}" for axis, each in by_axis.items() if axis not in places]
            configuration = "-".join([name, *values])
            label = f"{configuration}-seed{seed}"
            yield PlannedRun(
                label,
                configuration,
                {axis: each.name for axis, each in by_axis.items()},
                name,
                recipe.everywhere(seed=seed, resume="auto").replace(experiment=label),
                longest_epochs(recipe) if "epochs" in of_axes else sweep.set.get("epochs", longest_epochs(own)),
                _changed(own, recipe, {address: overrides[address] for address in overrides if address not in of_axes}),
            )


def _with_epochs(path: Path, own: Recipe, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings whose ``epochs`` are those of the longest stage; warm-up and milestones move in proportion.

    What is set for all stages holds for those that do not set it themselves.
    """
    epochs = settings.get("epochs")
    if not isinstance(epochs, int) or epochs < 1:  # none; or none that a recipe takes, which it says
        return dict(settings)
    rest = {address: value for address, value in settings.items() if address != "epochs"}
    stages = settings.get(STAGES, read_recipe(path).get(STAGES, []))

    def is_given(address: str) -> bool:
        stage, dot, key = address.partition(".")
        return bool(dot) and key in rest and key not in stages[int(stage.removeprefix("stage")) - 1]

    scaled = {address: value for address, value in in_proportion(own, epochs).items() if not is_given(address)}
    return {**scaled, **rest}


def _changed(own: Recipe, recipe: Recipe, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the settings by which a recipe computes something else than by itself; without the epochs."""
    changed = {}
    for address, given in settings.items():
        if address == STAGES:  # as the recipe itself has them not
            changed[address] = given
            continue
        stages = zip(own.chain(), recipe.chain(), strict=True)
        differ = any(_at(before, address) != _at(now, address) for before, now in stages)
        if differ and key_of(address) != "epochs" and key_of(address) in COMPUTING:
            changed[address] = given
    return changed


def _at(stage: Recipe, address: str) -> Any:
    """Return what a stage has at an address; None where it has no such element."""
    key, *rest = re.sub(r"^stage\d+\.", "", address).split(".")
    value = getattr(stage, key)
    for part in rest:
        elements = dict(enumerate(value)) if isinstance(value, list) else value or {}
        value = elements.get(int(part) if isinstance(value, list) else part)
    return value


def in_a_path(value: str) -> str:
    """Return a value as part of a folder's name."""
    return printable("_".join(value.replace("/", "_").split()))
