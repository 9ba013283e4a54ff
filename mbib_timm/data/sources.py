"""Data sources, found by name: each opens one split of the recipe's data."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from timm.data.readers import create_reader

from mbib_timm.data.digits import open_digits
from mbib_timm.data.folders import open_folder
from mbib_timm.data.images import ArrayReader, Split, TimmReader, first_line
from mbib_timm.data.lists import open_inaturalist, open_list
from mbib_timm.errors import DataError
from mbib_timm.recipe import Recipe
from mbib_timm.registry import Registry

SOURCES: Registry[Callable[[Recipe, str], Split]] = Registry("data source")
HFDS_PREFIX = "hfds/"


def open_split(recipe: Recipe, split: str) -> Split:
    """Open one split of the recipe's data.

    Args:
        recipe: names source and place.
        split: name of the split.

    Raises:
        MbibError: an unknown source.
        DataError: data that are missing or malformed.
    """
    if recipe.dataset.startswith(HFDS_PREFIX):
        return SOURCES["hfds/NAME"](recipe, split)
    return SOURCES[recipe.dataset](recipe, split)


@SOURCES.register("digits")
def _digits(recipe: Recipe, split: str) -> Split:
    return open_digits(split)


@SOURCES.register("folder")
def _folder(recipe: Recipe, split: str) -> Split:
    return open_folder(recipe.data_dir, split, recipe.val_fraction, recipe.subset_seed)


def _list_key(recipe: Recipe, split: str) -> str:
    """Return the recipe key of a split's list file."""
    keys = {recipe.test_split or "test": "test_list", recipe.val_split: "val_list", recipe.train_split: "train_list"}
    if split not in keys:
        raise DataError(f"there is no list of split {split!r}: the recipe names {', '.join(reversed(keys))}")
    return keys[split]


@SOURCES.register("list")
def _list(recipe: Recipe, split: str) -> Split:
    key = _list_key(recipe, split)
    return open_list(getattr(recipe, key), recipe.data_dir, key, recipe.class_map)


@SOURCES.register("inat2018")
def _inat2018(recipe: Recipe, split: str) -> Split:
    key = _list_key(recipe, split)
    return open_inaturalist(getattr(recipe, key), recipe.data_dir, key)


def _cifar(name: str, recipe: Recipe, split: str) -> Split:
    from torchvision import datasets

    if split not in ("train", "test", "validation"):
        raise DataError(f"{name} has the splits train and test, not {split!r}")
    root = Path(recipe.data_dir or "data")
    try:
        cifar: Any = getattr(datasets, name)(str(root), train=split == "train", download=recipe.dataset_download)
    except (RuntimeError, OSError) as error:
        reason = first_line(error) if recipe.dataset_download else "missing or damaged; --dataset-download fetches it"
        raise DataError(f"cannot open {name} under {root}: {reason}") from None
    return Split(ArrayReader(cifar.data, name), np.array(cifar.targets), class_names=tuple(cifar.classes))


SOURCES.register("torch/cifar10")(partial(_cifar, "CIFAR10"))
SOURCES.register("torch/cifar100")(partial(_cifar, "CIFAR100"))


@SOURCES.register("hfds/NAME")
def _hugging_face(recipe: Recipe, split: str) -> Split:
    try:
        reader: Any = create_reader(recipe.dataset, root=recipe.data_dir, split=split)
    except ImportError:
        raise DataError("hfds/ needs Hugging Face datasets: pip install 'mbib-timm[hfds]'") from None
    except (ValueError, KeyError, OSError) as error:
        raise DataError(f"cannot open {recipe.dataset}, split {split!r}: {first_line(error)}") from None
    # The whole column at once: the reader's own iteration takes a minute for a million images.
    targets = np.asarray(reader.dataset.select_columns(reader.label_key).with_format("numpy")[:][reader.label_key])
    if targets.dtype.kind not in "iu":
        raise DataError(f"{recipe.dataset}: labels must be integers, column {reader.label_key!r} is {targets.dtype}")
    names = sorted(reader.class_to_idx, key=reader.class_to_idx.__getitem__)
    inside = f"{recipe.dataset} {split}"
    return Split(TimmReader(reader, inside), targets.astype(np.int64), class_names=tuple(map(str, names)) or None)
