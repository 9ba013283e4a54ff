"""Figures of several runs side by side: accuracy by shot group, accuracy over the epochs; and the confusion matrix."""

from collections.abc import Sequence
from textwrap import fill
from typing import Any, NamedTuple

import numpy as np

from mbib_timm.drawing import (
    BLUE,
    CYCLE,
    GREY,
    HATCHES,
    LINE_STYLES,
    METHOD_COLORS,
    background,
    canvas,
    mean_bar,
    text_on,
)
from mbib_timm.evaluation.answer_files import ConfusionMatrix
from mbib_timm.methods import method_title
from mbib_timm.results.columns import COLUMNS
from mbib_timm.results.record import is_averaged
from mbib_timm.results.run_figures import AVERAGE, RAW, plot_runs, shortened
from mbib_timm.results.runs import RunGroup
from mbib_timm.sweeps.show_sweep import PAPER
from mbib_timm.sweeps.sweep_results import SweepResults, SweepRun

CURVES = 12  # as many lines as can be told apart
SHORT = 24  # letters of a title, three of which stand side by side
WIDE = 80  # letters of a title that fit beside its colour
MATRIX = 30  # classes whose cells have room for a number


def group_colors(groups: Sequence[RunGroup]) -> list[tuple[str, int]]:
    """Return a colour for each group of runs, its method's, and which group of the method it is, from 0."""
    methods = [method_title(group.first.record.method) for group in groups]
    return [(METHOD_COLORS.get(method, GREY), methods[:place].count(method)) for place, method in enumerate(methods)]


def comparison_bars(groups: Sequence[RunGroup], titles: Sequence[str] = ()) -> Any:
    """Draw the mean accuracy of each group of runs by shot group; the paper's numbers as diamonds.

    Args:
        groups: of which recipe each.
        titles: of the groups in the legend; their own when empty.
    """
    titles = titles or [group.title for group in groups]
    columns = 3 if max(map(len, titles)) < SHORT else 1
    titles = [fill(f"{title} (n = {len(group.runs)})", WIDE) for title, group in zip(titles, groups, strict=True)]
    lines = -(-len(groups) // columns) + sum(title.count("\n") for title in titles)
    figure, axes = canvas(max(6.5, 1.4 * len(groups)), 3.6 + 0.22 * lines)
    share = 0.84 / len(groups)
    legend: dict[str, Any] = {}
    looks = zip(groups, titles, group_colors(groups), strict=True)
    for place, (group, title, (color, sibling)) in enumerate(looks):
        for column_place, column in enumerate(COLUMNS):
            at = column_place + (place - (len(groups) - 1) / 2) * share
            marked = group.paper[0].accuracies.get(column) if group.is_papers else None
            hatch = HATCHES[sibling % len(HATCHES)]
            bar, mark = mean_bar(axes, at, group.values(column), share * 0.9, color, hatch, marked)
            legend |= {title: bar} if bar is not None else {}
            legend |= {PAPER: mark} if mark is not None else {}
    if PAPER in legend:  # last
        legend[PAPER] = legend.pop(PAPER)
    axes.set_xticks(range(len(COLUMNS)), [*COLUMNS])
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="x", visible=False)
    axes.set(ylabel="top-1 accuracy, %")
    axes.margins(y=0.12)
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=columns)
    return figure


class _Curve(NamedTuple):
    """Accuracy over the epochs of runs that differ in the seed alone.

    Attributes:
        title: in the legend.
        runs: epoch and accuracy in percent of each, by epoch.
        color: of the lines.
        style: of the lines.
        averaged: the accuracies are of the weights' moving average; None where nothing says so.
    """

    title: str
    runs: list[list[tuple[float, float]]]
    color: str
    style: str
    averaged: bool | None


