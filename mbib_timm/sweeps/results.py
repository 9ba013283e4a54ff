"""What a sweep has found so far: one file, ``sweep.json``, of which tables, figures and reports are made."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mbib_timm.errors import MbibError
from mbib_timm.evaluation.table import COLUMNS
from mbib_timm.names import data_of
from mbib_timm.sweeps.definition import HEAD, Sweep
from mbib_timm.sweeps.plan import PlannedRun
from mbib_timm.training.public import public_environment, public_text
from mbib_timm.training.run_folder import read_history

FILE = "sweep.json"
# Of a run's environment: what has to be the same for two runs to compare, beside the recipe.
ENVIRONMENT = ("mbib_timm", "commit", "torch", "timm", "device", "hardware", "processes", "command")

# Recipe keys that say how a result is reached and reported, and leave it as it is.
SAME_RESULT = {"val_interval", "validation_batch_size", "loader", "torchcompile", "cuda_graph", "channels_last"}


@dataclass(frozen=True)
class SweepResults:
    """A sweep's finished runs, with all that their table and their figure need.

    Attributes:
        name: of the sweep's folder.
        title: what the sweep shows.
        recipe: the base recipe.
        axes: values of each axis, in order, by the axis's name.
        labels: how the axes are called.
        heads: rows for the heads of a run, with their titles.
        figure: its kind, and the axes' roles.
        paper: source, recipe and numbers of the paper; None where there are none.
        planned: runs that the whole sweep has.
        runs: the finished ones, in order; see `run_record`.
        failed: why runs did not finish, by their label.
    """

    name: str
    title: str
    recipe: str
    axes: dict[str, list[str]]
    labels: dict[str, str]
    heads: dict[str, str]
    figure: dict[str, str]
    paper: dict[str, Any] | None
    planned: int
    runs: list[dict[str, Any]]
    failed: dict[str, str]

    @property
    def seeds(self) -> list[int]:
        """Seeds of the finished runs."""
        return sorted({run["seed"] for run in self.runs})

    @property
    def is_short(self) -> bool:
        """True if a run had other epochs than its recipe asks for."""
        return any(run["epochs"] != run["recipe_epochs"] for run in self.runs)

    @property
    def settings(self) -> dict[str, Any]:
        """What was set from outside in any of the runs, by address."""
        return {key: value for run in self.runs for key, value in run["settings"].items()}

    @property
    def is_papers(self) -> bool:
        """True if the sweep is the paper's: its recipe as it stands, in full. Then a difference from it counts."""
        if self.paper is None or self.recipe != self.paper["recipe"] or self.is_short:
            return False
        # The same images in files of their own are the benchmark still, and so is any other way to the same numbers.
        return self.settings.keys() <= SAME_RESULT or (
            self.settings.keys() <= {*SAME_RESULT, "dataset"} and self.settings["dataset"] == "folder"
        )


@dataclass(frozen=True)
class Cell:
    """What the runs of one configuration have in common, for one head.

    Attributes:
        coordinates: value of each axis by its name, and under ``head`` the head's title where rows are heads.
        values: of each of ``overall``, ``many``, ``medium``, ``few`` the top-1 accuracies in percent, one a seed.
        paper: the paper's numbers under the same names.
    """

    coordinates: dict[str, str]
    values: dict[str, list[float | None]]
    paper: dict[str, float]

    @property
    def n(self) -> int:
        """Number of runs."""
        return len(self.values["overall"])


def collect(sweep: Sweep, runs: Sequence[PlannedRun], planned: int, failed: Mapping[str, str]) -> SweepResults:
    """Read what finished runs have written.

    Args:
        sweep: their sweep.
        runs: the finished ones.
        planned: how many the whole sweep has.
        failed: why others did not finish, by label.
    """
    paper = None
    if sweep.paper is not None:
        paper = {**asdict(sweep.paper), "recipe": public_text(sweep.paper.recipe or sweep.recipe)}
    return SweepResults(
        name=Path(runs[0].recipe.output).name,
        title=sweep.title,
        recipe=public_text(sweep.recipe),
        axes={axis: [value.name for value in sweep.values(axis)] for axis in sweep.axes},
        labels={axis: sweep.label(axis) for axis in sweep.axes},
        heads=sweep.heads,
        figure=sweep.figure,
        paper=paper,
        planned=planned,
        runs=[run_record(run) for run in runs],
        failed={label: public_text(reason) for label, reason in failed.items()},
    )


