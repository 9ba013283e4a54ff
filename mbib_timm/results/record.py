"""The record of a finished run: ``metrics.json``, and the history of its epochs, ``summary.csv``."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mbib_timm.environment import Environment
from mbib_timm.errors import MbibError, few, shown
from mbib_timm.files import mappings_to_csv, printable, read_json, read_text, to_json, write_bytes
from mbib_timm.models.pretraining import NOT_RECORDED, Origin
from mbib_timm.results.columns import COLUMNS, MODEL_COLUMNS

RECORD, HISTORY = "metrics.json", "summary.csv"
LISTED = 1000  # names of files of a kind that a record keeps
# Accuracies that an epoch's row keeps, as the columns of ``summary.csv`` call them.
EPOCH_METRICS = tuple(column.metric for column in MODEL_COLUMNS.values())


@dataclass(frozen=True)
class HeadMetrics:
    """Metrics of a head on a set of images. A metric is None if there is nothing to measure.

    Attributes:
        top1: accuracy over the images; like all accuracies here, in percent.
        top5: share of the images whose label is among the five largest logits.
        macro: mean accuracy of the classes with images, with equal weight for each class (balanced accuracy).
        many: mean accuracy of the classes with more than 100 training images.
        medium: mean accuracy of the classes with 20 to 100 training images.
        few: mean accuracy of the classes with fewer than 20 training images.
        ece: expected calibration error, in percent.
        nll: negative log-likelihood per image, in nats.
        images: number of evaluated images.
        classes: number of classes in each shot group.
        per_class: accuracy of each of the K classes.
        macro_f1: mean F1 of the classes with images, in percent.
        intervals: 95 % intervals in percent, by the name of the metric: ``top1`` (Wilson), and for the prediction also
            ``macro``, ``macro_f1``, ``many``, ``medium`` and ``few``; see `mbib_timm.evaluation.with_intervals`.
        measured: numbers of images, and of classes with images, behind ``overall``, ``many``, ``medium`` and ``few``.
        class_images: for the prediction, the number of evaluated images of each of the K classes.
    """

    top1: float
    top5: float
    macro: float | None
    many: float | None
    medium: float | None
    few: float | None
    ece: float
    nll: float
    images: int
    classes: dict[str, int]
    per_class: list[float | None]
    # What was not always recorded.
    macro_f1: float | None = None
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    measured: dict[str, tuple[int, int]] = field(default_factory=dict)
    class_images: list[int] = field(default_factory=list)

    def check(self, num_classes: int) -> None:
        """Raise ValueError for what no command writes: accuracies that are none, or of another number of classes."""
        if len(self.per_class) != num_classes:
            raise ValueError(f"per_class: expected {num_classes} for as many class_counts, got {len(self.per_class)}")
        if self.class_images and (len(self.class_images) != num_classes or min(self.class_images) < 0):
            raise ValueError(f"class_images: expected {num_classes} numbers of images, got {few(self.class_images)}")
        for name in ("top1", "top5", "macro", "many", "medium", "few", "ece", "macro_f1", "per_class"):
            found = getattr(self, name)
            for value in found if isinstance(found, list) else (found,):
                if value is not None and not 0 <= round(value, 6) <= 100:
                    raise ValueError(f"{name}: expected percent, got {value:g}")
        if self.measured and not self.measured.keys() >= COLUMNS.keys():
            raise ValueError(f"measured: expected {', '.join(COLUMNS)}")

    def accuracies(self) -> dict[str, float | None]:
        """Return the accuracies of `COLUMNS`, in percent: ``overall``, then those of the shot groups."""
        return {name: getattr(self, column.metric) for name, column in COLUMNS.items()}

    def numbers(self) -> dict[str, float | None]:
        """Return the numbers of `MODEL_COLUMNS`, in percent."""
        return {name: getattr(self, column.metric) for name, column in MODEL_COLUMNS.items()}

    def interval(self, column: str) -> tuple[float, float] | None:
        """Return the 95 % interval of a column of `MODEL_COLUMNS`; None where there is none."""
        return self.intervals.get(MODEL_COLUMNS[column].metric)


@dataclass(frozen=True)
class Evaluation:
    """The metrics of certain weights on a split.

    Attributes:
        split: name of the split.
        heads: metrics of ``prediction`` and, if there are several, of each head and expert, by name.
        epoch: epoch after which they were measured, from 1; None if the weights are not from an epoch of the run.
        weights: file of the weights in the run's folder; None if they are not kept.
    """

    split: str
    heads: dict[str, HeadMetrics]
    epoch: int | None = None
    weights: str | None = None

    @property
    def prediction(self) -> HeadMetrics:
        """Metrics of the model's answer."""
        return self.heads["prediction"]


