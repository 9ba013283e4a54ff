"""The files that say what a model predicts of every image and every class; and the most confident errors, with images.

predictions.csv    image, class, predicted, probability
confusion.csv      images of each class (rows) by the class that they are taken for (columns)
classes.csv        class, training images, evaluated images, accuracy with its interval, F1
errors.json        the wrong answers of the highest probability, with small images, for reports
"""

import base64
import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mbib_timm.data.images import Split, convert_image
from mbib_timm.data.long_tail import named
from mbib_timm.errors import MbibError
from mbib_timm.evaluation.evaluate import Answers
from mbib_timm.evaluation.metrics import class_accuracy, class_f1, independent, wilson_interval
from mbib_timm.files import begins_with, from_cell, read_json, read_text, require_own, to_csv, to_json, write_bytes

PREDICTIONS, CONFUSION, CLASSES, ERRORS = "predictions.csv", "confusion.csv", "classes.csv", "errors.json"
# A matrix of more classes is a list of its cells that are not empty: iNaturalist's would have 66 million.
LARGEST_MATRIX = 500
CORNER = "class \\ predicted"
PREDICTION_COLUMNS = ("image", "class", "predicted", "probability")
CELL_COLUMNS = ("class", "predicted", "images")
CLASS_COLUMNS = ("class", "training_images", "evaluated_images", "accuracy", "accuracy_low", "accuracy_high", "f1")
SHOWN_ERRORS = 24
THUMBNAIL = 128  # pixels of the longer side


@dataclass(frozen=True)
class ConfusionMatrix:
    """Images by class and by the class that they are taken for: the cells that are not empty.

    Attributes:
        names: of the classes, (K,); of a long matrix those in its cells.
        rows: true classes, (C,), int64.
        columns: predicted ones, (C,), int64.
        images: (C,), int64, at least 1.
    """

    names: tuple[str, ...]
    rows: np.ndarray
    columns: np.ndarray
    images: np.ndarray

    def dense(self) -> np.ndarray:
        """Return the matrix, (K, K), int64."""
        matrix = np.zeros((len(self.names), len(self.names)), dtype=np.int64)
        matrix[self.rows, self.columns] = self.images
        return matrix


@dataclass(frozen=True)
class ConfidentError:
    """A wrong answer.

    Attributes:
        image: where it is, below the folder of the data.
        label: name of its class.
        predicted: name of the class that it is taken for.
        probability: of that class, in 0..1.
        thumbnail: a small image as a data URL.
    """

    image: str
    label: str
    predicted: str
    probability: float
    thumbnail: str


@dataclass(frozen=True)
class ConfidentErrors:
    """The wrong answers of the highest probability, which falls."""

    errors: list[ConfidentError]


def write_answers(
    folder: Path,
    answers: Answers,
    images: Split,
    class_counts: np.ndarray,
    class_names: Sequence[str] | None,
    data_dir: str | None,
    prefix: str = "",
) -> list[Path]:
    """Write predictions.csv, confusion.csv and classes.csv, each whole or not at all.

    Args:
        folder: where to.
        answers: for the images.
        images: that were evaluated.
        class_counts: training images of each class, (K,).
        class_names: in label order; numbers where there are none.
        data_dir: what paths are relative to, where they lie below it.
        prefix: goes before the files' names.

    Returns:
        The files.
    """
    names = named(class_names, len(class_counts))
    contents = {
        PREDICTIONS: _predictions(answers, images, names, data_dir),
        CONFUSION: _confusion(answers, names),
        CLASSES: _classes(answers, images, class_counts, names),
    }
    for name, rows in contents.items():
        write_bytes(folder / f"{prefix}{name}", to_csv(rows))
    return [folder / f"{prefix}{name}" for name in contents]


def require_own_answers(flag: str, folder: Path, prefix: str) -> None:
    """Raise MbibError where `write_answers` would replace a file that is none of its own; the flag asks for them."""
    headers = {
        PREDICTIONS: [to_csv([PREDICTION_COLUMNS])],
        CONFUSION: [f"{CORNER},".encode(), to_csv([CELL_COLUMNS])],
        CLASSES: [to_csv([CLASS_COLUMNS])],
    }
    for name, beginnings in headers.items():
        require_own(flag, folder / f"{prefix}{name}", begins_with(*beginnings), "holds something else")


def _predictions(
    answers: Answers, images: Split, names: Sequence[str], data_dir: str | None
) -> Iterable[Sequence[object]]:
    yield PREDICTION_COLUMNS
    for place, target, guess, probability in zip(
        answers.index, answers.targets, answers.predicted, answers.probability, strict=True
    ):
        yield images.name(int(place), data_dir), names[target], names[guess], f"{probability:.6f}"


