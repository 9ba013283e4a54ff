"""What `mbib predict` writes: tables to read, CSV, JSON lines, Parquet, and embeddings; and where it goes on.

CSV and JSON lines are written batch by batch, and an interrupted run's file is continued. Parquet files and embeddings
are there whole or not at all.
"""

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from mbib_timm.errors import DataError, MbibError
from mbib_timm.files import check_folder, check_place, printable

if TYPE_CHECKING:
    import numpy as np

FORMATS = ("table", "csv", "jsonl", "parquet")
RESUMABLE = ("csv", "jsonl")
EMBEDDINGS = (".npy", ".parquet")
# Of a probability in text.
DIGITS = 6
# In the place of a class whose probability is below the threshold.
UNSURE = "unsure"


@dataclass(frozen=True)
class Prediction:
    """What a model says of an image.

    Attributes:
        image: its path.
        classes: label and probability of the most probable classes, the first the most probable.
        label: the name of its class, where that is known.
        probabilities: of all classes, (K,), where they are asked for.
        unsure: the first class is not probable enough.
    """

    image: str
    classes: list[tuple[int, float]]
    label: str | None = None
    probabilities: "np.ndarray | None" = None
    unsure: bool = False


@dataclass(frozen=True)
class Broken:
    """An image that cannot be read.

    Attributes:
        image: its path.
        reason: in words.
        label: the name of its class, where that is known.
    """

    image: str
    reason: str
    label: str | None = None


@dataclass(frozen=True)
class OutputChoice:
    """What is to be written, and where.

    Attributes:
        format: one of `FORMATS`; None for that of the file's suffix, and else ``table``.
        file: None for standard output.
        probabilities: of all classes.
        embeddings: file of the features; None for none.
        cam: folder of Grad-CAM's overlays; None for none.
        resume: continue the file of an interrupted run.
        estimates: the prior is estimated, for which all images are needed.
    """

    format: str | None = None
    file: Path | None = None
    probabilities: bool = False
    embeddings: Path | None = None
    cam: Path | None = None
    resume: bool = False
    estimates: bool = False

    def check(self) -> str:
        """Return the format. Raises MbibError for choices that contradict one another."""
        suffix = self.file.suffix.lower().lstrip(".") if self.file else ""
        format = self.format or (suffix if suffix in FORMATS else "table")
        if format == "parquet" and self.file is None:
            raise MbibError("--format parquet needs --output FILE")
        if self.probabilities and format == "table":
            raise MbibError("--probabilities needs --format csv, jsonl or parquet")
        if self.embeddings is not None and self.embeddings.suffix.lower() not in EMBEDDINGS:
            raise MbibError(f"--embeddings {self.embeddings}: expected a name that ends in {' or '.join(EMBEDDINGS)}")
        if self.resume:
            if self.file is None or format not in RESUMABLE:
                raise MbibError("--resume continues a CSV or JSON lines file: give --output FILE.csv or FILE.jsonl")
            for flag, chosen in (
                ("--embeddings", self.embeddings is not None),
                ("--cam", self.cam is not None),
                ("--prior estimate", self.estimates),
            ):
                if chosen:
                    raise MbibError(f"{flag} needs all images at once; omit --resume")
        for path in (self.file, self.embeddings):
            if path is not None:
                check_place(path)
        if format == "parquet" or (self.embeddings is not None and self.embeddings.suffix.lower() == ".parquet"):
            _require("pyarrow", "Parquet files need pyarrow", "table")
        if self.cam is not None:
            _require("pytorch_grad_cam", "--cam needs grad-cam", "cam")
            if self.cam.exists() and not self.cam.is_dir():
                raise MbibError(f"--cam {self.cam}: expected a folder, and this is a file")
            check_folder(self.cam)
        if self.file is not None and self.file == self.embeddings:
            raise MbibError(f"--output and --embeddings are both {self.file}; give them a file each")
        return format


def _require(package: str, needed: str, extra: str) -> None:
    if find_spec(package) is None:
        raise MbibError(f"{needed}: pip install 'mbib-timm[{extra}]'")


