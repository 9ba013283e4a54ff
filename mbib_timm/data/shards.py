"""WebDataset shards: tars in which an image and its label stand together, as a sample, under one key.

``train-0000.tar`` holds ``n01/7.jpg`` and ``n01/7.cls``: a sample with key ``n01/7`` (the path up to the first dot of
its last part). webdataset's own loader streams them; here the headers are read once, and images by offset, so that an
epoch has the order of its sampler and a run goes on exactly where it stopped, as with any other source. Which shards
make up a split, timm's ``_info.json`` says, or the folders that they lie in, or their names, or a pattern in place of
the split's name.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from timm.utils import natural_key

from mbib_timm.data.archives import FILE, FOLDER, LINK, ArchiveReader, Member, members, open_tar
from mbib_timm.data.folders import READ, SPLIT_NAMES, SYNONYMS, find_split, is_hidden, no_split
from mbib_timm.data.images import Split, in_order
from mbib_timm.data.lists import check_path, parse_label, read_class_names
from mbib_timm.data.paths import Names
from mbib_timm.errors import DataError, few, shown
from mbib_timm.files import counted, from_plain, parse_json, read_content

SUFFIX = ".tar"
COMPRESSED = re.compile(r".*\.(tgz|tbz2|txz|tar\.(gz|bz2|xz|zst))", re.DOTALL)
# timm's descriptions of shards; the names of classes as the CLIP benchmark's sets have them.
DESCRIPTIONS, CLASS_NAMES = ("_info.json", "info.json"), "classnames.txt"
# Of a member's name its key and its kind, and the names that webdataset passes over.
NAME, META = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL), re.compile(r"__[^/]*__($|/)")
LABEL, METADATA = "cls", "json"
LABEL_FIELD = "label"  # of the metadata
LARGEST_LABEL, LARGEST_METADATA = 64, 16 * 2**20  # bytes
# Of a shard's name what stands before its number, the number, and of how many; of a pattern a range of numbers.
NUMBERED = re.compile(r"(.*?)(\d{1,18})((?:-of-(\d{1,9}))?\.tar)", re.DOTALL | re.IGNORECASE)
RANGE, LONGEST_RANGE = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})\}"), 1_000_000
# Shards from which on a further process is worth its start.
SHARDS_A_WORKER = 16
# Reason for which samples are left out.
NEITHER = "samples without image and label"


@dataclass(frozen=True)
class Shards:
    """The shards of a split.

    Attributes:
        files: in order.
        lengths: samples in each, where a description says so.
        label_field: of the metadata that holds the label, where a description names one; else `LABEL` does.
    """

    files: Sequence[Path]
    lengths: Sequence[int] = ()
    label_field: str | None = None


@dataclass(frozen=True)
class _Described:
    """What is read of a split in timm's description."""

    filenames: list[str]
    shard_lengths: list[int] = field(default_factory=list)
    alt_label: str | None = None


def open_shards(
    data_dir: str | None, split_names: Collection[str], class_map: str | None, workers: int
) -> Split | Callable[[str], Split]:
    """Open a folder of shards.

    Args:
        data_dir: the folder.
        split_names: of the recipe; one that ends in ``.tar`` is a pattern of shards.
        class_map: file with one class name per line, in label order; without it ``classnames.txt`` beside the shards.
        workers: processes that read the headers of many shards.

    Returns:
        All images, where the shards have no splits; else what opens a split by name.

    Raises:
        DataError: no such folder, no shards, a gap in their numbers, or shards of which some name a split; on reading
            also a shard that is no tar, or damaged, and a sample without its image or label, of which it names the key.
    """
    if data_dir is None:
        raise DataError("recipe key 'data_dir': the wds source needs the folder of the shards")
    root = Path(data_dir)
    if not root.is_dir():
        raise DataError(f"data_dir {root} {'is not a folder' if root.exists() else 'does not exist'}")
    beside = root / CLASS_NAMES
    class_file = str(beside) if class_map is None and beside.is_file() else class_map
    found = _described(root) or _find(root, split_names)
    if "" in found and not any(map(_is_pattern, split_names)):
        return _read(found[""], class_file, workers)
    return partial(_open, root, found, class_file, workers)


def has_shards(root: Path) -> bool:
    """Return whether there are shards in a folder, or in folders in it."""
    try:
        folders = [root, *(entry for entry in root.iterdir() if entry.is_dir() and not is_hidden(entry.name))]
        return _described(root) is not None or any(
            entry.name.lower().endswith(SUFFIX) or COMPRESSED.fullmatch(entry.name.lower())
            for folder in folders
            for entry in folder.iterdir()
        )
    except OSError:
        return False


