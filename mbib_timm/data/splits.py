"""The data of a run: its splits, the long-tailed subset, the class counts; opened and checked against one another."""

from dataclasses import dataclass

import numpy as np

from mbib_timm.data.groups import hold_out_groups
from mbib_timm.data.images import Split
from mbib_timm.data.long_tail import PROFILES, count_classes, hold_out, largest_class, long_tailed_indices
from mbib_timm.data.sources import Source
from mbib_timm.errors import DataError, MbibError
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
        held_out: images that are never trained on, for methods that choose a constant; or None. See `open_data`.
        held_out_from: what those are, in words, for the record.
    """

    train: Split
    val: Split
    test: Split | None
    class_counts: np.ndarray
    class_names: tuple[str, ...] | None
    held_out: Split | None = None
    held_out_from: str = "none"

    @property
    def num_classes(self) -> int:
        """Classes K."""
        return len(self.class_counts)

    def require_held_out(self) -> Split:
        """Return the images that are never trained on. Raises MbibError where there are none."""
        if self.held_out is None:
            raise MbibError(
                "every image is trained or tested on, which leaves none to choose a constant on: set "
                "holdout: 0.1 to keep a tenth of each class's training images out of training"
            )
        return self.held_out


def open_data(recipe: Recipe) -> Splits:
    """Open the recipe's splits, take the long-tailed subset, count the classes, and check that all of it fits.

    Images for methods that choose a constant are, in this order:

    1. with ``holdout`` above 0, that share of each class of the (long-tailed) training images, at least one of a class
       with two or more and never the last one, in whole groups where the images have groups, drawn by
       ``subset_seed``: they are not trained on, and not counted;
    2. of a long-tailed subset, the training images that it leaves out, which may be none of the largest class;
    3. where there is a test split, the validation split;
    4. none.

    Raises:
        DataError: data that are missing, malformed, or do not fit the recipe or one another.
    """
    names = [recipe.train_split, recipe.val_split]
    if recipe.test_split is not None or recipe.test_list is not None:
        names.append(recipe.test_split or "test")
    train, val, *tests = Source(recipe).splits(names)
    test = tests[0] if tests else None
    held_out, held_out_from = None, "none"
    num_classes = _num_classes(recipe, train)
    counts = count_classes(train.targets, num_classes, train.class_names)
    if recipe.imbalance != "none":
        kept = _long_tailed(recipe, train.targets, counts)
        left_out = np.setdiff1d(np.arange(len(train)), kept)
        if len(left_out):
            held_out = train.subset(left_out)
            held_out_from = f"the {len(left_out):,} training images that the long-tailed subset leaves out"
        train = train.subset(kept)
    if recipe.holdout > 0:
        train, held_out = _hold_out(recipe, train)
        groups = "" if train.groups is None else ", in whole groups"
        held_out_from = f"{100 * recipe.holdout:g} % of each class's training images{groups}, which are not trained on"
    counts = count_classes(train.targets, num_classes, train.class_names)
    for name, split in ((recipe.val_split, val), (recipe.test_split or "test", test)):
        if split is not None:
            check_evaluation(name, split, train, num_classes)
    if held_out is None and test is not None:
        held_out, held_out_from = val, f"the validation split {recipe.val_split!r}"
    return Splits(train, val, test, counts, train.class_names, held_out, held_out_from)


def _num_classes(recipe: Recipe, train: Split) -> int:
    highest = int(train.targets.max()) + 1
    in_data = len(train.class_names) if train.class_names is not None else highest
    if highest > in_data:
        raise DataError(f"label {highest - 1} has no name: the class map names {in_data} classes")
    if train.class_names is not None and in_data < 2:
        kind = " folder, as the first below data_dir are," if recipe.dataset == "folder" else ""
        raise DataError(
            f"{recipe.table or recipe.data_dir or recipe.dataset} holds {in_data} class{kind} "
            f"({', '.join(train.class_names)}); a classifier needs two or more"
        )
    if recipe.num_classes is not None and recipe.num_classes != in_data:
        raise DataError(f"the data have {in_data} classes, recipe key 'num_classes' says {recipe.num_classes}")
    return in_data


def _long_tailed(recipe: Recipe, targets: np.ndarray, available: np.ndarray) -> np.ndarray:
    """Return the indices of the images that the recipe's long-tailed subset keeps."""
    shape, factor = recipe.imbalance, recipe.imbalance_factor
    largest = recipe.imbalance_max or largest_class(available, shape, factor)
    return long_tailed_indices(targets, PROFILES[shape](len(available), largest, factor), recipe.subset_seed)


def _hold_out(recipe: Recipe, train: Split) -> tuple[Split, Split]:
    """Return the images to train on, and those that the recipe holds out."""
    # Seeded through MT19937, it is another stream than that which has drawn the long-tailed subset.
    generator = np.random.RandomState(np.random.MT19937(recipe.subset_seed))
    if train.groups is not None:
        held_out = hold_out_groups(train.targets, train.groups, recipe.holdout, generator)
        one = "group of training images"
    else:
        held_out, one = hold_out(train.targets, recipe.holdout, generator), "training image"
    if not held_out.any():
        raise DataError(f"recipe key 'holdout': every class has one {one}, which is needed for training")
    return train.subset(np.flatnonzero(~held_out)), train.subset(np.flatnonzero(held_out))


def check_evaluation(name: str, split: Split, train: Split, num_classes: int) -> None:
    """Raise DataError for a split that is empty, or has other classes than training."""
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
    raise DataError(f"split {name!r} has different classes from training: {', '.join(differing) or 'another order'}")