def run_record(run: PlannedRun) -> dict[str, Any]:
    """Return what a sweep keeps of a finished run: place in the sweep, accuracies by head, curve, environment.

    Epochs are those of the longest stage; the curve, and the time, are the last stage's.
    """
    folder = run.folder().path
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    history = read_history(folder)
    environment = public_environment(metrics["environment"])
    return {
        "label": run.label,
        "configuration": run.configuration,
        "coordinates": run.coordinates,
        "seed": metrics["seed"],
        "method": metrics["method"],
        "stages": metrics["stages"],
        "chosen": metrics["chosen"],
        "epochs": run.epochs,
        "recipe_epochs": run.recipe_epochs,
        "settings": run.settings,
        "dataset": metrics["dataset"],
        "test_images": metrics["result"]["heads"]["prediction"]["images"],
        "heads": {
            head: {column: values[metric] for column, metric in COLUMNS.items()}
            for head, values in metrics["result"]["heads"].items()
        },
        "curve": {
            "epoch": [int(row["epoch"]) for row in history],
            "train_loss": [float(f"{row['train_loss']:.5g}") for row in history],
            "val_top1": [row["val_top1"] for row in history],
        },
        "training_seconds": round(metrics["training_seconds"], 1),
        "environment": {name: environment[name] for name in ENVIRONMENT},
    }


def cells(results: SweepResults) -> list[Cell]:
    """Return the rows of a sweep's table: a configuration, or one head of it, with the paper's numbers for it."""
    grouped: dict[str, list[dict[str, Any]]] = {}
    by_place = sorted(
        results.runs, key=lambda run: [values.index(run["coordinates"][axis]) for axis, values in results.axes.items()]
    )
    for run in by_place:
        grouped.setdefault(run["configuration"], []).append(run)
    rows = []
    for runs in grouped.values():
        available = runs[0]["heads"]
        heads = [head for head in results.heads if head in available] if len(available) > 1 else []
        for head in heads or ["prediction"]:
            coordinates = dict(runs[0]["coordinates"])
            if results.heads:
                coordinates[HEAD] = results.heads[head] if heads else ""
            values = {column: [run["heads"][head][column] for run in runs] for column in COLUMNS}
            rows.append(Cell(coordinates, values, _paper_numbers(results, coordinates)))
    return rows


def _paper_numbers(results: SweepResults, coordinates: Mapping[str, str]) -> dict[str, float]:
    for number in results.paper["numbers"] if results.paper else ():
        if all(str(value) == coordinates.get(axis) for axis, value in number.items() if axis not in COLUMNS):
            return {column: float(number[column]) for column in COLUMNS if column in number}
    return {}


def headline(results: SweepResults) -> str:
    """Return the title: name, what it shows, and what was run."""
    return f"{results.name}: {short_headline(results)}"


def short_headline(results: SweepResults) -> str:
    """Return what a sweep shows, and what was run: ``Structures (cifar100_lt_if100, 20 epochs of 200, n = 1)``."""
    numbers = sorted({row.n for row in cells(results)})
    done = len(results.runs)
    some = f", {done} of {results.planned} runs" if done < results.planned else ""
    data = data_of(results.recipe)
    said = f"{f'{data}, ' if data else ''}{epochs_run(results)}, n = {listed(numbers)}{some}"
    return f"{results.title} ({said})" if results.title else said


def epochs_run(results: SweepResults) -> str:
    """Return the epochs, with those that the recipes ask for where they differ: ``20 epochs of 200``."""
    epochs = sorted({run["epochs"] for run in results.runs})
    asked_for = sorted({run["recipe_epochs"] for run in results.runs})
    own = f" of {listed(asked_for)}" if results.is_short else ""
    return f"{listed(epochs)} epoch{'s' if epochs != [1] else ''}{own}"


def listed(values: Sequence[Any], form: str = "") -> str:
    """Return values side by side."""
    return ", ".join(format(value, form) for value in values)


def read_results(path: Path) -> SweepResults:
    """Read ``sweep.json``, given it or its folder.

    Raises:
        MbibError: it is missing, or no sweep's.
    """
    file = path / FILE if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return SweepResults(**{item.name: content[item.name] for item in fields(SweepResults)})
    except OSError as error:
        raise MbibError(f"cannot read the sweep's results {file}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise MbibError(f"{file} holds no sweep's results: {error}") from None
