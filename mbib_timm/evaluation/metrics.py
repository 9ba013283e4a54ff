"""Metrics as pure functions: a batch of logits gives counts, counts add up, their sum gives the numbers.

Accuracies are percentages. Shot groups are those of Liu et al. (2019): many > 100, medium 20 to 100 and few < 20
training images; a group's accuracy is the mean of its classes' accuracies.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from mbib_timm.data.long_tail import shot_groups
from mbib_timm.results.record import HeadMetrics

ECE_BINS = 15


@dataclass
class Statistics:
    """What a set of evaluated images amounts to, for one head or for several. Adds up over batches and over processes.

    Attributes:
        total: images of each class, (..., K).
        correct: of these, classified correctly, (..., K).
        correct_top5: of these, with the label among the five largest logits, (..., K).
        negative_log_likelihood: sum over the images, in nats, (...).
        bins: for each confidence bin the number of images, their confidences' sum, and those correct, (..., 15, 3).
    """

    total: Tensor
    correct: Tensor
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

    ranked = logits.topk(min(5, num_classes), dim=-1).indices == labels
    correct, correct_top5 = ranked[..., 0], ranked.any(dim=-1)
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
        correct_top5=by_class(correct_top5),
        negative_log_likelihood=-log_probabilities.gather(-1, labels).to(wide).sum(dim=(-2, -1)),
        bins=bins,
    )


def expected_calibration_error(bins: np.ndarray) -> float:
    """Return the mean gap between confidence and accuracy over the bins, weighted by their images (Guo et al. 2017).

    Args:
        bins: images, sum of confidences and number correct of each bin, (15, 3).
    """
    return float(np.abs(bins[:, 1] - bins[:, 2]).sum() / bins[:, 0].sum())


def summarize(statistics: Statistics, class_counts: np.ndarray) -> HeadMetrics:
    """Return the metrics of what was counted.

    Args:
        statistics: of one head and at least one image.
        class_counts: training images of each class, (K,), which decide the shot groups.
    """
    total, correct = statistics.total.cpu().numpy(), statistics.correct.cpu().numpy()
    images = int(total.sum())
    seen = total > 0
    accuracy = np.full(len(total), np.nan)
    accuracy[seen] = 100.0 * correct[seen] / total[seen]

    def mean(classes: np.ndarray) -> float | None:
        measured = accuracy[classes][seen[classes]]
        return float(measured.mean()) if len(measured) else None

    groups = shot_groups(class_counts)
    return HeadMetrics(
        top1=100.0 * int(correct.sum()) / images,
        top5=100.0 * int(statistics.correct_top5.sum()) / images,
        macro=mean(np.arange(len(total))),
        **{name: mean(classes) for name, classes in groups.items()},
        ece=100.0 * expected_calibration_error(statistics.bins.cpu().numpy()),
        nll=float(statistics.negative_log_likelihood) / images,
        images=images,
        classes={name: len(classes) for name, classes in groups.items()},
        per_class=[float(value) if ok else None for value, ok in zip(accuracy, seen, strict=True)],
    )
