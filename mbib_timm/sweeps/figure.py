"""A sweep's figure in the paper's form: bars, lines over a parameter, or a heat map of two."""

import statistics
import textwrap
from collections.abc import Sequence
from typing import Any

from mbib_timm.drawing import CYCLE, HATCHES, LINE_STYLES, METHOD_COLORS, background, canvas, ink, text_on
from mbib_timm.evaluation.table import COLUMNS
from mbib_timm.methods import method_title
from mbib_timm.sweeps.definition import GROUP, HEAD
from mbib_timm.sweeps.results import Cell, SweepResults, cells, short_headline

ACCURACY = "top-1 accuracy, %"
PAPER = "the paper"


def sweep_figure(results: SweepResults) -> Any:
    """Draw the mean accuracy of every configuration, with the standard deviation where there are several seeds.

    Args:
        results: of one finished run or more.
    """
    draw = {"bars": _bars, "lines": _lines, "heatmap": _heatmap}[results.figure["kind"]]
    figure, axes = draw(results, cells(results))
    axes.set_title(_wrapped(short_headline(results), int(10 * figure.get_figwidth())))
    return figure


def _bars(results: SweepResults, rows: Sequence[Cell]) -> tuple[Any, Any]:
    """Groups of bars along x, coloured by an axis, or by all that x does not tell."""
    x = results.figure.get("x")
    by = results.figure.get("color")
    bars: dict[tuple[str, str], tuple[Sequence[float | None], float | None]] = {}
    for row in rows:
        colored = [by] if by else []
        others = [axis for axis in row.coordinates if axis not in (x, by)]
        # Where x is not said, the axes that have no colour are along it.
        name = _joined(row, colored if by and not x else [*colored, *others])
        if x == GROUP:
            for column in COLUMNS:
                bars["all" if column == "overall" else column, name] = row.values[column], row.paper.get(column)
        else:
            place = _joined(row, [x] if x else others if by else [])
            bars[place, name] = row.values["overall"], row.paper.get("overall")
    places, names = (list(dict.fromkeys(key[i] for key in bars)) for i in (0, 1))
    colors, hatches = _colors(names), _hatches(names)
    if names == [""]:  # all of one kind: variants of the base recipe's method
        methods = {run["method"] for run in results.runs}
        colors[""] = METHOD_COLORS.get(method_title(methods.pop()), colors[""]) if len(methods) == 1 else colors[""]
    # Bars of one kind beside one another have the colour of the method that each place names, if it names one.
    look = {(place, name): colors[name] if name else METHOD_COLORS.get(place, colors[name]) for place, name in bars}
    longest = max(len(place) for place in places)
    # A number over each bar takes a third of an inch, a label of several words an inch; what is wider than a page is
    # read on none.
    wide = max(0.36 * len(bars), min(longest / 10, 1.0) * len(places))
    figure, axes = canvas(min(10.0, max(6.0, 2.5 + wide)), 4.0)
    share = 0.84 / len(names)
    legend: dict[str, Any] = {}
    mark = dict(marker="D", linestyle="", color=ink(), markerfacecolor=background(), markersize=4.5)
    for (place, name), (values, number) in bars.items():
        measured = [value for value in values if value is not None]
        if not measured:
            continue
        at = places.index(place) + (names.index(name) - (len(names) - 1) / 2) * share
        mean = statistics.mean(measured)
        deviation = statistics.stdev(measured) if len(measured) > 1 else None
        legend[name] = axes.bar(
            at, mean, share * 0.9, color=look[place, name], hatch=hatches[name], edgecolor=background(), linewidth=0,
            yerr=deviation, ecolor=ink(), capsize=2,
        )  # fmt: skip
        marked = number if results.is_papers else None
        if marked is not None:
            (legend[PAPER],) = axes.plot(at, marked, **mark)
        write_number(axes, at, mean, deviation or 0.0, marked, look[place, name])
    characters = int((figure.get_figwidth() - 2.0) / len(places) / 0.09)
    axes.set_xticks(range(len(places)), [_wrapped(place, characters) for place in places])
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="x", visible=False)
    axes.set(ylabel=ACCURACY, xlabel=_label(results, x) if x else "")
    axes.margins(y=0.12)
    # The paper's mark comes last; a single kind of bars without a name needs no legend.
    shown = {name: legend[name] for name in (*names, PAPER) if name and name in legend}
    if shown:
        title = _label(results, by) if by else None
        axes.legend(shown.values(), shown.keys(), loc="upper left", bbox_to_anchor=(1.0, 1.0), title=title)
    return figure, axes


