"""What depends on labels alone: class counts, shot groups, long-tailed subsets, images held out of training."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from mbib_timm.errors import DataError
from mbib_timm.files import counted
from mbib_timm.recipe import Recipe

MANY_ABOVE, FEW_BELOW = 100, 20


def count_classes(targets: np.ndarray, num_classes: int, class_names: Sequence[str] | None = None) -> np.ndarray:
    """Count the training images of each class.

    Args:
        targets: labels (N,), integers.
        num_classes: classes K.
        class_names: names for the error message.

    Returns:
        Counts, (K,), int64.

    Raises:
        DataError: labels that are no integers or out of range, or a class without training images.
    """
    targets = np.asarray(targets)
    if targets.dtype.kind not in "iu":
        raise DataError(f"labels must be integers, got {targets.dtype}")
    if len(targets) == 0:
        raise DataError("there are no training images")
    if targets.min() < 0 or targets.max() >= num_classes:
        raise DataError(
            f"labels must lie in 0..{num_classes - 1} for {num_classes} classes, got {targets.min()}..{targets.max()}"
        )
    # A stray label of 10^12 must not allocate as many counts: of more classes than images some have none.
    counts = np.bincount(targets, minlength=num_classes) if num_classes <= len(targets) else None
    if counts is None or not counts.all():
        present = np.unique(targets)
        missing = num_classes - len(present)
        # The first gaps lie among the first few labels.
        empty = np.setdiff1d(np.arange(len(present) + min(missing, 5)), present)[:5]
        names = [class_names[i] if class_names is not None else str(i) for i in empty]
        more = f" and {missing - len(names)} more" if missing > len(names) else ""
        rule = "labels count from 0 without gaps" if class_names is None else "every class needs one"
        raise DataError(f"no training images of class {', '.join(names)}{more}; {rule}")
    return counts


def named(class_names: Sequence[str] | None, num_classes: int) -> tuple[str, ...]:
    """Return the names of K classes: their labels where they have none."""
    return tuple(map(str, range(num_classes))) if class_names is None else tuple(class_names)


def shot_groups(class_counts: np.ndarray) -> dict[str, np.ndarray]:
    """Return the classes of each shot group (Liu et al. 2019).

    Args:
        class_counts: training images of each class, (K,).

    Returns:
        Indices of the classes with more than 100 (``many``), 20 to 100 (``medium``) and fewer than 20 (``few``).
    """
    counts = np.asarray(class_counts)
    return {
        "many": np.flatnonzero(counts > MANY_ABOVE),
        "medium": np.flatnonzero((counts >= FEW_BELOW) & (counts <= MANY_ABOVE)),
        "few": np.flatnonzero(counts < FEW_BELOW),
    }


def exponential_profile(num_classes: int, largest: int, imbalance_factor: float) -> list[int]:
    """Images of each class, ``int(n_max (1/IF)^(c/(K-1)))``, falling exponentially (Cao et al. 2019).

    Args:
        num_classes: classes K, at least 2.
        largest: images n_max of class 0.
        imbalance_factor: IF, images of the first class over images of the last.

    Raises:
        DataError: a factor below 1, or one that leaves a class no image.
    """
    _check(num_classes, largest, imbalance_factor)
    # The small term keeps 49 * (1 / 49), a hair below 1 in floating point, from becoming 0.
    return [int(largest * (1 / imbalance_factor) ** (c / (num_classes - 1)) + 1e-9) for c in range(num_classes)]


def step_profile(num_classes: int, largest: int, imbalance_factor: float) -> list[int]:
    """Images of each class: the first half keeps n_max, the second ``int(n_max / IF)`` (Buda et al. 2018).

    Args:
        num_classes: classes K, at least 2.
        largest: images n_max of the large classes.
        imbalance_factor: IF.

    Raises:
        DataError: a factor below 1, or one that leaves a class no image.
    """
    _check(num_classes, largest, imbalance_factor)
    half = num_classes // 2
    return [largest] * half + [int(largest / imbalance_factor)] * (num_classes - half)


def _check(num_classes: int, largest: int, imbalance_factor: float) -> None:
    if num_classes < 2:
        raise DataError(f"an imbalance needs at least 2 classes, got {num_classes}")
    if not imbalance_factor >= 1:
        raise DataError(f"the imbalance factor must be at least 1, got {imbalance_factor:g}")
    if not _leaves_an_image(largest, imbalance_factor):
        raise DataError(
            f"imbalance factor {imbalance_factor:g} leaves the smallest class no image where the largest has {largest}"
        )


def _leaves_an_image(largest: int, imbalance_factor: float) -> bool:
    """Return whether the smallest class has an image where the largest has so many."""
    return int(largest / imbalance_factor) >= 1


PROFILES = {"exp": exponential_profile, "step": step_profile}


def images_by_class(targets: np.ndarray, num_classes: int) -> list[np.ndarray]:
    """Return the indices of each class's images, in order: K arrays of their own."""
    by_class = np.argsort(targets, kind="stable")
    starts = np.searchsorted(targets[by_class], np.arange(num_classes + 1))
    return [by_class[begin:end].copy() for begin, end in pairwise(starts)]


