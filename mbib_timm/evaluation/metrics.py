"""Metrics as pure functions: each batch of logits is counted, counts are summed, and the sums yield the metrics.

Accuracies and F1 are percentages. Shot groups are those of Liu et al. (2019): many > 100, medium 20 to 100 and few < 20
training images. A metric of several classes (macro, a shot group) is the mean over the classes that have evaluated
images, with equal weight for each class. Only top-1 and top-5 are means over images.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from mbib_timm.data.groups import group_numbers
from mbib_timm.data.long_tail import shot_groups
from mbib_timm.results.columns import FEW_IMAGES
from mbib_timm.results.record import HeadMetrics

ECE_BINS = 15
DRAWS = 1000  # of the bootstrap
BOOTSTRAP_SEED = 0
SLOWER = 8  # a binomial draw for a cell than a draw of an image
BLOCK = 2**20  # numbers of the bootstrap held at once: 8 MB
NORMAL = 1.959963984540054  # quantile of a two-sided interval of 95 %


@dataclass
class Statistics:
    """Counts over evaluated images, for one head or for several. They add up over batches and over processes.

    Attributes:
        total: images of each class, (..., K).
        correct: images of each class that are classified correctly, (..., K).
        predicted: images predicted as each class, (..., K).
        correct_top5: images of each class with the label among the five largest logits, (..., K).
        negative_log_likelihood: sum over the images, in nats, (...).
        bins: for each confidence bin the number of images, their confidences' sum, and those correct, (..., 15, 3).
    """

    total: Tensor
    correct: Tensor
    predicted: Tensor
    correct_top5: Tensor
    negative_log_likelihood: Tensor
    bins: Tensor

    def __add__(self, other: "Statistics") -> "Statistics":
        return Statistics(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __getitem__(self, head: int) -> "Statistics":
        return Statistics(*(getattr(self, f.name)[head] for f in fields(self)))

    def all_reduce(self) -> None:
        """Sum over the processes of the group, in place."""
        for item in fields(self):
            torch.distributed.all_reduce(getattr(self, item.name))


def batch_statistics(logits: Tensor, targets: Tensor) -> Statistics:
    """Count a batch, for one head or for several at once. Everything stays on the logits' device.

    Args:
        logits: (..., B, K).
        targets: (B,), int64.
    """
    logits = logits.float()
    heads, num_classes = logits.shape[:-2], logits.shape[-1]
    labels = targets[:, None].expand(*heads, -1, 1)

    def by_class(values: Tensor) -> Tensor:
        # bincount would wait for the device to learn its size.
        zeros = torch.zeros(*heads, num_classes, dtype=torch.long, device=logits.device)
        return zeros.index_add_(-1, targets, values.long())

    ranked = rank(logits)
    hits = ranked == labels
    correct, correct_top5 = hits[..., 0], hits.any(dim=-1)
    log_probabilities = logits.log_softmax(dim=-1)
    # MPS has no float64; sums over a batch are exact enough in float32 and are added up in it there alone.
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    confidence = log_probabilities.amax(dim=-1).exp().to(wide)
    # Bins are open below and closed above, ((b-1)/15, b/15], as Guo et al. (2017) have them.
    bin_index = (confidence * ECE_BINS).ceil().long().sub(1).clamp(0, ECE_BINS - 1)
    counted = torch.stack([torch.ones_like(confidence), confidence, correct.to(wide)], dim=-1)
    bins = torch.zeros(*heads, ECE_BINS, 3, dtype=wide, device=logits.device)
    bins.scatter_add_(-2, bin_index[..., None].expand(counted.shape), counted)
    return Statistics(
        total=by_class(torch.ones_like(correct)),
        correct=by_class(correct),
        predicted=by_class(torch.zeros_like(correct)).scatter_add_(-1, ranked[..., 0], torch.ones_like(ranked[..., 0])),
        correct_top5=by_class(correct_top5),
        negative_log_likelihood=-log_probabilities.gather(-1, labels).to(wide).sum(dim=(-2, -1)),
        bins=bins,
    )


def rank(logits: Tensor) -> Tensor:
    """Return the classes with the five largest of logits (..., B, K), (..., B, 5), or all; the first is the guess.

    Between equal logits argmax may choose another class.
    """
    return logits.float().topk(min(5, logits.shape[-1]), dim=-1).indices


def expected_calibration_error(bins: np.ndarray) -> float:
    """Return the mean gap between confidence and accuracy over the bins, weighted by their images (Guo et al. 2017).

    Args:
        bins: images, sum of confidences and number correct of each bin, (15, 3).
    """
    return float(np.abs(bins[:, 1] - bins[:, 2]).sum() / bins[:, 0].sum())


def summarize(statistics: Statistics, class_counts: np.ndarray) -> HeadMetrics:
    """Return the metrics of what was counted, with the interval of top-1; see `with_intervals` for the others.

    Args:
        statistics: of one head and at least one image.
        class_counts: training images of each class, (K,), which decide the shot groups.
    """
    total, correct = statistics.total.cpu().numpy(), statistics.correct.cpu().numpy()
    images, seen = int(total.sum()), total > 0
    accuracy, f1 = class_accuracy(total, correct), class_f1(total, correct, statistics.predicted.cpu().numpy())

    def mean(values: np.ndarray, classes: np.ndarray) -> float | None:
        measured = values[classes][seen[classes]]
        return float(measured.mean()) if len(measured) else None

    groups = shot_groups(class_counts)
    whole = np.arange(len(total))
    return HeadMetrics(
        top1=100.0 * int(correct.sum()) / images,
        top5=100.0 * int(statistics.correct_top5.sum()) / images,
        macro=mean(accuracy, whole),
        many=mean(accuracy, groups["many"]),
        medium=mean(accuracy, groups["medium"]),
        few=mean(accuracy, groups["few"]),
        ece=100.0 * expected_calibration_error(statistics.bins.cpu().numpy()),
        nll=float(statistics.negative_log_likelihood) / images,
        images=images,
        classes={name: len(classes) for name, classes in groups.items()},
        per_class=[float(value) if ok else None for value, ok in zip(accuracy, seen, strict=True)],
        macro_f1=mean(f1, whole),
        intervals={"top1": wilson_interval(int(correct.sum()), images)},
        measured={
            name: (int(total[classes].sum()), int(seen[classes].sum()))
            for name, classes in {"overall": whole, **groups}.items()
        },
    )


def class_accuracy(total: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """Return each class's accuracy in percent, (..., K), nan for classes without images; of counts of that shape."""
    return 100.0 * np.divide(correct, total, out=np.full(total.shape, np.nan), where=total > 0)