def _lines(results: SweepResults, rows: Sequence[Cell]) -> tuple[Any, Any]:
    """Accuracy over a number; an axis each for colour and line style."""
    x, by, style = (results.figure.get(role) for role in ("x", "color", "style"))
    assert x is not None
    figure, axes = canvas(6.5, 4.2)
    colored = results.axes.get(by or "", [""])
    styled = results.axes.get(style or "", [""])
    colors = _colors([method_title(value) for value in colored])
    for value in colored:
        for kind, line in zip(styled, LINE_STYLES * len(styled), strict=False):
            chosen = [
                row
                for row in rows
                if (not by or row.coordinates[by] == value) and (not style or row.coordinates[style] == kind)
            ]
            points = [
                (float(row.coordinates[x]), [v for v in row.values["overall"] if v is not None]) for row in chosen
            ]
            points = [(at, values) for at, values in sorted(points) if values]
            if not points:
                continue
            label = ", ".join(
                f"{_label(results, axis)} {method_title(name)}" if axis != "method" else method_title(name)
                for axis, name in ((style, kind), (by, value))
                if axis
            )
            axes.errorbar(
                [at for at, _ in points],
                [statistics.mean(values) for _, values in points],
                yerr=[statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in points],
                color=colors[method_title(value)], linestyle=line, marker="o", markersize=4, capsize=2, label=label,
            )  # fmt: skip
    axes.set(xlabel=_label(results, x), ylabel=ACCURACY)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure, axes


def _heatmap(results: SweepResults, rows: Sequence[Cell]) -> tuple[Any, Any]:
    """The accuracy over two numbers, written into the map."""
    import numpy as np

    x, y = results.figure["x"], results.figure["y"]
    grid = np.full((len(results.axes[y]), len(results.axes[x])), np.nan)
    for row in rows:
        measured = [value for value in row.values["overall"] if value is not None]
        place = results.axes[y].index(row.coordinates[y]), results.axes[x].index(row.coordinates[x])
        grid[place] = statistics.mean(measured) if measured else np.nan
    figure, axes = canvas(1.8 + 0.85 * grid.shape[1], 1.2 + 0.65 * grid.shape[0])
    image = axes.imshow(grid, cmap="cividis", origin="lower", aspect="auto")
    low, high = np.nanmin(grid), np.nanmax(grid)
    for (i, j), value in np.ndenumerate(grid):
        if not np.isnan(value):
            dark = (value - low) / (high - low or 1.0) < 0.5
            axes.text(j, i, f"{value:.1f}", ha="center", va="center", color="white" if dark else "black")
    axes.set_xticks(range(grid.shape[1]), results.axes[x])
    axes.set_yticks(range(grid.shape[0]), results.axes[y])
    axes.set(xlabel=_label(results, x), ylabel=_label(results, y))
    axes.grid(False)
    figure.colorbar(image, ax=axes, label=ACCURACY)
    return figure, axes


def write_number(axes: Any, at: float, mean: float, deviation: float, marked: float | None, color: str) -> None:
    """Write a bar's mean over it; into it where the paper's mark is in the way.

    Args:
        axes: with the bar.
        at: the bar's place.
        mean: its height, in percent.
        deviation: half the length of its error bar.
        marked: height of the paper's mark; None for none.
        color: of the bar.
    """
    text = dict(textcoords="offset points", ha="center", fontsize=7)
    if marked is None or not -2 < marked - mean - deviation < 6:
        axes.annotate(f"{mean:.1f}", (at, mean + deviation), (0, 2), va="bottom", **text)
        return
    below = (at, min(mean - deviation, marked))
    box = dict(facecolor=color, linewidth=0, pad=0.5)
    axes.annotate(f"{mean:.1f}", below, (0, -5), va="top", color=text_on(color), bbox=box, **text)


def _wrapped(text: str, characters: int) -> str:
    return textwrap.fill(text, max(characters, 1), break_long_words=False, break_on_hyphens=False)


def _label(results: SweepResults, axis: str) -> str:
    return {HEAD: "head", GROUP: "classes"}.get(axis) or results.labels[axis].replace("_", " ")


def _joined(row: Cell, axes: Sequence[str]) -> str:
    return " ".join(filter(None, (method_title(row.coordinates.get(axis, "")) for axis in axes)))


def _method(name: str) -> str | None:
    """Return the method whose bar it is: ``BIB`` of ``BIB v``; None for anything else."""
    first = name.partition(" ")[0]
    return first if first in METHOD_COLORS else None


def _colors(names: Sequence[str]) -> dict[str, str]:
    """Return a colour for each name: a method's own, the next of the cycle for anything else."""
    methods = {name: method for name in names if (method := _method(name))}
    free = [color for color in CYCLE if color not in {METHOD_COLORS[method] for method in methods.values()}]
    others = [name for name in names if name not in methods]
    cycled = free or list(CYCLE)
    return {
        **{name: METHOD_COLORS[method] for name, method in methods.items()},
        **{name: cycled[i % len(cycled)] for i, name in enumerate(others)},
    }


def _hatches(names: Sequence[str]) -> dict[str, str]:
    """Return what tells bars of one method apart: nothing for the last of them, which is its prediction."""
    hatches = {}
    for name in names:
        siblings = [other for other in names if _method(other) and _method(other) == _method(name)] or [name]
        hatches[name] = HATCHES[(len(siblings) - 1 - siblings.index(name)) % len(HATCHES)]
    return hatches
