"""The images that `mbib predict` is given: files, folders, archives, tables and lists; with labels where there are."""

import csv
import os
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image
from timm.utils.misc import natural_key

from mbib_timm.data.folders import ArchiveReader, image_kinds, is_archive, open_archive
from mbib_timm.data.images import Reader
from mbib_timm.errors import DataError, MbibError, unknown_name

# Among the arguments, what stands for names on standard input.
STANDARD_INPUT = "-"
TABLES = (".csv", ".tsv", ".parquet")
# Of a CSV's cells: spreadsheets in many languages write semicolons.
SEPARATORS = ",;\t"
# Of a table, where no other columns are named.
PATH_COLUMN, LABEL_COLUMN = "path", "label"


class FileReader:
    """Images in files of their own.

    Args:
        paths: of the files.
        names: what each is called; its path when None.
    """

    def __init__(self, paths: Sequence[Path], names: Sequence[str] | None = None) -> None:
        self.paths, self.names = paths, names

    def read(self, index: int) -> Image.Image:
        """Open an image."""
        return Image.open(self.paths[index])

    def path(self, index: int) -> str:
        """Return what it is called."""
        return str(self.paths[index]) if self.names is None else self.names[index]


@dataclass(frozen=True)
class FoundImage:
    """An image to predict.

    Attributes:
        reader: gives it.
        index: its number there.
        name: its path below what was given, such as ``fox/site A/1.jpg``.
        label: name of its class; None where it is not known.
    """

    reader: Reader
    index: int
    name: str
    label: str | None = None

    @property
    def path(self) -> str:
        """Where it is, as text that can be written anywhere."""
        return self.reader.path(self.index).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


@dataclass(frozen=True)
class Columns:
    """Columns of a table of images.

    Attributes:
        path: holds the images' paths, relative to the table's folder.
        label: holds the names of their classes; None for `LABEL_COLUMN`, where there is one.
    """

    path: str = PATH_COLUMN
    label: str | None = None


@dataclass(frozen=True)
class FoundImages:
    """What one argument gives.

    Attributes:
        given: the argument.
        images: in natural order, of a table or list in its own.
        in_folders: their folders may be classes: they come from a folder or an archive.
    """

    given: str
    images: list[FoundImage]
    in_folders: bool = False


def find_images(given: Sequence[str], columns: Columns | None = None) -> list[FoundImages]:
    """Find the images in files, folders, archives and tables.

    Args:
        given: paths; ``-`` for paths on standard input, one per line.
        columns: of tables.

    Raises:
        DataError: a path that does not exist, what holds no images, or a table that is malformed.
    """
    found = []
    for each in given:
        if each == STANDARD_INPUT:
            found.append(FoundImages("standard input", _listed(_names_on_standard_input(), "standard input")))
        else:
            found.append(_find(each, columns or Columns()))
    return found


def _find(given: str, columns: Columns) -> FoundImages:
    path = Path(given)
    if path.suffix.lower() in TABLES and path.is_file():
        return FoundImages(given, _read_table(path, columns))
    if is_archive(path):
        archive = open_archive(path)
        names = sorted(archive.members, key=natural_key)
        places = np.array([archive.members[name] for name in names], dtype=np.int64).reshape(-1, 2)
        inside = ArchiveReader(path, names, places, archive.tar)
        images = [FoundImage(inside, index, name) for index, name in enumerate(names)]
    elif path.is_dir():
        files = sorted(_files_below(path), key=lambda file: natural_key(str(file)))
        reader = FileReader(files)
        images = [FoundImage(reader, index, file.relative_to(path).as_posix()) for index, file in enumerate(files)]
    elif path.is_file():
        images = [FoundImage(FileReader([path]), 0, path.name)]
        return FoundImages(given, images)
    else:
        raise DataError(f"there is no image, folder, archive or table at {path}")
    if not images:
        raise DataError(f"no images in {path} (looked for {', '.join(image_kinds())})")
    return FoundImages(given, images, in_folders=True)


def _files_below(root: Path) -> Iterator[Path]:
    """Give the images below a folder; hidden files and folders, and what macOS adds to archives, are none."""
    kinds = image_kinds()
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__MACOSX"]
        for name in files:
            path = Path(folder, name)
            if path.suffix.lower() in kinds and not name.startswith(".") and path.is_file():
                yield path


