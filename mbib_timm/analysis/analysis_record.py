"""All that is found out of a trained model as one typed object: ``analysis.json`` is written and read here.

The measures are fields of `Analysis`, each with the function that measures it: that is the list to add one to.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from mbib_timm.analysis.embedding import Embedding, embed
from mbib_timm.analysis.measures import (
    Confusion,
    Distances,
    Reliability,
    Trend,
    accuracy_trend,
    distances,
    group_confusion,
    mean_positive_posterior,
    reliability,
)
from mbib_timm.analysis.outputs import Outputs
from mbib_timm.environment import Environment
from mbib_timm.files import from_plain, read_json, write_bytes
from mbib_timm.models.complexity import Efficiency, efficiency
from mbib_timm.models.head_outputs import PREDICTION
from mbib_timm.results.record import HeadMetrics

FOLDER, FILE = "analysis", "analysis.json"


@dataclass(frozen=True)
class Subject:
    """What is analyzed: a model, and what it says of a split.

    Attributes:
        model: in evaluation mode.
        outputs: over the split's N images.
        counts: training images of each class, (K,).
        input_size: the model's own image size (C, H, W).
        embedded_classes: labels of the classes to embed; None for ten from the head to the tail.
        images_per_class: images of each to embed.
    """

    model: nn.Module
    outputs: Outputs
    counts: np.ndarray
    input_size: tuple[int, int, int]
    embedded_classes: Sequence[int] | None
    images_per_class: int

    @property
    def labels(self) -> np.ndarray:
        """True classes, (N,)."""
        return self.outputs.labels.numpy()

    def predicted(self, head: str = PREDICTION) -> np.ndarray:
        """Return the classes that a head predicts, (N,)."""
        return self.outputs.heads[head].predicted.numpy()


def _measured(measure: Callable[[Subject], Any]) -> Any:
    """Return a field of `Analysis` that `measure` gives."""
    return dataclasses.field(metadata={"measure": measure})


def _positive_posterior(subject: Subject) -> dict[str, list[float]]:
    return {
        name: mean_positive_posterior(head.positive_posterior.numpy(), subject.labels, len(subject.counts)).tolist()
        for name, head in subject.outputs.heads.items()
    }


def _distances(subject: Subject) -> dict[str, dict[str, Distances]]:
    outputs = subject.outputs
    return {name: distances(values, outputs.labels, subject.counts) for name, values in outputs.features.items()}


def _embedding(subject: Subject) -> Embedding:
    features, chosen = subject.outputs.features, subject.embedded_classes
    return embed(features, subject.labels, subject.counts, chosen, subject.images_per_class)


def _reliability(subject: Subject) -> dict[str, Reliability]:
    return {
        name: reliability(head.confidence.numpy(), subject.predicted(name) == subject.labels)
        for name, head in subject.outputs.heads.items()
    }


def _trend(subject: Subject) -> Trend:
    return accuracy_trend(subject.outputs.metrics[PREDICTION].per_class, subject.counts)


@dataclass(frozen=True)
class Analyzed:
    """Which model was analyzed, and on what.

    Attributes:
        name: ``arch.tag``.
        model: name of the network.
        epochs: that it was trained; None where that is not known.
        seed: of the run; None where that is not known.
        class_names: in the order of the labels; None where the data have none.
        split: of the images.
        images: their number N.
        class_counts: training images of each class.
        prediction_heads: heads whose logits' mean is the prediction; empty for a network of one head.
        environment: versions, hardware, command, without paths of the machine.
    """

    name: str
    model: str
    epochs: int | None
    seed: int | None
    class_names: list[str] | None
    split: str
    images: int
    class_counts: list[int]
    prediction_heads: list[str]
    environment: Environment


@dataclass(frozen=True)
class Analysis(Analyzed):
    """What is found out of a trained model on a split; floats have six digits.

    Attributes:
        heads: metrics of ``prediction``, and by name of each head and expert where there are several.
        positive_posterior: of the same, by class; None for classes without images.
        distances: by features and shot group.
        embedding: images of some classes in the plane.
        reliability: of the prediction, the heads and the experts.
        confusion: of the prediction.
        trend: of the prediction.
        efficiency: parameters and operations.
    """

    heads: dict[str, HeadMetrics] = _measured(lambda subject: subject.outputs.metrics)
    positive_posterior: dict[str, list[float | None]] = _measured(_positive_posterior)
    distances: dict[str, dict[str, Distances]] = _measured(_distances)
    embedding: Embedding = _measured(_embedding)
    reliability: dict[str, Reliability] = _measured(_reliability)
    confusion: Confusion = _measured(lambda s: group_confusion(s.labels, s.predicted(), s.counts))
    trend: Trend = _measured(_trend)
    efficiency: Efficiency = _measured(lambda s: efficiency(s.model, s.input_size))

    @property
    def title(self) -> str:
        """Its name, with its seed where that is known."""
        return self.name if self.seed is None else f"{self.name} (seed {self.seed})"

    @cached_property
    def counts(self) -> np.ndarray:
        """Training images of each class, (K,)."""
        return np.array(self.class_counts)

    @cached_property
    def posterior(self) -> np.ndarray:
        """Mean positive posterior of the prediction by class, (K,); nan for classes without images."""
        return with_nan(self.positive_posterior[PREDICTION])


def measure(analyzed: Analyzed, subject: Subject) -> Analysis:
    """Measure everything, to six digits.

    Raises:
        MbibError: classes without images, or too few images to embed.
    """
    fields = [field for field in dataclasses.fields(Analysis) if "measure" in field.metadata]
    measures = {field.name: field.metadata["measure"](subject) for field in fields}
    return rounded(Analysis(**vars(analyzed), **measures))


def with_nan(values: Sequence[float | None]) -> np.ndarray:
    """Return numbers as an array, with nan for what could not be measured."""
    return np.array([np.nan if value is None else value for value in values])


def rounded(analysis: Analysis) -> Analysis:
    """Return an analysis as its file keeps it; see `six_digits`."""
    content: Analysis = from_plain(Analysis, six_digits(dataclasses.asdict(analysis)))
    return content


def six_digits(value: Any) -> Any:
    """Return nested plain values with floats of six digits, and None for nan, which JSON has not."""
    if isinstance(value, float):
        return None if math.isnan(value) else float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: six_digits(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [six_digits(item) for item in value]
    return value


def write_analysis(folder: Path, analysis: Analysis) -> None:
    """Write ``analysis.json``, whole or not at all, a line for each part; nan is refused."""
    folder.mkdir(parents=True, exist_ok=True)
    content = dataclasses.asdict(analysis)
    lines = [f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in content.items()]
    write_bytes(folder / FILE, ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def read_analysis(folder: Path) -> Analysis | None:
    """Read the analysis of a run, or of kept results; None where there is none.

    Raises:
        MbibError: the file holds something else.
    """
    found = [place for place in (folder / FOLDER / FILE, folder / FILE) if place.is_file()]
    return read_json(Analysis, found[0], "an analysis") if found else None
