"""The figures of an analysis: tables 5 and 6 and figures 7 and 8 of the paper, and where errors and confidence lie.

Those of single classes, their posterior, accuracy and features, come last.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from mbib_timm.analysis.measures import GROUPS, mean_by_shot_group
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
    text_on,
)
from mbib_timm.files import counted
from mbib_timm.models.complexity import TABLE_6_SIZE, Cost
from mbib_timm.models.head_outputs import PREDICTION, heads_of_expert
from mbib_timm.models.zoo import data_set_of
from mbib_timm.results.paper import TABLE_5, TABLE_5_EPOCHS, TABLE_6
from mbib_timm.results.run_figures import (
    HEAD_COLORS,
    class_bars,
    class_bars_title,
    drawn_heads,
    head_colors,
    name_classes,
    neighbours,
    number_of_classes,
    number_ticks,
    shortened,
    with_nan,
)

if TYPE_CHECKING:
    from mbib_timm.analysis.analysis_record import Analysis

# The two distances within classes and the two between them, as titles say them.
WITHIN = {"centre": r"$D_{intra}$ from the class centre", "pairs": r"$D_{intra}$ over pairs (eq. 15)"}
BETWEEN = {"inter": r"$D_{inter}$ over all classes", "inter_within": r"$D_{inter}$ within the shot group"}
SURE_IMAGES = 10  # fewer in a bin say little of its accuracy
# Eight colours and seven shapes, counted up together, filled in the first round of colours and hollow after it.
CLASS_COLORS = (BLUE, ORANGE, GREEN, VERMILION, SKY, PURPLE, GREY)  # and the foreground
CLASS_MARKERS = "o^sDvPX"
SEPARATE_POINTS = 2000  # with more classes, a point is the mean of neighbours
TITLE = 70  # as many letters as stand above a figure


def draw_distances(analysis: "Analysis") -> Any:
    """Draw rho, the ratio of intra- to inter-class distance, by shot group (equation 17 and Table 5), by all readings.

    The paper's numbers stand beside every reading: none fits all of its rows.
    """
    # The paper's numbers are for the whole schedule, and for its data.
    is_papers = analysis.epochs == TABLE_5_EPOCHS and data_set_of(
        analysis.name, analysis.class_counts, analysis.class_names
    )
    published = TABLE_5.get(analysis.name, {}) if is_papers else {}
    figure, panels = canvas(9.6, 6.4, columns=2, rows=2)
    readings = [(intra, inter) for inter in BETWEEN for intra in WITHIN]
    highest = max(
        _draw_rho(axes, analysis, intra, inter, published)
        for axes, (intra, inter) in zip(panels.flat, readings, strict=True)
    )
    for axes, (intra, inter) in zip(panels.flat, readings, strict=True):
        axes.set_xticks(range(len(GROUPS)), GROUPS)
        axes.grid(axis="x", visible=False)
        axes.set(title=f"{WITHIN[intra]}, {BETWEEN[inter]}", ylim=(0, 1.12 * highest or 1))
    for axes in panels[:, 0]:
        axes.set_ylabel(r"$\rho$ = $D_{intra}$ / $D_{inter}$")
    first = panels[0, 0]
    if published:
        first.plot([], [], "D", color=foreground(), markerfacecolor=background(), markersize=5, label="paper (Table 5)")
    _legend_bars_first(figure, first, columns=3)
    return figure


def _legend_bars_first(figure: Any, axes: Any, columns: int) -> None:
    """Add a legend of what is drawn on the axes, bars before lines and points."""
    entries = zip(*axes.get_legend_handles_labels(), strict=True)
    bars_first = sorted(entries, key=lambda entry: not hasattr(entry[0], "patches"))
    figure.legend(*zip(*bars_first, strict=True), loc="outside lower center", ncols=columns)


def _draw_rho(
    axes: Any, analysis: "Analysis", intra: str, inter: str, published: Mapping[str, Mapping[str, float]]
) -> float:
    """Draw rho by one of its readings, and the paper's diamonds; return the highest of all."""
    features, colors = analysis.distances, head_colors(analysis.heads)
    share = 0.8 / max(2, len(features))
    highest = 0.0
    for i, (name, groups) in enumerate(features.items()):
        for place, group in enumerate(GROUPS):
            at = place + (i - (len(features) - 1) / 2) * share
            rho, number = groups[group].rho(intra, inter), published.get(name, {}).get(group)
            color = colors.get(name, HEAD_COLORS[i % len(HEAD_COLORS)])
            axes.bar(at, rho or 0.0, share * 0.92, color=color, label=name if place == 0 else None)
            # The paper's diamond stands to the right of the number, so that neither covers the other.
            shift = -0.12 * share if published else 0.0
            text = "–" if rho is None else f"{rho:.2f}"
            axes.annotate(
                text, (at + shift, rho or 0.0), (0, 2), textcoords="offset points", ha="center", path_effects=outline()
            )
            if number is not None:
                axes.plot(
                    at + 0.37 * share, number, "D", color=foreground(), markerfacecolor=background(), markersize=5
                )
            highest = max(highest, rho or 0.0, number or 0.0)
    return highest


