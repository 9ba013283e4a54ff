"""What a sweep has found so far: ``sweep.json``, of which its tables, figure and reports are made."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mbib_timm.data.sources import LEFT_OUT
from mbib_timm.environment import Environment
from mbib_timm.errors import shown
from mbib_timm.files import read_json
from mbib_timm.methods import method_title
from mbib_timm.models.origin import origin_text
from mbib_timm.models.pretraining import NOT_RECORDED, Origin
from mbib_timm.recipe import data_of
from mbib_timm.results.columns import COLUMNS
from mbib_timm.results.runs import SAME_RESULT
from mbib_timm.sweeps.sweep import GROUP, HEAD, Paper, check_figure

FILE = "sweep.json"


@dataclass(frozen=True)
class Curve:
    """A run over its epochs.

    Attributes:
        epoch: numbers, from 1.
        train_loss: mean of each epoch.
        val_top1: accuracy after it in percent; None where it was not evaluated.
    """

    epoch: list[int]
    train_loss: list[float]
    val_top1: list[float | None]


@dataclass(frozen=True)
class SweepRun:
    """What a sweep keeps of a finished run.

    Attributes:
        label: name of its folder.
        configuration: the label without the seed.
        coordinates: the value of each axis, by the axis's name.
        seed: of the run.
        method: of the last stage.
        stages: methods of all stages.
        chosen: what the method has chosen by itself.
        epochs: of the longest stage.
        recipe_epochs: the same, as the recipe asks for them.
        settings: what was set from outside and computes something else, by address; the same images in files of
            their own do not.
        dataset: the recipe's.
        images: how many the result is on.
        split: of these images.
        heads: accuracies in percent by head, under ``overall``, ``many``, ``medium`` and ``few``.
        curve: of the last stage.
        training_seconds: of the epochs of all stages.
        environment: versions, hardware, command.
        origin: where it started.
        computation: digest of all that decides what was computed, but for the inputs; empty if it was not recorded.
        stage_epochs: epochs of each stage; empty if they were not recorded.
        chosen_on: the images on which the method chose by itself; None where it did not, or was not recorded.
        averaged: the curve's accuracies are of the weights' moving average; None where that was not recorded.
    """

    label: str
    configuration: str
    coordinates: dict[str, str]
    seed: int
    method: str
    stages: list[str]
    chosen: dict[str, float]
    epochs: int
    recipe_epochs: int
    settings: dict[str, Any]
    dataset: str
    images: int
    split: str
    heads: dict[str, dict[str, float | None]]
    curve: Curve
    training_seconds: float
    environment: Environment
    origin: Origin = NOT_RECORDED
    computation: str = ""
    stage_epochs: list[int] = field(default_factory=list)
    chosen_on: str | None = None
    averaged: bool | None = None


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
        runs: the finished ones, in the order of the plan.
        failed: why runs did not finish, by their label.
    """

    name: str
    title: str
    recipe: str
    axes: dict[str, list[str]]
    labels: dict[str, str]
    heads: dict[str, str]
    figure: dict[str, str]
    paper: Paper | None
    planned: int
    runs: list[SweepRun]
    failed: dict[str, str]

    def __post_init__(self) -> None:
        """Raise ValueError where the runs do not lie on the axes, or the figure and the labels name others."""
        if not self.runs:
            raise ValueError("runs: there are none")
        check_figure(self.figure, self.axes, self.heads)
        for axis in self.axes:
            if axis not in self.labels:
                raise ValueError(f"labels: axis {axis!r} is missing")
        for place, run in enumerate(self.runs):
            where = f"runs[{place}]"
            if run.coordinates.keys() != self.axes.keys():
                raise ValueError(f"{where}.coordinates: expected a value for each of {', '.join(self.axes)}")
            for axis, value in run.coordinates.items():
                if value not in self.axes[axis]:
                    raise ValueError(f"{where}.coordinates: {shown(value)} is not a value of axis {axis!r}")
            if run.heads.get("prediction", {}).keys() < COLUMNS.keys():
                raise ValueError(f"{where}.heads: expected a 'prediction' with {', '.join(COLUMNS)}")
            if not len(run.curve.epoch) == len(run.curve.train_loss) == len(run.curve.val_top1):
                raise ValueError(f"{where}.curve: expected equally many numbers of each kind")

    @property
    def seeds(self) -> list[int]:
        """Seeds of the finished runs."""
        return sorted({run.seed for run in self.runs})

    @property
    def is_short(self) -> bool:
        """True if a run had other epochs than its recipe asks for."""
        return any(run.epochs != run.recipe_epochs for run in self.runs)

    @property
    def starts(self) -> list[str]:
        """What runs started from, where any did not start from scratch, each once."""
        if all(run.origin.is_scratch for run in self.runs):
            return []
        return list(dict.fromkeys(origin_text(run.origin) for run in self.runs))

    @property
    def settings(self) -> dict[str, Any]:
        """What was set from outside in any of the runs, by address."""
        return {key: value for run in self.runs for key, value in run.settings.items()}

    @property
    def paper_beside(self) -> Paper | None:
        """The paper, where its numbers may stand beside the rows: from scratch, and not on left-out training images."""
        return self.paper if not self.starts and all(run.split != LEFT_OUT for run in self.runs) else None

    @property
    def is_papers(self) -> bool:
        """True if the sweep is the paper's: its recipe as it stands, in full. Then a difference from it counts.

        The paper's runs start from scratch.
        """
        paper = self.paper_beside
        if paper is None or self.recipe != paper.recipe or self.is_short:
            return False
        return self.settings.keys() <= SAME_RESULT