def _open(root: Path, found: Mapping[str, Shards], class_file: str | None, workers: int, split: str) -> Split:
    """Open a split of its own name, of a synonym, or of a pattern of shards."""
    if _is_pattern(split):
        check_path(split, "pattern of shards")
        return _read(Shards([root / name for name in _expanded(split, split)]), class_file, workers)
    shards = find_split(found, split)
    if shards is not None:
        return _read(shards, class_file, workers)
    hint = ""
    if set(map(str.casefold, filter(None, found))) <= set(SYNONYMS["train"]):
        hint = "; patterns name some of the shards and the others, as in --val-split 'train-{0008..0009}.tar'"
    raise no_split(root, found, split, hint)


# Which shards


def _described(root: Path) -> dict[str, Shards] | None:
    """Return the splits of timm's description; None where there is none."""
    file = next((root / name for name in DESCRIPTIONS if (root / name).is_file()), None)
    if file is None:
        return None
    try:
        content = parse_json(read_content(file, "description of shards", DataError))
        splits = content.get("splits") if isinstance(content, dict) else None
        if splits is None:  # it is of something else
            return None
        keys = ("filenames", "shard_lengths", "alt_label")
        if isinstance(splits, dict):
            splits = {name: _some(entry, keys) if isinstance(entry, dict) else entry for name, entry in splits.items()}
        described = from_plain(dict[str, _Described], splits, "splits")
    except ValueError as error:
        raise DataError(f"{file} does not describe splits of shards as timm's does: {error}") from None
    found = {}
    for name, entry in described.items():
        for each in entry.filenames:
            check_path(each, str(file))
        if entry.shard_lengths and len(entry.shard_lengths) != len(entry.filenames):
            raise DataError(
                f"{file}: split {name!r} has {counted(len(entry.filenames), 'shard')} and lengths of "
                f"{len(entry.shard_lengths):,}"
            )
        found[name] = Shards([root / each for each in entry.filenames], entry.shard_lengths, entry.alt_label or None)
    return found


def _some(entry: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key in keys}


def _is_pattern(split: str) -> bool:
    return split.endswith(SUFFIX)


def _expanded(pattern: str, whole: str) -> list[str]:
    """Return the names that a pattern stands for, a part of a `whole` one; numbers are as wide as the wider end."""
    found = RANGE.search(pattern)
    if found is None:
        return [pattern]
    first, last = int(found[1]), int(found[2])
    rest = _expanded(pattern[found.end() :], whole)
    if not 0 <= (last - first + 1) * len(rest) - 1 < LONGEST_RANGE:
        raise DataError(f"pattern of shards {whole!r}: expected {found[0]} to rise, up to {LONGEST_RANGE:,} shards")
    width = max(len(found[1]), len(found[2])) if "0" in (found[1][0], found[2][0]) else 0
    return [f"{pattern[: found.start()]}{n:0{width}d}{after}" for n in range(first, last + 1) for after in rest]


def _find(root: Path, split_names: Collection[str]) -> dict[str, Shards]:
    """Return the shards of each split, by the folders that they lie in or by their names; all under an empty name
    where neither says anything."""
    try:
        beside = _shards_in(root)
        folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not is_hidden(entry.name))
        inner = {entry.name: found for entry in folders if (found := _shards_in(entry))}
    except OSError as error:
        raise DataError(f"cannot look for shards in {root}: {error.strerror}") from None
    if not beside and not inner:
        raise DataError(f"there are no shards ({SUFFIX}) in {root}, nor in folders in it")
    if beside and inner:
        raise DataError(
            f"{root} holds the shard {beside[0].name} beside folders of shards ({few([*inner])}): put the shards of "
            "every split into a folder of their own"
        )
    if not inner:
        known = {name.casefold() for name in (*SPLIT_NAMES, *split_names) if name}
        by_split: dict[str, list[Path]] = defaultdict(list)
        for file in beside:
            by_split[_split_of(file.name, known)].append(file)
        if "" in by_split and len(by_split) > 1:
            file, (name, others) = by_split.pop("")[0], next(iter(by_split.items()))
            raise DataError(f"{root}: the shard {file.name} belongs to no split, and {others[0].name} to {name!r}")
        inner = dict(by_split)
    for files in inner.values():
        _require_all(files)
    return {name: Shards(files) for name, files in inner.items()}