def hold_out(targets: np.ndarray, share: float, generator: np.random.RandomState) -> np.ndarray:
    """Choose images to hold out: a share of each class.

    Args:
        targets: labels (N,).
        share: of each class: at least one image of a class with two or more, never the last one.
        generator: draws them.

    Returns:
        Which images are held out, (N,), bool.
    """
    held_out = np.zeros(len(targets), dtype=bool)
    for indices in images_by_class(targets, int(targets.max()) + 1):
        if len(indices):
            members = generator.permutation(indices)
            held_out[members[: min(max(1, round(share * len(members))), len(members) - 1)]] = True
    return held_out


def long_tailed_indices(targets: np.ndarray, counts: Sequence[int], seed: int) -> np.ndarray:
    """Choose the images of a long-tailed subset as Cao et al. (2019) do.

    One generator, and for each class in label order: shuffle its images, keep the first n_c. Global random state is
    not touched.

    Args:
        targets: labels (N,) of all images.
        counts: images to keep of each class, (K,).
        seed: of the generator.

    Returns:
        Indices of the images kept, class by class, (sum of counts,), int64.

    Raises:
        DataError: a class has fewer images than it is to keep.
    """
    return np.concatenate([kept for kept, _ in _kept_and_left_out(targets, counts, seed)])


def left_out_indices(targets: np.ndarray, counts: Sequence[int], seed: int, most: int) -> np.ndarray:
    """Choose among the images that `long_tailed_indices` leaves out: of each class those that come next, up to `most`.

    The largest class may have none. Arguments and errors are those of `long_tailed_indices`.

    Returns:
        Indices of the images, class by class, int64.
    """
    return np.concatenate([left_out[:most] for _, left_out in _kept_and_left_out(targets, counts, seed)])


def _kept_and_left_out(
    targets: np.ndarray, counts: Sequence[int], seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the indices that each class keeps, and those that it leaves out, both in the order of its shuffle."""
    generator = np.random.RandomState(seed)
    for label, (indices, count) in enumerate(zip(images_by_class(targets, len(counts)), counts, strict=True)):
        if len(indices) < count:
            raise DataError(
                f"class {label} has {len(indices)} images, the long-tailed profile asks for {count}; --imbalance none "
                "trains on all images"
            )
        generator.shuffle(indices)
        yield indices[:count], indices[count:]


def long_tailed_counts(recipe: Recipe, available: np.ndarray, class_names: Sequence[str] | None = None) -> list[int]:
    """Return the images of each class that a recipe's long-tailed subset keeps, (K,).

    Args:
        recipe: names profile and imbalance factor, and perhaps the largest class.
        available: images of each class, (K,).
        class_names: names for the error message.

    Raises:
        DataError: an imbalance that a class cannot have.
    """
    shape, factor = recipe.imbalance, recipe.imbalance_factor
    largest = recipe.imbalance_max or largest_class(available, shape, factor, class_names)
    return PROFILES[shape](len(available), largest, factor)


def largest_class(
    available: np.ndarray, shape: str, imbalance_factor: float, class_names: Sequence[str] | None = None
) -> int:
    """Return the largest n_max whose profile the data can fill.

    Args:
        available: images of each class, (K,).
        shape: name of the profile.
        imbalance_factor: IF.
        class_names: names for the error message.

    Raises:
        DataError: a factor that leaves the smallest class no image, or asks for more of another than there are.
    """
    largest = int(available.max())
    while True:
        counts = np.array(PROFILES[shape](len(available), largest, imbalance_factor))
        short = np.flatnonzero(counts > available)
        if not len(short):
            return largest
        if not _leaves_an_image(largest - 1, imbalance_factor):
            label = int(short[0])
            raise DataError(
                f"class {named(class_names, len(available))[label]} has {counted(int(available[label]), 'image')}, and "
                f"imbalance factor {imbalance_factor:g} asks for {counts[label]} or more"
            )
        largest -= 1
