"""Image folders, and archives of them: classes are folders, labels their natural order, as in timm's readers.

An archive is a tar, compressed or not: a whole data set in one file. It holds class folders, or split folders of them
(``train/cat/1.png``), below one common folder or not; a tar in it stands for the folder of its name. Members are read
by offset, and their names never lead to the disk.
"""

import gzip
import io
import os
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from timm.data import create_reader, get_img_extensions
from timm.utils import natural_key

from mbib_timm.data.images import Split, TimmReader
from mbib_timm.data.long_tail import hold_out
from mbib_timm.errors import DataError, first_line

SUFFIXES = (".tar", ".tar.gz", ".tgz")
GZIP_MAGIC = b"\x1f\x8b"
SYNONYMS = {"train": ("train", "training")} | dict.fromkeys(
    ("validation", "val", "valid", "test", "eval"), ("validation", "val", "valid", "test", "eval")
)


class ArchiveReader:
    """Images in a tar.

    Args:
        archive: the file.
        names: of the images, in the archive.
        places: first byte and size of each, (N, 2), int64.
        contents: the bytes that the places are in; None to read them from the file.
    """

    def __init__(self, archive: Path, names: list[str], places: np.ndarray, contents: bytes | None) -> None:
        self.archive, self.names, self.places, self.contents = archive, names, places, contents
        self._opened: tuple[int, BinaryIO] | None = None

    def read(self, index: int) -> Image.Image:
        """Open an image."""
        start, size = self.places[index].tolist()
        if self.contents is not None:
            return Image.open(io.BytesIO(self.contents[start : start + size]))
        file = self._file()
        file.seek(start)
        return Image.open(io.BytesIO(file.read(size)))

    def path(self, index: int) -> str:
        """Return the paths of the archive and of the image in it, joined."""
        return f"{self.archive}/{self.names[index]}"

    def _file(self) -> BinaryIO:
        """Return this process's own handle: one that came over a fork shares its position with the parent's."""
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = os.getpid(), self.archive.open("rb")
        return self._opened[1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}


@dataclass(frozen=True)
class ImageArchive:
    """The images of an archive, or of a folder in it.

    Attributes:
        path: the file.
        members: first byte and size of each image, by its name in the archive.
        tar: the decompressed tar; None for one that is not compressed and stays on the disk.
        prefix: the folder, with a slash at its end; empty for the whole archive.
    """

    path: Path
    members: dict[str, tuple[int, int]]
    tar: bytes | None
    prefix: str = ""

    def __str__(self) -> str:
        return f"{self.path}/{self.prefix}".rstrip("/")

    @cached_property
    def folders(self) -> dict[str, str]:
        """Paths, by name, of the folders that hold class folders: at the top, or in the only one there.

        A folder of images alone is none of them: CIFAR-100 has a class ``train``.
        """
        names = [name.split("/") for name in self.members]
        found = {parts[0]: f"{parts[0]}/" for parts in names if len(parts) > 2}
        if len({parts[0] for parts in names}) == 1:
            found |= {parts[1]: f"{parts[0]}/{parts[1]}/" for parts in names if len(parts) > 3}
        return found

    def folder(self, name: str) -> "ImageArchive":
        """Return the images of one of the `folders`."""
        prefix = self.folders[name]
        inside = {name: place for name, place in self.members.items() if name.startswith(prefix)}
        return replace(self, members=inside, prefix=prefix)

    def read(self) -> Split:
        """Return the images with labels: an image's folder is its class, as in timm's readers, and so is the order.

        Of a compressed archive, the images' encoded bytes are kept in memory, once for all workers that are forked and
        once for each that is spawned.

        Raises:
            DataError: there are no images.
        """
        if not self.members:
            raise DataError(f"no images in class folders under {self} (looked for {', '.join(image_kinds())})")
        names = sorted(self.members, key=natural_key)
        folders = [name.removeprefix(self.prefix).rpartition("/")[0].rpartition("/")[2] for name in names]
        # Names that differ in case alone have one natural key; their order must not be that of a set.
        classes = sorted(set(folders), key=lambda name: (natural_key(name), name))
        labels = {name: label for label, name in enumerate(classes)}
        targets = np.array([labels[name] for name in folders], dtype=np.int64)
        places, contents = np.array([self.members[name] for name in names], dtype=np.int64), None
        if self.tar is not None:
            contents = b"".join(memoryview(self.tar)[start : start + size] for start, size in places.tolist())
            places[:, 0] = np.cumsum(places[:, 1]) - places[:, 1]
        return Split(ArchiveReader(self.path, names, places, contents), targets, class_names=tuple(classes))


