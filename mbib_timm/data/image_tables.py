"""Tables of images: a CSV or Parquet file with a column of paths and one of classes, perhaps of splits and groups.

As labelling tools and camera-trap platforms export them. A CSV is UTF-8, with commas, semicolons or tabs.
"""

import csv
import io
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mbib_timm.data.archives import SUFFIXES, is_archive, refuse_packed
from mbib_timm.data.folders import (
    SPLIT_NAMES,
    SYNONYMS,
    OwnSplits,
    find_split,
    no_split,
    number_classes,
    open_archive,
    unasked,
)
from mbib_timm.data.groups import group_names
from mbib_timm.data.images import Reader, Split
from mbib_timm.data.paths import Names, PathReader, look_for_images, missing_images
from mbib_timm.errors import DataError, few, first_line, nearest
from mbib_timm.files import composed, csv_rows, printable, read_content
from mbib_timm.recipe import Recipe

PARQUET = (".parquet", ".pq")
DELIMITED = (".csv", ".tsv", ".txt")
SEPARATORS = ",;\t"
LARGEST_TABLE = 512 * 2**20  # bytes; of some million images
LONGEST_FIELD = 4096  # characters, as many as a path may have

# Reasons for which rows are left out.
NO_LABEL = "rows without a class"
NO_SPLIT = "rows without a split"
NOT_USED = "rows of splits that are not used"
REPEATED = "rows that repeat an image"
AMBIGUOUS = "images of several classes"


@dataclass(frozen=True)
class Row:
    """An image of a table.

    Attributes:
        where: its file and line, for messages.
        path: of the image.
        label: name of its class; empty for none.
        split: name of its split; empty where the table has none.
        group: of images that belong together; empty for none.
    """

    where: str
    path: str
    label: str = ""
    split: str = ""
    group: str = ""


def open_table(recipe: Recipe) -> Split | Callable[[str], Split]:
    """Open a recipe's table.

    A row without a class or a split is left out, and so are rows that repeat an image, and images of several classes.
    The training split names the rows whose split nothing asks for.

    Returns:
        All images, where the table has no splits; else what opens a split by name.

    Raises:
        DataError: no such file, a column that is not there, or a file that is malformed; names file and line.
    """
    file, root = _locate(recipe)
    wanted = {"path": recipe.path_column, "label": recipe.label_column}
    optional = {}
    if recipe.split_column is None:
        optional["split"] = "split"
    else:
        wanted["split"] = recipe.split_column
    if recipe.group_by in (None, "column"):
        optional["group"] = recipe.group_column or "group"
    rows = list(read_rows(file, wanted, optional))
    if not rows:
        raise DataError(f"{file} lists no images")
    left_out: dict[str, list[str]] = defaultdict(list)
    with_splits = any(row.split for row in rows)
    rows = list(_usable(rows, root, with_splits, recipe.group_by == "column", left_out))
    if not rows:
        raise DataError(f"{file} lists no image with a class{' and a split' if with_splits else ''}")
    passed = {why: tuple(names) for why, names in left_out.items()}
    if not with_splits:
        return _split(recipe, file, root, passed, rows)
    by_split: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_split[row.split.casefold()].append(row)

    def opened(split: str) -> Split:
        found = find_split(by_split, split)
        if found is None:
            raise no_split(file, by_split, split, ": name those to use with --train-split and --val-split")
        in_training = found is find_split(by_split, recipe.train_split)
        unused = _not_used(by_split, recipe.split_names) if in_training else {}
        return _split(recipe, file, root, {**passed, **unused}, found)

    return OwnSplits(by_split, opened)


