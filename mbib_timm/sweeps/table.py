"""A sweep's results as files: every run as CSV, means beside the paper's numbers as Markdown, a figure."""

import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from mbib_timm.drawing import render
from mbib_timm.errors import MbibError
from mbib_timm.evaluation.table import COLUMNS
from mbib_timm.methods import method_title
from mbib_timm.sweeps.definition import HEAD
from mbib_timm.sweeps.figure import sweep_figure
from mbib_timm.sweeps.results import FILE, Cell, SweepResults, cells, epochs_run, headline, listed
from mbib_timm.training.checkpoint import write_atomically


def write_results(folder: Path, results: SweepResults) -> str:
    """Write ``sweep.json``, ``runs.csv``, ``table.md``, ``figure.png`` and ``figure.pdf``.

    Args:
        folder: of the sweep's results.
        results: what the sweep has found so far.

    Returns:
        The text of ``table.md``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = markdown(results)
    files = {
        FILE: (json.dumps(asdict(results), indent=1, allow_nan=False) + "\n").encode(),
        "runs.csv": runs_csv(results).encode(),
        "table.md": text.encode(),
    }
    _write(folder, files)  # before anything is drawn: no figure is worth the numbers
    try:
        drawn = render(lambda: sweep_figure(results), ("png", "pdf"))
        _write(folder, {f"figure.{form}": content for form, content in drawn.items()})
    except MbibError as error:
        print(f"no figure: {error}")
    return text


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        write_atomically(folder / name, lambda out, content=content: out.write(content))  # type: ignore[misc]


def runs_csv(results: SweepResults) -> str:
    """Return a row per run: place, prediction by shot group, each head's top-1 accuracy, choices, seconds, commit."""
    rows = []
    for run in results.runs:
        heads = {f"head_{head}": values["overall"] for head, values in run["heads"].items() if head != "prediction"}
        rows.append(
            {
                **{results.labels[axis]: value for axis, value in run["coordinates"].items()},
                "seed": run["seed"],
                "epochs": run["epochs"],
                **run["heads"]["prediction"],
                **heads,
                **{f"chosen_{name}": value for name, value in run["chosen"].items()},
                "training_seconds": run["training_seconds"],
                "hardware": run["environment"]["hardware"],
                "commit": run["environment"]["commit"],
                "run": run["label"],
            }
        )
    table = io.StringIO()
    writer = csv.DictWriter(table, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return table.getvalue()


def markdown(results: SweepResults) -> str:
    """Return the sweep's table as Markdown, under a title that says what was run."""
    rows = cells(results)
    table = [header(results), *(table_row(results, row) for row in rows)]
    lines = [f"# {headline(results)}", "", *(f"{sentence}\n" for sentence in what_was_run(results))]
    lines += [f"| {' | '.join(cells_of_row)} |" for cells_of_row in (table[0], ["---"] * len(table[0]), *table[1:])]
    if closest := closest_to_the_paper(results, rows):
        lines += ["", closest]
    lines += ["", *(f"Failed: {label}: {reason}" for label, reason in results.failed.items())]
    return "\n".join(lines).rstrip() + "\n"


def what_was_run(results: SweepResults) -> list[str]:
    """Return what has to be known to read the table, in sentences."""
    seeds = listed(results.seeds)
    images = sorted({run["test_images"] for run in results.runs})
    machines = sorted({f"{run['environment']['hardware']} ({run['environment']['device']})" for run in results.runs})
    said = [
        f"Top-1 accuracy in percent after the last epoch on {listed(images, ',')} test images: mean ± sample standard "
        f"deviation over n seeds ({seeds}). {len(results.runs)} of {results.planned} runs of the recipe "
        f"`{results.recipe}`, {epochs_run(results)}, on {listed(machines)}."
    ]
    if results.settings:
        listing = listed([f"`{key}` {value}" for key, value in results.settings.items()])
        said.append(f"Set otherwise than in the recipe: {listing}.")
    if results.is_short:
        said.append(
            "**Not the recipe's schedule**: warm-up and milestones were moved in proportion to the epochs. The rows "
            "compare with one another, and with nothing else."
        )
    if results.paper is not None and results.paper["recipe"] != results.recipe:
        said.append(f"The paper's numbers are for another setting, `{results.paper['recipe']}`.")
    return said


def header(results: SweepResults) -> list[str]:
    """Return the table's columns: axes, n, accuracies, the paper's number and the difference from it."""
    axes = [results.labels[axis] for axis in results.axes]
    paper = _paper_columns(results)
    source = results.paper["source"] if results.paper else ""
    columns = [*axes, *([HEAD] if results.heads else []), "n", *COLUMNS]
    for column in paper:
        columns.append(f"paper: {column} ({source})")
        if results.is_papers:
            columns.append("difference" if len(paper) == 1 else f"difference: {column}")
    return columns


def table_row(results: SweepResults, cell: Cell) -> list[str]:
    """Return one row of the table."""
    axes = [method_title(cell.coordinates[axis]) for axis in results.axes]
    row = [*axes, *([cell.coordinates[HEAD]] if results.heads else []), str(cell.n)]
    row += [mean_and_deviation(cell.values[column]) for column in COLUMNS]
    for column in _paper_columns(results):
        number = cell.paper.get(column)
        row.append("–" if number is None else f"{number:.1f}")
        if results.is_papers:
            mean = mean_of(cell.values[column])
            row.append("–" if number is None or mean is None else signed(mean - number))
    return row


def closest_to_the_paper(results: SweepResults, rows: Sequence[Cell]) -> str:
    """Return which row comes closest to the paper, where all rows stand beside the same number; else nothing."""
    numbers = {row.paper.get("overall") for row in rows}
    if len(numbers) > 1 or None in numbers or not results.is_papers or len(rows) < 2:
        return ""
    number = numbers.pop()
    assert number is not None
    nearest = min(rows, key=lambda row: abs((mean_of(row.values["overall"]) or 0.0) - number))
    named = ", ".join(f"{results.labels[axis]} {method_title(nearest.coordinates[axis])}" for axis in results.axes)
    mean = mean_and_deviation(nearest.values["overall"])
    return f"Closest to the paper's {number:.1f}: {named}, with {mean} (n = {nearest.n})."


def mean_of(values: Sequence[float | None]) -> float | None:
    """Return the mean of what was measured; None where nothing was."""
    measured = [value for value in values if value is not None]
    return statistics.mean(measured) if measured else None


def mean_and_deviation(values: Sequence[float | None]) -> str:
    """Return ``mean ± standard deviation`` of percentages; a dash where there is nothing to measure."""
    measured = [value for value in values if value is not None]
    if not measured:
        return "–"
    mean = f"{statistics.mean(measured):.1f}"
    return f"{mean} ± {statistics.stdev(measured):.1f}" if len(measured) > 1 else mean


def signed(difference: float) -> str:
    """Return a difference in points, with its sign."""
    return f"{difference:+.1f}".replace("-", "−")


def _paper_columns(results: SweepResults) -> list[str]:
    numbers = results.paper["numbers"] if results.paper else []
    return [column for column in COLUMNS if any(column in number for number in numbers)]