def make_folder(path: Path) -> None:
    """Make a folder, with those above it. Raises MbibError where a file is in the way."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise MbibError(f"cannot make the folder {path}: there is a file of that name on the way") from None


class Writer(Protocol):
    """Takes predictions in batches."""

    def write(self, items: Sequence[Prediction | Broken]) -> None:
        """Write some."""

    def close(self) -> None:
        """Finish the file."""

    def abandon(self) -> None:
        """Leave what makes no sense unless it is whole."""


class TextWriter:
    """What ends the writers of text: nothing is left to do, and what there is makes sense."""

    def close(self) -> None:
        """Nothing is left to do."""

    def abandon(self) -> None:
        """Keep what there is."""


@dataclass(frozen=True)
class RowColumns:
    """The columns of CSV and Parquet: one row per image.

    Attributes:
        names: of the classes, in label order, each its own.
        top_k: classes that each image has columns of.
        probabilities: a column for each class as well.
    """

    names: Sequence[str]
    top_k: int
    probabilities: bool

    def header(self) -> list[str]:
        """Return the columns' names."""
        ranks = range(1, min(self.top_k, len(self.names)) + 1)
        return [
            *("image", "label", "predicted", "probability"),
            *(column for rank in ranks for column in (f"class_{rank}", f"probability_{rank}")),
            *([f"p({name})" for name in self.names] if self.probabilities else []),
            "error",
        ]

    def row(self, item: Prediction | Broken) -> list[Any]:
        """Return a row: text, floats, and None where there is nothing."""
        if isinstance(item, Broken):
            return [item.image, item.label, *[None] * (len(self.header()) - 3), item.reason]
        best, probability = item.classes[0]
        return [
            *(item.image, item.label, UNSURE if item.unsure else self.names[best], probability),
            *(cell for label, value in item.classes for cell in (self.names[label], value)),
            *([] if item.probabilities is None else item.probabilities.tolist()),
            None,
        ]


class TableWriter(TextWriter):
    """Predictions for a reader: an image, and below it its classes.

    Args:
        names: of the classes.
        file: where to.
    """

    def __init__(self, names: Sequence[str], file: TextIO) -> None:
        self.names, self.file = names, file

    def write(self, items: Sequence[Prediction | Broken]) -> None:
        """Write some; those that cannot be read are listed at the end by whoever runs this."""
        for item in items:
            if isinstance(item, Broken):
                continue
            label = "" if item.label is None else f"  (labelled {item.label})"
            print(printable(item.image + label), file=self.file)
            if item.unsure:
                print(f"  {UNSURE}", file=self.file)
            for label_of, probability in item.classes:
                print(f"  {100 * probability:6.2f} %  {printable(self.names[label_of])}", file=self.file)
        self.file.flush()


class CsvWriter(TextWriter):
    """Predictions as CSV: one row per image, see `RowColumns`.

    Args:
        columns: of the table.
        file: where to.
        continued: the header is there.
    """

    def __init__(self, columns: RowColumns, file: TextIO, continued: bool) -> None:
        self.columns, self.file = columns, file
        self.csv = csv.writer(file, lineterminator="\n")
        if not continued:
            self.csv.writerow(columns.header())

    def write(self, items: Sequence[Prediction | Broken]) -> None:
        """Write some rows."""
        for item in items:
            row = self.columns.row(item)
            self.csv.writerow([f"{cell:.{DIGITS}f}" if isinstance(cell, float) else cell for cell in row])
        self.file.flush()


