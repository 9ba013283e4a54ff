"""Lists of images with labels: text files of a line per image, and iNaturalist's json.

A list of ten million lines is read in blocks, and its paths lie in one buffer.
"""

import io
import os
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mbib_timm.data.images import Split, evenly_spaced
from mbib_timm.data.paths import Names, PathReader, look_for_images
from mbib_timm.errors import DataError
from mbib_timm.files import parse_json, read_content, read_text

# Of a list: bytes that are read at once; of a line, more than a path can have; digits of a label; the characters of
# most lists; control characters and halves of characters, which no path holds.
BLOCK_BYTES, LONGEST_LINE, LONGEST_LABEL = 1 << 22, 8192, 9
PLAIN = bytes([*range(0x20, 0x7F), *b"\t\n"])
INTEGER, CONTROL = re.compile(r"-?[0-9]+"), re.compile(r"[\x00-\x08\x0a-\x1f\x7f\ud800-\udfff]")
LARGEST_JSON = 2**30  # bytes; iNaturalist's have 120 MB
TRIED = 100  # images of a list, to see whether a folder is the one that it is of


class ListedReader(PathReader):
    """Images at the paths of a list, whose validation images may lie in another layout than the list says.

    Args:
        root: folder that the paths are relative to.
        names: relative paths.
    """

    def __init__(self, root: Path, names: Names) -> None:
        super().__init__(root, names)
        self.class_folders: dict[str, str] | None = None  # of flat validation images, looked up when first needed

    def path(self, index: int) -> str:
        """Return a path as it is on the disk.

        ImageNet's validation images lie in class folders (``val/n01440764/X.JPEG``) or flat (``val/X.JPEG``), and
        lists name either: what is not there is looked for in the other layout.
        """
        path = self.root / self.name(index)
        if "val" in (path.parent.name, path.parent.parent.name) and not os.path.exists(path):
            path = self._in_other_layout(path)
        return str(path)

    def _in_other_layout(self, path: Path) -> Path:
        if path.parent.name != "val":
            flat = path.parent.parent / path.name
            return flat if os.path.exists(flat) else path
        if self.class_folders is None:
            self.class_folders = {file.name: file.parent.name for file in path.parent.glob("*/*")}
        return path.parent / self.class_folders.get(path.name, "") / path.name


def open_list(list_file: str | None, data_dir: str | None, key: str, class_map: str | None) -> Split:
    """Open a list file, one line ``<relative path> <label>`` per image, as of ImageNet-LT and iNaturalist 2018.

    Args:
        list_file: the list, looked for as it is and then under `data_dir`.
        data_dir: folder that the paths are relative to.
        key: recipe key of the list, for messages.
        class_map: file with one class name per line, in label order.

    Raises:
        DataError: no file, a line that is malformed, absolute, or leads out of the root, or an image of two labels, of
            which file and line are named; or images of which more than half are missing, see `look_for_images`.
    """
    file, root = _locate(list_file, data_dir, key)
    names, targets = _read_list(file)
    if not len(names):
        raise DataError(f"{file} lists no images; expected lines '<relative path> <label>'")
    reader = ListedReader(root, names)
    _require_one_label(reader, targets, file)
    missing = look_for_images(reader, file, confined=True)
    return Split(reader, targets, class_names=read_class_names(class_map), missing=missing)


def has_listed(list_file: str, data_dir: str) -> bool:
    """Return whether a folder has any of `TRIED` evenly spaced images of a list; False too where there is no list.

    Raises:
        DataError: the folder is none, or a line of the list is malformed.
    """
    root = Path(data_dir)
    file = find_list(list_file, root)
    if file is None:
        return False
    names, _ = _read_list(file)
    reader = ListedReader(root, names)
    return any(os.path.exists(reader.path(place)) for place in evenly_spaced(len(names), TRIED).tolist())


def _read_list(file: Path) -> tuple[Names, np.ndarray]:
    """Return the paths of a list and its labels (N,), int64. Raises DataError for a malformed line."""
    buffer, lengths, labels = bytearray(), [np.empty(0, np.uint16)], [np.empty(0, np.int32)]
    for number, lines in _blocks(file):
        names, name_lengths, own = _plain_lines(lines) or _any_lines(lines, file, number)
        buffer += names
        lengths.append(name_lengths.astype(np.uint16))
        labels.append(own.astype(np.int32))
    ends = np.concatenate(lengths, dtype=np.uint32 if len(buffer) < 2**32 else np.int64)
    np.cumsum(ends, out=ends)
    return Names(buffer, ends), np.concatenate(labels, dtype=np.int64)


def _blocks(file: Path) -> Iterator[tuple[int, bytes]]:
    """Give the lines of a file, many at a time, with the number of the first, from 1; of a line that is too long,
    as much as shows it."""
    number = 1
    try:
        with file.open("rb") as opened:
            while lines := opened.read(BLOCK_BYTES):
                lines += opened.readline(LONGEST_LINE + 1)
                yield number, lines
                number += lines.count(b"\n")
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from None


