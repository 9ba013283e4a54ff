"""The figures of a run: training curves, accuracy by class, accuracy by shot group."""

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

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
    YELLOW,
    Illustration,
    canvas,
    figure_text,
    foreground,
    render,
)
from mbib_timm.errors import first_line
from mbib_timm.files import counted, write_bytes
from mbib_timm.models.head_outputs import POOLED, PREDICTION, heads_of_expert, labelled_heads
from mbib_timm.results.columns import FEW_IMAGES, MODEL_COLUMNS, macro_is_overall
from mbib_timm.results.record import Epoch, HeadMetrics, RunRecord, is_averaged

HEAD_COLORS = (SKY, ORANGE, GREEN, PURPLE, BLUE, VERMILION, YELLOW, GREY)
NAMED_CLASSES = 30  # as many names as can be read side by side
BARS = 150  # as many bars as can be told apart
# Of single runs behind their mean; and which weights a curve is of.
THIN: dict[str, Any] = {"linewidth": 0.7, "alpha": 0.45}
AVERAGE, RAW = "moving average of the weights", "raw weights"


def draw_figures(folder: Path, history: Sequence[Epoch], record: RunRecord) -> None:
    """Draw a run's figures under ``figures/``; says so where one cannot be drawn: the numbers are there without it."""
    target = folder / "figures"
    for illustration in run_figures(history, record):
        try:
            target.mkdir(exist_ok=True)
            write_bytes(target / f"{illustration.name}.png", render(illustration.draw)["png"])
        except Exception as error:  # matplotlib's are of many kinds
            print(f"no figure {illustration.name}.png: {first_line(error)}")


def run_figures(
    history: Sequence[Epoch], record: RunRecord, others: Sequence[Sequence[Epoch]] = ()
) -> list[Illustration]:
    """Return the figures of a run: curves where there is a history, with those of others that differ in the seed."""
    heads, counts = record.result.heads, np.array(record.class_counts)
    others = [each for each in others if each]
    seeds = f" Thin lines are the {1 + len(others)} seeds, and thick ones their mean." if others else ""
    weights = f" Accuracies are of the {AVERAGE}, but for the line of the raw weights." * is_averaged(history)
    curves = Illustration(
        "training_curves",
        "Training",
        "Left: training loss and learning rate. Right: the accuracy of each shot group on the evaluated split; that of "
        f"the last epoch is reported.{weights}{seeds}",
        lambda: training_curves(history, *others),
    )
    return [
        *([curves] if history else []),
        Illustration(
            "class_accuracy",
            "Accuracy by class",
            "Each bar is a class, from the most to the fewest training images (the line): the less the bars fall from "
            "left to right, the better the tail is learnt.",
            lambda: class_accuracy(heads, counts, record.class_names),
        ),
        Illustration(
            "shot_groups",
            "Accuracy by head and shot group",
            "Each colour is a head of the network; the prediction, in the colour of the text, is the model's answer. "
            "Overall is over images, the others are means over classes; in a balanced model, the groups are equally "
            "high.",
            lambda: shot_groups_figure(heads),
        ),
    ]


def _second_axis(axes: Any, label: str, color: str) -> Any:
    second = axes.twinx()
    second.set_ylabel(label, color=color)
    second.spines["right"].set_visible(True)
    second.grid(False)
    return second


