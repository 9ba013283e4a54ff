"""What `mbib predict` writes: tables to read, CSV, JSON lines, Parquet, and embeddings; and where it goes on.

CSV and JSON lines are written batch by batch, and an interrupted run's file is continued. Parquet files and embeddings
are there whole or not at all.
"""

import csv
import io
import json
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from mbib_timm.errors import DataError, MbibError, few, first_line
from mbib_timm.files import check_folder, check_place, counted, from_cell, parse_json, printable, require_own, to_cell

if TYPE_CHECKING:
    import numpy as np

FILE_FORMATS = ("csv", "jsonl", "parquet")
FORMATS = ("table", *FILE_FORMATS)
RESUMABLE = ("csv", "jsonl")
EMBEDDINGS = (".npy", ".parquet")
EMBEDDING_COLUMNS = ["image", "label", "embedding"]
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
        embeddings: file for the features that the prediction rests on, side by side, ``.npy`` or ``.parquet``; None for
            none.
        cam: folder for pictures of where the first class was seen (Grad-CAM); None for none.
        resume: leave out the images that the file of an interrupted run holds, and continue it.
    """

    format: str | None = None
    file: Path | None = None
    probabilities: bool = False
    embeddings: Path | None = None
    cam: Path | None = None
    resume: bool = False

    def check(self, estimates: bool) -> str:
        """Return the format. Raises MbibError for choices that contradict one another.

        Args:
            estimates: the prior is estimated, for which all images are needed.
        """
        format = self.format or self._format_of_name()
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
                ("--prior estimate", estimates),
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

    def _format_of_name(self) -> str:
        if self.file is None:
            return "table"
        if self.file == Path("-"):
            raise MbibError("--output -: predictions go to standard output without --output")
        suffix = self.file.suffix.lower().lstrip(".")
        if suffix not in FILE_FORMATS:
            check_place(self.file)
            endings = ", ".join(f".{each}" for each in FILE_FORMATS)
            raise MbibError(f"--output {self.file}: expected a name that ends in {endings}; or give --format too")
        return suffix


def _require(package: str, needed: str, extra: str) -> None:
    if find_spec(package) is None:
        raise MbibError(f"{needed}: pip install 'mbib-timm[{extra}]'")


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

    def ranks(self) -> int:
        """Return how many classes each image has columns of: no more than there are."""
        return min(self.top_k, len(self.names))

    def header(self) -> list[str]:
        """Return the columns' names."""
        ranks = range(1, self.ranks() + 1)
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