class JsonlWriter(TextWriter):
    """Predictions as JSON lines: an object per image.

    Args:
        names: of the classes.
        file: where to.
    """

    def __init__(self, names: Sequence[str], file: TextIO) -> None:
        self.names, self.file = names, file

    def write(self, items: Sequence[Prediction | Broken]) -> None:
        """Write some lines."""
        for item in items:
            print(json.dumps(self._content(item), ensure_ascii=False), file=self.file)
        self.file.flush()

    def _content(self, item: Prediction | Broken) -> dict[str, Any]:
        named = {"image": item.image} | ({} if item.label is None else {"label": item.label})
        if isinstance(item, Broken):
            return named | {"error": item.reason}
        classes = [
            {"class": label, "name": self.names[label], "probability": round(value, DIGITS)}
            for label, value in item.classes
        ]
        content: dict[str, Any] = {
            **named,
            "predicted": UNSURE if item.unsure else classes[0]["name"],
            "probability": classes[0]["probability"],
            "classes": classes,
        }
        if item.probabilities is not None:
            values = [round(value, DIGITS) for value in item.probabilities.tolist()]
            content["probabilities"] = dict(zip(self.names, values, strict=True))
        return content


class ParquetFile:
    """A Parquet file that is there when it is closed, and until then under another name.

    Args:
        path: of the file.
        schema: pyarrow's.
    """

    def __init__(self, path: Path, schema: Any) -> None:
        from pyarrow import parquet

        self.path, self.schema = path, schema
        self.beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self.writer = parquet.ParquetWriter(self.beside, schema)

    def write(self, columns: Sequence[Any]) -> None:
        """Write rows, given by column."""
        import pyarrow

        arrays = [pyarrow.array(column, kind.type) for column, kind in zip(columns, self.schema, strict=True)]
        self.writer.write_table(pyarrow.Table.from_arrays(arrays, schema=self.schema))

    def close(self) -> None:
        """Give the file its name."""
        self.writer.close()
        os.replace(self.beside, self.path)

    def abandon(self) -> None:
        """Remove what there is."""
        self.writer.close()
        self.beside.unlink(missing_ok=True)


class ParquetWriter:
    """Predictions as Parquet, with the columns of CSV.

    Args:
        columns: of the table.
        path: of the file.
    """

    def __init__(self, columns: RowColumns, path: Path) -> None:
        import pyarrow

        self.columns = columns
        text = {"image", "label", "predicted", "error"}
        schema = [
            (name, pyarrow.string() if name in text or name.startswith("class_") else pyarrow.float32())
            for name in columns.header()
        ]
        self.file = ParquetFile(path, pyarrow.schema(schema))

    def write(self, items: Sequence[Prediction | Broken]) -> None:
        """Write some rows."""
        if items:
            self.file.write([*zip(*map(self.columns.row, items), strict=True)])

    def close(self) -> None:
        """Finish the file."""
        self.file.close()

    def abandon(self) -> None:
        """Remove what there is."""
        self.file.abandon()


class EmbeddingsWriter:
    """Features of images as a NumPy array (N, C), or as Parquet of ``image``, ``label`` and ``embedding``.

    Both have a row for each image, in the order of the predictions: of one that cannot be read, NaN or null.

    Args:
        path: of the file, ``.npy`` or ``.parquet``.
        images: their number N.
    """

    def __init__(self, path: Path, images: int) -> None:
        self.path, self.images = path, images
        self.beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self.array: Any = None
        self.parquet: ParquetFile | None = None
        self.done = 0

    def write(self, items: Sequence[Prediction | Broken], features: "np.ndarray") -> None:
        """Write some rows.

        Args:
            items: images in order.
            features: of those that could be read, (B, C), float32.
        """
        import numpy as np

        rows = iter(features)
        given = [None if isinstance(item, Broken) else next(rows) for item in items]
        if self.path.suffix.lower() == ".parquet":
            if self.parquet is None:
                import pyarrow

                kinds = [("image", pyarrow.string()), ("label", pyarrow.string())]
                schema = pyarrow.schema([*kinds, ("embedding", pyarrow.list_(pyarrow.float32()))])
                self.parquet = ParquetFile(self.path, schema)
            self.parquet.write([[item.image for item in items], [item.label for item in items], given])
            return
        if self.array is None and features.size:
            shape = (self.images, features.shape[1])
            self.array = np.lib.format.open_memmap(self.beside, mode="w+", dtype=np.float32, shape=shape)
            self.array[:] = math.nan
        for place, row in enumerate(given, start=self.done):
            if row is not None:
                self.array[place] = row
        self.done += len(items)

    def close(self) -> None:
        """Give the file its name. Raises DataError where no image could be read, and nothing says how wide rows are."""
        if self.parquet is not None:
            self.parquet.close()
        elif self.array is None:
            raise DataError(f"none of the {self.images} images can be read, and there are no embeddings to write")
        else:
            self.array.flush()
            self.array = None
            os.replace(self.beside, self.path)

    def abandon(self) -> None:
        """Remove what there is."""
        if self.parquet is not None:
            self.parquet.abandon()
        self.array = None
        self.beside.unlink(missing_ok=True)


