"""What a run says of itself: a line an epoch, the table at the end, and the figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mbib_timm.drawing import Illustration, render
from mbib_timm.errors import MbibError
from mbib_timm.evaluation import figures, results_table
from mbib_timm.methods import method_title

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
        "the evaluated split, and that of the last epoch is reported.",
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
    """Print the result's table, what the method has chosen, the best epoch for what it is, and where everything lies.

    Args:
        folder: the run's.
        metrics: content of ``metrics.json``.
    """
    result, best = metrics["result"], metrics["best"]
    print(f"\n{_when(metrics)}, on {result['split']}:")
    print(results_table(result["heads"], np.array(metrics["class_counts"])))
    if chosen := chosen_text(metrics):
        print(chosen)
    if raw := raw_text(metrics):
        print(raw)
    if best is not None:
        best_top1 = best["heads"]["prediction"]["top1"]
        print(f"Best epoch on {best['selected_on']}: {best['epoch']} with {best_top1:.2f} (not the result)")
    if metrics["replaced_images"]:
        print(f"{len(metrics['replaced_images'])} broken training images were replaced: see metrics.json")
    print(f"\n{folder}")


def _when(metrics: Mapping[str, Any]) -> str:
    """Return when in a run its result was measured: ``Epoch 59 (the last)``, ``After tau-norm``."""
    epoch, stages = metrics["result"]["epoch"], metrics["stages"]
    if epoch < 0:
        return f"After {method_title(metrics['method'])}"
    stage = f" of stage {len(stages)}, {method_title(stages[-1])}" if len(stages) > 1 else ""
    return f"Epoch {epoch} (the last{stage})"


def chosen_text(metrics: Mapping[str, Any]) -> str:
    """Return what the method has chosen by itself, as ``Chosen by tau-norm: tau 0.7, on ...``; empty for nothing."""
    chosen = ", ".join(f"{name} {value:g}" for name, value in metrics["chosen"].items())
    where = f", on {metrics['chosen_on']}" if metrics.get("chosen_on") else ""
    return f"Chosen by {method_title(metrics['method'])}: {chosen}{where}" if chosen else ""


def raw_text(metrics: Mapping[str, Any]) -> str:
    """Return the accuracy of the last weights where the result is their moving average; empty for no average."""
    if metrics.get("raw") is None:
        return ""
    accuracies = metrics["raw"]["heads"]["prediction"]
    groups = [f"{name} {accuracies[name]:.2f}" for name in SHOT_METRICS[1:] if accuracies[name] is not None]
    return f"Weights without the moving average: {accuracies['top1']:.2f} ({', '.join(groups)})"


def stages_text(metrics: Mapping[str, Any]) -> str:
    """Return the methods of a run's stages by their titles: ``CE, then cRT``."""
    return ", then ".join(method_title(stage) for stage in metrics["stages"])
