"""How a sweep is shown: its runs as CSV, means beside the paper's numbers as a table, a figure in the paper's form.

The figure has bars, lines over a parameter, or a heat map of two.
"""

import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mbib_timm.drawing import (
    HATCHES,
    LINE_STYLES,
    canvas,
    mean_bar,
    method_colors,
    named_method,
    render,
)
from mbib_timm.errors import first_line
from mbib_timm.files import mappings_to_csv, printable_lines, to_json, write_bytes
from mbib_timm.methods import method_title
from mbib_timm.models.origin import origin_text
from mbib_timm.results.columns import COLUMNS
from mbib_timm.results.tables import FROM_WEIGHTS, STARTED, Table, difference, mean_and_deviation, mean_of, percent
from mbib_timm.sweeps.sweep import GROUP, HEAD, OF_RECIPES
from mbib_timm.sweeps.sweep_results import (
    FILE,
    Cell,
    SweepResults,
    SweepRun,
    axis_label,
    cells,
    epochs_run,
    headline,
    listed,
    row_name,
    short_headline,
)

ACCURACY = "top-1 accuracy, %"
PAPER = "the paper"


def write_results(folder: Path, results: SweepResults) -> str:
    """Write ``sweep.json``, ``runs.csv``, ``table.md`` and the figure as PNG and PDF; return the text of the table."""
    folder.mkdir(parents=True, exist_ok=True)
    text = markdown(results)
    files = {FILE: to_json(results, indent=1), "runs.csv": runs_csv(results), "table.md": text.encode()}
    for name, content in files.items():  # before anything is drawn: no figure is worth the numbers
        write_bytes(folder / name, content)
    try:
        for form, content in render(lambda: sweep_figure(results), ("png", "pdf")).items():
            write_bytes(folder / f"figure.{form}", content)
    except Exception as error:  # matplotlib's are of many kinds
        print(f"no figure: {first_line(error)}")
    return text


def runs_csv(results: SweepResults) -> bytes:
    """Return a row per run: place, prediction by shot group, each head's top-1 accuracy, choices, seconds, commit."""
    rows = []
    for run in results.runs:
        heads = {f"head_{head}": values["overall"] for head, values in run.heads.items() if head != "prediction"}
        rows.append(
            {
                **{results.labels[axis]: value for axis, value in run.coordinates.items()},
                "seed": run.seed,
                "epochs": run.epochs,
                **run.heads["prediction"],
                **heads,
                **{f"chosen_{name}": value for name, value in run.chosen.items()},
                "training_seconds": run.training_seconds,
                "hardware": run.environment.hardware,
                "commit": run.environment.commit,
                **({"started_from": origin_text(run.origin)} if results.starts else {}),
                "run": run.label,
            }
        )
    return mappings_to_csv(rows)


def markdown(results: SweepResults) -> str:
    """Return the sweep's table as Markdown, under a title that says what was run."""
    rows = cells(results)
    lines = [f"# {headline(results)}", "", *(f"{sentence}\n" for sentence in what_was_run(results))]
    lines.append(sweep_table(results, rows).markdown())
    lines += ["", *(f"Failed: {label}: {reason}" for label, reason in results.failed.items())]
    return printable_lines("\n".join(lines)).rstrip() + "\n"


def what_was_run(results: SweepResults) -> list[str]:
    """Return what has to be known to read the table, in sentences."""
    seeds = "as listed" if _seeds_differ(cells(results)) else listed(results.seeds)
    images = sorted({run.images for run in results.runs})
    splits = listed(run.split for run in results.runs)
    machines = sorted({run.environment.machine for run in results.runs})
    recipe = "these recipes" if results.recipe == OF_RECIPES else f"the recipe `{results.recipe}`"
    said = [
        f"Top-1 accuracy in percent after the last epoch on {listed(images, ',')} images (split {splits}): mean ± "
        f"sample standard deviation over n seeds ({seeds}). {len(results.runs)} of {results.planned} runs of "
        f"{recipe}, {epochs_run(results)}, on {listed(machines)}."
    ]
    if results.settings:
        listing = listed([f"`{key}` {value}" for key, value in results.settings.items()])
        said.append(f"Changed from the recipe: {listing}.")
    if results.starts:
        said.append(f"**Not from scratch**: started from {'; '.join(results.starts)}. {FROM_WEIGHTS}")
    if results.is_short:
        said.append(
            "**Not the recipe's schedule**: warm-up and milestones were moved in proportion to the epochs. Compare "
            "the rows only with one another."
        )
    if changed := [run for run in results.runs if run.environment.is_dirty]:
        said.append(f"Trained with uncommitted changes in the code: {_row_names(results, changed)}.")
    several = [run for run in results.runs if sum(map(bool, run.stage_epochs)) > 1]
    for epochs in dict.fromkeys(tuple(run.stage_epochs) for run in several):
        names = _row_names(results, [run for run in several if tuple(run.stage_epochs) == epochs])
        said.append(f"Stages of {' + '.join(map(str, epochs))} epochs: {names}.")
    for source in dict.fromkeys(run.chosen_on for run in results.runs if run.chosen_on):
        choosing = [run for run in results.runs if run.chosen_on == source]
        chosen = listed(name for run in choosing for name in run.chosen)
        names = _row_names(results, choosing)
        said.append(f"**Chosen with labels of further images**: {chosen} of {names}, on {source}.")
    if (paper := results.paper_beside) is not None and paper.recipe != results.recipe:
        said.append(f"The paper's numbers are for another setting, `{paper.recipe}`.")
    return said


