"""A model over a loader, once: what the analyses need of every image, small enough for any data set.

The logits of all images are never kept: iNaturalist's 24,426 images of 8,142 classes would take 0.8 GB a head.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mbib_timm.data.batch import Batch
from mbib_timm.errors import DataError
from mbib_timm.evaluation.evaluate import AnswerLog, metrics_of
from mbib_timm.evaluation.metrics import Statistics, batch_statistics, rank
from mbib_timm.models.head_outputs import PREDICTION, logits_and_features
from mbib_timm.results.record import HeadMetrics


class HeadOutputs(NamedTuple):
    """What a head, or the prediction, says of every image.

    Attributes:
        predicted: class with the largest logit, (N,), int64.
        positive_posterior: softmax probability q(y|x) of the true class, (N,), float32.
    """

    predicted: Tensor
    positive_posterior: Tensor


@dataclass(frozen=True)
class Outputs:
    """A model's outputs over N images, in the loader's order, on the CPU.

    Attributes:
        labels: true classes, (N,), int64.
        features: what the model calls so, by name, (N, C) each, float32; see `logits_and_features`.
        heads: of ``"prediction"`` and of each of `reported_heads`, by name.
        metrics: by head, as `evaluate` returns them with all intervals.
        bins: of confidence, by head, (15, 3); see `Statistics`.
    """

    labels: Tensor
    features: dict[str, Tensor]
    heads: dict[str, HeadOutputs]
    metrics: dict[str, HeadMetrics]
    bins: dict[str, np.ndarray]


@torch.no_grad()
def collect_outputs(
    model: nn.Module,
    loader: Iterable[Batch],
    class_counts: np.ndarray,
    *,
    channels_last: bool = False,
    groups: np.ndarray | None = None,
) -> Outputs:
    """Collect a model's outputs; one forward pass a batch gives features and logits.

    Args:
        model: set to evaluation mode.
        loader: gives batches on the model's device.
        class_counts: training images of each class, (K,).
        channels_last: hand the images on in channels-last format.
        groups: name of the group of each image of the split; None where images have none.

    Raises:
        DataError: no image at all, or what the loader raises for a broken one.
        MbibError: logits that are not finite, or a model that does not give its features.
    """
    model.eval()
    sums: Statistics | None = None
    answers = AnswerLog(groups)
    labels: list[Tensor] = []
    features: dict[str, list[Tensor]] = {}
    heads: dict[str, list[HeadOutputs]] = {}
    for batch in loader:
        logits, embedded = logits_and_features(model, batch.laid_out(channels_last).images)
        counted = batch_statistics(torch.stack([*logits.values()]), batch.targets)
        sums = counted if sums is None else sums + counted
        answers.add(logits[PREDICTION], batch)
        # Off the device at once: the features of a whole split may not fit there.
        labels.append(batch.targets.cpu())
        for name, values in embedded.items():
            features.setdefault(name, []).append(values.float().cpu())
        for name, values in logits.items():
            heads.setdefault(name, []).append(_of_head(values, batch.targets))
    if sums is None:
        raise DataError("there is no image to analyze")
    metrics = metrics_of(sums, [*heads], class_counts, answers)
    return Outputs(
        torch.cat(labels),
        {name: torch.cat(features.pop(name)) for name in list(features)},  # one by one, so that the parts go early
        {name: HeadOutputs(*map(torch.cat, zip(*parts, strict=True))) for name, parts in heads.items()},
        metrics,
        {name: sums[i].bins.cpu().numpy() for i, name in enumerate(heads)},
    )


def _of_head(logits: Tensor, targets: Tensor) -> HeadOutputs:
    positive = logits.float().log_softmax(dim=-1).gather(-1, targets[:, None])[:, 0].exp()
    return HeadOutputs(rank(logits)[:, 0].cpu(), positive.cpu())
