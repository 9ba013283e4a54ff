"""What a report is made of: finished runs with their history and their analysis, and sweeps' results."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mbib_timm.errors import MbibError
from mbib_timm.evaluation.table import COLUMNS
from mbib_timm.models.zoo import ZOO
from mbib_timm.paper import RESULTS, PaperResult
from mbib_timm.recipe import KEYS, Recipe, find_recipe, list_recipes, load_recipe, longest_epochs, recipe_name
from mbib_timm.sweeps.results import FILE, SAME_RESULT, SweepResults, read_results
from mbib_timm.sweeps.table import mean_of
from mbib_timm.training.public import public_method, public_metrics
from mbib_timm.training.run_folder import read_history


@dataclass(frozen=True)
class ReportedRun:
    """A finished run.

    Attributes:
        metrics: content of ``metrics.json``, without paths of the machine.
        recipe: as it was run.
        history: rows of ``summary.csv``; empty where it was not kept.
        analysis: content of ``analysis.json``; None where it was not analyzed.
        notes: paragraphs of ``notes.md``, by whoever ran it.
    """

    metrics: Mapping[str, Any]
    recipe: Recipe
    history: Sequence[Mapping[str, Any]]
    analysis: Mapping[str, Any] | None
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        """``arch.tag``."""
        return str(self.metrics["name"])

    @property
    def heads(self) -> Mapping[str, Any]:
        """The result's metrics by head."""
        heads: Mapping[str, Any] = self.metrics["result"]["heads"]
        return heads


@dataclass(frozen=True)
class RunGroup:
    """Runs that differ in the seed alone.

    Attributes:
        title: the run's name, with what sets it apart from others of the name.
        runs: by seed.
        packaged: the packaged recipe of the name; None where there is none.
        settings: keys with other values than in that recipe that compute something else, beside the epochs, by address.
    """

    title: str
    runs: tuple[ReportedRun, ...]
    packaged: Recipe | None
    settings: Mapping[str, Any]

    @property
    def first(self) -> ReportedRun:
        """The run whose figures are shown."""
        return self.runs[0]

    @property
    def epochs(self) -> int:
        """Epochs of the longest stage."""
        return longest_epochs(self.first.recipe)

    @property
    def recipe_epochs(self) -> int | None:
        """Epochs that the packaged recipe asks for; None where there is no such recipe."""
        return None if self.packaged is None else longest_epochs(self.packaged)

    @property
    def is_short(self) -> bool:
        """True if the runs had other epochs than their recipe asks for."""
        return self.recipe_epochs is not None and self.epochs != self.recipe_epochs

    @property
    def is_papers(self) -> bool:
        """True if the runs are the paper's: its recipe as it stands, in full. Then a difference from it counts."""
        return bool(self.paper) and not self.is_short and not self.settings

    def values(self, column: str, head: str = "prediction") -> list[float | None]:
        """Return a head's accuracy in percent of each run: ``overall``, ``many``, ``medium`` or ``few``."""
        return [run.heads[head][COLUMNS[column]] for run in self.runs]

    def mean(self, column: str) -> float | None:
        """Return the prediction's mean accuracy in percent; None for a group without classes."""
        return mean_of(self.values(column))

    @property
    def paper(self) -> tuple[PaperResult, ...]:
        """What the paper reports of such a run."""
        return RESULTS.get(self.first.name, ())


def read_inputs(names: Sequence[str]) -> tuple[list[RunGroup], list[SweepResults]]:
    """Read runs and sweeps by their folders or names.

    Args:
        names: folders of runs, or of kept results; folders of sweeps' results, or the sweep's name where they lie in
            ``results``; names of published models.

    Raises:
        MbibError: something that is none of these, or a run that is not finished.
    """
    runs: list[ReportedRun] = []
    sweeps: list[SweepResults] = []
    for name in names:
        folder = _folder(name)
        if (folder / FILE).is_file():
            sweeps.append(read_results(folder))
        else:
            runs.append(read_run(folder))
    return group_runs(runs), sweeps


