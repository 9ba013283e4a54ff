"""A sweep's figure in the paper's form: bars, lines over a parameter, or a heat map of two."""

import statistics
from collections.abc import Sequence
from typing import Any

from mbib_timm.drawing import CYCLE, METHOD_COLORS, canvas, ink, paper
from mbib_timm.evaluation.table import COLUMNS
from mbib_timm.methods import method_title
from mbib_timm.sweeps.definition import GROUP, HEAD
from mbib_timm.sweeps.results import Cell, SweepResults, cells, short_headline

ACCURACY = "top-1 accuracy, %"
LINE_STYLES = ("-", "--", ":", "-.")


def sweep_figure(results: SweepResults) -> Any:
    """Draw the mean accuracy of every configuration, with the standard deviation where there are several seeds.

    Args:
        results: of one finished run or more.
    """
    draw = {"bars": _bars, "lines": _lines, "heatmap": _heatmap}[results.figure["kind"]]
    figure, axes = draw(results, cells(results))
    axes.set_title(short_headline(results))
    return figure


def _bars(results: SweepResults, rows: Sequence[Cell]) -> tuple[Any, Any]:
    """Groups of bars along x, coloured by an axis, or by all that x does not tell."""
    x = results.figure.get("x")
    by = results.figure.get("color")
    bars: dict[tuple[str, str], tuple[Sequence[float | None], float | None]] = {}
    for row in rows:
        axes_left = [axis for axis in row.coordinates if axis not in (x, by)]
        name = _joined(row, [by] if by else axes_left)
        if x == GROUP:
            for column in COLUMNS:
                bars["all" if column == "overall" else column, name] = row.values[column], row.paper.get(column)
        else:
            place = _joined(row, [x] if x else axes_left if by else [])
            bars[place, name] = row.values["overall"], row.paper.get("overall")
    places, names = (list(dict.fromkeys(key[i] for key in bars)) for i in (0, 1))
    colors = _colors(names)
    share = 0.84 / len(names)
    figure, axes = canvas(min(14.0, max(6.0, 2.5 + 0.5 * len(bars))), 4.0)
    for (place, name), (values, number) in bars.items():
        measured = [value for value in values if value is not None]
        if not measured:
            continue
        at = places.index(place) + (names.index(name) - (len(names) - 1) / 2) * share
        mean = statistics.mean(measured)
        deviation = statistics.stdev(measured) if len(measured) > 1 else None
        axes.bar(at, mean, share * 0.9, color=colors[name], yerr=deviation, ecolor=ink(), capsize=2)
        top = mean + (deviation or 0.0)
        axes.annotate(
            f"{mean:.1f}", (at, top), (0, 2), textcoords="offset points", ha="center", va="bottom", fontsize=7
        )
        if number is not None and results.is_papers:
            axes.plot(at, number, "D", color=ink(), markerfacecolor=paper(), markersize=4.5)
    for name in names:
        axes.bar(0, 0, color=colors[name], label=name)
    if results.is_papers:
        axes.plot([], [], "D", color=ink(), markerfacecolor=paper(), markersize=4.5, label="the paper")
    axes.set_xticks(range(len(places)), places)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="x", visible=False)
    axes.set(ylabel=ACCURACY, xlabel=_label(results, x) if x else "")
    axes.margins(y=0.12)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), title=_label(results, by) if by else None)
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


def _label(results: SweepResults, axis: str) -> str:
    return {HEAD: "head", GROUP: "classes"}.get(axis) or results.labels[axis].replace("_", " ")


def _joined(row: Cell, axes: Sequence[str]) -> str:
    return " ".join(filter(None, (method_title(row.coordinates.get(axis, "")) for axis in axes)))


def _colors(names: Sequence[str]) -> dict[str, str]:
    """Return a colour for each name: a method's own, the next of the cycle for anything else."""
    free = [color for color in CYCLE if color not in {METHOD_COLORS.get(name) for name in names}] or list(CYCLE)
    others = [name for name in names if name not in METHOD_COLORS]
    return {
        **{name: METHOD_COLORS[name] for name in names if name in METHOD_COLORS},
        **{name: free[i % len(free)] for i, name in enumerate(others)},
    }
