"""Reliability diagrams: accuracy against confidence in 15 bins, and the error between them (Guo et al. 2017)."""

from typing import Any

import numpy as np

from mbib_timm.evaluation.metrics import ECE_BINS, expected_calibration_error


def reliability(confidence: np.ndarray, correct: np.ndarray) -> dict[str, Any]:
    """Return a reliability diagram's bins, which are those of `batch_statistics`: ((b-1)/15, b/15].

    Args:
        confidence: largest softmax probability of each image, (N,), in 0..1.
        correct: whether that class is the true one, (N,).

    Returns:
        ``images`` of each bin; their mean ``confidence`` and their ``accuracy`` in percent, None where a bin is empty;
        ``ece`` in percent.
    """
    wide = np.asarray(confidence, dtype=np.float64)
    place = np.clip(np.ceil(wide * ECE_BINS).astype(np.int64) - 1, 0, ECE_BINS - 1)
    columns = (np.ones_like(wide), wide, np.asarray(correct, dtype=np.float64))
    bins = np.stack([np.bincount(place, weights=column, minlength=ECE_BINS) for column in columns], axis=1)

    def percent(column: int) -> list[float | None]:
        return [float(100.0 * row[column] / row[0]) if row[0] else None for row in bins]

    return {
        "images": [int(images) for images in bins[:, 0]],
        "confidence": percent(1),
        "accuracy": percent(2),
        "ece": 100.0 * expected_calibration_error(bins),
    }