class TextWriter:
    """A file of text, or standard output, which stays open. When writing ends early, what there is makes sense."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def close(self) -> None:
        """Close the file."""
        if self.file is not sys.stdout:
            self.file.close()

    abandon = close


class TableWriter(TextWriter):
    """Predictions for a reader: an image, and below it its classes."""

    def __init__(self, names: Sequence[str], file: TextIO) -> None:
        super().__init__(file)
        self.names = names

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
    """Predictions as CSV: one row per image, see `RowColumns`; text that is somebody else's as `to_cell` gives it.

    The header is there where the file is continued.
    """

    def __init__(self, columns: RowColumns, file: TextIO, continued: bool) -> None:
        super().__init__(file)
        self.columns = columns
        self.csv = csv.writer(file, lineterminator="\n")
        if not continued:
            self.csv.writerow(map(to_cell, columns.header()))

    def write(self, items: Sequence[Prediction | Broken]) -> None:
        """Write some rows."""
        for item in items:
            self.csv.writerow(map(self._cell, self.columns.row(item)))
        self.file.flush()

    def _cell(self, value: str | float | None) -> str:
        if isinstance(value, str):
            return to_cell(value)
        return "" if value is None else f"{value:.{DIGITS}f}"


class JsonlWriter(TextWriter):
    """Predictions as JSON lines: an object per image."""

    def __init__(self, names: Sequence[str], file: TextIO) -> None:
        super().__init__(file)
        self.names = names

    def write(self, items: Sequence[Prediction | Broken]) -> None:
        """Write some lines."""
        for item in items:
            print(_encodable(json.dumps(self._content(item), ensure_ascii=False)), file=self.file)
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


def _encodable(text: str) -> str:
    """Return text whose surrogates, which UTF-8 has not, are escapes: those of JSON."""
    return text.encode("utf-8", "backslashreplace").decode()


class ParquetFile:
    """A Parquet file that is there when it is closed, and until then under another name."""

    def __init__(self, path: Path, columns: Sequence[tuple[str, Any]]) -> None:
        import pyarrow
        from pyarrow import parquet

        self.path, self.schema = path, pyarrow.schema(columns)
        self.beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self.writer = parquet.ParquetWriter(self.beside, self.schema)

    def write_columns(self, columns: Sequence[Any]) -> None:
        """Write rows, given by column."""
        import pyarrow

        columns = [[_encodable(cell) if isinstance(cell, str) else cell for cell in column] for column in columns]
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


class ParquetWriter(ParquetFile):
    """Predictions as Parquet, with the columns of CSV."""

    def __init__(self, columns: RowColumns, path: Path) -> None:
        import pyarrow

        self.columns = columns
        text = {"image", "label", "predicted", "error"}
        kinds = [
            (_encodable(name), pyarrow.string() if name in text or name.startswith("class_") else pyarrow.float32())
            for name in columns.header()
        ]
        super().__init__(path, kinds)

    def write(self, items: Sequence[Prediction | Broken]) -> None:
        """Write some rows."""
        if items:
            self.write_columns([*zip(*map(self.columns.row, items), strict=True)])


Writer = TableWriter | CsvWriter | JsonlWriter | ParquetWriter


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
        """Write some rows; the features, (B, C), float32, are of the images that could be read."""
        import numpy as np

        rows = iter(features)
        given = [None if isinstance(item, Broken) else next(rows) for item in items]
        if self.path.suffix.lower() == ".parquet":
            if self.parquet is None:
                import pyarrow

                kinds = (pyarrow.string(), pyarrow.string(), pyarrow.list_(pyarrow.float32()))
                self.parquet = ParquetFile(self.path, [*zip(EMBEDDING_COLUMNS, kinds, strict=True)])
            self.parquet.write_columns([[item.image for item in items], [item.label for item in items], given])
            return
        if self.array is None and features.size:
            shape = (self.images, features.shape[1])
            self.array = np.lib.format.open_memmap(self.beside, mode="w+", dtype=np.float32, shape=shape)
            # A full disk is an error now; writing to a map for which the disk has no room would end the process.
            if hasattr(os, "posix_fallocate"):
                with self.beside.open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, self.beside.stat().st_size)
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
class Continued:
    """What is there of an interrupted run.

    Attributes:
        images: that are done, under their paths as the file has them; see `written`.
        length: bytes of the file that hold them; what follows is half a line.
    """

    images: list[Prediction | Broken] = field(default_factory=list)
    length: int = 0


def written(text: str, format: str) -> str:
    """Return a name as a file of one of `RESUMABLE` has it."""
    return to_cell(text) if format == "csv" else text


def read_continued(file: Path, format: str, columns: RowColumns) -> Continued:
    """Read the file of an interrupted run; there may be none.

    Raises:
        MbibError: the file holds something else, or other columns than are to be written.
    """
    if not file.exists():
        return Continued()
    content = file.read_bytes()
    length = content.rfind(b"\n") + 1
    try:
        read, first = (_read_csv, ",".join(map(to_cell, columns.header()))) if format == "csv" else (_read_jsonl, "{")
        if not length and content and not _begin_alike(content, first.encode()):
            raise ValueError("its first line is another")
        images = read(content[:length].decode(), columns) if length else []
        _check_done(images)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, csv.Error) as error:
        raise MbibError(
            f"--resume: {file} does not hold predictions of this kind ({first_line(error)}); repeat the flags that it "
            "was written with, or choose another --output"
        ) from None
    return Continued(images, length)


def open_writer(format: str, columns: RowColumns, file: Path | None, continued: Continued) -> Writer:
    """Open a file of one of `FORMATS`, behind what an interrupted run has written whole; None for standard output."""
    if format == "parquet" and file is not None:
        return ParquetWriter(columns, file)
    stream: TextIO = sys.stdout if file is None else _open_text(file, continued)
    if format == "csv":
        return CsvWriter(columns, stream, continued=continued.length > 0)
    return JsonlWriter(columns.names, stream) if format == "jsonl" else TableWriter(columns.names, stream)


def _open_text(file: Path, continued: Continued) -> TextIO:
    if continued.length:
        os.truncate(file, continued.length)
    return file.open("a" if continued.length else "w", encoding="utf-8", newline="")


def check_replaced(file: Path, format: str) -> None:
    """Raise MbibError for a file that holds something else than predictions of a format: it would be lost."""
    otherwise = f"holds no predictions of format {format}"
    require_own("--output", file, lambda there: _holds_predictions(there, format), otherwise)


def check_replaced_embeddings(file: Path) -> None:
    """Raise MbibError for a file that holds something else than embeddings; an array has nothing more to be told by
    than its type and its two dimensions."""
    require_own("--embeddings", file, _holds_embeddings, "holds no embeddings of this command")


def _holds_embeddings(file: Path) -> bool:
    if file.suffix.lower() == ".parquet":
        return _parquet_columns(file) == EMBEDDING_COLUMNS
    import numpy as np

    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError):
        return False
    return isinstance(array, np.memmap) and array.ndim == 2 and array.dtype == np.float32


def _parquet_columns(file: Path) -> list[str]:
    """Return the names of a Parquet file's columns; none of what is no such file."""
    from pyarrow import ArrowException, parquet

    try:
        names: list[str] = parquet.read_schema(file).names
    except (ArrowException, OSError):
        return []
    return names