def image_kinds() -> list[str]:
    """Return the suffixes of images: timm's, and WebP's."""
    return sorted({*get_img_extensions(), ".webp"})


def is_archive(path: Path) -> bool:
    """Return whether a path is that of an archive, by its name."""
    return path.name.lower().endswith(SUFFIXES) and path.is_file()


def open_archive(path: Path) -> ImageArchive:
    """Find the images of an archive.

    A compressed archive cannot be read by offset: it is decompressed into memory, which suits some hundred megabytes.
    Whether it is compressed is seen from its first bytes: downloads are unpacked on the way and keep their name.

    Args:
        path: a tar, or a tar compressed by gzip.

    Raises:
        DataError: a file that is no tar, truncated or damaged.
    """
    try:
        with path.open("rb") as file:
            tar = None
            if file.read(len(GZIP_MAGIC)) == GZIP_MAGIC:
                with gzip.open(path) as compressed:
                    tar = compressed.read()
            contents = file if tar is None else io.BytesIO(tar)
            end = contents.seek(0, os.SEEK_END)
            contents.seek(0)
            # Of members with the same name the last counts, as when a tar is unpacked.
            members = {name: (start, size) for name, start, size in _images(contents, end)}
    # tarfile lets ValueError and OverflowError of the numbers in a damaged header pass.
    except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError, OverflowError) as error:
        raise DataError(f"cannot read {path}: {first_line(error)}") from None
    return ImageArchive(path, members, tar)


def _images(file: BinaryIO, end: int, folder: str = "") -> Iterator[tuple[str, int, int]]:
    """Give name, first byte and size of each image in the tar that begins at the file's position.

    Args:
        file: can be sought.
        end: of the tar in the file.
        folder: goes before the names, for the tar of a class in a tar.
    """
    with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="backslashreplace") as tar:
        members = tar.getmembers()
        file.seek(tar.offset)
    # tarfile takes a damaged header, and a file that ends between two members, for the end.
    if tar.offset >= end or file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        where = f" of {folder}.tar" if folder else ""
        raise tarfile.ReadError(f"truncated or damaged after {len(members)} members{where}")
    kinds = image_kinds()
    for member in members:
        parts = [part for part in member.name.split("/") if part not in ("", ".")]
        if not member.isreg() or any(part.startswith(".") for part in parts):  # hidden, or macOS's ._ files, or ..
            continue
        name = PurePosixPath(folder, *parts)
        if name.suffix.lower() in kinds:
            if member.issparse():  # its bytes are not those of the image
                raise tarfile.ReadError(f"{name} is a sparse member; pack it without tar's option --sparse")
            yield str(name), member.offset_data, member.size
        elif name.suffix.lower() == ".tar" and not folder:
            file.seek(member.offset_data)
            yield from _images(file, member.offset_data + member.size, str(name.with_suffix("")))


