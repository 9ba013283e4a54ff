"""Class frequencies: those that logits are for, those that they should be for, and those of images without labels.

    log p'(y|x) = log p(y|x) + log p'(y) / p(y) + constant

Saerens, Latinne and Decaestecker (2002): where images differ from training in how frequent the classes are and in
nothing else, Bayes' theorem turns the probabilities for the old frequencies p into those for the new ones p', and
expectation-maximisation finds the p' under which the images are most likely.
"""

import csv
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mbib_timm.data.long_tail import named
from mbib_timm.errors import DataError, MbibError, few, unknown_name
from mbib_timm.options import is_number

TRAIN, UNIFORM, ESTIMATE = "train", "uniform", "estimate"
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


def label_names(class_names: Sequence[str] | None, num_classes: int) -> tuple[str, ...]:
    """Return a name of its own for each class: its name, with its label where two share it; its label without one.

    Args:
        class_names: in label order, where they are known.
        num_classes: classes K.
    """
    names = named(class_names, num_classes)
    count = Counter(names)
    return tuple(name if count[name] == 1 else f"{name} [{label}]" for label, name in enumerate(names))


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
        return (
            f"class frequencies estimated from {self.images:,} images in {self.iterations} iterations{ended}: "
            f"{listed}{more}"
        )


def estimate_prior(
    probabilities: np.ndarray, trained: np.ndarray, tolerance: float = TOLERANCE, iterations: int = ITERATIONS
) -> EstimatedPrior:
    """Find the class frequencies of images by expectation-maximisation (Saerens et al. 2002, equation 2.9).

    It rests on the probabilities: an overconfident model takes few classes for all.

    Args:
        probabilities: of each image's classes, for the frequencies `trained`, (N, K).
        trained: shares (K,), all above 0.
        tolerance: the sum of all changes at which it ends.
        iterations: after which it ends in any case.

    Raises:
        DataError: there are no images.
    """
    images = len(probabilities)
    if images == 0:
        raise DataError("--prior estimate: there is no image to estimate class frequencies from")
    p = np.asarray(probabilities, dtype=np.float64)
    shares = np.asarray(trained, dtype=np.float64)
    done, change = 0, math.inf
    while done < iterations and change > tolerance:
        # The mean over the images of p_ij w_j / sum_k p_ik w_k, without a matrix (N, K) for it.
        w = shares / trained
        new = w * (p.T @ (1 / (p @ w))) / images
        change = float(np.abs(new - shares).sum())
        shares, done = new, done + 1
    return EstimatedPrior(shares / shares.sum(), done, change <= tolerance, images)


def read_prior(path: str | Path, names: Sequence[str]) -> np.ndarray:
    """Read the shares or counts of all classes: only their ratios matter, and 0 excludes a class.

    Args:
        path: a number for each class in label order, one per line or as a JSON or YAML list; or numbers by class name:
            a JSON or YAML mapping, or a CSV of two columns, or with columns ``class`` and ``share`` among others.
        names: of the classes, each one's own, in label order.

    Returns:
        (K,), float64; their sum is 1.

    Raises:
        MbibError: there is no such file.
        DataError: another format, a number that is negative or none, all zeros, or names that are not the classes'.
    """
    file = Path(path)
    if not file.exists() and not file.suffix and file.parent == Path("."):
        raise unknown_name("prior, and no file either:", str(path), (TRAIN, UNIFORM, ESTIMATE))
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read the prior {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{file} is no text file in UTF-8; save it as 'CSV UTF-8'") from None
    content = _parse(file, text)
    if isinstance(content, Mapping):
        values = _by_name(file, content, names)
    elif len(content) != len(names):
        raise DataError(
            f"{file} has {len(content)} numbers, the model {len(names)} classes; give a number for each, or numbers by "
            "class name"
        )
    else:
        values = [_number(file, f"class {name}", given) for name, given in zip(names, content, strict=True)]
    if sum(values) == 0:
        raise DataError(f"{file}: every class has share 0; give at least one of them more")
    return _shares(np.array(values))


EXPECTED = (
    "expected a number for each class, one per line or as a JSON or YAML list; or numbers by class name, as a CSV of "
    "class and share, or a JSON or YAML mapping"
)


class _Texts(yaml.BaseLoader):
    """Reads every scalar as text, since a class may be called no, null or 1; and no key twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if repeated := [key for key in keys if keys.count(key) > 1]:
            raise yaml.YAMLError(f"class {repeated[0]!r} stands there twice")
        return super().construct_mapping(node, deep)


def _parse(file: Path, text: str) -> Mapping[str, str] | Sequence[str]:
    """Return a list of numbers in label order, or numbers by class name, all of them still text."""
    words = text.split()
    if words and all(map(is_number, words)):
        return words
    first = text.strip().partition("\n")[0]
    if file.suffix.lower() == ".csv" or ("," in first and ":" not in first and not first.startswith(("[", "{"))):
        return _parse_csv(file, text)
    try:
        content = yaml.load(text, _Texts)
    except yaml.YAMLError as error:
        raise DataError(f"{file}: {' '.join(str(error).split())}; {EXPECTED}") from None
    values = list(content.values()) if isinstance(content, dict) else content
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise DataError(f"{file}: {EXPECTED}")
    return content


def _parse_csv(file: Path, text: str) -> dict[str, str]:
    try:
        rows = [(number, row) for number, row in enumerate(csv.reader(text.splitlines()), start=1) if any(row)]
    except csv.Error as error:
        raise DataError(f"{file}: {error}; {EXPECTED}") from None
    if not rows:
        raise DataError(f"{file}: {EXPECTED}")
    header = [cell.strip().lower() for cell in rows[0][1]]
    columns = (0, 1)
    if "class" in header and "share" in header:
        columns, rows = (header.index("class"), header.index("share")), rows[1:]
    elif len(header) == 2 and not is_number(header[1]):
        rows = rows[1:]
    elif len(header) != 2:
        raise DataError(f"{file}: expected two columns, or columns 'class' and 'share', got {', '.join(header)}")
    found: dict[str, str] = {}
    for number, row in rows:
        if len(row) <= max(columns):
            raise DataError(f"{file}, line {number}: expected class and share, got {','.join(row)!r}")
        name = row[columns[0]].strip()
        if name in found:
            raise DataError(f"{file}, line {number}: class {name!r} stands there twice")
        found[name] = row[columns[1]].strip()
    return found


def _by_name(file: Path, content: Mapping[str, str], names: Sequence[str]) -> list[float]:
    for name in content:
        if name not in names:
            raise DataError(f"{file}: {unknown_name('class', name, names)}")
    missing = [name for name in names if name not in content]
    if missing:
        raise DataError(f"{file} lacks class {few(missing)}; a class that does not occur has share 0")
    return [_number(file, f"class {name}", content[name]) for name in names]


def _number(file: Path, of: str, text: str) -> float:
    if not is_number(text) or float(text) < 0 or not math.isfinite(float(text)):
        raise DataError(f"{file}: {of} has {text!r}, expected a number of at least 0")
    return float(text)
