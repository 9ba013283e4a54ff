"""From a sweep to its runs: every recipe resolved, every folder named."""

import copy
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mbib_timm.errors import MbibError
from mbib_timm.recipe import TYPES, Recipe, find_recipe, load_recipe, recipe_name
from mbib_timm.sweeps.definition import PER_RUN, Sweep
from mbib_timm.training.run_folder import RunFolder


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep.

    Attributes:
        label: name of its folder.
        configuration: the label without the seed: runs of one configuration differ in it alone.
        coordinates: the value of each axis, by the axis's name.
        name: of the recipe, as `recipe_name` has it.
        recipe: resolved, with the folder that it writes to.
        recipe_epochs: epochs that the recipe asks for by itself.
        settings: recipe keys that were set from outside, with values that compute something else; without the epochs.
    """

    label: str
    configuration: str
    coordinates: dict[str, str]
    name: str
    recipe: Recipe
    recipe_epochs: int
    settings: dict[str, Any]

    def folder(self) -> RunFolder:
        """Return the run's folder."""
        return RunFolder(Path(self.recipe.output) / self.label)

    def is_done(self) -> bool:
        """Return whether the run has come to its end."""
        return (self.folder().path / "metrics.json").is_file()

    def status(self) -> str:
        """Return ``done``, ``partial`` or ``missing``. Raises CheckpointError for another recipe's run."""
        folder = self.folder()
        if not self.is_done() and not folder.has_checkpoint():
            return "missing"
        folder.agree(self.recipe)
        return "done" if self.is_done() else "partial"


def on_recipe(sweep: Sweep, recipe: str) -> Sweep:
    """Return a sweep on another base recipe, under a name that says so: ``figure4_weights-mbib_resnet20.digits``.

    An axis that was a part of the old recipe's name and is none of the new one's has to be a recipe key. The paper's
    numbers stay where they are for this recipe.
    """
    recipe = recipe.removesuffix(".yaml") if not Path(recipe).is_file() else recipe
    if recipe == sweep.recipe:
        return sweep
    for axis in sweep.placeholders():
        if f"{{{axis}}}" not in recipe and axis not in TYPES:
            raise MbibError(
                f"sweep {sweep.name} varies the {axis} by the recipe's name: --recipe {recipe!r} needs a place for "
                f"it, as in {sweep.recipe!r}"
            )
    paper = sweep.paper if sweep.paper is not None and sweep.paper.recipe == recipe else None
    parts = re.sub(r"{.*?}_?", "", Path(recipe).stem), Path(recipe).parent.name
    name = f"{sweep.name}-{'.'.join(filter(None, parts))}"
    return replace(sweep, recipe=recipe, name=name, paper=paper)


def plan(sweep: Sweep, overrides: Mapping[str, Any]) -> list[PlannedRun]:
    """Resolve every run of a sweep; all configurations of one seed come before those of the next.

    With other ``epochs`` than its own, a recipe's warm-up and milestones move in proportion. The runs' folder is named
    after the sweep, and with ``-20e`` after epochs that are not the recipes' own: a short sweep never meets a full one.

    Args:
        sweep: what to run.
        overrides: recipe keys of all runs, before the sweep's own.

    Raises:
        MbibError: an unknown recipe, a value that a recipe does not take, or two runs of one name.
    """
    for name in PER_RUN:
        if name in overrides:
            raise MbibError(f"recipe key {name!r} is the sweep's own to set; see --seeds")
    runs = list(_runs(sweep, {**sweep.set, **overrides}))
    labels = [run.label for run in runs]
    for label in labels:
        if labels.count(label) > 1:
            raise MbibError(f"sweep {sweep.name} has two runs of the name {label}")
    epochs = {run.recipe.epochs for run in runs}
    as_asked = all(run.recipe.epochs == run.recipe_epochs for run in runs)
    folder = sweep.name if as_asked or len(epochs) > 1 else f"{sweep.name}-{epochs.pop()}e"
    return [replace(run, recipe=run.recipe.replace(output=str(Path(run.recipe.output) / folder))) for run in runs]


def _runs(sweep: Sweep, overrides: Mapping[str, Any]) -> Iterator[PlannedRun]:
    places = sweep.placeholders()
    for seed in sweep.seeds:
        for point in itertools.product(*(sweep.values(axis) for axis in sweep.axes)):
            coordinates = {axis: value for axis, (value, _) in zip(sweep.axes, point, strict=True)}
            given = sweep.recipe
            for place in places:
                given = given.replace(f"{{{place}}}", coordinates[place])
            path = find_recipe(given)
            own = load_recipe(path)
            settings = dict(overrides)
            for _, keys in point:
                for key, value in keys.items():
                    _put(settings, own, key, value)
            recipe = load_recipe(path, {**_in_proportion(own, settings), **settings})
            name = recipe_name(path)
            values = [f"{a}={_in_a_path(v)}" for a, v in coordinates.items() if a not in places]
            configuration = "-".join([name, *values])
            label = f"{configuration}-seed{seed}"
            placed = recipe.replace(seed=seed, experiment=label, resume="auto")
            before, now = own.computation(), recipe.computation()
            changed = {key: now[key] for key in overrides if key in now and now[key] != before[key] and key != "epochs"}
            yield PlannedRun(label, configuration, coordinates, name, placed, own.epochs, changed)


def _put(settings: dict[str, Any], own: Recipe, key: str, value: Any) -> None:
    """Set a recipe key, or an element of one: ``observation_weights.0``, ``model_kwargs.taps``."""
    name, dot, place = key.partition(".")
    if not dot:
        settings[name] = value
        return
    whole = copy.deepcopy(settings.get(name, getattr(own, name)))
    try:
        whole[int(place) if isinstance(whole, list) else place] = value
    except (TypeError, ValueError, IndexError):
        raise MbibError(f"recipe key {name!r} has no element {place!r}: it is {whole!r}") from None
    settings[name] = whole


def _in_proportion(own: Recipe, settings: Mapping[str, Any]) -> dict[str, Any]:
    epochs = settings.get("epochs", own.epochs)
    if epochs == own.epochs or not isinstance(epochs, int) or epochs < 1:  # the recipe refuses what is no number
        return {}
    share = epochs / own.epochs
    warmup = min(max(1, round(share * own.warmup_epochs)), epochs - 1) if own.warmup_epochs else 0
    return {"warmup_epochs": warmup, "decay_milestones": [max(1, round(share * m)) for m in own.decay_milestones]}


def _in_a_path(value: str) -> str:
    """Return a value as part of a folder's name."""
    return "_".join(value.replace("/", "_").split())
