"""What becomes of the images that are predicted, counted as they are written."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mbib_timm.evaluation.metrics import Statistics, batch_statistics, summarize, with_intervals
from mbib_timm.files import composed
from mbib_timm.inference.prediction_files import Broken, Prediction
from mbib_timm.results.record import HeadMetrics


class Tally:
    """What becomes of the images.

    Args:
        names: of the model's classes, each its own, in label order.

    Attributes:
        statistics: of the images whose class the model knows; None before the first.
        unknown: how many there are of each class that it does not know.
        broken: images that could not be read.
        unsure: how many answers are that.
        sure: images whose class the model knows and whose answer is not unsure.
        right: of these, those whose answer is their class.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.labels = {composed(name): label for label, name in enumerate(names)}
        self.statistics: Statistics | None = None
        self.unknown: Counter[str] = Counter()
        self.broken: list[Broken] = []
        self.unsure = self.sure = self.right = 0
        self._targets: list[int] = []
        self._predicted: list[int] = []

    def count(self, items: Sequence[Prediction | Broken], logits: Tensor) -> None:
        """Count a batch; the logits (B, K) are those of the images that could be read."""
        self.broken += [item for item in items if isinstance(item, Broken)]
        read = [item for item in items if isinstance(item, Prediction)]
        self.unsure += sum(item.unsure for item in read)
        targets = [None if item.label is None else self.label(item.label) for item in read]
        self.unknown.update(
            item.label for item, target in zip(read, targets, strict=True) if item.label is not None and target is None
        )
        known = [place for place, target in enumerate(targets) if target is not None]
        if not known:
            return
        counted = batch_statistics(logits[known], torch.tensor([targets[place] for place in known]).to(logits.device))
        self.statistics = counted if self.statistics is None else self.statistics + counted
        self._targets += [target for target in targets if target is not None]
        self._predicted += [read[place].classes[0][0] for place in known]
        sure = [place for place in known if not read[place].unsure]
        self.sure += len(sure)
        self.right += sum(read[place].classes[0][0] == targets[place] for place in sure)

    def count_done(self, done: Sequence[Prediction | Broken]) -> None:
        """Count images of an interrupted run. What its file does not tell, the other classes share evenly."""
        best = [item.classes[0] for item in done if isinstance(item, Prediction)]
        logits = torch.empty(len(best), len(self.names))
        for row, (label, probability) in zip(logits, best, strict=True):
            rest = max(1 - probability, 1e-7) / max(len(self.names) - 1, 1)
            row.fill_(np.log(rest))
            row[label] = np.log(max(probability, 1.001 * rest))
        self.count(done, logits)

    def label(self, name: str) -> int | None:
        """Return the label of a class; None where the model does not know it."""
        return self.labels.get(composed(name))

    def metrics(self, class_counts: np.ndarray | None) -> HeadMetrics | None:
        """Return the metrics of the images whose class the model knows, with their intervals; None without one.

        Args:
            class_counts: training images of each class, (K,), which decide the shot groups; None where not known.
        """
        if self.statistics is None:
            return None
        counts = np.ones(len(self.names), dtype=int) if class_counts is None else class_counts
        metrics = summarize(self.statistics, counts)
        return with_intervals(metrics, np.array(self._targets), np.array(self._predicted), counts)