def comparison_curves(groups: Sequence[RunGroup]) -> Any:
    """Draw the accuracy after each evaluated epoch, of every run of each group, and of several the mean."""
    curves = []
    for group, (color, sibling) in zip(groups, group_colors(groups), strict=True):
        histories = [run.history for run in group.runs]
        runs = [
            [(float(row.epoch), row.val["top1"] or 0.0) for row in history if row.val is not None]
            for history in histories
        ]
        if kept := [run for run in runs if run]:
            style = LINE_STYLES[sibling % len(LINE_STYLES)]
            curves.append(_Curve(group.title, kept, color, style, any(map(is_averaged, histories))))
    return _curves(curves)


def sweep_curves(results: SweepResults) -> Any:
    """Draw the accuracy after each evaluated epoch, of every run of each configuration, and of several the mean."""
    collected: dict[str, list[SweepRun]] = {}
    for run in results.runs:
        collected.setdefault(", ".join(method_title(value) for value in run.coordinates.values()), []).append(run)
    free = [color for color in CYCLE if color not in {METHOD_COLORS.get(title) for title in collected}] or list(CYCLE)
    curves = []
    for i, (title, members) in enumerate(collected.items()):
        points = [zip(run.curve.epoch, run.curve.val_top1, strict=True) for run in members]
        runs = [[(float(epoch), value) for epoch, value in each if value is not None] for each in points]
        color, style = METHOD_COLORS.get(title, free[i % len(free)]), LINE_STYLES[i // len(free) % len(LINE_STYLES)]
        if kept := [run for run in runs if run]:
            said = {run.averaged for run in members}
            curves.append(_Curve(title, kept, color, style, said.pop() if len(said) == 1 else None))
    return _curves(curves)


def _curves(curves: Sequence[_Curve]) -> Any:
    """Draw curves: of several runs each as a thin line, and their mean, after the epochs that all have, as a thick one.

    Which weights are evaluated is said where any are a moving average.
    """
    labels = []
    for curve in curves:
        seeds = f" (n = {len(curve.runs)})" if len(curve.runs) > 1 else ""
        weights = {True: f", {AVERAGE}", False: f", {RAW}", None: ""}[curve.averaged]
        labels.append(f"{curve.title}{seeds}{weights if any(each.averaged for each in curves) else ''}")
    columns = 2 if len(labels) >= 6 and max(map(len, labels)) < WIDE / 2 else 1
    labels = [fill(label, WIDE) for label in labels]
    figure, axes = canvas(6.5, 3.6 + 0.2 * (len(curves) + sum(label.count("\n") for label in labels)))
    for curve, label in zip(curves, labels, strict=True):
        plot_runs(axes, curve.runs, label, marked=29, color=curve.color, linestyle=curve.style, markersize=3.5)
    axes.set(xlabel="epochs done", ylabel="top-1 accuracy, %", ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    figure.legend(loc="outside lower center", ncols=columns)
    return figure


def confusion_figure(matrix: ConfusionMatrix, class_counts: np.ndarray) -> Any:
    """Draw the images of each class by the class that they are taken for, a row adding up to its images.

    Args:
        matrix: of at most `MATRIX` classes.
        class_counts: training images of each class, (K,), which sort the classes.
    """
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    order = np.argsort(-class_counts, kind="stable")
    images = matrix.dense()[np.ix_(order, order)]
    total = images.sum(axis=1, keepdims=True)
    shares = np.divide(images, total, out=np.zeros(images.shape), where=total > 0)
    names = [shortened(matrix.names[label]) for label in order]
    size = 0.36 * len(names) + 0.085 * max(map(len, names))
    figure, axes = canvas(max(4.0, 1.2 + size), max(3.2, 0.9 + size))
    colors = LinearSegmentedColormap.from_list("shares", [background(), BLUE])
    axes.imshow(shares, cmap=colors, vmin=0, vmax=1, aspect="equal")
    for row, column in zip(*np.nonzero(images), strict=True):
        behind = str(to_hex(colors(shares[row, column])))
        axes.text(column, row, f"{images[row, column]}", ha="center", va="center", fontsize=7, color=text_on(behind))
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted class", ylabel="class")
    axes.tick_params(length=0)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(True)
    return figure
