"""What a run says of itself: a line an epoch, the table at the end, and the figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mbib_timm.drawing import Illustration, render
from mbib_timm.errors import MbibError
from mbib_timm.evaluation import figures, results_table

SHOT_METRICS = ("top1", "many", "medium", "few")


def epoch_line(row: Mapping[str, Any], epochs: int) -> str:
    """Return an epoch's numbers as one line.

    Args:
        row: of ``summary.csv``.
        epochs: epochs of the run.
    """
    line = f"epoch {row['epoch']:>3}/{epochs}  lr {row['lr']:.2e}  loss {row['train_loss']:.3f}"
    if "val_top1" in row:
        values = {name: row[f"val_{name}"] for name in SHOT_METRICS}
        line += "".join(f"  {name} {'-' if value is None else format(value, '.1f')}" for name, value in values.items())
    return f"{line}  {row['seconds']:.1f} s"


def draw_figures(folder: Path, history: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any]) -> None:
    """Draw a run's figures under ``figures/``; says so where matplotlib is not installed.

    Args:
        folder: the run's.
        history: rows of ``summary.csv``.
        metrics: content of ``metrics.json``.
    """
    target = folder / "figures"
    target.mkdir(exist_ok=True)
    try:
        for illustration in run_figures(history, metrics):
            (target / f"{illustration.name}.png").write_bytes(render(illustration.draw)["png"])
    except MbibError as error:
        print(f"no figures: {error}")


def run_figures(history: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any]) -> list[Illustration]:
    """Return the figures of a run; the curves where there is a history.

    Args:
        history: rows of ``summary.csv``.
        metrics: content of ``metrics.json``.
    """
    heads, counts = metrics["result"]["heads"], np.array(metrics["class_counts"])
    curves = Illustration(
        "training_curves",
        "Training",
        "On the left the loss falls as the learning rate does; on the right the accuracy of each shot group is that on "
        "the evaluated split, and the last epoch is the result.",
        lambda: figures.training_curves(history),
    )
    return [
        *([curves] if history else []),
        Illustration(
            "class_accuracy",
            "Accuracy by class",
            "Each bar is a class, from the most to the fewest training images (the line): the less the bars fall from "
            "left to right, the better the tail is learnt.",
            lambda: figures.class_accuracy(heads, counts, metrics.get("class_names")),
        ),
        Illustration(
            "shot_groups",
            "Accuracy by head and shot group",
            "Each colour is a head of the network, and the prediction, in ink, is what the model answers; a balanced "
            "model has groups of one height.",
            lambda: figures.shot_groups_figure(heads),
        ),
    ]


def print_report(folder: Path, metrics: Mapping[str, Any]) -> None:
    """Print the result's table, the best epoch for what it is, and where everything lies.

    Args:
        folder: the run's.
        metrics: content of ``metrics.json``.
    """
    result, best = metrics["result"], metrics["best"]
    when = f"Epoch {result['epoch']} (the last)" if result["epoch"] >= 0 else "Without training"
    print(f"\n{when}, on {result['split']}:")
    print(results_table(result["heads"], np.array(metrics["class_counts"])))
    if best is not None:  # there were epochs
        best_top1 = best["heads"]["prediction"]["top1"]
        print(f"Best epoch on {best['selected_on']}: {best['epoch']} with {best_top1:.2f} (not the result)")
    for name, value in metrics["chosen"].items():
        print(f"{name}: {value:g}" if isinstance(value, float) else f"{name}: {value}")
    if metrics["replaced_images"]:
        print(f"{len(metrics['replaced_images'])} broken training images were replaced: see metrics.json")
    print(f"\n{folder}")
