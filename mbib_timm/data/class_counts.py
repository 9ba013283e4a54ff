"""Training images of each class: what decides loss, weights and shot groups, so it is always derived from labels."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mbib_timm.errors import DataError

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
    present = np.unique(targets)
    missing = num_classes - len(present)
    if missing:
        # A stray label of 10^12 must not allocate as many counts: the first gaps lie among the first few labels.
        empty = np.setdiff1d(np.arange(len(present) + min(missing, 5)), present)[:5]
        names = [class_names[i] if class_names is not None else str(i) for i in empty]
        more = f" and {missing - len(names)} more" if missing > len(names) else ""
        raise DataError(f"no training images of class {', '.join(names)}{more}")
    return np.bincount(targets, minlength=num_classes)


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


def read_class_counts(path: str | Path) -> np.ndarray:
    """Read training images of each class: a JSON list, or one integer a line.

    Raises:
        DataError: the file is missing or holds something else.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot read the class counts {path}: {error.strerror}") from None
    try:
        values = json.loads(text) if text.lstrip().startswith("[") else [int(line) for line in text.split()]
        counts = np.array(values)
        if counts.ndim != 1 or counts.dtype.kind not in "iu" or len(counts) < 2 or counts.min() < 1:
            raise ValueError
    except ValueError:
        raise DataError(f"{path}: expected a positive integer for each class, one a line or a JSON list") from None
    return counts.astype(np.int64)