def _shards_in(folder: Path) -> list[Path]:
    """Return the shards right in a folder, in natural order."""
    found = []
    for entry in folder.iterdir():
        name = entry.name.lower()
        if is_hidden(name):
            continue
        if COMPRESSED.fullmatch(name):
            raise DataError(f"{entry} is compressed, and shards are read by offset; unpack it to a {SUFFIX}")
        if name.endswith(SUFFIX):
            if not entry.is_file():
                raise DataError(f"{entry} is not a regular file; expected a shard")
            found.append(entry)
    return sorted(found, key=lambda file: (natural_key(file.name), file.name))


def _split_of(name: str, known: Collection[str]) -> str:
    """Return the split that a shard's name names between other words, in lower case; the last of several."""
    words = "|".join(map(re.escape, sorted(known, key=len, reverse=True)))
    found = re.findall(rf"(?:(?<=[-_.])|^)({words})(?=[-_.0-9])", name.casefold())
    return found[-1] if found else ""


def _require_all(files: Sequence[Path]) -> None:
    """Raise DataError where a number is missing between those of shards whose names differ in it alone."""
    series: dict[tuple[str, str, str | None], dict[int, str]] = defaultdict(dict)
    for file in files:
        if found := NUMBERED.fullmatch(file.name):
            series[found[1], found[3], found[4]][int(found[2])] = found[2]
    for (before, after, total), numbers in series.items():
        first, last = min(numbers), max(numbers)
        if total is not None:  # counted from 0 or from 1
            first = int(int(total) in numbers)
            last = max(last, first + int(total) - 1)
        missing = next((number for number in range(first, last + 1) if number not in numbers), None)
        if missing is not None:
            width = len(next(iter(numbers.values())))
            raise DataError(
                f"{files[0].parent}: the shard {before}{missing:0{width}d}{after} is missing; if only the others are "
                "wanted, name them by patterns (--train-split, --val-split)"
            )


# What is in them


@dataclass(frozen=True)
class _Index:
    """The images of a shard.

    Attributes:
        names: of all, one behind the other, UTF-8.
        lengths: of each name, in bytes, (n,), uint32.
        places: first byte and size of each image, (n, 2), int64.
        labels: (n,), int32.
        passed: samples that have neither image nor label.
    """

    names: bytes
    lengths: np.ndarray
    places: np.ndarray
    labels: np.ndarray
    passed: list[str]


def _index(shards: Shards, number: int) -> _Index:
    """Read the headers and labels of one of some shards."""
    file, passed = shards.files[number], list[str]()
    if not file.is_file():
        raise DataError(f"there is no shard {file}")
    found = list(_images(file, shards.label_field, passed))
    if shards.lengths and shards.lengths[number] != len(found):
        raise DataError(
            f"{file} holds {counted(len(found), 'sample')}, and its description says {shards.lengths[number]:,}; "
            "it may have been copied in part"
        )
    names = [name.encode() for name, _, _, _ in found]
    lengths = np.array([len(name) for name in names], dtype=np.uint32)
    places = np.array([(start, size) for _, start, size, _ in found], dtype=np.int64).reshape(-1, 2)
    return _Index(b"".join(names), lengths, places, np.array([row[-1] for row in found], dtype=np.int32), passed)


