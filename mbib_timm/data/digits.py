"""The embedded data: 1,797 handwritten digits of 8x8 pixels, enlarged to 16x16. Nothing is downloaded.

E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository (1998),
doi:10.24432/C50P49, CC BY 4.0: the test part, in the order in which scikit-learn has it; grey values 0 to 16.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from mbib_timm.data.images import ArrayReader, Split
from mbib_timm.errors import DataError

FILE = Path(__file__).with_suffix(".npz")
TEST_IMAGES_A_CLASS = 34
SIZE = 16


def open_digits(split: str) -> Split:
    """Open the digits: the last 34 images of each class are the test set, the other 1,457 the training set.

    Args:
        split: ``train``, or ``test`` or ``validation`` for the test set.

    Raises:
        DataError: an unknown split.
    """
    if split not in ("train", "test", "validation"):
        raise DataError(f"digits have the splits train and test, not {split!r}")
    with np.load(FILE) as digits:
        grey, targets = digits["images"], digits["targets"].astype(np.int64)
    in_test = np.zeros(len(targets), dtype=bool)
    for label in range(10):
        in_test[np.flatnonzero(targets == label)[-TEST_IMAGES_A_CLASS:]] = True
    chosen = ~in_test if split == "train" else in_test
    grey = np.rint(grey[chosen] * (255 / 16)).astype(np.uint8)
    images = np.stack([np.asarray(Image.fromarray(g).resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for g in grey])
    return Split(ArrayReader(images, "digits"), targets[chosen], class_names=tuple("0123456789"))