def training_curves(history: Sequence[Epoch], *others: Sequence[Epoch]) -> Any:
    """Draw loss, learning rate and accuracy over the epochs; of several runs each, and their mean.

    Where the weights have a moving average, the accuracies are its, and one line is the raw weights' overall accuracy.

    Args:
        history: the run's epochs, at least one.
        others: those of runs that differ in the seed alone, whose learning rates are the same.
    """
    histories = [history, *others]
    epochs = [row.epoch for row in history]
    rates = [row.lr for row in history]
    evaluated = [[(row.epoch, row.val) for row in each if row.val is not None] for each in histories]
    raw = [[(row.epoch, row.raw) for row in each if row.raw is not None] for each in histories]
    figure, (left, right) = canvas(9.5, 3.5, columns=2)
    for axes in (left, right):
        # Half an epoch of room at each end, so that a single epoch has a width too.
        axes.set(xlabel="epoch", xlim=(epochs[0] - 0.5, epochs[-1] + 0.5))
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)

    losses = [[(float(row.epoch), row.losses["loss"]) for row in each] for each in histories]
    plot_runs(left, losses, color=foreground())
    highest = max(value for run in losses for _, value in run)
    left.set(ylabel="training loss", ylim=(0, 1.05 * highest or 1), title="Training loss and learning rate")
    rate = _second_axis(left, "learning rate (dashed)", ORANGE)
    # An epoch's rate holds from half an epoch before its number to half an epoch after it.
    rate.stairs(rates, [epochs[0] - 0.5, *(e + 0.5 for e in epochs)], baseline=None, color=ORANGE, linestyle="--")
    # Schedules span decades; one that hardly moves, or reaches 0, reads better on a linear axis.
    if 0 < 10 * min(rates) <= max(rates):
        rate.set_yscale("log")
    else:
        rate.set_ylim(0, 1.05 * max(rates) or 1)

    of_average = f"\n({AVERAGE})" if any(raw) else ""
    right.set(ylabel="top-1 accuracy, %", ylim=(0, 100), title=f"Accuracy by shot group{of_average}")
    labels = {name: name for name in GROUP_COLORS} | {"top1": "overall"}
    if not macro_is_overall((values["top1"], values.get("macro")) for run in evaluated for _, values in run):
        labels["macro"] = "macro"
    for name, label in labels.items():
        style: dict[str, Any] = {
            "color": GROUP_COLORS.get(name, foreground()),
            "linestyle": ":" if name == "macro" else "-",
        }
        plot_runs(right, [_points(run, name) for run in evaluated], label=label, clip_on=False, **style)
    plot_runs(right, [_points(run, "top1") for run in raw], label=f"overall,\n{RAW}", color=GREY, linestyle="-.")
    if any(evaluated):
        right.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    else:
        right.text(0.5, 0.5, "not evaluated", ha="center", color=GREY, transform=right.transAxes)
    return figure


def _points(rows: Sequence[tuple[int, Mapping[str, float | None]]], name: str) -> list[tuple[float, float]]:
    return [(float(epoch), value) for epoch, values in rows if (value := values.get(name)) is not None]


def plot_runs(
    axes: Any, runs: Sequence[Sequence[tuple[float, float]]], label: str | None = None, marked: int = 1, **look: Any
) -> None:
    """Draw a line for a run; for several a thin one for each, and a thick one for their mean.

    Args:
        axes: to draw in.
        runs: points of each; a run without any is left out.
        label: of the line, or of the mean.
        marked: points up to which a line shows each of them.
        look: of all lines.
    """
    runs = [run for run in runs if run]
    if len(runs) > 1:
        for run in runs:
            axes.plot(*zip(*run, strict=True), **look, **THIN)
        runs = [_mean_points(runs)]
    for points in filter(None, runs):
        axes.plot(*zip(*points, strict=True), **look, label=label, marker="o" if len(points) <= marked else None)