def _row_names(results: SweepResults, runs: Sequence[SweepRun]) -> str:
    """Return the names of the rows of runs side by side."""
    return "; ".join(dict.fromkeys(row_name(results, run.coordinates) for run in runs))


def sweep_table(results: SweepResults, rows: Sequence[Cell]) -> Table:
    """Return the sweep's table: axes, n, accuracies, the paper's number and the difference from it."""
    columns = [
        (axis_label(results, axis), [method_title(row.coordinates[axis]) for row in rows]) for axis in results.axes
    ]
    if results.heads:
        columns.append((HEAD, [row.coordinates[HEAD] for row in rows]))
    if len(results.starts) > 1:
        columns.append((STARTED, [row.start for row in rows]))
    columns.append(("n", [str(row.n) for row in rows]))
    if _seeds_differ(rows):
        columns.append(("seeds", [listed(sorted(row.seeds)) for row in rows]))
    columns += [(name, [mean_and_deviation(row.values[name]) for row in rows]) for name in COLUMNS]
    if (paper := results.paper_beside) is not None:
        numbers = [name for name in COLUMNS if any(name in number for number in paper.numbers)]
        for name in numbers:
            columns.append((f"paper: {name} ({paper.source})", [percent(row.paper.get(name)) for row in rows]))
            if results.is_papers:
                apart = [difference(mean_of(row.values[name]), row.paper.get(name)) for row in rows]
                columns.append(("difference" if len(numbers) == 1 else f"difference: {name}", apart))
    return Table([title for title, _ in columns], [*zip(*(column for _, column in columns), strict=True)])


def _seeds_differ(rows: Sequence[Cell]) -> bool:
    return len({tuple(sorted(row.seeds)) for row in rows}) > 1


def sweep_figure(results: SweepResults) -> Any:
    """Draw the mean accuracy of every configuration, with the standard deviation where there are several seeds."""
    draw = {"bars": _bars, "lines": _lines, "heatmap": _heatmap}[results.figure["kind"]]
    figure = draw(results, cells(results))
    title = short_headline(results).replace(" = ", "\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}")
    figure.suptitle(_wrapped(title, int(10 * figure.get_figwidth())))
    return figure