def _confusion(answers: Answers, names: Sequence[str]) -> Iterable[Sequence[object]]:
    cells, images = np.unique(answers.targets * len(names) + answers.predicted, return_counts=True)
    if len(names) <= LARGEST_MATRIX:
        matrix = np.zeros(len(names) ** 2, dtype=np.int64)
        matrix[cells] = images
        yield CORNER, *names
        for name, row in zip(names, matrix.reshape(len(names), -1).tolist(), strict=True):
            yield name, *row
    else:
        yield CELL_COLUMNS
        for cell, number in zip(cells.tolist(), images.tolist(), strict=True):
            yield names[cell // len(names)], names[cell % len(names)], number


def _classes(
    answers: Answers, images: Split, class_counts: np.ndarray, names: Sequence[str]
) -> Iterable[Sequence[object]]:
    correct = answers.targets == answers.predicted
    total, right, taken = (
        np.bincount(labels, minlength=len(names))
        for labels in (answers.targets, answers.targets[correct], answers.predicted)
    )
    groups = None if images.groups is None else images.groups[answers.index]
    worth = independent(answers.targets, len(names), groups)
    accuracy, f1 = class_accuracy(total, right), class_f1(total, right, taken)
    yield CLASS_COLUMNS
    for label, name in enumerate(names):
        measured: Sequence[float] = ()
        if total[label]:
            interval = wilson_interval(right[label] / total[label] * worth[label], worth[label])
            measured = accuracy[label], *interval, f1[label]
        shown = [f"{value:.2f}" for value in measured] or [""] * 4
        yield name, int(class_counts[label]), int(total[label]), *shown


def write_errors(
    folder: Path, answers: Answers, images: Split, class_names: Sequence[str] | None, data_dir: str | None
) -> None:
    """Write errors.json: the most confident of the wrong answers, with their images; see `write_answers`."""
    wrong = np.flatnonzero(answers.targets != answers.predicted)
    chosen = wrong[np.argsort(-answers.probability[wrong], kind="stable")][:SHOWN_ERRORS]
    names = named(class_names, int(max(answers.targets.max(), answers.predicted.max())) + 1)
    errors = [
        ConfidentError(
            image=images.name(int(answers.index[i]), data_dir),
            label=names[answers.targets[i]],
            predicted=names[answers.predicted[i]],
            probability=round(float(answers.probability[i]), 6),
            thumbnail=_thumbnail(images, int(answers.index[i])),
        )
        for i in chosen
    ]
    write_bytes(folder / ERRORS, to_json(ConfidentErrors(errors)))


def _thumbnail(images: Split, place: int) -> str:
    """Return the image at a place as a data URL, at most `THUMBNAIL` pixels wide and high."""
    image = convert_image(images.reader.read(images.index_of(place)), "RGB")
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    content, small = io.BytesIO(), max(image.size) <= THUMBNAIL // 2
    options: dict[str, Any] = {"format": "PNG"} if small else {"format": "JPEG", "quality": 85}
    image.save(content, **options)
    return f"data:image/{options['format'].lower()};base64,{base64.b64encode(content.getvalue()).decode()}"


def read_confusion(folder: Path) -> ConfusionMatrix | None:
    """Read confusion.csv of a run's folder; None where there is none.

    Raises:
        MbibError: the file holds something else.
    """
    file = folder / CONFUSION
    if not file.is_file():
        return None
    text = read_text(file, "confusion matrix")
    try:
        lines = csv.reader(io.StringIO(text, newline=""), strict=True)
        (corner, *header), *rows = ([from_cell(cell) for cell in row] for row in lines)
        if corner == CORNER:
            matrix = np.array([[int(number) for number in row[1:]] for row in rows], dtype=np.int64)
            if matrix.shape != (len(header), len(header)):
                raise ValueError(f"{len(header)} columns and rows of {matrix.shape}")
            row, column = np.nonzero(matrix)
            return ConfusionMatrix(tuple(header), row, column, matrix[row, column])
        names = {name: place for place, name in enumerate(dict.fromkeys(name for row in rows for name in row[:2]))}
        cells = np.array([[names[true], names[taken], int(number)] for true, taken, number in rows], dtype=np.int64)
        return ConfusionMatrix(tuple(names), *cells.reshape(-1, 3).T)
    except (ValueError, IndexError, OverflowError, csv.Error) as error:
        raise MbibError(f"{file} does not hold a confusion matrix: {error}") from None


def read_errors(folder: Path) -> list[ConfidentError]:
    """Read errors.json of a run's folder; none where there is no such file.

    Raises:
        MbibError: the file holds something else.
    """
    file = folder / ERRORS
    errors = read_json(ConfidentErrors, file, "a model's errors").errors if file.is_file() else []
    if not all(error.thumbnail.startswith("data:image/") for error in errors):
        raise MbibError(f"{file} does not hold a model's errors: a thumbnail is not an image")
    return errors