def _holds_predictions(file: Path, format: str) -> bool:
    first_columns = RowColumns([""], 1, False).header()[:-1]
    if format == "parquet":
        return _parquet_columns(file)[: len(first_columns)] == first_columns
    with file.open("rb") as opened:
        if format == "table":
            opened.readline()
            return re.match(rb"  (unsure\n|[ \d]{3}\.\d\d %  )", opened.readline()) is not None
        beginning = f"{','.join(first_columns)}," if format == "csv" else '{"image": "'
        return _begin_alike(opened.read(len(beginning)), beginning.encode())


def _begin_alike(one: bytes, other: bytes) -> bool:
    shorter = min(len(one), len(other))
    return one[:shorter] == other[:shorter]


def _check_done(images: Sequence[Prediction | Broken]) -> None:
    for item in images:
        error = item.reason if isinstance(item, Broken) else ""
        if not all(isinstance(text, str) for text in (item.image, item.label or "", error)):
            raise ValueError("an image, a label or an error is not text")
        for _, probability in [] if isinstance(item, Broken) else item.classes:
            if not 0 <= probability <= 1:
                raise ValueError(f"{probability} is not a probability")


def _label_of(name: str, labels: Mapping[str, int]) -> int:
    if name not in labels:
        raise ValueError(f"the model has no class {name!r}")
    return labels[name]


def _read_csv(content: str, columns: RowColumns) -> list[Prediction | Broken]:
    header = [*map(to_cell, columns.header())]
    reader = csv.reader(io.StringIO(content, newline=""), strict=True)
    first = next(reader)
    if first != header:
        differences = [
            f"{verb} {few(names)}"
            for verb, names in (
                ("lacks", [name for name in header if name not in first]),
                ("has", [name for name in first if name not in header]),
            )
            if names
        ]
        raise ValueError(f"of the columns it {' and '.join(differences) or 'has another order'}")
    labels = {to_cell(name): label for label, name in enumerate(columns.names)}
    images: list[Prediction | Broken] = []
    for row in reader:
        if len(row) != len(header):
            raise ValueError(f"line {reader.line_num} has {len(row)} cells, the header {len(header)}")
        truth = (columns.names[labels[row[1]]] if row[1] in labels else from_cell(row[1])) or None
        if row[-1]:
            images.append(Broken(row[0], row[-1], truth))
            continue
        ranked = zip(row[4 : 4 + 2 * columns.ranks() : 2], row[5 : 5 + 2 * columns.ranks() : 2], strict=True)
        classes = [(_label_of(name, labels), float(value)) for name, value in ranked]
        images.append(Prediction(row[0], classes, truth, unsure=row[2] == UNSURE != row[4]))
    return images


def _read_jsonl(content: str, columns: RowColumns) -> list[Prediction | Broken]:
    labels = {name: label for label, name in enumerate(columns.names)}
    images: list[Prediction | Broken] = []
    for line in content.rstrip("\n").split("\n"):
        item = parse_json(line)
        truth = item.get("label")
        if "error" in item:
            images.append(Broken(item["image"], item["error"], truth))
            continue
        classes = [(_label_of(each["name"], labels), float(each["probability"])) for each in item["classes"]]
        if len(classes) != columns.ranks():
            raise ValueError(f"it has {counted(len(classes), 'class')} of each image, not {columns.ranks()}")
        if ("probabilities" in item) != columns.probabilities:
            raise ValueError(f"it is written with{'' if 'probabilities' in item else 'out'} --probabilities")
        unsure = item["predicted"] != item["classes"][0]["name"]
        images.append(Prediction(item["image"], classes, truth, unsure=unsure))
    return images
