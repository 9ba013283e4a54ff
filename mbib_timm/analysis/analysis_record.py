"""All that is found out of a trained model as one typed object: ``analysis.json`` is written and read here.

The measures are fields of `Analysis`, each with the function that measures it and the figures that show it: that is the
list to add one to.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from mbib_timm.analysis.analysis_figures import (
    draw_accuracy_trend,
    draw_confusion,
    draw_costs,
    draw_distances,
    draw_embedding,
    draw_positive_posterior,
    draw_posterior_change,
    draw_reliability,
)
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
from mbib_timm.drawing import Illustration
from mbib_timm.environment import Environment
from mbib_timm.files import from_plain, read_json, write_bytes
from mbib_timm.models.complexity import Efficiency, efficiency
from mbib_timm.models.head_outputs import PREDICTION
from mbib_timm.results.record import HeadMetrics, check_classes
from mbib_timm.results.run_figures import shot_groups_figure, with_nan

FOLDER, FILE = "analysis", "analysis.json"


@dataclass(frozen=True)
class Subject:
    """What is analyzed: a model, and what it says of a split.

    Attributes:
        model: in evaluation mode.
        outputs: over the split's N images.
        counts: training images of each class, (K,).
        input_size: image size (C, H, W) that its costs are counted at.
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

    @property
    def predicted(self) -> np.ndarray:
        """Classes that the prediction takes the images for, (N,)."""
        return self.outputs.heads[PREDICTION].predicted.numpy()


def _measured(
    measure: Callable[[Subject], Any], name: str, title: str, reading: str, draw: "Callable[[Analysis], Any]"
) -> Any:
    """Return a field of `Analysis` that a figure shows.

    Older files lack a field that is new, which is None then, and is not shown: its type says ``| None``.

    Args:
        measure: gives the value.
        name: of the figure's files.
        title: above it.
        reading: how to read it, in a sentence.
        draw: gives the figure of an analysis.
    """
    return dataclasses.field(default=None, metadata={"measure": measure, "figure": (name, title, reading, draw)})


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
    return {name: reliability(bins) for name, bins in subject.outputs.bins.items()}


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
        trained_on: a line on the images that the model was trained on; None where there are none.
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
    trained_on: str | None = None


@dataclass(frozen=True)
class Analysis(Analyzed):
    """What is found out of a trained model on a split; floats have six digits.

    Attributes:
        heads: metrics of ``prediction``, and by name of each head and expert where there are several.
        trend: of the prediction.
        confusion: of the prediction.
        positive_posterior: of the prediction, the heads and the experts, by class; None for classes without images.
        reliability: of the prediction, the heads and the experts.
        distances: by features and shot group.
        embedding: images of some classes in the plane.
        efficiency: parameters and operations.
    """

    heads: dict[str, HeadMetrics] = _measured(
        lambda subject: subject.outputs.metrics,
        "accuracy_by_head",
        "Accuracy by shot group and head",
        "Higher is better; the closer the bars for few come to those for many, the better the tail is learnt.",
        lambda analysis: shot_groups_figure(analysis.heads),
    )
    trend: Trend = _measured(
        _trend,
        "trend",
        "Accuracy of a class by its training images",
        "A flat, high line is best: accuracy then does not depend on how often a class was seen in training.",
        draw_accuracy_trend,
    )
    confusion: Confusion = _measured(
        lambda s: group_confusion(s.labels, s.predicted, s.counts),
        "confusion",
        "Where errors go",
        "A colour that is longer in the wide bar than in the narrow one below, which spreads the same errors "
        "evenly over all other classes, marks a shot group that attracts errors.",
        draw_confusion,
    )
    positive_posterior: dict[str, list[float | None]] = _measured(
        _positive_posterior,
        "positive_posterior",
        "Mean positive posterior by class",
        "A bar is the mean probability that the prediction gives to the true class of an image; 1 is ideal.",
        draw_positive_posterior,
    )
    reliability: dict[str, Reliability] = _measured(
        _reliability,
        "reliability",
        "Reliability",
        "On the diagonal, accuracy equals confidence; below it, the model is overconfident, above it "
        "underconfident; of the expected calibration error (ECE), less is better.",
        draw_reliability,
    )
    distances: dict[str, dict[str, Distances]] = _measured(
        _distances,
        "distances",
        "Intra-class over inter-class distance",
        "Lower is better: images of one class lie close together, and the centres of classes far apart; distances in a "
        "class are from its centre (left) or over pairs of its images, as in equation 15 (right), and its centre is "
        "compared with those of all other classes (above) or of its shot group (below), which the paper leaves open.",
        draw_distances,
    )
    embedding: Embedding = _measured(
        _embedding,
        "embedding",
        "Features of some classes in the plane",
        "Compact islands of one colour and shape are good; t-SNE only keeps neighbours together: the axes, the sizes "
        "of islands and the distances between them have no meaning.",
        draw_embedding,
    )
    efficiency: Efficiency = _measured(
        lambda s: efficiency(s.model, s.input_size),
        "costs",
        "Costs of one image",
        "Shorter is better: each bar is the cost of a forward pass on one image, beside the paper's Table 6 if the "
        "network is the paper's.",
        draw_costs,
    )

    def __post_init__(self) -> None:
        """Raise ValueError for classes that are not equally many everywhere; older files may lack a measure."""
        for name in ("heads", "reliability", "positive_posterior"):
            if getattr(self, name) is None:
                raise ValueError(f"{name}: missing")
        check_classes(self.class_counts, self.class_names, self.heads)
        if min(self.class_counts) < 1:
            raise ValueError("class_counts: expected at least 1 for each class")
        if PREDICTION not in self.heads or PREDICTION not in self.reliability:
            raise ValueError(f"heads: {PREDICTION!r} is missing")
        if len(self.positive_posterior.get(PREDICTION, ())) != len(self.class_counts):
            raise ValueError(f"positive_posterior: expected {len(self.class_counts)} of {PREDICTION!r}")

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


def analysis_figures(analysis: Analysis) -> list[Illustration]:
    """Return the figures of everything that was measured."""
    shown = [field for field in dataclasses.fields(Analysis) if "figure" in field.metadata]
    figures = [field.metadata["figure"] for field in shown if getattr(analysis, field.name) is not None]
    return [Illustration(name, title, reading, partial(draw, analysis)) for name, title, reading, draw in figures]


def comparison_figures(first: Analysis, other: Analysis) -> list[Illustration]:
    """Return the figures that compare a run with the first one, of the same classes."""
    return [
        Illustration(
            "positive_posterior_difference",
            f"Mean positive posterior, {other.title} minus {first.title}",
            f"Above zero, {other.title} gives the true class of an image more probability than "
            f"{first.title} does, which is better. {other_images(first, other)}".strip(),
            partial(draw_posterior_change, first, other),
        )
    ]


def other_images(first: Analyzed, other: Analyzed) -> str:
    """Return a sentence on two analyses of different images; empty where split and number are the same."""
    if (first.split, first.images) == (other.split, other.images):
        return ""
    of_first, of_other = (f"{each.images:,} images of the split {each.split!r}" for each in (first, other))
    return f"They are not of the same images: the first is of {of_first}, the other of {of_other}."


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
