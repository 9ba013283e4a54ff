"""Image folders and archives, as timm reads them: classes are folders, labels their natural order."""

from pathlib import Path
from typing import Any

import numpy as np
from timm.data.readers import create_reader

from mbib_timm.data.archives import SUFFIXES, ImageArchive, image_kinds, is_archive, open_archive
from mbib_timm.data.images import Split, TimmReader, first_line
from mbib_timm.data.long_tail import hold_out
from mbib_timm.errors import DataError

SYNONYMS = {"train": ("train", "training")} | dict.fromkeys(
    ("validation", "val", "valid", "test", "eval"), ("validation", "val", "valid", "test", "eval")
)


def open_folder(data_dir: str | None, split: str, val_fraction: float, seed: int) -> Split:
    """Open a split of an image folder or archive.

    `data_dir` may hold a folder or archive for each split (``train``; ``validation``, ``val``, ``test``), or the class
    folders themselves; or be an archive of either. Without splits, a share of each class is held out for evaluation.

    Args:
        data_dir: the folder, or a ``.tar``, ``.tar.gz`` or ``.tgz``.
        split: name of the split.
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
    held_out = hold_out(whole.targets, val_fraction, np.random.RandomState(seed))
    return whole.subset(np.flatnonzero(~held_out if split in SYNONYMS["train"] else held_out))


def find_split(root: Path | ImageArchive, split: str) -> Path | ImageArchive | None:
    """Return the folder or archive of a split under its own name or a synonym; None where there is none.

    A folder of images alone is none of them: CIFAR-100 has a class ``train``.
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
