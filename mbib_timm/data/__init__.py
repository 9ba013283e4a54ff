"""Data: sources, long-tailed subsets, transforms and loaders.

`open_data` finds out what there is, and checks it; `create_loaders` makes batches of it.
"""

from dataclasses import dataclass

import numpy as np
import torch

from mbib_timm.data.class_counts import count_classes, read_class_counts, shot_groups
from mbib_timm.data.images import Split
from mbib_timm.data.loaders import Loader, Place
from mbib_timm.data.long_tail import PROFILES, largest_class, long_tailed_indices
from mbib_timm.data.resident import resident_loader
from mbib_timm.data.sources import SOURCES, open_split
from mbib_timm.data.timm_loader import timm_eval_loader, timm_train_loader
from mbib_timm.errors import DataError
from mbib_timm.recipe import Recipe

__all__ = [
    "SOURCES",
    "Loader",
    "Loaders",
    "Split",
    "Splits",
    "build_eval_loader",
    "count_classes",
    "create_loaders",
    "open_data",
    "open_split",
    "shot_groups",
]


@dataclass(frozen=True)
class Splits:
    """The data of a run.

    Attributes:
        train: training images, the long-tailed subset where the recipe asks for one.
        val: images evaluated during training.
        test: images evaluated once at the end, or None.
        class_counts: training images of each class, (K,).
        class_names: in label order, where they are known.
    """

    train: Split
    val: Split
    test: Split | None
    class_counts: np.ndarray
    class_names: tuple[str, ...] | None

    @property
    def num_classes(self) -> int:
        """Classes K."""
        return len(self.class_counts)


@dataclass(frozen=True)
class Loaders:
    """Batches of each split."""

    train: Loader
    val: Loader
    test: Loader | None

    def broken_images(self) -> list[str]:
        """Return the training images that could not be read and were replaced."""
        return self.train.broken_images()


def open_data(recipe: Recipe) -> Splits:
    """Open the recipe's splits, take the long-tailed subset, count the classes, and check that all of it fits.

    Raises:
        DataError: data that are missing, malformed, or do not fit the recipe or one another.
    """
    train = open_split(recipe, recipe.train_split)
    val = open_split(recipe, recipe.val_split)
    has_test = recipe.test_split is not None or recipe.test_list is not None
    test = open_split(recipe, recipe.test_split or "test") if has_test else None
    counts = _declared_counts(recipe) if train.targets is None else None
    if train.targets is not None:
        num_classes = _num_classes(recipe, train)
        counts = count_classes(train.targets, num_classes, train.class_names)
        if recipe.imbalance != "none":
            train = _long_tailed(recipe, train, counts)
            counts = count_classes(np.asarray(train.targets), num_classes, train.class_names)
    assert counts is not None
    for name, split in ((recipe.val_split, val), (recipe.test_split or "test", test)):
        if split is not None:
            _check_evaluation(name, split, train, len(counts))
    return Splits(train, val, test, counts, train.class_names)


def _num_classes(recipe: Recipe, train: Split) -> int:
    assert train.targets is not None
    highest = int(train.targets.max()) + 1
    in_data = len(train.class_names) if train.class_names is not None else highest
    if highest > in_data:
        raise DataError(f"label {highest - 1} has no name: the class map names {in_data} classes")
    if recipe.num_classes is not None and recipe.num_classes != in_data:
        raise DataError(f"the data have {in_data} classes, recipe key 'num_classes' says {recipe.num_classes}")
    return in_data


def _declared_counts(recipe: Recipe) -> np.ndarray:
    if recipe.class_counts is None:
        raise DataError(
            f"data source {recipe.dataset!r} streams and cannot be counted: give its training images of each class "
            "with --class-counts FILE"
        )
    if recipe.imbalance != "none":
        raise DataError(f"data source {recipe.dataset!r} streams: a long-tailed subset needs images by index")
    counts = read_class_counts(recipe.class_counts)
    if recipe.num_classes is not None and recipe.num_classes != len(counts):
        raise DataError(f"{recipe.class_counts} counts {len(counts)} classes, 'num_classes' says {recipe.num_classes}")
    return counts


def _long_tailed(recipe: Recipe, train: Split, available: np.ndarray) -> Split:
    assert train.targets is not None
    shape, factor = recipe.imbalance, recipe.imbalance_factor
    largest = recipe.imbalance_max or largest_class(available, shape, factor)
    counts = PROFILES[shape](len(available), largest, factor)
    return train.subset(long_tailed_indices(train.targets, counts, recipe.subset_seed))


def _check_evaluation(name: str, split: Split, train: Split, num_classes: int) -> None:
    if split.targets is None:
        return
    if len(split) == 0:
        raise DataError(f"split {name!r} has no images")
    if split.targets.min() < 0 or split.targets.max() >= num_classes:
        raise DataError(
            f"split {name!r} has labels {split.targets.min()}..{split.targets.max()}, training has "
            f"{num_classes} classes"
        )
    if split.class_names is None or train.class_names is None or split.class_names == train.class_names:
        return
    differing = sorted(set(split.class_names) ^ set(train.class_names))[:5]
    raise DataError(f"split {name!r} has other classes than training: {', '.join(differing) or 'another order'}")


def create_loaders(
    splits: Splits,
    recipe: Recipe,
    input_size: tuple[int, int, int],
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
) -> Loaders:
    """Make batches of a run's splits.

    Args:
        splits: what `open_data` found.
        recipe: augmentation, batch sizes, workers.
        input_size: (C, H, W) of the model.
        device: where the batches go.
        rank: this process.
        world_size: processes that share the data.
    """
    place = Place(device, rank, world_size)
    resident = recipe.loader == "resident"

    def build(split: Split, training: bool) -> Loader:
        if resident:
            return resident_loader(split, recipe, input_size, place, training)
        return (timm_train_loader if training else timm_eval_loader)(split, recipe, input_size, place)

    return Loaders(
        train=build(splits.train, True),
        val=build(splits.val, False),
        test=None if splits.test is None else build(splits.test, False),
    )


def build_eval_loader(
    recipe: Recipe,
    split: str,
    *,
    input_size: tuple[int, int, int],
    num_classes: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
) -> Loader:
    """Make batches of one split alone, for evaluation.

    Args:
        recipe: names the data and the preprocessing.
        split: name of the split.
        input_size: (C, H, W) of the model.
        num_classes: classes that the model tells apart.
        device: where the batches go.
        rank: this process.
        world_size: processes that share the data.

    Raises:
        DataError: data that are missing, or have labels that the model has not.
    """
    opened = open_split(recipe, split)
    if opened.class_names is not None and len(opened.class_names) != num_classes:
        raise DataError(f"split {split!r} has {len(opened.class_names)} classes, the model has {num_classes}")
    _check_evaluation(split, opened, opened, num_classes)
    return timm_eval_loader(opened, recipe, input_size, Place(device, rank, world_size))
