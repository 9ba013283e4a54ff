"""Figures of an analysis that show single classes: their posterior, their accuracy and their features."""

from typing import TYPE_CHECKING, Any

import numpy as np

from mbib_timm.analysis.measures import mean_by_shot_group, with_nan
from mbib_timm.data.long_tail import shot_groups
from mbib_timm.drawing import (
    BLUE,
    GREEN,
    GREY,
    GROUP_COLORS,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    background,
    canvas,
    foreground,
    outline,
)
from mbib_timm.files import counted
from mbib_timm.models.head_outputs import PREDICTION
from mbib_timm.results.run_figures import (
    class_bars,
    class_bars_title,
    name_classes,
    neighbours,
    number_of_classes,
    number_ticks,
    shortened,
)

if TYPE_CHECKING:
    from mbib_timm.analysis.analysis_record import Analysis

# Eight colours and seven shapes, counted up together, filled in the first round of colours and hollow after it.
CLASS_COLORS = (BLUE, ORANGE, GREEN, VERMILION, SKY, PURPLE, GREY)  # and the foreground
CLASS_MARKERS = "o^sDvPX"
SEPARATE_POINTS = 2000  # with more classes, a point is the mean of neighbours
TITLE = 70  # as many letters as stand above a figure


def draw_positive_posterior(analysis: "Analysis") -> Any:
    """Draw the prediction's mean positive posterior of each class (equation 14 and figure 7 (a) and (d))."""
    figure, axes, classes_a_bar = _posterior_bars(analysis, analysis.posterior, "{:.2f}")
    axes.set_title(class_bars_title("Mean positive posterior of the prediction", classes_a_bar))
    axes.set(ylabel="mean probability\nof the true class", ylim=(0, 1))
    return figure


def draw_posterior_change(first: "Analysis", other: "Analysis") -> Any:
    """Draw how a run's mean positive posterior differs from another's, by class (figure 7 (b), (c) and (e)).

    Args:
        first: its training counts sort the classes.
        other: of another run with as many classes.
    """
    difference = other.posterior - first.posterior
    figure, axes, classes_a_bar = _posterior_bars(first, difference, "{:+.3f}")
    axes.axhline(0, color=foreground(), linewidth=0.8)
    heights = [1.08 * patch.get_height() for patch in axes.patches]
    # Runs that agree have a flat line, and not an axis of rounding errors.
    axes.set_ylim(min(-0.005, *heights), max(0.005, *heights))
    title = [shortened(other.title, TITLE), f"minus {shortened(first.title, TITLE)}"]
    axes.set_title("\n".join([*title, f"mean of {classes_a_bar} neighbours"][: 2 + (classes_a_bar > 1)]))
    axes.set_ylabel("difference of the mean\nprobability of the true class")
    return figure


def _posterior_bars(analysis: "Analysis", values: np.ndarray, form: str) -> tuple[Any, Any, int]:
    """Draw a bar for each class, and a line at each shot group's mean, which the legend says."""
    counts = analysis.counts
    groups, means = shot_groups(counts), mean_by_shot_group(values, counts)
    labels = {
        name: f"{name} ({number_of_classes(len(groups[name]), int(np.isfinite(values[groups[name]]).sum()))})"
        + ("" if mean is None else f": {form.format(mean)}".replace("-", "−"))
        for name, mean in means.items()
        if name != "all"
    }
    figure, axes = canvas(6.5, 3.8)
    classes_a_bar = class_bars(axes, values, counts, labels)
    name_classes(axes, counts, analysis.class_names)
    start, label = 0.5, "mean of the shot group"
    for name, classes in groups.items():
        mean = means[name]
        if mean is not None:
            span = [start, start + len(classes)]
            # Flat ends stay between the group's first and last bar.
            axes.plot(
                span, [mean, mean], color=foreground(), linewidth=1.6, label=label, path_effects=outline(3.2),
                solid_capstyle="butt",
            )  # fmt: skip
            label = "_"
        start += len(classes)
    handles, texts = axes.get_legend_handles_labels()
    bars_first = sorted(zip(handles, texts, strict=True), key=lambda entry: not hasattr(entry[0], "patches"))
    figure.legend(*zip(*bars_first, strict=True), loc="outside lower center", ncols=2)
    return figure, axes, classes_a_bar


