"""The images that `mbib predict` is given: files, folders, archives, tables and lists; with labels where there are."""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from PIL import Image

from mbib_timm.data.archives import is_archive, refuse_packed
from mbib_timm.data.folders import READ, open_archive, scan_folder
from mbib_timm.data.image_tables import DELIMITED, PARQUET, read_rows
from mbib_timm.data.images import Reader
from mbib_timm.data.paths import open_image
from mbib_timm.errors import DataError, MbibError
from mbib_timm.files import composed, counted, in_words

# Among the arguments, what stands for names on standard input.
STANDARD_INPUT = "-"
# Of a table, where no other columns are named.
PATH_COLUMN, LABEL_COLUMN = "path", "label"
# Bytes of a name on standard input, which may be a device without an end; systems take no more than 4,096.
LONGEST_LINE = 2**16


class FileReader:
    """Images in files of their own, each called as its path, or by a name."""

    def __init__(self, paths: Sequence[Path], names: Sequence[str] | None = None) -> None:
        self.paths, self.names = paths, names

    def read(self, index: int) -> Image.Image:
        """Open an image. Raises OSError for what is no file: a pipe would keep the reader waiting."""
        return open_image(str(self.paths[index]))

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
        return as_text(self.reader.path(self.index))

    @property
    def file(self) -> bytes:
        """Where it lies, absolute and normalised, whatever a list calls it."""
        reader = self.reader
        place = reader.paths[self.index] if isinstance(reader, FileReader) else reader.path(self.index)
        return os.path.abspath(os.fsencode(place))


def as_text(name: str) -> str:
    """Return a name of the file system as text that can be written anywhere: bytes that are none become escapes."""
    try:
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # surrogates that stand for no byte
        return name.encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True)
class Columns:
    """Columns of a table of images.

    Attributes:
        path: holds the images' paths, absolute or below `root`.
        label: holds the names of their classes; None for `LABEL_COLUMN`, where there is one.
        root: folder of relative paths; None for the table's own.
    """

    path: str = PATH_COLUMN
    label: str | None = None
    root: Path | None = None


@dataclass(frozen=True)
class FoundImages:
    """What one argument gives.

    Attributes:
        given: the argument.
        images: in natural order, of a table or list in its own.
        in_folders: their folders may be classes: they come from a folder or an archive.
        left_out: names of what a folder or an archive holds and is passed over, by the reason.
    """

    given: str
    images: list[FoundImage]
    in_folders: bool = False
    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)


def find_images(given: Sequence[str], columns: Columns | None = None) -> list[FoundImages]:
    """Find the images in files, folders, archives and tables.

    A path that leads nowhere is that of an image, which will be reported as unreadable, but not all may be.

    Args:
        given: paths; ``-`` for paths on standard input, one per line.
        columns: of tables.

    Raises:
        DataError: none of the paths exists, what holds no images, or a table that is malformed.
    """
    found, there = [], [each == STANDARD_INPUT or os.path.isdir(each) or os.path.isfile(each) for each in given]
    for each, is_there in zip(given, there, strict=True):
        if each == STANDARD_INPUT:
            found.append(FoundImages("standard input", _listed(_names_on_standard_input(), "standard input")))
        elif each and not is_there and any(there):
            found.append(FoundImages(each, [_in_file(Path(each))]))
        else:
            found.append(_find(each, columns or Columns()))
    return found


def _find(given: str, columns: Columns) -> FoundImages:
    path = Path(given)
    if not given:  # which pathlib takes for the current folder
        raise DataError("there is no image, folder, archive or table at ''")
    if path.is_dir() or is_archive(path):
        tree = scan_folder(path) if path.is_dir() else open_archive(path)
        if not tree.names:
            passed = f"; left out: {in_words(tree.left_out)}" if tree.left_out else ""
            raise DataError(f"no images in {path} (looked for {', '.join(READ)}){passed}")
        reader = tree.reader(tree.names)
        images = [FoundImage(reader, index, name) for index, name in enumerate(tree.names)]
        return FoundImages(given, images, in_folders=True, left_out=tree.left_out)
    if not path.is_file():
        raise DataError(f"there is no image, folder, archive or table at {given}")
    if path.suffix.lower() in (*DELIMITED, *PARQUET):
        return FoundImages(given, _read_table(path, columns))
    refuse_packed(path)
    return FoundImages(given, [_in_file(path)])


def _in_file(path: Path) -> FoundImage:
    return FoundImage(FileReader([path]), 0, path.name)


def _names_on_standard_input() -> list[str]:
    if sys.stdin is None or sys.stdin.isatty():
        raise MbibError("- reads names of images from standard input, one per line, and there is none: pipe them in")
    names: list[str] = []
    while line := sys.stdin.buffer.readline(LONGEST_LINE + 1):
        if len(line) > LONGEST_LINE:
            raise DataError(f"standard input: line {len(names) + 1:,} is too long for the name of a file")
        if name := os.fsdecode(line).rstrip("\r\n"):
            names.append(name)
    return names


def _listed(names: Sequence[str], where: str, root: Path | None = None, labels: Sequence[str] = ()) -> list[FoundImage]:
    """Return the images of a list. One that is missing will be reported as unreadable, but not all may be."""
    if not names:
        raise DataError(f"{where} names no images")
    paths = [Path(name) if root is None else root / name for name in names]
    if not any(map(os.path.isfile, paths)):
        first = str(paths[0])[:200]
        raise DataError(f"{where} names {counted(len(paths), 'image')}, and none is there: the first is {first}")
    reader = FileReader(paths, names)  # under the list's own names, by which its reader can join what comes out
    named = [PurePosixPath(*(part for part in Path(name).parts if part not in ("/", ".."))) for name in names]
    return [
        FoundImage(reader, index, str(name), (labels[index] or None) if labels else None)
        for index, name in enumerate(named)
    ]


def _read_table(file: Path, columns: Columns) -> list[FoundImage]:
    label = {"label": columns.label or LABEL_COLUMN}
    wanted = {"path": columns.path, **(label if columns.label else {})}
    rows = list(read_rows(file, wanted, label))
    root = columns.root or file.parent
    where = f"{file}, whose paths are taken below {root},"
    return _listed([row.path for row in rows], where, root, [row.label for row in rows])


def label_by_folder(found: FoundImages, class_names: Sequence[str]) -> FoundImages:
    """Return images with the first folder level as their label, where one of those folders is a class.

    In an archive whose images lie below one common folder, the level below it counts.
    """
    if not found.in_folders:
        return found
    folders = [PurePosixPath(image.name).parts[:-1] for image in found.images]
    known = {composed(name) for name in class_names}
    common = is_archive(Path(found.given)) and len({parts[:1] for parts in folders}) == 1
    for level in (0, 1) if common else (0,):
        names = [composed(as_text(parts[level])) if len(parts) > level else None for parts in folders]
        if known & {name for name in names if name is not None}:
            images = [replace(image, label=name) for image, name in zip(found.images, names, strict=True)]
            return replace(found, images=images)
    return found
