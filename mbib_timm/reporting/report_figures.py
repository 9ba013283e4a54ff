"""Figures of several runs side by side: accuracy by shot group, accuracy over the epochs; and the confusion matrix."""

import statistics
from collections.abc import Sequence
from textwrap import fill
from typing import Any, NamedTuple

import numpy as np

from mbib_timm.drawing import (
    BLUE,
    LINE_STYLES,
    background,
    canvas,
    foreground,
    method_colors,
    named_method,
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
NARROW = 26  # letters of a title beside its bars
WIDE = 80  # letters of a title that fit beside its colour
MATRIX = 30  # classes whose cells have room for a number


def group_colors(groups: Sequence[RunGroup]) -> list[tuple[str, int]]:
    """Return a colour for each group of runs, its method's, and which group of the colour it is, from 0."""
    methods = [method_title(group.first.record.method) for group in groups]
    return _counted([method_colors(methods)[method] for method in methods])


def _counted(colors: Sequence[str]) -> list[tuple[str, int]]:
    """Return colours, each with how often it has come before."""
    return [(color, colors[:place].count(color)) for place, color in enumerate(colors)]


def comparison_bars(groups: Sequence[RunGroup], titles: Sequence[str]) -> Any:
    """Draw the mean accuracy of each group of runs, a row each, by shot group; the paper's numbers as diamonds."""
    titles = [fill(f"{title} (n = {len(group.runs)})", NARROW) for title, group in zip(titles, groups, strict=True)]
    columns = [name for name in COLUMNS if any(group.mean(name) is not None for group in groups)]
    lines = sum(max(1.8, 0.8 + title.count("\n")) for title in titles)
    figure, panels = canvas(7.5, 1.1 + 0.19 * lines, columns=len(columns))
    mark: Any = None
    for column, axes in zip(columns, np.atleast_1d(panels), strict=True):
        for row, (group, (color, _)) in enumerate(zip(groups, group_colors(groups), strict=True)):
            values = [value for value in group.values(column) if value is not None]
            if not values:
                continue
            mean, deviation = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None
            axes.barh(row, mean, 0.72, color=color, xerr=deviation, ecolor=foreground(), capsize=2)
            end = mean + (deviation or 0.0)
            if (marked := group.papers_number(column)) is not None:
                look = dict(marker="D", linestyle="", color=foreground(), markerfacecolor=background(), markersize=5)
                (mark,) = axes.plot(marked, row, **look)
                end = max(end, marked)
            # To the right of all that could be in its way.
            axes.annotate(f"{mean:.1f}", (end, row), (7, 0), textcoords="offset points", va="center")
        axes.set(title=column, ylim=(len(groups) - 0.5, -0.5), yticks=[])
        axes.grid(axis="y", visible=False)
        axes.xaxis.get_major_locator().set_params(nbins=3)
    widest = max(axes.get_xlim()[1] for axes in np.atleast_1d(panels))
    for axes in np.atleast_1d(panels):
        axes.set_xlim(0, 1.3 * widest)
    np.atleast_1d(panels)[0].set_yticks(range(len(groups)), titles)
    figure.supxlabel("top-1 accuracy, %", fontsize=9)
    if mark is not None:
        figure.legend([mark], [PAPER], loc="outside upper right")
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


def comparison_curves(groups: Sequence[RunGroup], titles: Sequence[str]) -> Any:
    """Draw the accuracy after each evaluated epoch, of every run of each group, and of several the mean."""
    curves = []
    for group, title, (color, sibling) in zip(groups, titles, group_colors(groups), strict=True):
        histories = [run.history for run in group.runs]
        runs = [
            [(float(row.epoch), row.val["top1"] or 0.0) for row in history if row.val is not None]
            for history in histories
        ]
        if kept := [run for run in runs if run]:
            style = LINE_STYLES[sibling % len(LINE_STYLES)]
            curves.append(_Curve(title, kept, color, style, any(map(is_averaged, histories))))
    return _curves(curves)


def sweep_curves(results: SweepResults) -> Any:
    """Draw the accuracy after each evaluated epoch, of every run of each configuration, and of several the mean.

    Where methods differ, and line styles suffice for what each has, a curve has its method's colour.
    """
    collected: dict[str, list[SweepRun]] = {}
    for run in results.runs:
        collected.setdefault(", ".join(method_title(value) for value in run.coordinates.values()), []).append(run)
    names = [named_method(title) or method_title(members[0].method) for title, members in collected.items()]
    if len(set(names)) == 1 or max(map(names.count, names)) > len(LINE_STYLES):
        names = list(collected)
    colors = method_colors(names)
    curves = []
    for (title, members), (color, sibling) in zip(
        collected.items(), _counted([colors[name] for name in names]), strict=True
    ):
        points = [zip(run.curve.epoch, run.curve.val_top1, strict=True) for run in members]
        runs = [[(float(epoch), value) for epoch, value in each if value is not None] for each in points]
        style = LINE_STYLES[sibling % len(LINE_STYLES)]
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
