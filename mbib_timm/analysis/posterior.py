"""The mean positive posterior probability of each class (equation 14 and figure 7 of the paper)."""

import numpy as np

from mbib_timm.data.long_tail import shot_groups
from mbib_timm.errors import MbibError


def mean_positive_posterior(positive_posterior: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Return the mean over each class's images of the probability given to that class (equation 14); 1 is ideal.

    Args:
        positive_posterior: softmax probability of the true class, (N,).
        labels: true classes, (N,), int64.
        num_classes: classes K.

    Returns:
        (K,), float64; nan for classes without images.
    """
    images = np.bincount(labels, minlength=num_classes)
    sums = np.bincount(labels, weights=positive_posterior, minlength=num_classes)
    return np.divide(sums, images, out=np.full(num_classes, np.nan), where=images > 0)


def posterior_difference(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return diff = first - second by class (figure 7); nan where either has no images.

    Args:
        first: mean positive posterior of one run, (K,).
        second: that of another, (K,).

    Raises:
        MbibError: different numbers of classes.
    """
    if len(first) != len(second):
        raise MbibError(f"posteriors of {len(first)} and of {len(second)} classes cannot be compared")
    return np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)


def mean_by_shot_group(values: np.ndarray, class_counts: np.ndarray) -> dict[str, float | None]:
    """Return the mean of a quantity of classes over all classes and over each shot group.

    Args:
        values: (K,); nan for classes where it was not measured, which are left out.
        class_counts: training images of each class, (K,).

    Returns:
        ``all``, ``many``, ``medium`` and ``few``; None where nothing was measured.
    """
    groups = {"all": np.arange(len(class_counts)), **shot_groups(class_counts)}
    measured = {name: values[classes][~np.isnan(values[classes])] for name, classes in groups.items()}
    return {name: float(some.mean()) if len(some) else None for name, some in measured.items()}
