"""The data of a run: its splits, the long-tailed subset, the class counts; opened and checked against one another."""

from dataclasses import dataclass

import numpy as np

from mbib_timm.data.class_counts import count_classes, read_class_counts
from mbib_timm.data.images import Split
from mbib_timm.data.long_tail import PROFILES, largest_class, long_tailed_indices
from mbib_timm.data.sources import open_split
from mbib_timm.errors import DataError
from mbib_timm.recipe import Recipe


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
            check_evaluation(name, split, train, len(counts))
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


def check_evaluation(name: str, split: Split, train: Split, num_classes: int) -> None:
    """Raise DataError for a split that is empty, or has other classes than training."""
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