def class_f1(total: np.ndarray, correct: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return each class's F1 in percent, ``2 correct / (total + predicted)``, (..., K); nan for classes without images.

    The counts, of that shape, are those of `Statistics`.
    """
    return 100.0 * np.divide(2.0 * correct, total + predicted, out=np.full(total.shape, np.nan), where=total > 0)


def wilson_interval(correct: float, images: float) -> tuple[float, float]:
    """Return the 95 % interval in percent of an accuracy over images (Wilson 1927).

    Args:
        correct: images that are right; no whole number where the images are worth fewer than they are.
        images: their number, above 0.
    """
    share, square = correct / images, NORMAL**2 / images
    centre = (share + square / 2) / (1 + square)
    reach = NORMAL * math.sqrt(share * (1 - share) / images + square / (4 * images)) / (1 + square)
    # Without the rounding that would leave 100 % of the images outside of their own interval.
    return 100.0 * (0.0 if correct == 0 else centre - reach), 100.0 * (1.0 if correct == images else centre + reach)


def mean_interval(accuracy: np.ndarray, images: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval in percent of the mean accuracy of classes, of which some may have few images.

    It is Wilson's for K^2 / sum(1 / n_k) images, whose accuracy varies as that mean does where all classes are equally
    hard; where they are not, the mean varies less as a rule, and the interval is wider than need be.

    Args:
        accuracy: of each class, in percent, (K,).
        images: of each class, (K,), at least one.
    """
    worth = float(len(images) ** 2 / (1.0 / images).sum())
    return wilson_interval(float(accuracy.mean()) / 100.0 * worth, worth)


def independent(targets: np.ndarray, num_classes: int, groups: np.ndarray | None) -> np.ndarray:
    """Return how many images of each class say something of their own, (K,): of each group one.

    Args:
        targets: labels of the N images, (N,).
        num_classes: classes K.
        groups: name of each image's group, (N,), where images have groups; one with an empty name stands alone.
    """
    if groups is None:
        return np.bincount(targets, minlength=num_classes)
    labels, _ = np.unique(np.stack([targets, group_numbers(groups)]), axis=1)
    return np.bincount(labels, minlength=num_classes)


def by_group(metrics: HeadMetrics, groups: np.ndarray | None) -> HeadMetrics:
    """Return metrics with the interval of top-1 for as many images as there are groups, see `independent`; without
    groups as they are."""
    if groups is None:
        return metrics
    worth = float(independent(np.zeros(len(groups), dtype=np.int64), 1, groups)[0])
    return replace(metrics, intervals={**metrics.intervals, "top1": wilson_interval(metrics.top1 / 100 * worth, worth)})


def with_intervals(
    metrics: HeadMetrics,
    targets: np.ndarray,
    predicted: np.ndarray,
    class_counts: np.ndarray,
    groups: np.ndarray | None = None,
) -> HeadMetrics:
    """Return metrics with the images of each class, and the 95 % intervals of what is a mean over classes.

    The intervals of macro accuracy, macro F1 and the shot groups come from a bootstrap over images: 1,000 draws of N
    images out of N, with a fixed seed; percentiles 2.5 and 97.5. Where a class has fewer than `FEW_IMAGES` images, or
    no draw differs, they are those of `mean_interval`, and macro F1 has none: draws of one image are all alike.

    Images of a group may all be right or wrong together, and then a group says no more than one image would: where
    there are groups, all intervals are those of as many images as there are groups.

    Args:
        metrics: metrics of the head.
        targets: labels of the N images, (N,).
        predicted: labels that the head predicts, (N,).
        class_counts: training images of each class, (K,).
        groups: name of each image's group, (N,); see `independent`.
    """
    of_classes = {"macro": np.arange(len(class_counts)), **shot_groups(class_counts)}
    images = np.bincount(targets, minlength=len(class_counts))
    right = np.bincount(targets[targets == predicted], minlength=len(class_counts))
    worth, accuracy = independent(targets, len(class_counts), groups), class_accuracy(images, right)
    intervals = dict(by_group(metrics, groups).intervals)
    measured = {name: classes[images[classes] > 0] for name, classes in of_classes.items()}
    drawn = {
        name: classes for name, classes in measured.items() if groups is None and (worth[classes] >= FEW_IMAGES).all()
    }
    found = _bootstrap(targets, predicted, drawn, len(class_counts)) if any(map(len, drawn.values())) else {}
    for name, classes in measured.items():
        if not len(classes):
            continue
        low, high = found.get(name, (0.0, 0.0))
        intervals[name] = (low, high) if low < high else mean_interval(accuracy[classes], worth[classes])
    if found.get("macro_f1") is not None:
        low, high = found["macro_f1"]
        intervals["macro_f1"] = (low, high) if low < high else intervals["macro"]
    return replace(metrics, intervals=intervals, class_images=images.tolist())


def _bootstrap(
    targets: np.ndarray, predicted: np.ndarray, groups: Mapping[str, np.ndarray], num_classes: int
) -> dict[str, tuple[float, float]]:
    """Return percentiles 2.5 and 97.5 of draws of images, by name of some classes; with all of them, macro F1's too."""
    drawn: dict[str, list[np.ndarray]] = {}
    for total, correct, taken in _draws(targets, predicted, num_classes):
        accuracy = class_accuracy(total, correct)
        for name, classes in groups.items():
            if len(classes):
                drawn.setdefault(name, []).append(_mean_of_rows(accuracy[:, classes]))
        if "macro" in groups:
            drawn.setdefault("macro_f1", []).append(_mean_of_rows(class_f1(total, correct, taken)))
    found = {name: np.nanpercentile(np.concatenate(parts), [2.5, 97.5]).tolist() for name, parts in drawn.items()}
    return {name: (low, high) for name, (low, high) in found.items()}


def _mean_of_rows(values: np.ndarray) -> np.ndarray:
    """Return the mean of each row's numbers but nan, (D,); nan for a row without any."""
    known = ~np.isnan(values)
    number = known.sum(axis=1)
    return np.divide(
        np.where(known, values, 0.0).sum(axis=1), number, out=np.full(len(values), np.nan), where=number > 0
    )


def _draws(
    targets: np.ndarray, predicted: np.ndarray, num_classes: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Give what bootstrap samples amount to, some at a time: images of each class, those right, those taken for it.

    N images out of N are a multinomial draw over the cells of the confusion matrix that are not empty, of which even
    iNaturalist's 8,142 classes have no more than its 24,426 images.

    Yields:
        Three arrays (D, K), int64; the D of all pieces add up to `DRAWS`.
    """
    cells, cell_of, images = np.unique(
        targets.astype(np.int64) * num_classes + predicted, return_inverse=True, return_counts=True
    )
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    rows, columns = cells // num_classes, cells % num_classes
    right, by_column = np.flatnonzero(rows == columns), np.argsort(columns, kind="stable")
    piece = max(1, BLOCK // max(len(cells), num_classes))
    for start in range(0, DRAWS, piece):
        drawn = _multinomial(generator, cell_of, images, min(piece, DRAWS - start))
        correct = np.zeros((len(drawn), num_classes), dtype=np.int64)
        correct[:, rows[right]] = drawn[:, right]
        yield _sums(drawn, rows, num_classes), correct, _sums(drawn[:, by_column], columns[by_column], num_classes)


def _multinomial(generator: np.random.Generator, cell_of: np.ndarray, images: np.ndarray, draws: int) -> np.ndarray:
    """Return draws of N images out of N by cell, (draws, C); of each image's cell, (N,), and the cells' sizes, (C,)."""
    number = len(cell_of)
    if SLOWER * len(images) < number:
        return generator.multinomial(number, images / number, size=draws)
    chosen = (generator.integers(0, number, number, dtype=np.uint32) for _ in range(draws))
    return np.stack([np.bincount(cell_of[places], minlength=len(images)) for places in chosen])


def _sums(values: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Return the sums (D, K) of the columns of values (D, C) that have one label; labels (C,) ascend."""
    present, starts = np.unique(labels, return_index=True)
    sums = np.zeros((len(values), num_classes), dtype=values.dtype)
    sums[:, present] = np.add.reduceat(values, starts, axis=1)
    return sums