def draw_accuracy_trend(analysis: "Analysis") -> Any:
    """Draw the prediction's accuracy on each class against its training images, and the line of `trend`."""
    counts = analysis.counts
    accuracy = with_nan(analysis.heads[PREDICTION].per_class)
    order = np.argsort(-counts, kind="stable")
    classes_a_point, edges_of = neighbours(counts)
    if len(counts) <= SEPARATE_POINTS:
        classes_a_point, edges_of = 1, {name: np.arange(e[0], e[-1] + 1) for name, e in edges_of.items()}
    figure, axes = canvas(6.0, 4.2)
    for name, edges in edges_of.items():
        classes = order[edges[0] : edges[-1]]
        measured = [part[~np.isnan(accuracy[part])] for part in np.split(classes, edges[1:-1] - edges[0])]
        points = [(10 ** np.log10(counts[part]).mean(), accuracy[part].mean()) for part in measured if len(part)]
        if points:
            axes.plot(
                *zip(*points, strict=True), "o", color=GROUP_COLORS[name], alpha=0.9, markeredgewidth=0,
                markersize=5.5 if len(counts) <= 200 or classes_a_point > 1 else 3.5, clip_on=False,
                label=f"{name} ({counted(sum(map(len, measured)), 'class')})",
            )  # fmt: skip
    least, most = counts.min() / 1.25, counts.max() * 1.25
    trend = analysis.trend
    if trend.slope is not None and trend.intercept is not None:
        ends = np.array([least, most])
        explained = "" if trend.r2 is None else f", $R^2$ = {trend.r2:.2f}"
        axes.plot(
            ends, trend.intercept + trend.slope * np.log10(ends), color=foreground(), linewidth=1.8,
            label=f"{trend.slope:+.1f} points per tenfold training images{explained}".replace("-", "−"),
        )  # fmt: skip
    axes.set_xscale("log")
    number_ticks(axes.xaxis, least, most, counts)
    axes.set(xlim=(least, most), ylim=(0, 100), xlabel="training images of the class (log)")
    axes.set(
        ylabel="top-1 accuracy, %",
        title=class_bars_title("Accuracy of a class by its training images", classes_a_point),
    )
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def draw_embedding(analysis: "Analysis") -> Any:
    """Draw the features of some classes in the plane, a panel for each kind of features (figure 8)."""
    shown, counts = analysis.embedding, analysis.class_counts
    labels, names = np.array(shown.labels), analysis.class_names
    classes = sorted(shown.classes, key=lambda label: -counts[label])
    colors = (*CLASS_COLORS, foreground())
    columns = min(4, len(classes)) if names is None else min(3, len(classes))
    panels = len(shown.points)
    width = 6.5 if panels > 1 else 5.0
    rows = -(-len(classes) // columns)
    figure, axes = canvas(width, 3.2 * (1.25 if panels == 1 else 1) + 0.18 * rows, columns=panels)
    for place, (panel, (features, points)) in enumerate(zip(np.atleast_1d(axes), shown.points.items(), strict=True)):
        plane = np.array(points)
        for i, label in enumerate(classes):
            x, y = plane[labels == label].T
            name = str(label) if names is None else shortened(names[label])
            marker, color = CLASS_MARKERS[i % len(CLASS_MARKERS)], colors[i % len(colors)]
            face, edge = (color, background()) if i < len(colors) else (background(), color)
            panel.plot(
                x, y, marker, color=face, markersize=5.4 if marker in "PX" else 4.2,
                markeredgecolor=edge, markeredgewidth=0.35 if i < len(colors) else 1.0,
                label=f"{name} ({counts[label]:,})" if place == 0 else None,
            )  # fmt: skip
        # Distances mean the same in both directions, and nothing more: no ticks.
        panel.set(title=features, xticks=[], yticks=[], aspect="equal", adjustable="datalim")
        panel.spines[["top", "right"]].set_visible(True)
        panel.margins(0.06)
    legend = figure.legend(
        loc="outside lower center", ncols=columns, title="class (training images)", columnspacing=1.2, handletextpad=0.2
    )
    for handle in legend.legend_handles:
        handle.set_markersize(6)
    return figure