@dataclass(frozen=True)
class Inputs:
    """What a stage was given that its recipe only says the place of, as digests.

    Attributes:
        data: of the images and their labels, wherever they lie; see `mbib_timm.data.Splits`.
        start: SHA-256 of the weights' file that the recipe names; None where it names none.
        plugins: SHA-256 of the code of each plugin that it uses, by the name of its file; of each version, separated by
            spaces, where it changed before the run went on.
        class_weights: SHA-256 of the file of class weights; None where the recipe names none.
        teachers: SHA-256 of the weights' file of each teacher that lies in a folder.
    """

    data: str
    start: str | None = None
    plugins: dict[str, str] = field(default_factory=dict)
    class_weights: str | None = None
    teachers: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class RunRecord:
    """The record of a finished run.

    Attributes:
        name: ``arch.tag``.
        model: name of the network.
        method: name of the method; if there are several stages, that of the last.
        stages: names of the methods of all stages.
        prediction_heads: heads whose logits' mean is the prediction; empty for a network of one head.
        dataset: the recipe key ``dataset``.
        loader: ``resident`` or ``timm``.
        precision: precision of the training step: ``float32``, or mixed precision with ``bfloat16`` or ``float16``.
        epochs: epochs of the last stage.
        seed: seed of the run.
        class_counts: training images of each class.
        class_names: in the same order; None if the data have none.
        result: metrics of the last epoch's weights.
        raw: metrics of the weights without their moving average, if the result is that of the average; else None.
        best: metrics of the best evaluated epoch, on the split that chose it; None if no epoch was evaluated.
        chosen: values that the method has chosen itself, by name.
        chosen_on: the images on which it chose them.
        training_seconds: time of the epochs of all stages, including their evaluations, and of a stage that another run
            has trained before; of records without `inputs`, of the last stage.
        replaced_images: broken training images that were replaced by others.
        left_out_images: broken images that were left out of the evaluations.
        environment: versions, hardware, command.
        held_out: how the evaluated images were held out of the training data, in words; None if the data have a split
            for them, or if it was not recorded.
        origin: where training started: from scratch, or from which weights and which data.
        rounded_from: top-1 accuracy of the prediction in percent before the package rounded the weights to half
            precision; `result` is then that of the rounded weights. None if they were not rounded.
        inputs: of each stage; none if they were not recorded.
        trained_before: a line on the evaluated images that the run which this one started from was trained on; None if
            there are none, or if it was not recorded.
        left_out: names of the files that the data's source has passed over, by the reason; at most `LISTED` of each.
        unread_classes: names of the classes whose training images were all broken and replaced.
        unmeasured_classes: names of the classes whose evaluated images were all broken and left out of the result.
        other_seconds: time of what the stages computed before their first epochs and after their last: decoded images,
            features, class means, the result. What a cache gave took none. None if it was not recorded.
        extended_from: epochs after which the last stage went on by the schedule of another number of epochs; none if it
            had one schedule.
    """

    name: str
    model: str
    method: str
    stages: list[str]
    prediction_heads: list[str]
    dataset: str
    loader: str
    epochs: int
    seed: int
    class_counts: list[int]
    class_names: list[str] | None
    result: Evaluation
    raw: Evaluation | None
    best: Evaluation | None
    chosen: dict[str, float]
    chosen_on: str | None
    training_seconds: float
    replaced_images: list[str]
    environment: Environment
    # What was not always recorded.
    precision: str | None = None
    left_out_images: list[str] = field(default_factory=list)
    held_out: str | None = None
    origin: Origin = NOT_RECORDED
    rounded_from: float | None = None
    inputs: list[Inputs] = field(default_factory=list)
    trained_before: str | None = None
    left_out: dict[str, list[str]] = field(default_factory=dict)
    unread_classes: list[str] = field(default_factory=list)
    unmeasured_classes: list[str] = field(default_factory=list)
    other_seconds: float | None = None
    extended_from: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Raise ValueError where classes, their names and their accuracies are not equally many, or no accuracies."""
        for evaluation in (self.result, self.raw, self.best):
            if evaluation is not None:
                check_classes(self.class_counts, self.class_names, evaluation.heads)
        if not self.stages:
            raise ValueError("stages: there are none")


def check_classes(
    class_counts: Sequence[int], class_names: Sequence[str] | None, heads: Mapping[str, HeadMetrics]
) -> None:
    """Raise ValueError where there are no classes, or not equally many counts, names and accuracies of them."""
    if not class_counts or min(class_counts) < 0:
        raise ValueError("class_counts: expected a number of at least 0 for each class")
    if class_names is not None and len(class_names) != len(class_counts):
        raise ValueError(f"class_names: expected {len(class_counts)} for as many class_counts, got {len(class_names)}")
    if "prediction" not in heads:
        raise ValueError("heads: 'prediction' is missing")
    for head, metrics in heads.items():
        try:
            metrics.check(len(class_counts))
        except ValueError as error:
            raise ValueError(f"heads: {shown(head)}: {error}") from None


@dataclass
class Epoch:
    """An epoch of a run.

    Attributes:
        epoch: number of the epoch, from 1.
        lr: largest learning rate.
        seconds: duration, including the evaluation.
        losses: means over the epoch, by name; ``loss`` is the one that was minimised.
        val: accuracies in percent under the names of `EPOCH_METRICS`; None if the epoch was not evaluated.
        raw: the same for the weights without their moving average; None if there is none.
    """

    epoch: int
    lr: float
    seconds: float
    losses: dict[str, float] = field(default_factory=dict)
    val: dict[str, float | None] | None = None
    raw: dict[str, float | None] | None = None

    def row(self) -> dict[str, float | None]:
        """Return the row of ``summary.csv``: a number for each column that the epoch has."""
        return {
            "epoch": self.epoch,
            "lr": self.lr,
            **{f"train_{name}": value for name, value in self.losses.items()},
            **{f"val_{name}": value for name, value in (self.val or {}).items()},
            **{f"raw_{name}": value for name, value in (self.raw or {}).items()},
            "seconds": self.seconds,
        }


def is_averaged(history: Iterable[Epoch]) -> bool:
    """Return whether the accuracies after epochs, and so the result, are of the weights' moving average."""
    return any(row.raw is not None for row in history)