def _mean_points(runs: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Return the mean of several runs at each place along x that all of them have."""
    values = [dict(run) for run in runs]
    shared = sorted(set(values[0]).intersection(*values[1:]))
    return [(place, statistics.mean(each[place] for each in values)) for place in shared]


def with_nan(values: Sequence[float | None]) -> np.ndarray:
    """Return numbers as an array, with nan for what could not be measured."""
    return np.array([np.nan if value is None else value for value in values])


def class_accuracy(
    results: Mapping[str, HeadMetrics],
    class_counts: np.ndarray,
    class_names: Sequence[str] | None = None,
) -> Any:
    """Draw the prediction's accuracy on each class, over the classes sorted by their training images.

    Where there are too many classes to tell their bars apart, a bar is the mean of neighbours in one shot group.

    Args:
        results: metrics by head.
        class_counts: training images of each class, (K,).
        class_names: labels of the classes, shown where they fit.
    """
    accuracy = with_nan(results["prediction"].per_class)
    figure, axes = canvas(9, 3.8)
    labels = {
        name: f"{name} ({number_of_classes(len(classes), int(np.isfinite(accuracy[classes]).sum()))})"
        for name, classes in shot_groups(class_counts).items()
    }
    images = results["prediction"].class_images
    classes_a_bar = class_bars(axes, accuracy, class_counts, labels, np.array(images) if images else None)
    axes.set(title=class_bars_title("Accuracy of the prediction by class", classes_a_bar))
    axes.set(ylabel="top-1 accuracy, %", ylim=(0, 100))
    order = name_classes(axes, class_counts, class_names)
    places = np.arange(1, len(order) + 1)

    counts = _second_axis(axes, "training images per class (line)", foreground())
    counts.plot(
        places, class_counts[order], color=foreground(), linewidth=1.2, marker="." if len(order) <= 30 else None
    )
    if class_counts.min() < class_counts.max():
        counts.set_yscale("log")
        least, most = counts.get_ylim()
        number_ticks(counts.yaxis, least, most, class_counts)
    else:
        counts.set_ylim(0, 1.25 * class_counts.max())
    figure.legend(loc="outside lower center", ncols=4)
    return figure


def number_ticks(axis: Any, least: float, most: float, class_counts: np.ndarray) -> None:
    """Set the ticks of a logarithmic axis of training images: as few as can be read, at round numbers.

    Args:
        axis: to set.
        least: where the axis begins, above 0.
        most: where it ends.
        class_counts: training images of each class, (K,), whose ends are the ticks where there are no two round ones.
    """
    ticks = [step * 10**power for power in range(8) for step in ((1, 2, 5) if most < 5000 * least else (1,))]
    within = [tick for tick in ticks if least <= tick <= most]
    axis.set_ticks(within if len(within) > 1 else np.unique([class_counts.min(), class_counts.max()]))
    axis.set_ticks([], minor=True)
    axis.set_major_formatter("{x:,.0f}")


def number_of_classes(trained: int, evaluated: int) -> str:
    """Return in words how many classes of a group were trained on, and evaluated where that is not all of them."""
    of = f"{evaluated} of " if evaluated != trained else ""
    return f"{of}{trained} class{'es' * (trained != 1)}{' evaluated' * bool(of)}"


def class_bars(
    axes: Any,
    values: np.ndarray,
    class_counts: np.ndarray,
    labels: Mapping[str, str],
    images: np.ndarray | None = None,
) -> int:
    """Draw a quantity of classes as bars, sorted by their training images and coloured by shot group.

    Where there are too many classes to tell their bars apart, a bar is the mean of neighbours in one shot group.

    Args:
        axes: where to draw.
        values: (K,); nan for classes without images, which get a cross instead.
        class_counts: training images of each class, (K,).
        labels: what the legend says of each shot group.
        images: that each class's value is of, (K,): a bar of one class is hollow where they are few. None for no
            difference.

    Returns:
        How many classes a bar stands for.
    """
    order = np.argsort(-class_counts, kind="stable")
    sorted_values = values[order]
    classes_a_bar, edges_of = neighbours(class_counts)
    few = np.zeros(len(order), dtype=bool)
    if images is not None and classes_a_bar == 1:
        few = (images[order] < FEW_IMAGES) & (images[order] > 0)
    for name, edges in edges_of.items():
        bars = [_mean(sorted_values[a:b]) for a, b in pairwise(edges)]
        gap = 0.2 if classes_a_bar == 1 else 0.0
        drawn = axes.bar(
            edges[:-1] + 0.5 + gap / 2, bars, np.diff(edges) - gap, align="edge", color=GROUP_COLORS[name],
            label=labels[name],
        )  # fmt: skip
        for bar, place in zip(drawn, edges[:-1], strict=True):
            if few[place]:
                bar.set(facecolor="none", edgecolor=GROUP_COLORS[name], linewidth=1.5)
    if few.any():
        axes.bar(np.nan, np.nan, facecolor="none", edgecolor=GREY, label=f"hollow: fewer than {FEW_IMAGES} images")
    unseen = np.flatnonzero(np.isnan(sorted_values)) + 1
    if len(unseen):
        axes.plot(unseen, np.zeros(len(unseen)), "x", color=GREY, label="no test images", clip_on=False)
    return classes_a_bar


def neighbours(class_counts: np.ndarray) -> tuple[int, dict[str, np.ndarray]]:
    """Divide the classes, sorted by their training images, into as many bars as can be told apart.

    Args:
        class_counts: training images of each class, (K,).

    Returns:
        How many neighbours a bar holds, and of each shot group that has classes the edges of its bars in 0..K.
    """
    classes_a_bar = -(-len(class_counts) // BARS)
    edges_of: dict[str, np.ndarray] = {}
    first = 0
    for name, classes in shot_groups(class_counts).items():
        # The groups follow one another in the sorted order.
        last = first + len(classes)
        if len(classes):
            edges_of[name] = np.append(np.arange(first, last, classes_a_bar), last)
        first = last
    return classes_a_bar, edges_of


def class_bars_title(title: str, classes_a_bar: int) -> str:
    """Return a title that says what a bar of `class_bars` is the mean of."""
    return title if classes_a_bar == 1 else f"{title}, mean of {classes_a_bar} neighbours"


def name_classes(axes: Any, class_counts: np.ndarray, class_names: Sequence[str] | None) -> np.ndarray:
    """Name the classes below the bars of `class_bars` where they fit, and number them where they do not.

    Args:
        axes: with a bar at 1..K.
        class_counts: training images of each class, (K,).
        class_names: labels of the classes; None for numbers.

    Returns:
        The classes in the order of the bars, (K,).
    """
    order = np.argsort(-class_counts, kind="stable")
    axes.set_xlim(0.3, len(order) + 0.7)
    axes.grid(axis="x", visible=False)
    if class_names is not None and len(order) <= NAMED_CLASSES:
        axes.set_xlabel("class, from most to fewest training images")
        names = [shortened(class_names[i]) for i in order]
        axes.set_xticks(range(1, len(order) + 1), names)
        if max(map(len, names)) > 3:
            axes.tick_params(axis="x", labelrotation=45)
            for label in axes.get_xticklabels():
                label.set(ha="right", rotation_mode="anchor")
    else:
        axes.set_xlabel("rank of the class, from most to fewest training images")
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    return order


def drawn_heads(names: Iterable[str]) -> list[str]:
    """Return the heads that a figure has room for: of experts with several heads each, the experts alone."""
    names = list(names)
    if len(names) <= len(HEAD_COLORS):
        return names
    of_experts = {head for name in names for head in heads_of_expert(name, names)}
    return [name for name in names if name not in of_experts]


def head_colors(names: Iterable[str]) -> dict[str, str]:
    """Return the colours of the heads of `drawn_heads`, and of `POOLED`, the features that the last map's head sees."""
    heads = drawn_heads(name for name in names if name != PREDICTION)
    colors = {name: HEAD_COLORS[place % len(HEAD_COLORS)] for place, name in enumerate(heads)}
    of_maps = [color for name, color in colors.items() if re.fullmatch(rf"{POOLED}\d+", name)]
    return {**colors, POOLED: of_maps[-1] if of_maps else HEAD_COLORS[0]}


def shot_groups_figure(results: Mapping[str, HeadMetrics]) -> Any:
    """Draw the accuracy of the heads, see `drawn_heads`, on all classes and on each shot group."""
    columns = {name: column.metric for name, column in MODEL_COLUMNS.items() if column.kind == "accuracy"}
    if macro_is_overall((each.top1, each.macro) for each in results.values()):
        del columns["macro"]
    labels_of = labelled_heads(results)
    heads = [*drawn_heads(name for name in results if name != "prediction"), "prediction"]
    colors = head_colors(results)
    bar = 0.84 / len(heads)
    # A number over each bar takes almost a third of an inch.
    figure, axes = canvas(max(6.0, 1.5 + 1.7 * len(heads)), 3.8)
    for i, head in enumerate(heads):
        color = foreground() if head == "prediction" else colors[head]
        for place, metric in enumerate(columns.values()):
            value = getattr(results[head], metric)
            x = place + (i - (len(heads) - 1) / 2) * bar
            axes.bar(x, value or 0.0, bar * 0.92, color=color, label=labels_of[head] if place == 0 else None)
            number = "–" if value is None else f"{value:.1f}".replace("100.0", "100")
            axes.annotate(
                number, (x, value or 0.0), (0, 1), textcoords="offset points", ha="center", va="bottom", fontsize=7
            )
    prediction = results["prediction"]
    trained = prediction.classes | {"macro": sum(prediction.classes.values())}
    evaluated = {name: number for name, (_, number) in prediction.measured.items()} or trained
    evaluated["macro"] = evaluated.get("overall", trained["macro"])
    numbers = {name: number_of_classes(trained[name], evaluated.get(name, 0)) for name in trained}
    numbers["overall"] = counted(prediction.images, "image")
    labels = [f"{name}\n{numbers[name]}".replace(" evaluated", "\nevaluated") for name in columns]
    axes.set_xticks(range(len(columns)), labels)
    axes.grid(axis="x", visible=False)
    axes.set(ylabel="top-1 accuracy, %", ylim=(0, 105), yticks=range(0, 101, 20))
    axes.set_title("Accuracy by shot group and head" if len(heads) > 1 else "Accuracy by shot group")
    if len(heads) > 1:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), title="head")
    return figure


def _mean(accuracy: np.ndarray) -> float:
    measured = accuracy[~np.isnan(accuracy)]
    return float(measured.mean()) if len(measured) else 0.0


def shortened(name: str, longest: int = 20) -> str:
    """Return a name for a figure, cut where it is too long; see `figure_text`."""
    return figure_text(name if len(name) <= longest else f"{name[: longest - 1]}…")
