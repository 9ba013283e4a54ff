"""What a sweep found: a row a run as CSV, and mean and standard deviation of each configuration as a table."""

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mbib_timm.evaluation.table import COLUMNS
from mbib_timm.recipe import Recipe
from mbib_timm.training.checkpoint import write_atomically


class Run(Protocol):
    """What the summary needs to know of a run, beside its metrics."""

    @property
    def label(self) -> str:
        """Name of the run's folder."""

    @property
    def configuration(self) -> str:
        """What its seeds have in common."""

    @property
    def recipe(self) -> Recipe:
        """As it was run."""

    @property
    def recipe_epochs(self) -> int:
        """Epochs that the recipe asks for by itself."""


Finished = Sequence[tuple[Run, Mapping[str, Any]]]


def write_summary(folder: Path, name: str, finished: Finished) -> str:
    """Write ``runs.csv`` and ``summary.md`` into a sweep's folder.

    Args:
        folder: of the sweep.
        name: of the sweep.
        finished: runs with the content of their ``metrics.json``.

    Returns:
        The text of ``summary.md``.
    """
    rows = [run_row(run, metrics) for run, metrics in finished]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    text = summary(name, finished)
    for file, content in (("runs.csv", table.getvalue()), ("summary.md", text)):
        encoded = content.encode()
        write_atomically(folder / file, lambda out, encoded=encoded: out.write(encoded))  # type: ignore[misc]
    return text


def run_row(run: Run, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run as a row: what it was, its prediction by shot group, each head's top-1 accuracy, seconds, folder."""
    heads = metrics["result"]["heads"]
    return {
        "configuration": run.configuration,
        "seed": run.recipe.seed,
        "epochs": metrics["epochs"],
        **{column: heads["prediction"][metric] for column, metric in COLUMNS.items()},
        **{f"head_{head}": values["top1"] for head, values in heads.items() if head != "prediction"},
        "training_seconds": metrics["training_seconds"],
        "folder": run.label,
    }


def summary(name: str, finished: Finished) -> str:
    """Return the sweep's table as Markdown, under a title that says what was run.

    Args:
        name: of the sweep.
        finished: one run or more with their metrics.
    """
    seeds = sorted({run.recipe.seed for run, _ in finished})
    epochs = sorted({metrics["epochs"] for _, metrics in finished})
    asked_for = sorted({run.recipe_epochs for run, _ in finished})
    length = f"{_listed(epochs)} epochs"
    if any(metrics["epochs"] != run.recipe_epochs for run, metrics in finished):
        length += f" (the recipes ask for {_listed(asked_for)}; warm-up and milestones moved in proportion)"
    lines = [
        f"# {name}: {length}, seed {_listed(seeds)}",
        "",
        "Top-1 accuracy in percent after the last epoch: mean ± sample standard deviation over n seeds.",
        "",
        f"| configuration | n | {' | '.join(COLUMNS)} |",
        f"|---|---|{'---|' * len(COLUMNS)}",
    ]
    for configuration in dict.fromkeys(run.configuration for run, _ in finished):
        results = [
            metrics["result"]["heads"]["prediction"] for run, metrics in finished if run.configuration == configuration
        ]
        cells = [mean_and_deviation([result[metric] for result in results]) for metric in COLUMNS.values()]
        lines.append(f"| {configuration} | {len(results)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def mean_and_deviation(values: Sequence[float | None]) -> str:
    """Return ``mean ± standard deviation`` of percentages; a dash where there is nothing to measure."""
    measured = [value for value in values if value is not None]
    if not measured:
        return "–"
    mean = f"{statistics.mean(measured):.1f}"
    return f"{mean} ± {statistics.stdev(measured):.1f}" if len(measured) > 1 else mean


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))
