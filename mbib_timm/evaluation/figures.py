"""The figures of a run: training curves, accuracy by class, accuracy by shot group."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mbib_timm.data.class_counts import shot_groups
from mbib_timm.errors import MbibError

# Okabe and Ito's palette: told apart with any kind of colour vision.
BLACK, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE, GREY = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#999999",
)  # fmt: skip
GROUP_COLORS = {"many": BLUE, "medium": GREEN, "few": VERMILION}
HEAD_COLORS = (GREY, SKY, GREEN, PURPLE, ORANGE, BLUE, VERMILION)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise MbibError("figures need matplotlib: pip install 'mbib-timm[train]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3, "font.size": 9}
    )
    return plt


def _finish(plt: Any, figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def training_curves(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw loss, learning rate and accuracy over the epochs.

    Args:
        history: rows of ``summary.csv``: ``epoch``, ``lr``, ``train_loss``, and where evaluated ``val_*``.
        path: PNG file to write.

    Raises:
        MbibError: matplotlib is not installed.
    """
    plt = _pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    epochs = [row["epoch"] for row in history]
    left.plot(epochs, [row["train_loss"] for row in history], color=BLACK, label="training loss")
    left.set(xlabel="epoch", ylabel="training loss", ylim=(0, None), title="Training loss and learning rate")
    rate = left.twinx()
    rate.plot(epochs, [row["lr"] for row in history], color=ORANGE, linestyle="--", drawstyle="steps-post")
    rate.set_ylabel("learning rate (dashed)", color=ORANGE)
    rate.set_yscale("log") if min(row["lr"] for row in history) > 0 else None
    rate.spines["right"].set_visible(True)
    rate.grid(False)

    evaluated = [row for row in history if row.get("val_top1") is not None]
    for name, color in {"top1": BLACK, **GROUP_COLORS}.items():
        points = [(row["epoch"], row[f"val_{name}"]) for row in evaluated if row[f"val_{name}"] is not None]
        if points:
            marker = "o" if len(points) == 1 else None
            right.plot(*zip(*points, strict=True), color=color, marker=marker, label="all" if name == "top1" else name)
    right.set(xlabel="epoch", ylabel="top-1 accuracy, %", ylim=(0, 100), title="Accuracy by shot group")
    if evaluated:
        right.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    figure.tight_layout()
    _finish(plt, figure, path)


def class_accuracy(
    results: Mapping[str, Mapping[str, Any]],
    class_counts: np.ndarray,
    path: Path,
    class_names: Sequence[str] | None = None,
) -> None:
    """Draw the prediction's accuracy on each class, over the classes sorted by their training images.

    Args:
        results: metrics by head.
        class_counts: training images of each class, (K,).
        path: PNG file to write.
        class_names: labels of the classes, shown where they fit.

    Raises:
        MbibError: matplotlib is not installed.
    """
    plt = _pyplot()
    order = np.argsort(-class_counts, kind="stable")
    accuracy = np.array([np.nan if v is None else v for v in results["prediction"]["per_class"]])[order]
    group_of = np.empty(len(class_counts), dtype=object)
    for name, classes in shot_groups(class_counts).items():
        group_of[classes] = name
    figure, axes = plt.subplots(figsize=(9, 3.6))
    places = np.arange(len(order))
    for name, color in GROUP_COLORS.items():
        inside = group_of[order] == name
        if inside.any():
            axes.bar(places[inside], accuracy[inside], width=0.8, color=color, label=f"{name} ({inside.sum()} classes)")
    axes.set(ylabel="top-1 accuracy, %", ylim=(0, 100), xlim=(-0.7, len(order) - 0.3))
    axes.grid(axis="x", visible=False)
    if class_names is not None and len(order) <= 30:
        axes.set_xticks(places, [class_names[i] for i in order], rotation=45 if max(map(len, class_names)) > 3 else 0)
        axes.set_xlabel("class, by number of training images")
    else:
        axes.set_xlabel("rank of the class by number of training images")
    counts = axes.twinx()
    counts.plot(places, class_counts[order], color=BLACK, linewidth=1.2)
    counts.set_yscale("log")
    counts.set_ylabel("training images (line)")
    counts.spines["right"].set_visible(True)
    counts.grid(False)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    _finish(plt, figure, path)


def shot_groups_figure(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw the accuracy of every head on all classes and on each shot group.

    Args:
        results: metrics by head.
        path: PNG file to write.

    Raises:
        MbibError: matplotlib is not installed.
    """
    plt = _pyplot()
    columns = {"all": "top1", "many": "many", "medium": "medium", "few": "few"}
    heads = [name for name in results if name != "prediction"] + ["prediction"]
    figure, axes = plt.subplots(figsize=(7.5, 3.6))
    width = 0.84 / len(heads)
    for i, head in enumerate(heads):
        color = BLACK if head == "prediction" else HEAD_COLORS[i % len(HEAD_COLORS)]
        for place, metric in enumerate(columns.values()):
            value = results[head][metric]
            x = place + (i - (len(heads) - 1) / 2) * width
            axes.bar(x, value or 0.0, width * 0.92, color=color, label=head if place == 0 else None)
            axes.annotate(
                "–" if value is None else f"{value:.0f}", (x, value or 0.0), ha="center", va="bottom", fontsize=7
            )
    classes = results["prediction"]["classes"]
    labels = [f"{name}\n{classes[name]} classes" if name in classes else name for name in columns]
    axes.set_xticks(range(len(columns)), labels)
    axes.grid(axis="x", visible=False)
    axes.set(ylabel="top-1 accuracy, %", ylim=(0, 105))
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, title="head")
    _finish(plt, figure, path)
