"""The embedded data: scikit-learn's 8x8 handwritten digits, enlarged to 16x16. Nothing is downloaded."""

import numpy as np
from PIL import Image

from mbib_timm.data.images import ArrayReader, Split
from mbib_timm.errors import DataError

TEST_IMAGES_A_CLASS = 34
SIZE = 16


def open_digits(split: str) -> Split:
    """Open the digits: the last 34 images of each class are the test set, the other 1,457 the training set.

    Args:
        split: ``train``, or ``test`` or ``validation`` for the test set.

    Raises:
        DataError: an unknown split, or scikit-learn is not installed.
    """
    if split not in ("train", "test", "validation"):
        raise DataError(f"digits have the splits train and test, not {split!r}")
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("the digits come with scikit-learn: pip install 'mbib-timm[train]'") from None
    digits = load_digits()
    targets = digits.target.astype(np.int64)
    in_test = np.zeros(len(targets), dtype=bool)
    for label in range(10):
        in_test[np.flatnonzero(targets == label)[-TEST_IMAGES_A_CLASS:]] = True
    chosen = ~in_test if split == "train" else in_test
    grey = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)
    images = np.stack([np.asarray(Image.fromarray(g).resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for g in grey])
    return Split(ArrayReader(images, "digits"), targets[chosen], class_names=tuple("0123456789"))