def _read(shards: Shards, class_file: str | None, workers: int) -> Split:
    """Read the headers and labels of shards, in several processes where there are many."""
    workers = min(workers, len(shards.files) // SHARDS_A_WORKER)
    found = list(in_order(partial(_index, shards), len(shards.files), workers, batch_size=1, unit="shard"))
    counts = [len(index.labels) for index in found]
    if not sum(counts):
        raise DataError(f"there are no samples in {shards.files[0] if shards.files else 'a split without shards'}")
    ends = np.cumsum(np.concatenate([index.lengths for index in found]), dtype=np.int64)
    names = Names(b"".join(index.names for index in found), ends)
    places = np.concatenate([index.places for index in found])
    reader = ArchiveReader(shards.files, (np.cumsum(counts) - counts).tolist(), names, places)
    targets = np.concatenate([index.labels for index in found], dtype=np.int64)
    passed = tuple(key for index in found for key in index.passed)
    split = Split(reader, targets, left_out={NEITHER: passed} if passed else {})
    class_names = read_class_names(class_file)
    if class_names is None:
        return split
    if len(unnamed := np.flatnonzero(split.targets >= len(class_names))):
        place = int(unnamed[0])
        raise DataError(
            f"{split.path(place)}: its label {split.targets[place]} has no name; {class_file} names classes "
            f"0..{len(class_names) - 1}"
        )
    return replace(split, class_names=class_names)


@dataclass
class _Sample:
    """Members that share a key, while they are gathered.

    Attributes:
        key: of the sample.
        image: that it holds.
        contents: of its label and its metadata, undecoded, by kind.
        kinds: of its members, in their order.
    """

    key: str
    image: Member | None = None
    contents: dict[str, bytes] = field(default_factory=dict)
    kinds: list[str] = field(default_factory=list)


def _images(file: Path, label_field: str | None, passed: list[str]) -> Iterator[tuple[str, int, int, int]]:
    """Give the images of a shard: name, first byte, size in bytes, label.

    Args:
        file: the shard.
        label_field: of the metadata that holds the label; None where it is the content of `LABEL`, or else in the
            metadata's `LABEL_FIELD`.
        passed: where samples go that have neither image nor label.

    Raises:
        DataError: a shard that is no tar, or damaged, or what is no sample; names the key.
    """
    with open_tar(file, unzip=False) as tar:
        for sample in _samples(file, tar.file, tar.end):
            where = f"{file}, sample {sample.key!r}"
            label = _label(sample, label_field, where)
            has = ", ".join(f".{kind}" for kind in sample.kinds[:5])
            if sample.image is not None and label is not None:
                yield sample.image.name.removeprefix("./"), sample.image.start, sample.image.size, label
            elif sample.image is not None:
                metadata = f"a .{METADATA} with an integer {label_field or LABEL_FIELD!r}"
                expected = metadata if label_field else f"a .{LABEL}, or {metadata}"
                raise DataError(f"{where} has no label: expected {expected}, right beside its image; it has {has}")
            elif label is not None:
                raise DataError(f"{where} has a label and, right beside it, no image that is read; it has {has}")
            else:
                passed.append(f"{file.name}/{sample.key}")


def _samples(file: Path, tar: BinaryIO, end: int) -> Iterator[_Sample]:
    """Give the samples of a shard: members of one key, which stand one after another."""
    seen = set[str]()
    sample: _Sample | None = None
    for member in members(tar, end):
        named = NAME.fullmatch(member.name)
        if named is None or member.kind == FOLDER or META.match(member.name):
            continue
        key, kind = named[1], named[2].lower()
        if sample is None or key != sample.key:
            if sample is not None:
                yield sample
            if key in seen:
                raise DataError(
                    f"{file}, sample {key!r}: members with this key stand apart; expected those of a sample one after "
                    "another, as tar --sort=name packs them"
                )
            seen.add(key)
            sample = _Sample(key)
        where = f"{file}, sample {key!r}"
        if member.kind != FILE:
            what = "a link" if member.kind == LINK else "a sparse member or a device"
            raise DataError(f"{where}: {member.name!r} is {what}; expected a file (tar --hard-dereference)")
        if kind in sample.kinds:
            raise DataError(f"{where} has two members .{kind}")
        sample.kinds.append(kind)
        if f".{kind}" in READ:
            if sample.image is not None:
                raise DataError(f"{where} has two images: {sample.image.name!r}, {member.name!r}")
            sample.image = member
        elif kind in (LABEL, METADATA):
            if member.size > (most := LARGEST_LABEL if kind == LABEL else LARGEST_METADATA):
                raise DataError(f"{where}: its .{kind} has {member.size:,} bytes; expected at most {most:,}")
            tar.seek(member.start)
            sample.contents[kind] = tar.read(member.size)
    if sample is not None:
        yield sample


def _label(sample: _Sample, label_field: str | None, where: str) -> int | None:
    """Return a sample's label; None where it has none."""
    if label_field is None and LABEL in sample.contents:
        return parse_label(sample.contents[LABEL].decode("utf-8", "backslashreplace").strip(), where)
    if METADATA not in sample.contents:
        return None
    try:
        metadata = parse_json(sample.contents[METADATA])
    except ValueError as error:
        raise DataError(f"{where}: its .{METADATA} cannot be read: {error}") from None
    label = metadata.get(label_field or LABEL_FIELD) if isinstance(metadata, dict) else None
    if label is None:
        return None
    if type(label) is not int:
        raise DataError(f"{where}: label {shown(label)} is not an integer")
    return parse_label(str(label), where)