def open_folder(data_dir: str | None, split: str, val_fraction: float, seed: int) -> Split:
    """Open a split of an image folder or archive.

    `data_dir` may hold a folder or archive for each split (``train``; ``validation``, ``val``, ``test``), or the class
    folders themselves; or be an archive of either. Without splits, a share of each class is held out for evaluation.

    Args:
        data_dir: the folder, or a ``.tar``, ``.tar.gz`` or ``.tgz``.
        split: name of the split; ``all`` for every image where there are no splits.
        val_fraction: share of each class to hold out where there are no splits: at least one image of a class with
            two or more; a class with one image keeps it for training.
        seed: chooses the images held out.

    Raises:
        DataError: nothing there, no images, or no such split.
    """
    if data_dir is None:
        raise DataError("recipe key 'data_dir': the folder source needs the folder or archive of the images")
    path = Path(data_dir)
    if not path.exists():
        raise DataError(f"data_dir {path} does not exist")
    root = open_archive(path) if is_archive(path) else path
    found = find_split(root, split)
    if found is not None:
        return _read(found)
    if any(find_split(root, name) for name in ("train", "validation")):
        raise DataError(f"{root} holds no split {split!r}: there is {', '.join(_entries(root))}")
    whole = _read(root)
    if split == "all":
        return whole
    held_out = hold_out(whole.targets, val_fraction, np.random.RandomState(seed))
    return whole.subset(np.flatnonzero(~held_out if split in SYNONYMS["train"] else held_out))


def find_split(root: Path | ImageArchive, split: str) -> Path | ImageArchive | None:
    """Return the folder or archive of a split under its own name or a synonym; None where there is none.

    A folder of images alone is no split: CIFAR-100 has a class ``train``.
    """
    names = dict.fromkeys((split, *SYNONYMS.get(split, ())))
    if isinstance(root, ImageArchive):
        return next((root.folder(name) for name in names if name in root.folders), None)
    candidates = (root / f"{name}{suffix}" for name in names for suffix in ("", *SUFFIXES))
    return next((candidate for candidate in candidates if candidate.is_file() or _holds_folders(candidate)), None)


def _holds_folders(path: Path) -> bool:
    return path.is_dir() and any(entry.is_dir() for entry in path.iterdir() if not entry.name.startswith("."))


def _read(place: Path | ImageArchive) -> Split:
    if isinstance(place, Path) and is_archive(place):
        place = open_archive(place)
    split = place.read() if isinstance(place, ImageArchive) else _read_folder(place)
    names = split.class_names or ()
    if "" in names:
        raise DataError(f"{place} holds images outside of class folders")
    if len(names) < 2:
        raise DataError(f"{place} holds {len(names)} class folder ({', '.join(names)}); a classifier needs two or more")
    return split


def _read_folder(path: Path) -> Split:
    if path.is_dir() and not any(path.iterdir()):
        raise DataError(f"{path} is empty")
    try:
        reader: Any = create_reader("", root=str(path), input_key=";".join(image_kinds()))
    except OSError as error:
        raise DataError(f"cannot read {path}: {first_line(error)}") from None
    except (ValueError, AssertionError, RuntimeError):
        kinds = f"looked for {', '.join(image_kinds())}" if path.is_dir() else f"archives are {', '.join(SUFFIXES)}"
        raise DataError(f"no images in class folders under {path} ({kinds})") from None
    _refuse_empty_classes(path, reader)
    targets = np.array([label for _, label in reader.samples], dtype=np.int64)
    names = sorted(reader.class_to_idx, key=lambda name: reader.class_to_idx[name])
    return Split(TimmReader(reader), targets, class_names=tuple(names))


def _refuse_empty_classes(root: Path, reader: Any) -> None:
    """timm leaves a folder without images out of the classes, which shifts the labels of those after it."""
    used = {Path(file).relative_to(root).parts[0] for file, _ in reader.samples}
    folders = {entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
    if folders - used:
        raise DataError(f"no images of class {', '.join(sorted(folders - used)[:5])} in {root}")


def _entries(root: Path | ImageArchive) -> list[str]:
    return sorted(root.folders if isinstance(root, ImageArchive) else [path.name for path in root.iterdir()])[:8]
