"""Class weights of a loss: from the training counts, or from a file by class name."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mbib_timm.data.class_values import ClassValues, label_names, read_class_values
from mbib_timm.errors import DataError
from mbib_timm.files import read_text
from mbib_timm.recipe.checks import parse_class_weights

WEIGHTS = ClassValues("class weights", "weight", zero=False, missing="every class needs one")


def require_file(given: str) -> None:
    """Raise DataError where the recipe key ``class_weights`` names a file that is missing or cannot be read."""
    if parse_class_weights(given)[0] == "file":
        read_text(Path(given), WEIGHTS.file, DataError)


def loss_weights(given: str, class_counts: np.ndarray, class_names: Sequence[str] | None) -> np.ndarray | None:
    """Return the class weights that a recipe asks for, scaled so that their mean over the training images is 1.

    Of n_k images ``balanced`` gives 1 / n_k, ``power:p`` n_k^-p, and ``effective:b`` (1 - b) / (1 - b^n_k) (Cui et al.
    2019). With the mean at 1 a loss keeps its scale, and with it the learning rate its meaning.

    Args:
        given: recipe key ``class_weights``: none, balanced, effective[:beta], power[:p], or a file.
        class_counts: training images of each class, (K,), at least 1.
        class_names: in label order; numbers where there are none.

    Returns:
        (K,), float64; None for none.

    Raises:
        MbibError: a value that is none of these.
        DataError: a file that is none of weights for these classes; see `read_class_values`.
    """
    kind, number = parse_class_weights(given)
    counts = class_counts.astype(np.float64)
    if kind == "none":
        return None
    if kind == "file":
        weights = read_class_values(Path(given), label_names(class_names, len(counts)), WEIGHTS)
        weights /= weights.max()
    elif kind == "effective":
        weights = (1 - number) / (1 - number**counts)
    else:
        weights = (counts / counts.min()) ** -number  # the rarest class has 1, whatever the exponent
    return weights * counts.sum() / (weights * counts).sum()
