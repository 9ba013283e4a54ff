"""What is measured of a trained model: pure functions of predictions, features, labels and training counts.

positive posterior    probability of the true class, by class            equation 14, figure 7
distances             how compact classes are, and how far apart         equations 15-17, Table 5
reliability           accuracy against confidence, in 15 bins            Guo et al. 2017
confusion             shot group of the truth against that of the guess
trend                 accuracy of a class against log n
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mbib_timm.data.long_tail import shot_groups
from mbib_timm.evaluation.metrics import expected_calibration_error

GROUPS = ("all", "many", "medium", "few")
BLOCK = 2**20  # numbers held at once beside the features, in each of a few arrays: 8 MB
# Pairs closer than this, relative to their squared norms, lose digits where distances come out of a matrix product.
NEAR = 1e-6


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


@dataclass(frozen=True)
class Distances:
    """Mean distances within and between classes with two images or more; None where there is nothing to measure.

    A class with one image has no distance within: its 0 would make every group that holds it look compact.

    Over pairs, as eq. 15 of the paper has it, rho comes out about sqrt(2) times as large as from the centre. In our
    runs the first has the level of BSCE in its Table 5, the second that of BIB and MBIB. And it does not say which
    other classes count for a shot group. So there are two distances within, two between, and rho is named by those that
    it is made of.

    Attributes:
        pairs: D_intra over all pairs of a class's images (eq. 15).
        centre: D_intra as the mean distance of a class's images from their centre.
        inter: D_inter, from a class's centre to those of all other classes (eq. 16); None without a second class.
        inter_within: the same to those of the other classes of its shot group; of ``all`` that of each class's group.
    """

    pairs: float | None
    centre: float | None
    inter: float | None
    inter_within: float | None

    def rho(self, intra: str = "pairs", inter: str = "inter") -> float | None:
        """Return the ratio of an intra- to an inter-class distance (eq. 17), the lower the better.

        Args:
            intra: ``pairs`` or ``centre``.
            inter: ``inter`` or ``inter_within``.
        """
        within, between = getattr(self, intra), getattr(self, inter)
        return within / between if within is not None and between else None


def distances(features: Tensor, labels: Tensor, class_counts: np.ndarray) -> dict[str, Distances]:
    """Return the distances over all classes and by shot group: of ``all``, ``many``, ``medium`` and ``few``.

    That of a group is the mean over its classes, so that "all" is the mean of the groups weighted by their classes.
    Classes with fewer than two images are left out, but for the centre of a single image among the others.

    Args:
        features: of every image, (N, C).
        labels: true classes, (N,), int64.
        class_counts: training images of each class, (K,).
    """
    measured = class_distances(features, labels, class_counts)
    single = np.bincount(labels.cpu().numpy(), minlength=len(class_counts)) == 1
    means = {}
    for name, values in measured._asdict().items():
        of_classes = values.numpy()
        of_classes[single] = np.nan
        means[name] = mean_by_shot_group(of_classes, class_counts)
    return {group: Distances(**{name: by_group[group] for name, by_group in means.items()}) for group in GROUPS}


class ClassDistances(NamedTuple):
    """Distances of each class, (K,), float64, on the CPU; nan where there is nothing to measure. See `Distances`."""

    pairs: Tensor
    centre: Tensor
    inter: Tensor
    inter_within: Tensor


def class_distances(features: Tensor, labels: Tensor, class_counts: np.ndarray) -> ClassDistances:
    """Return the distances of each class: within, and between its centre and other centres.

    Args:
        features: of every image, (N, C).
        labels: true classes, (N,), int64.
        class_counts: training images of each class, (K,), which make the shot groups.

    Returns:
        nan for classes without images, and between where there is no other class.
    """
    num_classes = len(class_counts)
    images = torch.bincount(labels, minlength=num_classes)
    present = images.nonzero()[:, 0]
    members = labels.argsort(stable=True).split(images.tolist())
    pairs, centre, inter, inter_within = torch.full((4, num_classes), torch.nan, dtype=torch.float64)
    centres = torch.empty(len(present), features.shape[1], dtype=torch.float64, device=features.device)
    for row, label in enumerate(present.tolist()):
        points = features[members[label]].double()
        centres[row] = points.mean(dim=0)
        pairs[label] = _mean_distance(points)
        centre[label] = torch.linalg.vector_norm(points - centres[row], dim=1).mean()
    here = present.cpu().numpy()
    _between(centres, here, inter)
    for group in shot_groups(class_counts).values():
        rows = np.flatnonzero(np.isin(here, group))
        _between(centres[torch.from_numpy(rows).to(centres.device)], here[rows], inter_within)
    return ClassDistances(pairs, centre, inter, inter_within)


def _between(centres: Tensor, classes: np.ndarray, values: Tensor) -> None:
    """Write each centre's mean distance to the others among `centres` (n, C) at its class's place in `values` (K,)."""
    if len(centres) > 1:
        shifted = centres - centres.mean(dim=0)  # shorter vectors lose fewer digits
        values[torch.from_numpy(classes)] = (_distance_sums(shifted) / (len(centres) - 1)).cpu()


def _mean_distance(points: Tensor) -> float:
    """Return the sum of the distances of all ordered pairs, j = k included, over n^2, of points (n, C), float64."""
    # Not by a matrix product, whose cancellation moves near points apart, and each from itself.
    sums = [
        torch.cdist(rows, points, compute_mode="donot_use_mm_for_euclid_dist").sum()
        for rows in points.split(max(1, BLOCK // len(points)))
    ]
    return float(torch.stack(sums).sum()) / len(points) ** 2


def _distance_sums(centres: Tensor) -> Tensor:
    """Return the sum of each centre's distances to all centres, (K,), of centres (K, C), float64.

    The 33 million pairs of iNaturalist take a matrix product (seconds instead of minutes); pairs that are too near
    for it are computed again from their difference.
    """
    norms = torch.linalg.vecdot(centres, centres)
    sums = torch.zeros_like(norms)
    rows = max(1, BLOCK // len(centres))
    for start in range(0, len(centres), rows):
        block, rest = centres[start : start + rows], centres[start:]  # every pair once
        scale = norms[start : start + rows, None] + norms[start:]
        squared = scale - 2 * (block @ rest.T)
        near = (squared <= NEAR * scale).nonzero()
        for i, j in (pairs.T for pairs in near.split(max(1, BLOCK // centres.shape[1]))):
            squared[i, j] = (block[i] - rest[j]).square().sum(dim=1)
        distance = squared.sqrt()
        sums[start : start + rows] += distance.sum(dim=1)
        sums[start + len(block) :] += distance[:, len(block) :].sum(dim=0)
    return sums


@dataclass(frozen=True)
class Reliability:
    """A reliability diagram, whose bins are those of `batch_statistics`: ((b-1)/15, b/15].

    Attributes:
        images: of each bin.
        confidence: their mean confidence in percent; None where a bin is empty.
        accuracy: the same of their accuracy.
        ece: expected calibration error, in percent.
    """

    images: list[int]
    confidence: list[float | None]
    accuracy: list[float | None]
    ece: float


def reliability(bins: np.ndarray) -> Reliability:
    """Return the reliability diagram of a head.

    Args:
        bins: images, sum of confidences and number correct of each bin, (15, 3).
    """

    def percent(column: int) -> list[float | None]:
        return [float(100.0 * row[column] / row[0]) if row[0] else None for row in bins]

    images = [int(number) for number in bins[:, 0]]
    return Reliability(images, percent(1), percent(2), 100.0 * expected_calibration_error(bins))


@dataclass(frozen=True)
class Confusion:
    """Where the images of each shot group go, by the group of the true class.

    Shares are means over the group's classes, as accuracies are: ``correct`` is the group's accuracy.

    Attributes:
        images: their numbers, by the group of the class that they are taken for.
        correct: how many are right.
        shares: mean over the group's classes with images of the share of a class's images in percent: those
            ``correct``, and ``wrong_to_many``, ``wrong_to_medium`` and ``wrong_to_few``; None for a group without
            images.
        even: the same, with the errors spread evenly over all other classes.
    """

    images: dict[str, dict[str, int]]
    correct: dict[str, int]
    shares: dict[str, dict[str, float] | None]
    even: dict[str, dict[str, float] | None]


def group_confusion(labels: np.ndarray, predicted: np.ndarray, class_counts: np.ndarray) -> Confusion:
    """Count the images of each true group by the group of the class that they are taken for.

    A large group draws many errors simply because it has many classes. ``even`` tells what the shares would be if the
    same number of errors were spread evenly over all other classes: more than that is attraction.

    Args:
        labels: true classes, (N,), int64.
        predicted: predicted classes, (N,), int64.
        class_counts: training images of each class, (K,).
    """
    groups = shot_groups(class_counts)
    names = list(groups)
    group_of = np.empty(len(class_counts), dtype=np.int64)
    for place, classes in enumerate(groups.values()):
        group_of[classes] = place
    wrong = np.zeros((len(class_counts), len(names)), dtype=np.int64)
    right = np.zeros(len(class_counts), dtype=np.int64)
    hit = labels == predicted
    np.add.at(wrong, (labels[~hit], group_of[predicted[~hit]]), 1)
    np.add.at(right, labels[hit], 1)
    result = Confusion({}, {}, {}, {})
    for place, (name, classes) in enumerate(groups.items()):
        taken = wrong[classes].sum(axis=0)
        correct = int(right[classes].sum())
        taken[place] += correct
        result.images[name] = dict(zip(names, taken.tolist(), strict=True))
        result.correct[name] = correct
        images = right[classes] + wrong[classes].sum(axis=1)
        measured = classes[images > 0]
        if not len(measured):
            result.shares[name] = result.even[name] = None
            continue
        images = images[images > 0]
        share_right = float((right[measured] / images).mean())
        # Other classes that an error can go to: in its own group there is one fewer.
        others = np.array([len(each) for each in groups.values()]) - (np.arange(len(names)) == place)
        evenly = (1 - share_right) * others / max(1, others.sum())
        result.shares[name] = _percent(names, share_right, (wrong[measured] / images[:, None]).mean(axis=0))
        result.even[name] = _percent(names, share_right, evenly)
    return result


def _percent(names: list[str], correct: float, wrong: np.ndarray) -> dict[str, float]:
    """Return shares in percent."""
    shares = {f"wrong_to_{name}": float(100.0 * share) for name, share in zip(names, wrong, strict=True)}
    return {"correct": 100.0 * correct, **shares}


@dataclass(frozen=True)
class Trend:
    """A line through the accuracies of classes, by log10 of their training images; None where there is none.

    Attributes:
        slope: points for ten times as many training images.
        intercept: the line's accuracy at one training image, in percent.
        r2: share of the variance that the line explains; None where accuracies do not differ.
    """

    slope: float | None
    intercept: float | None
    r2: float | None


def accuracy_trend(per_class: Sequence[float | None], class_counts: np.ndarray) -> Trend:
    """Fit the classes' accuracies by least squares to log10 of their training images.

    Args:
        per_class: accuracy of each class in percent, (K,); None for classes without images, which are left out.
        class_counts: training images of each class, (K,), at least 1.

    Returns:
        The line; without one where the classes have fewer than two distinct counts.
    """
    measured = np.array([value is not None for value in per_class])
    accuracy = [value for value in per_class if value is not None]
    images = np.log10(np.asarray(class_counts)[measured]).tolist()
    if len(set(images)) < 2:
        return Trend(None, None, None)
    line = statistics.linear_regression(images, accuracy)
    varies = len(set(accuracy)) > 1
    return Trend(line.slope, line.intercept, statistics.correlation(images, accuracy) ** 2 if varies else None)