def _bars(results: SweepResults, rows: Sequence[Cell]) -> Any:
    """Groups of bars along x, coloured by an axis, or by all that x does not tell."""
    x = results.figure.get("x")
    by = results.figure.get("color")
    bars: dict[tuple[str, str], tuple[Sequence[float | None], float | None]] = {}
    methods: dict[tuple[str, str], str] = {}
    for row in rows:
        colored = [by] if by else []
        others = [axis for axis in row.coordinates if axis not in (x, by)]
        # Where x is not said, the axes that have no colour are along it.
        name = _joined(row, colored if by and not x else [*colored, *others])
        if x == GROUP:
            for column in (name for name in COLUMNS if any(value is not None for value in row.values[name])):
                key = "all" if column == "overall" else column, name
                bars[key], methods[key] = (row.values[column], row.paper.get(column)), row.method
        else:
            key = _joined(row, [x] if x else others if by else []), name
            bars[key], methods[key] = (row.values["overall"], row.paper.get("overall")), row.method
    places, names = (list(dict.fromkeys(key[i] for key in bars)) for i in (0, 1))
    colors, hatches = method_colors(names), _hatches(names)
    # Bars of one kind beside one another have the colours of their methods.
    of_methods = method_colors(methods.values())
    look = {key: colors[key[1]] if key[1] else of_methods[methods[key]] for key in bars}
    longest = max(len(place) for place in places)
    # Many places with long names stand below one another, where names are read without turning one's head.
    lying = len(places) > 10 and longest > 10
    # A number at each bar takes a third of an inch, a label of several words an inch; what is wider than a page is
    # read on none.
    wide = max(0.36 * len(bars), min(longest / 10, 1.0) * len(places))
    figure, axes = canvas(8.0, 1.0 + 0.24 * len(bars)) if lying else canvas(min(10.0, max(6.0, 2.5 + wide)), 4.0)
    share = 0.84 / len(names)
    legend: dict[str, Any] = {}
    for (place, name), (values, number) in bars.items():
        at = places.index(place) + (names.index(name) - (len(names) - 1) / 2) * share
        marked = number if results.is_papers else None
        bar, mark = mean_bar(axes, at, values, share * 0.9, look[place, name], hatches[name], marked, lying)
        legend |= {name: bar} if bar is not None else {}
        legend |= {PAPER: mark} if mark is not None else {}
    along, over = ("y", "x") if lying else ("x", "y")
    characters = longest if lying else int((figure.get_figwidth() - 2.0) / len(places) / 0.09)
    axes.set(**{
        f"{along}ticks": range(len(places)), f"{along}ticklabels": [_wrapped(place, characters) for place in places],
        f"{along}label": axis_label(results, x) if x else "", f"{over}label": ACCURACY,
    })  # fmt: skip
    axes.tick_params(axis=along, length=0)
    axes.grid(axis=along, visible=False)
    axes.margins(**{over: 0.12}, **({along: 0.01} if lying else {}))
    if lying:
        axes.invert_yaxis()
    # The paper's mark comes last; a single kind of bars without a name needs no legend.
    shown = {name: legend[name] for name in (*names, PAPER) if name and name in legend}
    if shown:
        title = axis_label(results, by) if by else None
        axes.legend(shown.values(), shown.keys(), loc="upper left", bbox_to_anchor=(1.0, 1.0), title=title)
    return figure


def _lines(results: SweepResults, rows: Sequence[Cell]) -> Any:
    """Accuracy over a number; an axis each for colour and line style."""
    x, by, style = (results.figure.get(role) for role in ("x", "color", "style"))
    assert x is not None
    figure, axes = canvas(6.5, 4.2)
    colored = results.axes.get(by or "", [""])
    styled = results.axes.get(style or "", [""])
    colors = method_colors(method_title(value) for value in colored)
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
            label = row_name(results, {axis: name for axis, name in ((style, kind), (by, value)) if axis})
            axes.errorbar(
                [at for at, _ in points],
                [statistics.mean(values) for _, values in points],
                yerr=[statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in points],
                color=colors[method_title(value)], linestyle=line, marker="o", markersize=4, capsize=2, label=label,
            )  # fmt: skip
    axes.set(xlabel=axis_label(results, x), ylabel=ACCURACY)
    if by or style:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _heatmap(results: SweepResults, rows: Sequence[Cell]) -> Any:
    """The accuracy over two numbers, written into the map."""
    x, y = results.figure["x"], results.figure["y"]
    grid = np.full((len(results.axes[y]), len(results.axes[x])), np.nan)
    for row in rows:
        place = results.axes[y].index(row.coordinates[y]), results.axes[x].index(row.coordinates[x])
        grid[place] = np.nan if (mean := mean_of(row.values["overall"])) is None else mean
    figure, axes = canvas(1.8 + 0.85 * grid.shape[1], 1.2 + 0.65 * grid.shape[0])
    image = axes.imshow(grid, cmap="cividis", origin="lower", aspect="auto")
    low, high = np.nanmin(grid), np.nanmax(grid)
    for (i, j), value in np.ndenumerate(grid):
        if not np.isnan(value):
            dark = (value - low) / (high - low or 1.0) < 0.5
            axes.text(j, i, f"{value:.1f}", ha="center", va="center", color="white" if dark else "black")
    axes.set_xticks(range(grid.shape[1]), results.axes[x])
    axes.set_yticks(range(grid.shape[0]), results.axes[y])
    axes.set(xlabel=axis_label(results, x), ylabel=axis_label(results, y))
    axes.grid(False)
    figure.colorbar(image, ax=axes, label=ACCURACY)
    return figure


def _wrapped(text: str, characters: int) -> str:
    return textwrap.fill(text, max(characters, 1), break_long_words=False, break_on_hyphens=False)


def _joined(row: Cell, axes: Sequence[str]) -> str:
    return " ".join(filter(None, (method_title(row.coordinates.get(axis, "")) for axis in axes)))


def _hatches(names: Sequence[str]) -> dict[str, str]:
    """Return what tells bars of one method apart: nothing for the last of them, which is its prediction."""
    hatches = {}
    for name in names:
        method = named_method(name)
        siblings = [other for other in names if method and named_method(other) == method] or [name]
        hatches[name] = HATCHES[(len(siblings) - 1 - siblings.index(name)) % len(HATCHES)]
    return hatches