def _not_used(by_split: Mapping[str, list[Row]], names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the rows whose split nothing asks for, by the reason, with the name that a slip may have stood for.

    A further split for evaluation, as of a table that has one for testing, is none of these.
    """
    known, unused = SPLIT_NAMES - {*SYNONYMS["train"]}, unasked(by_split, names)
    others = {name: rows for name, rows in unused.items() if name not in known}
    if not others:
        return {}
    meant = SPLIT_NAMES & (by_split.keys() - unused.keys())
    said = []
    for name in others:
        near = nearest(name, meant, most=1)
        said.append(f"{printable(name)}{f' (did you mean {near[0]}?)' if near else ''}")
    return {f"{NOT_USED}, {few(said)}": tuple(row.where for rows in others.values() for row in rows)}


def _split(
    recipe: Recipe, file: Path, root: Path, left_out: Mapping[str, tuple[str, ...]], rows: Sequence[Row]
) -> Split:
    labels, paths = [row.label for row in rows], [row.path for row in rows]
    classes, targets = number_classes(labels)
    groups, unused = None, ""
    if recipe.group_by is None and any(row.group for row in rows):
        unused = f"{file}: its column 'group' is not used, and images count as independent; --group-by column uses it"
    elif recipe.group_by == "column":
        groups = np.array([row.group for row in rows])
    elif recipe.group_by is not None:
        groups = group_names(recipe.group_by, paths, labels)
    reader: Reader
    if is_archive(root):
        tree = open_archive(root)
        reader, gone = tree.reader(paths), [path for path in paths if path not in tree.members]
        missing = missing_images(file, len(paths), gone, root) if gone else ""
    else:
        reader = PathReader(root, Names.of(paths))
        missing = look_for_images(reader, file)
    return Split(reader, targets, class_names=classes, groups=groups, left_out=left_out, missing=missing, unused=unused)


def _locate(recipe: Recipe) -> tuple[Path, Path]:
    """Return the table, and the folder or archive that its paths are relative to."""
    assert recipe.table is not None  # the recipe is checked
    root = None if recipe.data_dir is None else Path(recipe.data_dir)
    if root is not None and not (root.is_dir() or is_archive(root)):
        refuse_packed(root)
        raise DataError(f"data_dir {root} is neither a folder nor a supported archive ({', '.join(SUFFIXES)})")
    for candidate in (Path(recipe.table), *([] if root is None else [root / recipe.table])):
        if candidate.is_file():
            return candidate, root or candidate.parent
    raise DataError(f"recipe key 'table': no file {recipe.table}{'' if root is None else f', here or in {root}'}")


def _usable(
    rows: Sequence[Row], root: Path, with_splits: bool, with_groups: bool, left_out: dict[str, list[str]]
) -> Iterator[Row]:
    """Give one row of each image that can be used; note the others."""
    first: dict[str, Row] = {}
    ambiguous: dict[str, str] = {}
    above = os.path.abspath(root)
    for row in rows:
        place = os.path.normpath(os.path.join(above, row.path))
        if not row.label:
            left_out[NO_LABEL].append(row.where)
        elif with_splits and not row.split:
            left_out[NO_SPLIT].append(row.where)
        elif (known := first.setdefault(place, row)) is not row:
            if known.label != row.label:
                ambiguous[place] = f"{row.path}: {known.label}, {row.label}"
            elif known.split != row.split:
                raise DataError(
                    f"{row.where}: {row.path} is in split {row.split!r} here, and in {known.split!r} in {known.where}"
                )
            elif with_groups and known.group != row.group:
                raise DataError(
                    f"{row.where}: {row.path} is in group {row.group!r} here, and in {known.group!r} in {known.where}"
                )
            else:
                left_out[REPEATED].append(row.where)
    if ambiguous:
        left_out[AMBIGUOUS] = list(ambiguous.values())
    for place, row in first.items():
        if place not in ambiguous:
            yield row


# The columns of a table, and what gives its rows: of these columns, with where they are.
Columns = tuple[list[str], Callable[[list[str]], Iterator[tuple[str, list[str]]]]]


def read_rows(file: Path, wanted: Mapping[str, str], optional: Mapping[str, str]) -> Iterator[Row]:
    """Give the rows of a table.

    Args:
        file: CSV or Parquet.
        wanted: name of the column of fields of `Row`, ``path`` among them.
        optional: the same of fields whose column need not be there.

    Raises:
        DataError: a column that is not there, a file that is malformed, or a row without a path; names file and line.
    """
    suffix = file.suffix.lower()
    if suffix in PARQUET:
        names, rows = _parquet(file)
    elif suffix in DELIMITED:
        names, rows = _csv(file, set(wanted.values()))
    else:
        raise DataError(
            f"{file}: expected a table whose name ends in {', '.join((*DELIMITED, *PARQUET))}; save a spreadsheet as "
            "'CSV UTF-8'"
        )
    if not names:
        raise DataError(f"{file} is empty; expected a first line that names its columns, such as path,label")
    own_names = {composed(name): name for name in names}

    def own(name: str) -> str:
        return name if name in names else own_names.get(composed(name), name)

    wanted = {what: own(name) for what, name in wanted.items()}
    wanted |= {what: own(name) for what, name in optional.items() if own(name) in names}
    for what, name in wanted.items():
        if name not in names:
            hint = f"--{what}-column names another"
            if len(names) == 1:
                hint += "; commas, semicolons or tabs separate columns"
            raise DataError(f"{file} has no column {name!r}; its columns are: {few([*map(printable, names)])}. {hint}")
        if names.count(name) > 1:
            raise DataError(f"{file} has {names.count(name)} columns {name!r}")
    for where, values in rows(list(wanted.values())):
        row = dict(zip(wanted, values, strict=True))
        for what, value in row.items():
            if len(value) > LONGEST_FIELD or "\0" in value:
                fault = f"{len(value):,} characters" if len(value) > LONGEST_FIELD else "the control character '\\x00'"
                raise DataError(f"{where}: column {wanted[what]!r} holds {fault}; expected a path or a name")
        path = row.pop("path")
        if not path:
            raise DataError(f"{where}: column {wanted['path']!r} holds no path")
        if "\\" in path and "/" not in path:  # written on Windows
            path = path.replace("\\", "/")
        yield Row(where, path, **{what: composed(value) for what, value in row.items()})


def _csv(file: Path, wanted: set[str]) -> Columns:
    """Return a CSV's columns and rows; `wanted` are columns that it should have."""
    try:
        text = read_content(file, "table", DataError, LARGEST_TABLE).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{file}, line {line}: not UTF-8; save the table as 'CSV UTF-8'") from None
    if "\n" not in text:  # the line ends of old Macs
        text = text.replace("\r", "\n")
    header = next((line for line in text.split("\n") if line.strip()), "")

    def columns(separator: str) -> set[str]:
        return {name.strip() for name in next(csv.reader([header], delimiter=separator), [])}

    # Whichever separates the columns that are wanted, or else the most.
    try:
        separator = max(SEPARATORS, key=lambda each: (wanted <= columns(each), len(columns(each))))
    except csv.Error as error:
        raise DataError(f"{file}: the first line names no columns: {error}") from None
    rows = csv_rows(text, separator, str(file))
    _, names = next(rows, (0, []))

    def of_columns(chosen: list[str]) -> Iterator[tuple[str, list[str]]]:
        places = [names.index(name) for name in chosen]
        for line, values in rows:
            if len(values) != len(names):
                raise DataError(
                    f"{file}, line {line}: expected {len(names)} columns, got {len(values)}; a name with {separator!r} "
                    "in it needs quotes"
                )
            yield f"{file}, line {line}", [values[place] for place in places]

    return names, of_columns


def _parquet(file: Path) -> Columns:
    """Return a Parquet file's columns and rows."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"{file}: Parquet needs pyarrow: pip install 'mbib-timm[table]'") from None
    # What pyarrow raises of damaged files; text that is no UTF-8 it finds when it makes Python's strings of it.
    damaged = (pyarrow.ArrowException, OSError, UnicodeDecodeError, OverflowError, MemoryError)
    content = io.BytesIO(read_content(file, "table", DataError, LARGEST_TABLE))

    def rows(columns: list[str]) -> Iterator[tuple[str, list[str]]]:
        try:
            table = parquet.read_table(content, columns=columns)
            for name in columns:
                kind = table.schema.field(name).type
                kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
                if pyarrow.types.is_nested(kind) or "binary" in str(kind):
                    raise DataError(f"{file}: column {name!r} holds {kind}; expected text or numbers")
            values = [[_text(value) for value in table.column(name).to_pylist()] for name in columns]
        except damaged as error:
            raise DataError(f"cannot read {file}: {first_line(error)}") from None
        for number, row in enumerate(zip(*values, strict=True), start=1):
            yield f"{file}, row {number}", list(row)

    try:
        return list(parquet.read_schema(content).names), rows
    except damaged as error:
        raise DataError(f"cannot read {file}: {first_line(error)}") from None


def _text(value: Any) -> str:
    """Return a value as a CSV has it; a class that is a number may have become a floating-point one."""
    if value is None or value != value:
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()