@dataclass(frozen=True)
class Cell:
    """What the runs of one configuration have in common, for one head.

    Attributes:
        coordinates: value of each axis by its name, and under ``head`` the head's title where rows are heads.
        values: of each of ``overall``, ``many``, ``medium``, ``few`` the top-1 accuracies in percent, one per seed.
        paper: the paper's numbers under the same names; none where they may not stand beside, see `paper_beside`.
        start: what the runs started from.
        seeds: the runs' seeds, in the order of the values.
        method: title of the runs' method.
    """

    coordinates: dict[str, str]
    values: dict[str, list[float | None]]
    paper: dict[str, float]
    start: str
    seeds: list[int]
    method: str

    @property
    def n(self) -> int:
        """Number of runs."""
        return len(self.values["overall"])


def cells(results: SweepResults) -> list[Cell]:
    """Return the rows of a sweep's table: a configuration, or one head of it, with the paper's numbers for it."""
    grouped: dict[str, list[SweepRun]] = {}
    by_place = sorted(
        results.runs, key=lambda run: [values.index(run.coordinates[axis]) for axis, values in results.axes.items()]
    )
    for run in by_place:
        grouped.setdefault(run.configuration, []).append(run)
    paper = results.paper_beside
    rows = []
    for runs in grouped.values():
        available = runs[0].heads
        heads = [head for head in results.heads if head in available] if len(available) > 1 else []
        for head in heads or ["prediction"]:
            coordinates = dict(runs[0].coordinates)
            if results.heads:
                coordinates[HEAD] = results.heads[head] if heads else ""
            values = {column: [run.heads[head].get(column) for run in runs] for column in COLUMNS}
            numbers, seeds = _paper_numbers(paper, coordinates), [run.seed for run in runs]
            start, method = origin_text(runs[0].origin), method_title(runs[0].method)
            rows.append(Cell(coordinates, values, numbers, start, seeds, method))
    return rows


def _paper_numbers(paper: Paper | None, coordinates: Mapping[str, str]) -> dict[str, float]:
    for number in paper.numbers if paper else ():
        if all(str(value) == coordinates.get(axis) for axis, value in number.items() if axis not in COLUMNS):
            return {column: float(number[column]) for column in COLUMNS if column in number}
    return {}


def axis_label(results: SweepResults, axis: str) -> str:
    """Return how an axis is called in tables and figures."""
    return results.labels.get(axis, "classes" if axis == GROUP else axis).replace("_", " ")


def row_name(results: SweepResults, coordinates: Mapping[str, str]) -> str:
    """Return what tells a row from others: ``MBIB, beta 5``. What is no method or recipe stands behind its axis."""
    return ", ".join(
        method_title(value)
        if axis.rpartition(".")[2] in ("method", "recipe")
        else f"{axis_label(results, axis)} {method_title(value)}"
        for axis, value in coordinates.items()
        if value
    )


def headline(results: SweepResults) -> str:
    """Return the title: name, what it shows, and what was run."""
    return f"{results.name}: {short_headline(results)}"


def short_headline(results: SweepResults) -> str:
    """Return what a sweep shows, and what was run: ``Structures (cifar100_lt_if100, 20 epochs of 200, n = 1)``."""
    numbers = [row.n for row in cells(results)]
    seeds = " to ".join(map(str, sorted({min(numbers, default=0), max(numbers, default=0)})))
    done = len(results.runs)
    some = f"; {done} of {results.planned} runs" if done < results.planned else ""
    data = data_of(results.recipe)
    start = f", started from {'; '.join(results.starts)}" if results.starts else ""
    said = f"{f'{data}, ' if data else ''}{epochs_run(results)}, n = {seeds}{some}{start}"
    return f"{results.title} ({said})" if results.title else said


def epochs_run(results: SweepResults) -> str:
    """Return the epochs, with those that the recipes ask for where they differ: ``20 epochs of 200``."""
    epochs = sorted({run.epochs for run in results.runs})
    trained = [number for number in epochs if number] or epochs
    asked_for = sorted({run.recipe_epochs for run in results.runs} - {0})
    own = f" of {' or '.join(map(str, asked_for))}" if results.is_short else ""
    untrained = " (0 where nothing is trained)" if trained != epochs else ""
    return f"{' or '.join(map(str, trained))} epoch{'s' if trained != [1] else ''}{own}{untrained}"


def listed(values: Iterable[Any], form: str = "") -> str:
    """Return values side by side, each once."""
    return ", ".join(format(value, form) for value in dict.fromkeys(values))


def read_results(path: Path) -> SweepResults:
    """Read ``sweep.json``, given it or its folder.

    Raises:
        MbibError: it is missing, or no sweep's.
    """
    return read_json(SweepResults, path / FILE if path.is_dir() else path, "results of a sweep")
