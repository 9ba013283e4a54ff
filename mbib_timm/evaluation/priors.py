"""Class frequencies: those that logits are for, those that they should be for, and those of images without labels.

    log p'(y|x) = log p(y|x) + log p'(y) / p(y) + constant

Saerens, Latinne and Decaestecker (2002): where images differ from training in how frequent the classes are and in
nothing else, Bayes' theorem turns the probabilities for the old frequencies p into those for the new ones p', and
expectation-maximisation finds the p' under which the images are most likely.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mbib_timm.data.class_values import ClassValues, label_names, read_class_values
from mbib_timm.errors import DataError, MbibError, unknown_name
from mbib_timm.results.columns import FEW_IMAGES

TRAIN, UNIFORM, ESTIMATE = "train", "uniform", "estimate"
SHARES = ClassValues("prior", "share", zero=True, missing="a class that does not occur has share 0")
# What is added to the logit of a class without any share, for log 0: its probability is 0, and sums stay finite.
EXCLUDED = -1e4
# Expectation-maximisation ends when the shares change by less than this in all, or after so many iterations.
TOLERANCE, ITERATIONS = 1e-6, 1000
# Shares that a message lists.
LISTED = 10


def trained_shares(model: str, logit_prior: str | None, class_counts: np.ndarray | None) -> np.ndarray:
    """Return the class frequencies that a model's logits are for, (K,), float64; their sum is 1.

    Args:
        model: its name, for messages.
        logit_prior: ``uniform`` after training with a balanced loss, ``train`` after training with a plain one.
        class_counts: training images of each class, (K,).

    Raises:
        MbibError: the model does not say.
    """
    if logit_prior is None or class_counts is None:
        raise MbibError(f"{model} does not say which class frequencies it was trained on; omit --prior")
    return _shares(class_counts if logit_prior == TRAIN else np.ones(len(class_counts)))


def wanted_shares(prior: str, class_counts: np.ndarray, class_names: Sequence[str] | None) -> np.ndarray:
    """Return the class frequencies that are asked for, (K,), float64; their sum is 1.

    Args:
        prior: ``train``, ``uniform``, or a file, see `read_prior`.
        class_counts: training images of each class, (K,).
        class_names: in label order; None where there are but numbers.

    Raises:
        MbibError: neither a word nor a file.
        DataError: a file that is malformed or does not fit the classes.
    """
    if prior == TRAIN:
        return _shares(class_counts)
    if prior == UNIFORM:
        return _shares(np.ones(len(class_counts)))
    return read_prior(prior, label_names(class_names, len(class_counts)))


def _shares(numbers: np.ndarray) -> np.ndarray:
    values = np.asarray(numbers, dtype=np.float64)
    return values / values.sum()


def log_shift(wanted: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """Return what is added to logits so that they are for other class frequencies: log of the new over the old.

    Args:
        wanted: the new shares, (K,); a class with share 0 is excluded.
        trained: the old shares, (K,), all above 0.

    Returns:
        (K,), float32.
    """
    shift = np.full(len(wanted), EXCLUDED)
    present = wanted > 0
    shift[present] = np.log(wanted[present] / trained[present])
    return shift.astype(np.float32)


@dataclass(frozen=True)
class EstimatedPrior:
    """Class frequencies of images without labels.

    Attributes:
        shares: of the classes, (K,); their sum is 1.
        iterations: of expectation-maximisation.
        converged: False where it was ended before the shares stood still.
        images: that they were estimated from.
    """

    shares: np.ndarray
    iterations: int
    converged: bool
    images: int

    def describe(self, names: Sequence[str]) -> str:
        """Return the largest shares in words, one line; `names` are the classes', in label order."""
        order = np.argsort(-self.shares, kind="stable")[:LISTED]
        listed = ", ".join(f"{names[label]} {100 * self.shares[label]:.1f} %" for label in order)
        rest = len(self.shares) - len(order)
        more = f", and {rest} more with {100 * (1 - self.shares[order].sum()):.1f} %" if rest else ""
        ended = "" if self.converged else ", where it was stopped"
        is_little = self.images < FEW_IMAGES * len(self.shares)
        doubt = f"; that is uncertain, from fewer than {FEW_IMAGES} images for each class" if is_little else ""
        return (
            f"class frequencies estimated from {self.images:,} images in {self.iterations} iterations{ended}: "
            f"{listed}{more}{doubt}"
        )


def estimate_prior(probabilities: np.ndarray, trained: np.ndarray) -> EstimatedPrior:
    """Find the class frequencies of images by expectation-maximisation (Saerens et al. 2002, equation 2.9).

    It rests on the probabilities: an overconfident model takes few classes for all.

    Args:
        probabilities: of each image's classes, for the frequencies `trained`, (N, K).
        trained: shares (K,), all above 0.

    Raises:
        DataError: there are no images.
    """
    images = len(probabilities)
    if images == 0:
        raise DataError("--prior estimate: there is no image to estimate class frequencies from")
    p = np.asarray(probabilities, dtype=np.float64)
    shares = np.asarray(trained, dtype=np.float64)
    done, change = 0, math.inf
    while done < ITERATIONS and change > TOLERANCE:
        # The mean over the images of p_ij w_j / sum_k p_ik w_k, without a matrix (N, K) for it.
        w = shares / trained
        new = w * (p.T @ (1 / (p @ w))) / images
        change = float(np.abs(new - shares).sum())
        shares, done = new, done + 1
    return EstimatedPrior(shares / shares.sum(), done, change <= TOLERANCE, images)


def read_prior(path: str | Path, names: Sequence[str]) -> np.ndarray:
    """Read the shares or counts of all classes: only their ratios matter, and 0 excludes a class.

    Args:
        path: a file that `read_class_values` reads.
        names: of the classes, each one's own, in label order.

    Returns:
        (K,), float64; their sum is 1.

    Raises:
        MbibError: there is no such file.
        DataError: no shares of these classes, or all zeros.
    """
    file = Path(path)
    if not file.suffix and file.parent == Path(".") and not os.path.lexists(file):
        raise unknown_name("prior, and no file either:", str(path), (TRAIN, UNIFORM, ESTIMATE))
    values = read_class_values(file, names, SHARES)
    if not values.any():
        raise DataError(f"the prior {file}: every class has share 0; give at least one of them more")
    return _shares(values / values.max())  # the sum of the largest numbers would be infinite