@dataclass(frozen=True)
class DoneImage:
    """What the file of an interrupted run says of an image.

    Attributes:
        image: its path.
        label: name of its class, where it is known.
        best: name of its most probable class; None for an image that could not be read.
        probability: of that class.
        unsure: it was not probable enough.
        error: why the image could not be read; empty where it could.
    """

    image: str
    label: str | None
    best: str | None
    probability: float
    unsure: bool
    error: str


@dataclass(frozen=True)
class Continued:
    """What is there of an interrupted run.

    Attributes:
        images: that are done.
        length: bytes of the file that hold them; what follows is half a line.
    """

    images: list[DoneImage] = field(default_factory=list)
    length: int = 0


def read_continued(file: Path, format: str, columns: RowColumns) -> Continued:
    """Read the file of an interrupted run; there may be none.

    Raises:
        MbibError: the file holds something else, or other columns than are to be written.
    """
    if not file.exists():
        return Continued()
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    try:
        found = _read_csv(whole, columns) if format == "csv" else _read_jsonl(whole, columns)
        known = {*columns.names, None}
        if (other := next((image.best for image in found.images if image.best not in known), None)) is not None:
            raise ValueError(f"the model has no class {other!r}")
        return found
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, csv.Error) as error:
        raise MbibError(f"--resume: {file} does not hold predictions of this kind ({error}); remove it first") from None


def _read_csv(content: bytes, columns: RowColumns) -> Continued:
    lines = io.BytesIO(content)
    ends = [0]

    def texts() -> Iterable[str]:
        for line in lines:
            ends[0] += len(line)
            yield line.decode()

    header = columns.header()
    reader = csv.reader(texts())
    if content and (first := next(reader)) != header:
        expected = "expected columns " + ", ".join(header[:8]) + (" ..." if len(header) > 8 else "")
        raise ValueError(f"{expected}, got {', '.join(first[:8])}")
    images, length = [], ends[0]
    for row in reader:
        if len(row) != len(header):
            if ends[0] == len(content):  # a line end in half a quoted cell
                break
            raise ValueError(f"line {reader.line_num} has {len(row)} cells, the header {len(header)}")
        length = ends[0]
        of = dict(zip(header, row, strict=True))
        best = of["class_1"] or None
        probability = float(of["probability"]) if best else math.nan
        images.append(DoneImage(row[0], row[1] or None, best, probability, row[2] == UNSURE != best, row[-1]))
    return Continued(images, length)


def _read_jsonl(content: bytes, columns: RowColumns) -> Continued:
    images = []
    for line in content.decode().rstrip("\n").split("\n") if content else ():
        item = json.loads(line)
        label = item.get("label")
        if "error" in item:
            images.append(DoneImage(item["image"], label, None, math.nan, False, item["error"]))
            continue
        if len(item["classes"]) != min(columns.top_k, len(columns.names)):
            raise ValueError(f"it has {len(item['classes'])} classes of each image, not {columns.top_k}")
        if ("probabilities" in item) != columns.probabilities:
            raise ValueError(f"it is written with{'' if 'probabilities' in item else 'out'} --probabilities")
        best = item["classes"][0]["name"]
        unsure = item["predicted"] != best
        images.append(DoneImage(item["image"], label, best, float(item["probability"]), unsure, ""))
    return Continued(images, len(content))
