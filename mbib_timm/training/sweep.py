"""Many runs in one process, one after another: they share opened data, resident images and the compiled step."""

import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mbib_timm.data import DataPool
from mbib_timm.errors import MbibError, unknown_name
from mbib_timm.recipe import TYPES, Recipe, find_recipe, load_recipe, recipe_name, recipes_folder
from mbib_timm.training.run import train
from mbib_timm.training.run_folder import RunFolder
from mbib_timm.training.sweep_summary import write_summary

PER_RUN = ("seed", "experiment", "resume")


@dataclass(frozen=True)
class Sweep:
    """What to run: every recipe with every combination of the axes' values and every seed.

    Attributes:
        name: of the sweep's folder.
        recipes: names of recipes, or recipe files.
        axes: values to try, by recipe key.
        seeds: a run each.
        set: recipe keys of all runs.
    """

    name: str
    recipes: list[str]
    axes: dict[str, list[Any]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    set: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for kind, keys in (("axis", self.axes), ("key in set", self.set)):
            for name in keys:
                if name not in TYPES:
                    raise unknown_name(f"{kind} of sweep {self.name}", name, TYPES)
                if name in PER_RUN:
                    raise MbibError(f"sweep {self.name}: recipe key {name!r} is the sweep's own to set; see --seeds")
        for name, values in self.axes.items():
            if not isinstance(values, list) or not values:
                raise MbibError(f"sweep {self.name}: axis {name!r} needs a list of values, got {values!r}")
        if not self.recipes or not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise MbibError(f"sweep {self.name} needs a recipe or more, and a seed or more, each once")


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep.

    Attributes:
        label: name of its folder.
        configuration: the label without the seed: runs of one configuration differ in it alone.
        name: of the recipe, as `recipe_name` has it.
        recipe: resolved, with the folder that it writes to.
        recipe_epochs: epochs that the recipe asks for by itself.
    """

    label: str
    configuration: str
    name: str
    recipe: Recipe
    recipe_epochs: int

    def folder(self) -> RunFolder:
        """Return the run's folder."""
        return RunFolder(Path(self.recipe.output) / self.label)

    def status(self) -> str:
        """Return ``done``, ``partial`` or ``missing``. Raises CheckpointError for another recipe's run."""
        folder = self.folder()
        done = (folder.path / "metrics.json").is_file()
        if not done and not folder.has_checkpoint():
            return "missing"
        folder.agree(self.recipe)
        return "done" if done else "partial"


def list_sweeps() -> list[str]:
    """Return the names of the sweeps that come with the package."""
    return sorted(path.stem for path in (recipes_folder() / "sweeps").glob("*.yaml"))


def find_sweep(names: Sequence[str]) -> Sweep:
    """Return the sweep of a packaged name or a sweep file, or one over the recipes named.

    Raises:
        MbibError: no such file, or one that is no sweep.
    """
    packaged = recipes_folder() / "sweeps" / f"{names[0]}.yaml"
    for path in (Path(names[0]), packaged):
        if len(names) == 1 and path.is_file() and (path == packaged or _is_sweep(path)):
            return load_sweep(path)
    return Sweep("sweep", list(names))


def _is_sweep(path: Path) -> bool:
    content = _read(path)
    return isinstance(content, dict) and "recipes" in content


def _read(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MbibError(f"{path}: not a YAML file ({str(error).splitlines()[0]})") from None


def load_sweep(path: Path) -> Sweep:
    """Read a sweep file: ``recipes``, and ``axes``, ``seeds`` and ``set`` where wanted.

    Raises:
        MbibError: an unknown key, or a value of another kind.
    """
    kinds = {"recipes": list, "axes": dict, "seeds": list, "set": dict}
    content = _read(path)
    for key, value in content.items():
        if key not in kinds:
            raise unknown_name(f"key in {path.name}", str(key), kinds)
        if not isinstance(value, kinds[key]):
            raise MbibError(f"{path}: key {key!r}: expected a {kinds[key].__name__}, got {value!r}")
    return Sweep(path.stem, **content)


def plan(sweep: Sweep, overrides: Mapping[str, Any]) -> list[PlannedRun]:
    """Resolve every run of a sweep.

    With other ``epochs`` than its own, a recipe's warm-up and milestones move in proportion.

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
    return runs


def _runs(sweep: Sweep, overrides: Mapping[str, Any]) -> Iterator[PlannedRun]:
    for given, *values in itertools.product(sweep.recipes, *sweep.axes.values()):
        path = find_recipe(given)
        chosen = dict(zip(sweep.axes, values, strict=True))
        own = load_recipe(path)
        settings = {**overrides, **chosen}
        recipe = load_recipe(path, {**_in_proportion(own, settings), **settings})
        name = recipe_name(path)
        configuration = "-".join([name, *(f"{key}={_plain(value)}" for key, value in chosen.items())])
        for seed in sweep.seeds:
            label = f"{configuration}-seed{seed}"
            output = str(Path(recipe.output) / sweep.name)
            placed = recipe.replace(seed=seed, output=output, experiment=label, resume="auto")
            yield PlannedRun(label, configuration, name, placed, own.epochs)


def _in_proportion(own: Recipe, settings: Mapping[str, Any]) -> dict[str, Any]:
    epochs = settings.get("epochs", own.epochs)
    if epochs == own.epochs or not isinstance(epochs, int) or epochs < 1:  # the recipe refuses what is no number
        return {}
    share = epochs / own.epochs
    warmup = min(max(1, round(share * own.warmup_epochs)), epochs - 1) if own.warmup_epochs else 0
    return {"warmup_epochs": warmup, "decay_milestones": [max(1, round(share * m)) for m in own.decay_milestones]}


def _plain(value: Any) -> str:
    """Return a value as part of a folder's name."""
    items = value if isinstance(value, list) else [value]
    return ",".join(str(item).replace("/", "_") for item in items)


def run_sweep(sweep: Sweep, overrides: Mapping[str, Any], only: str = "", dry_run: bool = False) -> bool:
    """Run what is missing of a sweep; write and print its summary.

    Args:
        sweep: what to run.
        overrides: recipe keys of all runs.
        only: run only those whose label contains this.
        dry_run: list the runs, and stop.

    Returns:
        True if every run came to its end.

    Raises:
        MbibError: the sweep cannot be; nothing has been run.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise MbibError("a sweep is one process: start one for each device, with --device and --only, not torchrun")
    runs = [run for run in plan(sweep, overrides) if only in run.label]
    if not runs:
        raise MbibError(f"sweep {sweep.name} has no run whose name contains {only!r}")
    states = [run.status() for run in runs]
    if dry_run:
        for run, state in zip(runs, states, strict=True):
            print(f"{state:<8} {run.label}")
        return True
    pool, failed, finished = DataPool(), {}, []
    for number, (run, state) in enumerate(zip(runs, states, strict=True), start=1):
        print(f"run {number} of {len(runs)}: {run.label}" + (" (done)" if state == "done" else ""), flush=True)
        try:
            if state != "done":
                train(run.recipe, run.name, pool)
        except MbibError as error:
            failed[run.label] = str(error)
            print(f"failed: {error}", flush=True)
            continue
        finished.append((run, json.loads((run.folder().path / "metrics.json").read_text())))
        text = write_summary(Path(run.recipe.output), sweep.name, finished)
    if finished:
        print(f"\n{text}\n{finished[0][0].recipe.output}")
    for label, reason in failed.items():
        print(f"failed: {label}: {reason}")
    return not failed
