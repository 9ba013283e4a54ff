"""Image folders, and archives of them: a class is a folder of the first level, whatever lies below it.

``fox/site A/1.jpg`` is a fox. One scan serves folders and archives: it finds the images, and what it passes over, by
name. Where every folder with images bears the name of a split, and holds folders in its turn, those are the classes
(``train/fox/1.jpg``). Labels are the natural order of the classes' names, as in timm's readers.

An archive is a tar, compressed or not: a whole data set in one file. Its folders lie below one common folder or not; a
tar in it stands for the folder of its name. Members are read by offset, and their names never lead to the disk.
"""

import os
import re
import tarfile
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from shlex import quote
from typing import Any, BinaryIO, TypeVar

import numpy as np
from timm.utils import natural_key

from mbib_timm.data import archives
from mbib_timm.data.archives import SUFFIXES, ArchiveReader, is_archive, members, open_tar, refuse_packed
from mbib_timm.data.groups import group_names
from mbib_timm.data.images import Reader, Split
from mbib_timm.data.paths import Names, PathReader
from mbib_timm.errors import DataError, few, nearest
from mbib_timm.files import composed, in_words, printable

T = TypeVar("T")
# Kinds of images that are read, by suffix; of several frames the first.
READ = (
    ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip
# And that are not: of phones, cameras, graphics programs, microscopes and clinics.
UNREAD = {
    ".arw", ".avif", ".bif", ".cr2", ".cr3", ".crw", ".czi", ".dcm", ".dng", ".eps", ".exr", ".hdr", ".heic", ".heif",
    ".hif", ".ico", ".j2k", ".jp2", ".jxl", ".kdc", ".lif", ".mrxs", ".nd2", ".nef", ".nii", ".nrw", ".orf", ".pcx",
    ".pef", ".psd", ".raf", ".raw", ".rw2", ".sr2", ".srf", ".srw", ".svg", ".svs", ".tga", ".x3f", ".xcf",
}  # fmt: skip
# Nor are videos, and what lies beside images: tables, texts, settings of cameras and programs.
NO_IMAGES = {
    ".aae", ".avi", ".csv", ".htm", ".html", ".ini", ".json", ".jsonl", ".log", ".m4v", ".md", ".mkv", ".mov", ".mp4",
    ".mpeg", ".mpg", ".mts", ".parquet", ".thm", ".tsv", ".txt", ".webm", ".wmv", ".xml", ".xmp", ".yaml", ".yml",
}  # fmt: skip
# Names, in lower case, under which systems and programs keep what is theirs; and all that begin with a dot.
OF_SYSTEMS = {
    "__macosx", "__pycache__", "@eadir", "#recycle", "$recycle.bin", "desktop.ini", "lost+found",
    "system volume information", "thumbs.db",
}  # fmt: skip
# A split for testing stands for validation where there is no other; who asks for testing does not mean the reverse.
SYNONYMS = {
    **dict.fromkeys(("train", "training"), ("train", "training")),
    **dict.fromkeys(("validation", "val", "valid", "eval"), ("validation", "val", "valid", "eval", "test")),
    "test": ("test",),
}
SPLIT_NAMES = {*SYNONYMS}
# A split of every image, of data that have no splits.
ALL = "all"

# Reasons for which a scan passes something over.
NOT_READ = "images of unsupported kinds"
UNKNOWN = "files of unknown kind"
OUTSIDE = "images outside class folders"
BESIDE = "images beside the folders of the splits"
WITHOUT_IMAGES = "class folders without images"
PACKED = "archives within the folder, which are not opened (--dataset wds reads WebDataset shards)"
CIRCLES = "circular links"
LINKS = "links in the archive, which are not followed"
OUT = "names that lead out of the archive"
NOWHERE = "links that lead nowhere"
SPECIAL = "devices, pipes and sockets"
NOT_UTF8 = "names that are not UTF-8"

IMAGE, FOLDER = "image", "folder"


@dataclass(frozen=True)
class ImageTree:
    """The images of a folder or an archive, or of a folder in it.

    Attributes:
        path: the folder, or the archive.
        members: the images' names below `path`, each with its first byte and size in an archive; (0, 0) for a file.
        folders: names of all folders below `path`.
        left_out: names of what was passed over, by the reason.
        archive: whether `path` is one.
        tar: the decompressed tar; None for one that is not compressed and stays on the disk.
        prefix: the folder, with a slash at its end; empty for the whole.
    """

    path: Path
    members: dict[str, tuple[int, int]]
    folders: tuple[str, ...]
    left_out: Mapping[str, Sequence[str]]
    archive: bool = False
    tar: bytes | None = None
    prefix: str = ""

    def __str__(self) -> str:
        return f"{self.path}/{self.prefix}".rstrip("/")

    @cached_property
    def names(self) -> list[str]:
        """Names of the images, in natural order; those that differ in case alone have one natural key."""
        return sorted(self.members, key=lambda name: (natural_key(name), name))

    @cached_property
    def tops(self) -> dict[str, bool]:
        """First folders with images, and whether folders with images lie in them."""
        found: dict[str, bool] = {}
        for name in self.members:
            top, *inner = self.inside(name).split("/")
            if inner:
                found[top] = found.get(top, False) or len(inner) > 1
        return found

    def inside(self, name: str) -> str:
        """Return an image's name below the folder that the tree is of."""
        return name[len(self.prefix) :]

    def folder(self, name: str) -> "ImageTree":
        """Return the images of one of the `tops`."""
        prefix = f"{self.prefix}{name}/"
        return replace(
            self,
            members={name: place for name, place in self.members.items() if name.startswith(prefix)},
            folders=tuple(folder for folder in self.folders if folder.startswith(prefix)),
            left_out={why: [name for name in names if name.startswith(prefix)] for why, names in self.left_out.items()},
            prefix=prefix,
        )

    def reader(self, names: Sequence[str]) -> Reader:
        """Return what reads the images of these names; one that is not in an archive is empty.

        Of a compressed archive, the images' encoded bytes are kept in memory, once for all workers that are forked and
        once for each that is spawned.
        """
        if not self.archive:
            return PathReader(self.path, Names.of(names))
        places = np.array([self.members.get(name, (0, 0)) for name in names], dtype=np.int64).reshape(-1, 2)
        contents = None
        if self.tar is not None:
            contents = b"".join(memoryview(self.tar)[start : start + size] for start, size in places.tolist())
            places[:, 0] = np.cumsum(places[:, 1]) - places[:, 1]
        return ArchiveReader([self.path], [0], Names.of(names), places, contents)

    def read(self, group_by: str | None = None, hint: str = "") -> Split:
        """Return the images with labels: the first folder is the class.

        Args:
            group_by: what puts images into groups, see `mbib_timm.data.groups`.
            hint: what to do where images lie in no folder.

        Raises:
            DataError: there are no images in folders.
        """
        names = [name for name in self.names if "/" in self.inside(name)]
        left_out = {why: tuple(passed) for why, passed in self.left_out.items() if passed}
        if strays := tuple(name for name in self.names if "/" not in self.inside(name)):
            left_out[OUTSIDE] = strays
        if not names:
            passed = f"; left out: {in_words(left_out)}" if left_out else ""
            looked = hint if strays else f" (looked for {', '.join(READ)})"
            raise DataError(f"no images in class folders under {self}{looked}{passed}")
        if empty := sorted({self.inside(folder).split("/")[0] for folder in self.folders} - self.tops.keys()):
            left_out[WITHOUT_IMAGES] = tuple(f"{self.prefix}{folder}" for folder in empty)
        labels = [composed(self.inside(name).split("/")[0]) for name in names]
        classes, targets = number_classes(labels)
        groups = None
        if group_by is not None:
            groups = group_names(group_by, [self.inside(name) for name in names], labels)
        notes = tuple(filter(None, [self._about_levels(names, group_by)]))
        return Split(self.reader(names), targets, class_names=classes, groups=groups, left_out=left_out, notes=notes)

    def _about_levels(self, names: Sequence[str], group_by: str | None) -> str:
        """Return a line on folders that may be meant otherwise than as they are taken; empty where none are. Whoever
        gives `group_by` knows what the folders are."""
        parts = [self.inside(folder).split("/") for folder in self.folders]
        splits = {folder[1].casefold(): "/".join(folder[:2]) for folder in parts if len(folder) > 1}
        splits = {name: folder for name, folder in splits.items() if name in SPLIT_NAMES}
        if len({SYNONYMS[name][0] for name in splits}) > 1:
            return (
                f"class folders contain folders named like splits ({few([*splits.values()], 3)}), which are read "
                "together; to keep these splits, put the classes inside them: train/fox, not fox/train"
            )
        if group_by is not None or any(self.inside(name).count("/") == 1 for name in names):
            return ""
        flags = _split_flags(self.tops)
        return (
            f"no image lies directly in a class folder; all lie deeper, such as {self.inside(names[0])}; "
            + (f"if these are splits: {flags}; " if flags else "")
            + "if the second level is the class, put all images of a class into one top-level folder"
        )


def _split_flags(names: Collection[str]) -> str:
    """Return the flags that name folders as splits, which their names suggest; empty without two of them."""
    found: dict[str, str] = {}
    for name in names:
        for part in ("train", "val", "test"):
            if any(word.startswith(part) for word in re.findall("[a-z]+", name.casefold())):
                found.setdefault(part, name)
    evaluated = [found[part] for part in ("val", "test") if part in found]
    if "train" not in found or not evaluated or found["train"] in evaluated or len({*evaluated}) < len(evaluated):
        return ""
    flags = zip(("--train-split", "--val-split", "--test-split"), (found["train"], *evaluated), strict=False)
    return " ".join(f"{flag} {quote(name)}" for flag, name in flags)


def number_classes(labels: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the names of classes in natural order, and the label of each image, (N,), int64: the place of its class
    there."""
    classes = tuple(sorted(set(labels), key=lambda name: (natural_key(name), name)))
    number = {name: label for label, name in enumerate(classes)}
    return classes, np.array([number[label] for label in labels], dtype=np.int64)


# Scans


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is hidden, or a system's own."""
    return name.startswith(".") or name.lower() in OF_SYSTEMS


def scan_folder(path: Path) -> ImageTree:
    """Find the images of a folder."""
    return _tree(path, ((what, name, (0, 0)) for what, name in _walk(str(path))))


def _tree(path: Path, found: Iterator[tuple[str, str, tuple[int, int]]], **archive: Any) -> ImageTree:
    """Build a tree of what a scan has found: `IMAGE`, `FOLDER` or a reason, with a name and a place."""
    # Of members with the same name the last counts, as when a tar is unpacked.
    members: dict[str, tuple[int, int]] = {}
    folders: dict[str, None] = {}
    left_out: dict[str, list[str]] = defaultdict(list)
    for what, name, place in found:
        if what == IMAGE:
            members[name] = place
        elif what == FOLDER:
            folders[name] = None
        else:
            left_out[what].append(name)
    return ImageTree(path, members, tuple(folders), left_out, **archive)


def _walk(folder: str, prefix: str = "", above: tuple[tuple[int, int], ...] = ()) -> Iterator[tuple[str, str]]:
    """Give what is in a folder and below it, with names that begin with `prefix`; `above` are device and number of the
    folders that lead here."""
    try:
        status = os.stat(folder)
        with os.scandir(folder) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        yield f"folders that cannot be opened ({error.strerror})", prefix.rstrip("/") or folder
        return
    above = (*above, (status.st_dev, status.st_ino))
    for entry in listed:
        if is_hidden(entry.name):
            continue
        name = prefix + entry.name
        try:
            name.encode()
        except UnicodeEncodeError:
            yield NOT_UTF8, name
            continue
        try:
            if entry.is_dir():
                inner = entry.stat()
                if (inner.st_dev, inner.st_ino) in above:
                    yield CIRCLES, name
                    continue
                yield FOLDER, name
                yield from _walk(entry.path, f"{name}/", above)
            elif entry.is_file():
                yield from _file(name)
            else:
                yield NOWHERE if entry.is_symlink() else SPECIAL, name
        except OSError:  # a link to itself
            yield NOWHERE, name


def _file(name: str) -> Iterator[tuple[str, str]]:
    """Give a file, unless its name says that it is no image."""
    suffix = os.path.splitext(name)[1].lower()
    if suffix in READ:
        yield IMAGE, name
    elif suffix in UNREAD:
        yield NOT_READ, name
    elif name.lower().endswith(SUFFIXES):
        yield PACKED, name
    elif suffix not in NO_IMAGES:
        yield UNKNOWN, name


def open_archive(path: Path) -> ImageTree:
    """Find the images of an archive. Raises DataError as `open_tar` does."""
    with open_tar(path) as tar:
        return _tree(path, _packed(tar.file, tar.end), archive=True, tar=tar.unzipped)


def _packed(file: BinaryIO, end: int, folder: str = "") -> Iterator[tuple[str, str, tuple[int, int]]]:
    """Give what is in the tar from the file's position to `end`: images with first byte and size. `folder` goes before
    the names, for the tar of a class in a tar."""
    nowhere = (0, 0)
    for member in members(file, end, f"{folder}.tar" if folder else ""):
        parts = [part for part in member.name.split("/") if part not in ("", ".")]
        if ".." in parts:
            yield OUT, member.name, nowhere
            continue
        if not parts or any(map(is_hidden, parts)):
            continue
        name = "/".join((folder, *parts) if folder else parts)
        if "/" in name:  # not every tar has its folders as members
            yield FOLDER, name.rpartition("/")[0], nowhere
        if member.kind == archives.FOLDER:
            yield FOLDER, name, nowhere
        elif member.kind in (archives.LINK, archives.OTHER):
            yield LINKS if member.kind == archives.LINK else SPECIAL, name, nowhere
        elif name.lower().endswith(".tar") and not folder:
            file.seek(member.start)
            yield FOLDER, name[: -len(".tar")], nowhere
            yield from _packed(file, member.start + member.size, name[: -len(".tar")])
        else:
            for what, image in _file(name):
                if what == IMAGE and member.kind == archives.SPARSE:  # its bytes are not those of the image
                    raise tarfile.ReadError(f"{name} is a sparse member; pack it without tar's option --sparse")
                yield what, image, (member.start, member.size)


# Splits


def open_folder(
    data_dir: str | None, split_names: Collection[str] = (), group_by: str | None = None
) -> Split | Callable[[str], Split]:
    """Open an image folder or archive.

    Args:
        data_dir: the folder, or a ``.tar``, ``.tar.gz`` or ``.tgz``. It holds the class folders; or a folder or archive
            for each split (``train``; ``validation``, ``val``, ``test``), which holds them.
        split_names: further names of splits.
        group_by: what puts images into groups, see `mbib_timm.data.groups`.

    Returns:
        All images, where the data have no splits; else what opens a split by name.

    Raises:
        DataError: nothing there, no images, or several folders of one split; on opening a split, also where there are
            folders beside the splits.
    """
    if data_dir is None:
        raise DataError("recipe key 'data_dir': the folder source needs the folder or archive of the images")
    path = Path(data_dir)
    if not path.exists():
        raise DataError(f"data_dir {path} does not exist; --data-dir says where the images are")
    known = _known(split_names)
    if path.is_dir():
        if not any(path.iterdir()):
            raise DataError(f"{path} is empty; expected a folder of images for each class")
        places = _split_folders(path, known)
        if places is None:
            return scan_folder(path).read(group_by, _one_level_up(path))
        return OwnSplits(places, partial(_open, path, places, split_names, group_by))
    if not is_archive(path):
        refuse_packed(path)
        is_table = path.suffix.lower() in (".csv", ".tsv", ".parquet")
        hint = f"; a table is read with --dataset table --table {quote(str(path))}" if is_table else ""
        raise DataError(f"{path} is neither a folder nor a supported archive ({', '.join(SUFFIXES)}){hint}")
    for tree in _levels(open_archive(path)):
        if any(inner and name.casefold() in known for name, inner in tree.tops.items()):
            trees = {name: tree.folder(name) for name in tree.tops}
            return OwnSplits(trees, partial(_open, tree, trees, split_names, group_by))
    return tree.read(group_by)


def _one_level_up(path: Path) -> str:
    """Return what to say of a folder that holds images, and may be that of a class."""
    up = path.resolve().parent if path.name in ("", "..") or path.parent == Path() else path.parent
    perhaps = "" if up.resolve() == Path.cwd() else f"; perhaps {quote(str(up))}?"
    unlabelled = f"unlabelled images: mbib predict RUN {quote(str(path))}"
    return f"; --data-dir is the folder that holds one folder per class ({unlabelled}){perhaps}"


def _known(split_names: Collection[str]) -> set[str]:
    """Return the names of splits in lower case, with further ones."""
    return {name.casefold() for name in (*SPLIT_NAMES, *split_names)} - {ALL}


def _levels(tree: ImageTree) -> Iterator[ImageTree]:
    """Give an archive, and the folder around everything in it, which most archives have; and so on."""
    while True:
        yield tree
        if len(tree.tops) != 1 or not all(tree.tops.values()):
            return
        inner = tree.folder(*tree.tops)
        if len(inner.members) < len(tree.members):
            return
        tree = inner


def _split_folders(root: Path, known: set[str]) -> dict[str, Path] | None:
    """Return the folders of a folder, and its archives that are named as splits; None where it holds class folders.

    A folder of images alone is no split: CIFAR-100 has a class ``train``.
    """
    places: dict[str, Path] = {}
    for entry in sorted(root.iterdir(), key=lambda entry: (not entry.is_dir(), entry.name)):
        name = entry.name[: entry.name.find(".")] if is_archive(entry) else entry.name
        holds_images = entry.is_dir() or (is_archive(entry) and name.casefold() in known)
        if holds_images and name not in places and not is_hidden(entry.name):
            places[name] = entry
    # A look into each, no more than it takes: the folders may be large, and far away.
    if not any(name.casefold() in known and has_images(place, folders=True) for name, place in places.items()):
        return None
    return {name: place for name, place in places.items() if has_images(place)}


def has_images(place: Path, folders: bool = False) -> bool:
    """Return whether there are images in a folder, or in `folders` in it; an archive is not looked into."""
    return is_archive(place) or any(what == IMAGE and ("/" in name or not folders) for what, name in _walk(str(place)))


def find_split(places: Mapping[str, T], split: str) -> T | None:
    """Return what stands for a split, by its own name or a synonym's, whatever their case; None where nothing does."""
    by_name = {name.casefold(): place for name, place in places.items()}
    asked = split.casefold()
    return next((by_name[name] for name in (asked, *SYNONYMS.get(asked, ())) if name in by_name), None)


def _refuse_twins(root: Path | ImageTree, places: Collection[str], split_names: Collection[str]) -> None:
    """Raise DataError for folders of one split by their names, of which one would be read, unless each is asked for."""
    of_split: dict[str, list[str]] = defaultdict(list)
    for name in sorted(places):
        of_split[SYNONYMS.get(name.casefold(), (name.casefold(),))[0]].append(name)
    asked = {name.casefold() for name in split_names}
    for split, names in of_split.items():
        folded = {name.casefold() for name in names}
        if len(names) > 1 and not (len(folded) == len(names) and folded <= asked):
            raise DataError(
                f"{root} holds {few([*map(repr, names)])}, whose names all mean split {split!r}: put their images into "
                "one folder, or some elsewhere; or assign each with --train-split, --val-split or --test-split"
            )


@dataclass(frozen=True)
class OwnSplits:
    """What opens the splits that data have of their own, by name.

    Attributes:
        places: what stands for each, by its own name.
        opened: opens one, by that name or a synonym's.
    """

    places: Mapping[str, Any]
    opened: Callable[[str], Split]

    def __call__(self, split: str) -> Split:
        """Open a split."""
        return self.opened(split)


def unasked(places: Mapping[str, T], splits: Collection[str]) -> dict[str, T]:
    """Return what stands for none of some splits."""
    used = [find_split(places, split) for split in splits]
    return {name: place for name, place in places.items() if not any(place is each for each in used)}


def no_split(where: object, places: Collection[str], split: str, hint: str = "") -> DataError:
    """Build the error for a split that is not there.

    Args:
        where: the data, for the message.
        places: names of the splits that there are.
        split: that was asked for.
        hint: what to do, unless another split is meant.
    """
    if split.casefold() == "test" and find_split(dict.fromkeys(places, True), "validation"):
        hint = "; for its validation split, give --split validation, in training --val-split validation"
    names = [printable(name) for name in sorted(filter(None, places))]
    return DataError(f"{where} has no split {split!r}; it has {few(names) if names else 'none by name'}{hint}")


def _open(
    root: Path | ImageTree,
    places: Mapping[str, Path | ImageTree],
    split_names: Collection[str],
    group_by: str | None,
    split: str,
) -> Split:
    """Open a split of its own name or of a synonym. Raises DataError for no such split, several folders of one, or a
    folder that is no split beside others that are."""
    known, asked = _known(split_names), split.casefold()
    if others := [name for name in places if name.casefold() not in known | {asked}]:
        name = next(name for name in places if name.casefold() in known)
        near = [nearest(other, known, most=1) for other in others]
        said = [f"{o!r} (did you mean {n[0]!r}?)" if n else repr(o) for o, n in zip(others, near, strict=True)]
        raise DataError(
            f"{root} holds {name!r}, which contains folders as a split does, beside "
            f"{few(said, 3)}: put the splits into a folder of their own; or, if {name!r} is a class, "
            "give it another name, or put its images directly into it"
        )
    _refuse_twins(root, places, split_names)
    place = found = find_split(places, split)
    if place is None:
        hint = ""
        if {*map(str.casefold, places)} <= {*SYNONYMS["train"]} and isinstance(root, Path):
            training = quote(str(next(iter(places.values()))))
            hint = f"; to hold a part of it out for evaluation, give --data-dir {training}"
        raise no_split(root, places, split, hint)
    if isinstance(place, Path):
        place = list(_levels(open_archive(place)))[-1] if is_archive(place) else scan_folder(place)
    own = next(name for name, each in places.items() if each is found)
    opened = replace(place.read(group_by), called=own)
    beside = _beside(root)
    return replace(opened, left_out={**opened.left_out, BESIDE: beside}) if beside else opened


def _beside(root: Path | ImageTree) -> tuple[str, ...]:
    """Return the images that lie beside folders of splits."""
    if isinstance(root, ImageTree):
        return tuple(name for name in root.names if "/" not in root.inside(name))
    files = sorted(entry.name for entry in root.iterdir() if entry.is_file() and not is_hidden(entry.name))
    return tuple(name for name in files if os.path.splitext(name)[1].lower() in READ)
