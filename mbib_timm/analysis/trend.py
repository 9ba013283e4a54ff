"""How accuracy depends on the number of training images: a line through the classes."""

from collections.abc import Sequence

import numpy as np


def accuracy_trend(per_class: Sequence[float | None], class_counts: np.ndarray) -> dict[str, float | None]:
    """Fit the classes' accuracies by least squares to log10 of their training images.

    Args:
        per_class: accuracy of each class in percent, (K,); None for classes without images, which are left out.
        class_counts: training images of each class, (K,), at least 1.

    Returns:
        ``slope`` in points for ten times as many training images; ``intercept``, the line's accuracy at one training
        image, in percent; ``r2``, the share of the variance that the line explains, None where accuracies do not
        differ. All None with fewer than two distinct counts.
    """
    measured = np.array([value is not None for value in per_class])
    accuracy = np.array([value for value in per_class if value is not None], dtype=np.float64)
    images = np.log10(np.asarray(class_counts)[measured])
    if len(np.unique(images)) < 2:
        return {"slope": None, "intercept": None, "r2": None}
    deviation, difference = images - images.mean(), accuracy - accuracy.mean()
    slope = (deviation * difference).sum() / (deviation**2).sum()
    varies = len(np.unique(accuracy)) > 1
    residual = difference - slope * deviation
    return {
        "slope": float(slope),
        "intercept": float(accuracy.mean() - slope * images.mean()),
        "r2": float(1 - (residual**2).sum() / (difference**2).sum()) if varies else None,
    }