def draw_reliability(analysis: "Analysis") -> Any:
    """Draw accuracy against confidence in bins (Guo et al. 2017), and how many images lie in each bin."""
    heads = analysis.reliability
    predicting = analysis.prediction_heads
    parts = [
        name
        for name in drawn_heads(name for name in heads if name != "prediction")
        if name in predicting or heads_of_expert(name, predicting)
    ]
    shown, colors = ["prediction", *parts], head_colors(heads)
    figure, (curve, images) = canvas(5.2, 6.2, rows=2)
    curve.get_gridspec().set_height_ratios([3, 1])
    points_on_top = dict(markersize=4.5, clip_on=False, zorder=3)
    if any(0 < number < SURE_IMAGES for name in shown for number in heads[name].images):
        curve.plot([], [], "o", color=GREY, markerfacecolor=background(), label=f"fewer than {SURE_IMAGES} images")
    curve.plot([0, 100], [0, 100], "--", color=GREY, label="perfectly calibrated")
    for name in reversed(shown):  # the prediction on top
        bins = heads[name]
        color = foreground() if name == "prediction" else colors[name]
        points = zip(bins.confidence, bins.accuracy, bins.images, strict=True)
        confidence, accuracy, number = np.array([point for point in points if point[2]]).T
        curve.plot(
            confidence, accuracy, color=color, marker="o", label=f"{name}: ECE {bins.ece:.1f} %", **points_on_top
        )
        few = number < SURE_IMAGES
        if few.any():
            curve.plot(confidence[few], accuracy[few], "o", color=color, markerfacecolor=background(), **points_on_top)
        share = 100.0 * np.array(bins.images) / sum(bins.images)
        edges = np.linspace(0, 100, len(share) + 1)
        if name == "prediction":
            images.stairs(share, edges, color=color, fill=True, alpha=0.25, zorder=1.5)
        images.stairs(share, edges, color=color, linewidth=1.5, zorder=2)
    for axes in (curve, images):
        axes.set(xlim=(0, 100), xticks=range(0, 101, 20))
    curve.tick_params(labelbottom=False)
    curve.set(ylim=(0, 100), yticks=range(0, 101, 20), ylabel="accuracy, %", title="Accuracy by confidence")
    images.set(ylabel="images, %", xlabel="confidence of the predicted class, %")
    handles, labels = curve.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=2)
    return figure


