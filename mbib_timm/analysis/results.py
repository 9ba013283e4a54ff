"""The analyses of a model put together, and the file that holds them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from mbib_timm.analysis.calibration import reliability
from mbib_timm.analysis.confusion import group_confusion
from mbib_timm.analysis.distances import distances
from mbib_timm.analysis.efficiency import efficiency
from mbib_timm.analysis.embedding import choose_images, perplexity_for, spread_classes, tsne
from mbib_timm.analysis.outputs import Outputs
from mbib_timm.analysis.posterior import mean_positive_posterior
from mbib_timm.analysis.trend import accuracy_trend
from mbib_timm.files import write_bytes

FILE = "analysis.json"
SEED = 0  # of the images that are shown and of t-SNE


def all_analyses(
    model: nn.Module,
    outputs: Outputs,
    counts: np.ndarray,
    input_size: tuple[int, int, int],
    classes: Sequence[int] | None,
    images_per_class: int,
) -> dict[str, Any]:
    """Return every analysis of a model, as plain values.

    Args:
        model: the model.
        outputs: its outputs over a split.
        counts: training images of each class, (K,).
        input_size: the model's own image size (C, H, W).
        classes: labels of the classes to embed; None for ten from the head to the tail.
        images_per_class: images of each to embed.

    Raises:
        MbibError: classes without images, or too few images to embed.
    """
    labels = outputs.labels.numpy()
    predicted = {name: head.predicted.numpy() for name, head in outputs.heads.items()}
    return {
        "heads": {name: asdict(metrics) for name, metrics in outputs.metrics.items()},
        "positive_posterior": {
            name: mean_positive_posterior(head.positive_posterior.numpy(), labels, len(counts)).tolist()
            for name, head in outputs.heads.items()
        },
        "distances": {name: distances(values, outputs.labels, counts) for name, values in outputs.features.items()},
        "embedding": _embedding(outputs, counts, classes, images_per_class),
        "reliability": {
            name: reliability(head.confidence.numpy(), predicted[name] == labels)
            for name, head in outputs.heads.items()
        },
        "confusion": group_confusion(labels, predicted["prediction"], counts),
        "trend": accuracy_trend(outputs.metrics["prediction"].per_class, counts),
        "efficiency": efficiency(model, input_size),
    }


def _embedding(
    outputs: Outputs, counts: np.ndarray, classes: Sequence[int] | None, images_per_class: int
) -> dict[str, Any]:
    labels = outputs.labels.numpy()
    chosen = spread_classes(labels, counts) if classes is None else list(dict.fromkeys(classes))
    places = choose_images(labels, chosen, images_per_class, SEED)
    points = {name: tsne(values[places].numpy(), SEED) for name, values in outputs.features.items()}
    return {
        "classes": chosen,
        "labels": labels[places].tolist(),
        "points": {name: np.round(values.astype(np.float64), 2).tolist() for name, values in points.items()},
        "perplexity": perplexity_for(len(places)),
        "seed": SEED,
    }


def rounded(value: Any) -> Any:
    """Return nested plain values with floats of six digits, and None for nan, which JSON has not."""
    if isinstance(value, float):
        return None if np.isnan(value) else float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return value


def write_analysis(folder: Path, content: Mapping[str, Any]) -> None:
    """Write ``analysis.json``, whole or not at all, a line for each part; nan is refused."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in content.items()]
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    write_bytes(folder / FILE, text.encode())