def _plain_lines(lines: bytes) -> tuple[bytes, np.ndarray, np.ndarray] | None:
    """Read lines of which nothing needs a closer look: ASCII, a path, a space or a tab, a label, and no more.

    Returns:
        The paths, one behind the other, their lengths (n,) and the labels (n,); None where a line is another, or wrong.
    """
    lines = lines.replace(b"\r\n", b"\n")
    if lines.translate(None, PLAIN) or not lines.endswith(b"\n") or b".." in lines or b":" in lines:
        return None
    text = np.frombuffer(lines, dtype=np.uint8)
    ends = np.flatnonzero(text == ord("\n"))
    starts = np.concatenate([[0], ends[:-1] + 1])
    if (ends - starts).min() < len("a 0"):
        return None
    labels, digits, at_digit = (np.zeros(len(ends), kind) for kind in (np.int64, np.int64, bool))
    at_digit[:] = True
    for place in range(LONGEST_LABEL):
        digit = text[ends - 1 - place] - np.uint8(ord("0"))
        at_digit &= digit < 10
        if not at_digit.any():
            break
        labels += np.where(at_digit, digit * np.int64(10**place), 0)
        digits += at_digit
    name_ends = ends - digits - 1
    parted = (digits > 0) & (name_ends > starts) & (text[name_ends] <= ord(" ")) & (text[name_ends - 1] > ord(" "))
    begins = (text[starts] > ord(" ")) & (text[starts] != ord("/")) & (text[starts] != ord("\\"))
    if not (parted & begins & (ends - starts < LONGEST_LINE)).all():
        return None
    kept = np.ones(len(text), dtype=bool)
    for place in range(int(digits.max()) + 2):
        kept[np.minimum(name_ends + place, ends)] = False
    return text[kept].tobytes(), name_ends - starts, labels


def _any_lines(lines: bytes, file: Path, number: int) -> tuple[bytes, np.ndarray, np.ndarray]:
    """Read lines one by one, the first of which has a number; see `_plain_lines`. Raises DataError, naming the line."""
    names, labels = [], []
    for place, text in read_lines(lines, file, number):
        name, label = _parse_line(text, f"{file}, line {place}")
        names.append(name.encode())
        labels.append(label)
    lengths = np.array([len(name) for name in names], dtype=np.int64)
    return b"".join(names), lengths, np.array(labels, dtype=np.int64)


def _require_one_label(reader: PathReader, targets: np.ndarray, file: Path) -> None:
    """Raise DataError for an image that a list has with two labels."""
    names = reader.names if reader.is_plain else Names.of([*map(os.fsdecode, reader.files(None))])
    hashes = names.hashes()
    hashes.sort()
    repeated = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
    if len(repeated) == 0:
        return
    places = np.flatnonzero(np.isin(names.hashes(), repeated, kind="sort"))
    label_of: dict[bytes, int] = {}
    for place, name in zip(places.tolist(), reader.files(places), strict=True):
        label = int(targets[place])
        if (other := label_of.setdefault(name, label)) != label:
            numbers = (number for first, lines in _blocks(file) for number, _ in read_lines(lines, file, first))
            number = next(islice(numbers, place, None))
            raise DataError(
                f"{file}, line {number}: {reader.name(place)} has label {label} here, and {other} on an earlier line"
            )


def read_lines(lines: bytes, file: Path, first: int) -> Iterator[tuple[int, str]]:
    """Give the lines of a list that are not empty, with their numbers.

    Args:
        lines: of the list.
        file: that they are from, for messages.
        first: number of the first of them, from 1.

    Raises:
        DataError: a line that is not UTF-8, has control characters, or is longer than any path.
    """
    for number, line in enumerate(io.BytesIO(lines), start=first):
        where = f"{file}, line {number}"
        if len(line) > LONGEST_LINE:
            raise DataError(f"{where} is longer than {LONGEST_LINE:,} bytes; expected '<relative path> <label>'")
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError:
            raise DataError(f"{where} is not UTF-8; save the list in that encoding") from None
        if found := CONTROL.search(text):
            raise DataError(f"{where}: {text[:80]!r} holds the control character {found[0]!r}")
        if text:
            yield number, text


def _parse_line(line: str, where: str) -> tuple[str, int]:
    """Return path and label of a line. Raises DataError naming the line."""
    parts = line.rsplit(maxsplit=1)
    if len(parts) != 2:
        raise DataError(f"{where}: expected '<relative path> <label>', got {line[:80]!r}")
    name, label = parts[0].lstrip(), parts[1]
    if name[0] in "/\\" or ".." in name or ":" in name:
        check_path(name, where)
    return name, parse_label(label, where, "; a CSV has classes by name (--dataset table)")