def draw_confusion(analysis: "Analysis") -> Any:
    """Draw which shot groups each shot group's images are taken for, beside the same errors spread evenly."""
    content = analysis.confusion
    colors = {"correct": GREY, **{f"wrong_to_{group}": color for group, color in GROUP_COLORS.items()}}
    faded = {name: _faded(color) for name, color in colors.items()}
    figure, axes = canvas(6.5, 3.9)
    places, texts = [], []
    for row, group in enumerate(content.shares):
        shares, even, images = content.shares[group], content.even[group], content.images[group]
        number = sum(images.values())
        places += [row, row + 0.43]
        texts += [f"{group}\n{counted(number, 'image')}", "" if shares is None else "errors spread evenly"]
        if shares is None or even is None:
            axes.text(1, row, "no images", color=GREY, va="center")
            continue
        _stacked(axes, row, 0.5, shares, colors)
        _stacked(axes, row + 0.43, 0.22, even, faded)
    axes.set_yticks(places, texts)
    for label in axes.get_yticklabels()[1::2]:
        label.set(fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.set(
        xlim=(0, 100),
        ylim=(len(content.shares) - 0.25, -0.42),
        xlabel="share of a class's images, mean over the group's classes, %",
    )
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", visible=False)
    axes.set_title("Where the prediction's errors go")
    bars = [axes.barh(0, 0, color=color) for color in colors.values()]
    names = ["correct", "wrong: to many", "to medium", "to few"]
    figure.legend(bars, names, loc="outside lower center", ncols=4, columnspacing=1.5)
    return figure


def _stacked(axes: Any, place: float, height: float, shares: Mapping[str, float], colors: Mapping[str, str]) -> None:
    wide = height > 0.3
    start = 0.0
    for name, share in shares.items():
        axes.barh(place, share, height, left=start, color=colors[name], edgecolor=background(), linewidth=0.8)
        # Shorter bars have no room for their number; the correct ones are those of the wide bar.
        if share >= 5 and (wide or name != "correct"):
            axes.text(
                start + share / 2, place, f"{share:.1f}", ha="center", va="center_baseline",
                color=text_on(colors[name]), fontsize=9 if wide else 7,
            )  # fmt: skip
        start += share


def _faded(color: str) -> str:
    """Return a colour half way to paper: not transparent, which would show the grid behind it."""
    from matplotlib.colors import to_hex, to_rgb

    return str(to_hex((np.array(to_rgb(color)) + to_rgb(background())) / 2))


def draw_costs(analysis: "Analysis") -> Any:
    """Draw parameters and operations of one image's forward pass beside the paper's (Table 6)."""
    content = analysis.efficiency
    size = "×".join(map(str, content.input_size))
    ours = {"this model, inference": content.inference, "this model, all heads": content.all_heads}
    if content.inference == content.all_heads:
        ours = {"this model": content.inference}
    # Of another network, or for images of another size than Table 6's, the paper has no costs.
    comparable = tuple(content.input_size[1:]) == TABLE_6_SIZE
    papers = {f"{name}, paper": Cost(**values) for name, values in TABLE_6.items()} if comparable else {}
    quantities = {
        "parameters, thousands": {name: cost.parameters / 1e3 for name, cost in {**ours, **papers}.items()},
        "multiply-accumulates (MACs), billions": {name: cost.macs / 1e9 for name, cost in {**ours, **papers}.items()},
    }
    heights = [len(bars) for bars in quantities.values()]
    figure, panels = canvas(6.0, 1.4 + 0.22 * sum(heights), rows=2)
    panels[0].get_gridspec().set_height_ratios(heights)
    for axes, (label, bars) in zip(panels, quantities.items(), strict=True):
        for place, (name, value) in enumerate(bars.items()):
            color = GREY if name in papers else (BLUE, SKY)[place]
            axes.barh(place, value, 0.75, color=color)
            axes.annotate(
                f"{value:,.2f}", (value, place), (3, 0), textcoords="offset points", va="center", path_effects=outline()
            )
        axes.set_yticks(range(len(bars)), bars)
        axes.set(ylim=(len(bars) - 0.4, -0.6), xlim=(0, 1.18 * max(bars.values())), xlabel=label)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
    panels[0].set_title(f"Costs of one image of {size}")
    return figure


def draw_positive_posterior(analysis: "Analysis") -> Any:
    """Draw the prediction's mean positive posterior of each class (equation 14 and figure 7 (a) and (d))."""
    figure, axes, classes_a_bar = _posterior_bars(analysis, analysis.posterior, "{:.2f}")
    axes.set_title(class_bars_title("Mean positive posterior of the prediction", classes_a_bar))
    axes.set(ylabel="mean probability\nof the true class", ylim=(0, 1))
    return figure


def draw_posterior_change(first: "Analysis", other: "Analysis") -> Any:
    """Draw how a run's mean positive posterior differs from the first one's, by class (figure 7 (b), (c) and (e)).

    Classes are in the order of the first run's training counts.
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
    _legend_bars_first(figure, axes, columns=2)
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