def _folder(name: str) -> Path:
    published = [model.folder for model in ZOO if model.name == name and model.is_trained]
    for folder in (Path(name), Path("results") / name, *published):
        if (folder / FILE).is_file() or (folder / "metrics.json").is_file():
            return folder
    if Path(name).is_dir():
        raise MbibError(f"{name} holds neither metrics.json nor {FILE}: no finished run, and no sweep's results")
    if Path(name).exists():
        raise MbibError(f"{name} is a file: expected the folder of a run, of kept results or of a sweep's results")
    raise MbibError(
        f"there is no {name}: expected the folder of a run, of kept results or of a sweep's results, or a published "
        "name"
    )


def read_run(folder: Path) -> ReportedRun:
    """Read a finished run, or what was kept of it.

    Raises:
        MbibError: files that are missing or broken.
    """
    try:
        metrics = public_metrics(json.loads((folder / "metrics.json").read_text(encoding="utf-8")))
        history = read_history(folder)
        places = [
            place for place in (folder / "analysis" / "analysis.json", folder / "analysis.json") if place.is_file()
        ]
        analysis = json.loads(places[0].read_text(encoding="utf-8")) if places else None
        notes = (folder / "notes.md").read_text(encoding="utf-8") if (folder / "notes.md").is_file() else ""
    except OSError as error:
        raise MbibError(f"cannot read {error.filename}: {error.strerror}") from None
    except (ValueError, KeyError) as error:
        raise MbibError(f"{folder} holds no run's results: {error}") from None
    paragraphs = tuple(" ".join(text.split()) for text in notes.split("\n\n") if text.strip())
    return ReportedRun(metrics, load_recipe(folder / "recipe.yaml"), history, analysis, paragraphs)


def group_runs(runs: Sequence[ReportedRun]) -> list[RunGroup]:
    """Put runs together that differ in the seed alone, in the order in which they were given."""
    grouped: dict[str, list[ReportedRun]] = {}
    for run in runs:
        computed = run.recipe.everywhere(seed=0).computation()
        grouped.setdefault(json.dumps([run.name, computed], sort_keys=True), []).append(run)
    groups = []
    for members in grouped.values():
        seeds = [run.metrics["seed"] for run in members]
        if len(set(seeds)) < len(seeds):
            raise MbibError(f"two of the runs of {members[0].name} have the same seed: {seeds}")
        own = packaged_recipe(members[0].name)
        ordered = tuple(sorted(members, key=lambda run: run.metrics["seed"]))
        settings = {} if own is None else _settings(members[0].recipe, own)
        groups.append(RunGroup(_title(members[0], runs), ordered, own, settings))
    return groups


def packaged_recipe(name: str) -> Recipe | None:
    """Return the packaged recipe that runs of a name are made by; None where there is none."""
    named = [recipe for recipe in list_recipes() if recipe_name(find_recipe(recipe)) == name]
    return load_recipe(find_recipe(named[0])) if named else None


def _settings(recipe: Recipe, own: Recipe) -> dict[str, Any]:
    """Return what has other values than in the packaged recipe; the same images in files are the same data."""
    elsewhere = {"dataset"} if recipe.dataset == "folder" and own.imbalance == recipe.imbalance == "exp" else set()
    before, now = _by_address(own), _by_address(recipe)
    return {
        address: now.get(address)
        for address in {**now, **before}
        if now.get(address) != before.get(address)
        and address.rpartition(".")[2] not in {"seed", "epochs", *SAME_RESULT, *elsewhere}
    }


def _by_address(recipe: Recipe) -> dict[str, Any]:
    """Return what decides what a recipe computes, by address: settings of the method, and keys of several stages."""
    found: dict[str, Any] = {}
    for number, stage in enumerate(recipe.chain(), start=1):
        values = {key: getattr(stage, key) for key, item in KEYS.items() if not item.metadata["location"]}
        method = public_method(values.pop("method"))
        values = {**values, "method": method.pop("name"), **{f"method.{key}": value for key, value in method.items()}}
        prefix = f"stage{number}." if recipe.stage else ""
        found |= {f"{prefix}{address}": value for address, value in values.items()}
    return found


def _title(run: ReportedRun, runs: Sequence[ReportedRun]) -> str:
    """Return the run's name, and the settings that differ among the runs of this name."""
    own = _by_address(run.recipe)
    others = [_by_address(other.recipe) for other in runs if other.name == run.name]
    differing = [key for key in own if key.rpartition(".")[2] != "seed" and any(o.get(key) != own[key] for o in others)]
    settings = ", ".join(f"{key} {own[key]}" for key in differing)
    return f"{run.name} ({settings})" if settings else run.name