def parse_label(text: str, where: str, hint: str = "") -> int:
    """Return a label. Raises DataError for what is none, saying where it stands; `hint` follows what is no number."""
    if not INTEGER.fullmatch(text):
        raise DataError(f"{where}: label {text[:80]!r} is not an integer{hint}")
    if len(text) > LONGEST_LABEL or text[0] == "-":
        raise DataError(f"{where}: label {text[:80]} is {'negative' if text[0] == '-' else 'too large'}")
    return int(text)


def open_inaturalist(json_file: str | None, data_dir: str | None, key: str) -> Split:
    """Open iNaturalist's own json (``train2018.json``): images, annotations and categories.

    Args:
        json_file: the json, looked for as it is and then under `data_dir`.
        data_dir: folder that the images' paths are relative to.
        key: recipe key of the json, for messages.

    Raises:
        DataError: no file, another format, an image without annotation, or a path that leads out of the root.
    """
    file, root = _locate(json_file, data_dir, key)
    try:
        content = parse_json(read_content(file, "list", DataError, LARGEST_JSON))
        images = _entries(content, "images", {"id": int, "file_name": str})
        annotations = _entries(content, "annotations", {"image_id": int, "category_id": int})
        categories: dict[int, str] = dict(_entries(content, "categories", {"id": int, "name": str}))
    except ValueError as error:
        raise DataError(f"{file} is not iNaturalist's json of images, annotations and categories: {error}") from None
    if not images:
        raise DataError(f"{file} lists no images")
    if set(categories) != set(range(len(content["categories"]))):
        raise DataError(f"{file}: category ids must be 0..{len(content['categories']) - 1}, each once")
    label_of: dict[int, int] = {}
    for image, label in annotations:
        if label_of.setdefault(image, label) != label:
            raise DataError(f"{file}: image {image} has annotations with several categories")
    seen = set()
    for image, name in images:
        check_path(name, str(file))
        if image in seen:
            raise DataError(f"{file}: two images have the id {image}")
        seen.add(image)
        if label_of.get(image) not in categories:
            raise DataError(f"{file}: image {image} ({name}) has no annotation with a known category")
    reader = ListedReader(root, Names.of([name for _, name in images]))
    targets = np.array([label_of[image] for image, _ in images], dtype=np.int64)
    missing = look_for_images(reader, file, confined=True)
    return Split(reader, targets, class_names=tuple(categories[i] for i in range(len(categories))), missing=missing)


def _entries(content: Any, key: str, kinds: Mapping[str, type]) -> list[tuple[Any, ...]]:
    """Return these fields of a list of mappings. Raises ValueError where something is of another type."""
    entries = content.get(key) if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise ValueError(f"it has no list {key!r}")
    found = []
    for place, entry in enumerate(entries):
        values = tuple(entry.get(name) for name in kinds) if isinstance(entry, dict) else (None,)
        if [type(value) for value in values] != [*kinds.values()]:
            expected = " and ".join(f"{name} ({kind.__name__})" for name, kind in kinds.items())
            raise ValueError(f"{key}[{place}]: expected {expected}")
        found.append(values)
    return found


def read_class_names(path: str | None) -> tuple[str, ...] | None:
    """Read class names, one per line in label order. Raises DataError for what is no such file."""
    if path is None:
        return None
    lines = [line.strip() for line in read_text(Path(path), "class map", DataError).rstrip().split("\n")]
    if "" in lines:
        raise DataError(f"class map {path}, line {lines.index('') + 1} is empty; expected the name of a class")
    return tuple(lines)


def _locate(file: str | None, data_dir: str | None, key: str) -> tuple[Path, Path]:
    if file is None:
        raise DataError(f"recipe key {key!r} is needed: the file that lists the images")
    if data_dir is None:
        raise DataError("recipe key 'data_dir' is needed: the folder that the listed paths are relative to")
    root = Path(data_dir)
    if not os.path.isdir(root):
        raise DataError(f"data_dir {root} {'is not a folder' if root.exists() else 'does not exist'}")
    found = find_list(file, root)
    if found is None:
        raise DataError(f"recipe key {key!r}: no file {file}, here or in {root}")
    return found, root


def find_list(file: str, root: Path) -> Path | None:
    """Return a list file, as it is or under a folder; None where it is in neither place."""
    return next((candidate for candidate in (Path(file), root / file) if os.path.isfile(candidate)), None)


def check_path(name: str, where: str) -> None:
    """Raise DataError for a name that may lead out of the data folder, saying where it stands."""
    parts = Path(name.replace("\\", "/")).parts
    if not parts or name[0] in "/\\" or ":" in parts[0] or ".." in parts or CONTROL.search(name):
        raise DataError(f"{where}: {name[:80]!r} must be a path below the data folder")