def epoch_metrics(metrics: HeadMetrics) -> dict[str, float | None]:
    """Return what an epoch's row keeps of a head's metrics."""
    return {name: getattr(metrics, name) for name in EPOCH_METRICS}


def is_finished(folder: Path) -> bool:
    """Return whether a folder holds the record of a finished run."""
    return (folder / RECORD).is_file()


def read_record(folder: Path) -> RunRecord:
    """Read the record in the folder of a run, or of kept results.

    Raises:
        MbibError: there is none, or the file holds something else.
    """
    if not is_finished(folder):
        if not folder.is_dir():
            raise MbibError(f"there is no folder {folder}; expected that of a run")
        raise MbibError(f"{folder} has no {RECORD}: the run is not finished, and has no result")
    return read_json(RunRecord, folder / RECORD, "the record of a run")


def write_record(folder: Path, record: RunRecord) -> None:
    """Write ``metrics.json``."""
    write_bytes(folder / RECORD, to_json(record))


def read_history(folder: Path) -> list[Epoch]:
    """Read the epochs of ``summary.csv``; none where there is no such file.

    Raises:
        MbibError: the file holds something else.
    """
    if not (folder / HISTORY).is_file():
        return []
    text = read_text(folder / HISTORY, "history of a run")
    try:
        rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        return [_epoch({key: _number(key, value) for key, value in row.items()}) for row in rows]
    except (ValueError, csv.Error) as error:
        raise MbibError(f"{folder / HISTORY} does not hold the epochs of a run: {error}") from None


def _number(column: str | None, text: str | list[str] | None) -> float | None:
    """Return the number in a cell; None in an empty one. DictReader calls what is beyond the header None."""
    if column is None:
        raise ValueError("a line has more columns than the first")
    if not text or isinstance(text, list):
        return None
    value = float(text)
    if not abs(value) < 1e300:
        raise ValueError(f"column {printable(column)}: expected a finite number, got {text}")
    return value


def _epoch(row: dict[str, float | None]) -> Epoch:
    def named(prefix: str) -> dict[str, float | None]:
        return {name.removeprefix(prefix): value for name, value in row.items() if name.startswith(prefix)}

    def accuracies(prefix: str) -> dict[str, float | None] | None:
        found = named(prefix)
        return found if found.get("top1") is not None else None

    def number(name: str) -> float:
        if name not in row:
            raise ValueError(f"there is no column {name}")
        value = row[name]
        if value is None:
            raise ValueError(f"column {name} is empty")
        return value

    losses = {name: value for name, value in named("train_").items() if value is not None}
    return Epoch(int(number("epoch")), number("lr"), number("seconds"), losses, accuracies("val_"), accuracies("raw_"))


def write_history(folder: Path, history: Sequence[Epoch]) -> None:
    """Write ``summary.csv`` anew, so that a resumed run has every epoch once."""
    columns = ["epoch", "lr", "train_loss", *(f"val_{name}" for name in EPOCH_METRICS), "seconds"]
    write_bytes(folder / HISTORY, mappings_to_csv([epoch.row() for epoch in history], first=columns))