def _names_on_standard_input() -> list[str]:
    if sys.stdin is None or sys.stdin.isatty():
        raise MbibError("- reads names of images from standard input, one per line, and there is none: pipe them in")
    lines = (os.fsdecode(line).rstrip("\r\n") for line in sys.stdin.buffer)
    return [line for line in lines if line]


def _listed(names: Sequence[str], where: str, root: Path | None = None, labels: Sequence[str] = ()) -> list[FoundImage]:
    """Return the images of a list. One that is missing will be reported as unreadable, but not all may be."""
    if not names:
        raise DataError(f"{where} names no images")
    paths = [Path(name) if root is None else root / name for name in names]
    if not any(path.is_file() for path in paths):
        raise DataError(f"{where} names {len(paths):,} images, and none of them is there: the first is {paths[0]}")
    reader = FileReader(paths, names)  # under the list's own names, by which its reader can join what comes out
    named = [PurePosixPath(*(part for part in Path(name).parts if part not in ("/", ".."))) for name in names]
    return [
        FoundImage(reader, index, str(name), (labels[index] or None) if labels else None)
        for index, name in enumerate(named)
    ]


def _read_table(file: Path, columns: Columns) -> list[FoundImage]:
    header, rows = _read_parquet(file) if file.suffix.lower() == ".parquet" else _read_csv(file)
    if not header:
        raise DataError(f"{file} is empty; expected a first line that names its columns, such as path,label")
    if columns.path not in header:
        raise DataError(f"{file}: {unknown_name('column of paths', columns.path, header)}")
    if columns.label is not None and columns.label not in header:
        raise DataError(f"{file}: {unknown_name('column of labels', columns.label, header)}")
    path_at = header.index(columns.path)
    label = columns.label or LABEL_COLUMN
    paths = [row[path_at] for row in rows]
    if "" in paths:
        raise DataError(f"{file}, row {paths.index('') + 1}: column {columns.path!r} is empty")
    labels = [row[header.index(label)].strip() for row in rows] if label in header else []
    return _listed(paths, str(file), file.parent, labels)


def _read_csv(file: Path) -> tuple[list[str], list[list[str]]]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            separator = max(SEPARATORS, key=lines.readline().count)
            lines.seek(0)
            reader = csv.reader(lines, delimiter=separator, strict=True)
            header = next(reader, [])
            rows = []
            for row in reader:
                if len(row) not in (0, len(header)):
                    raise DataError(f"{file}, line {reader.line_num}: {len(row)} cells, the header has {len(header)}")
                if row:
                    rows.append(row)
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{file} is no text file in UTF-8") from None
    except csv.Error as error:
        raise DataError(f"{file}, line {reader.line_num}: {error}") from None
    return header, rows


def _read_parquet(file: Path) -> tuple[list[str], list[list[str]]]:
    parquet = import_parquet()
    try:
        table = parquet.read_table(file)
    except (OSError, ValueError) as error:  # pyarrow's own are kinds of these
        raise DataError(f"cannot read {file}: {' '.join(str(error).split())[:200]}") from None
    cells = [["" if value is None else str(value) for value in column.to_pylist()] for column in table.columns]
    return table.column_names, [list(row) for row in zip(*cells, strict=True)]


def label_by_folder(found: FoundImages, class_names: Sequence[str]) -> FoundImages:
    """Return images with the first folder level as their label, where one of those folders is a class.

    In an archive whose images lie below one common folder, the level below it counts.

    Args:
        found: images of one argument.
        class_names: of the model.
    """
    if not found.in_folders:
        return found
    folders = [PurePosixPath(image.name).parts[:-1] for image in found.images]
    known = {unicodedata.normalize("NFC", name) for name in class_names}
    common = is_archive(Path(found.given)) and len({parts[:1] for parts in folders}) == 1
    for level in (0, 1) if common else (0,):
        names = [unicodedata.normalize("NFC", parts[level]) if len(parts) > level else None for parts in folders]
        if known & {name for name in names if name is not None}:
            images = [replace(image, label=name) for image, name in zip(found.images, names, strict=True)]
            return replace(found, images=images)
    return found


def import_parquet() -> Any:
    """Return pyarrow's module for Parquet. Raises MbibError where it is not installed."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise MbibError("Parquet files need pyarrow: pip install 'mbib-timm[table]'") from None
    return parquet
