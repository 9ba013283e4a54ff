#!/usr/bin/env python
"""Keep the results of runs in the repository, and the README's tables in step with them.

    python tools/results.py add runs/mbib_resnet32.cifar100_lt_if100    # copy a finished run's figures and numbers
    python tools/results.py table                                       # write the tables into README.md
    python tools/results.py redraw                                      # draw the figures again from the numbers

A result is what a finished run wrote: metrics.json, summary.csv, recipe.yaml and the figures, under
`results/<run>-<epochs>e-seed<seed>/`. The other tables are the zoo's, as `mbib models` prints it, and that of the
`results/benchmark-<device>.json` that `tools/benchmark.py` has written.
"""

import argparse
import csv
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from benchmarking.table import markdown, read_results

from mbib_timm.errors import MbibError
from mbib_timm.inference.catalogue import catalogue, markdown_table
from mbib_timm.recipe import Recipe, find_recipe, load_recipe
from mbib_timm.training.report import draw_figures

ROOT = Path(__file__).parents[1]
RUNS = ("<!-- results: tools/results.py table -->\n", "<!-- end of results -->")
MODELS = ("<!-- zoo: tools/results.py table -->\n", "<!-- end of zoo -->")
SPEED = ("<!-- benchmark: tools/results.py table -->\n", "<!-- end of benchmark -->")
GROUPS = ("top1", "many", "medium", "few")


def add(run: Path, results: Path) -> Path:
    """Copy a finished run's results.

    Args:
        run: the run's folder.
        results: folder of all results.

    Returns:
        The folder written.

    Raises:
        MbibError: the run has no final metrics.
    """
    if not (run / "metrics.json").is_file():
        raise MbibError(f"{run} has no metrics.json: the run is not finished")
    metrics = json.loads((run / "metrics.json").read_text())
    target = results / f"{metrics['name']}-{metrics['epochs']}e-seed{metrics['seed']}"
    target.mkdir(parents=True, exist_ok=True)
    for name in ("metrics.json", "summary.csv", "recipe.yaml"):
        shutil.copyfile(run / name, target / name)
    draw(target)
    return target


def draw(result: Path) -> None:
    """Draw a result's figures from its metrics and its summary."""
    metrics = json.loads((result / "metrics.json").read_text())
    with (result / "summary.csv").open() as file:
        history = [{key: float(value) if value else None for key, value in row.items()} for row in csv.DictReader(file)]
    draw_figures(result, history, metrics)


def table(results: Path) -> str:
    """Return the Markdown table of all results, the last epoch's, with the epochs of the schedule beside them."""
    lines = [
        "| run | epochs | seed | overall | many | medium | few | test images |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for file in sorted(results.glob("*/metrics.json")):
        metrics = json.loads(file.read_text())
        prediction = metrics["result"]["heads"]["prediction"]
        numbers = ["–" if prediction[group] is None else f"{prediction[group]:.1f}" for group in GROUPS]
        cells = [
            f"[{metrics['name']}](results/{file.parent.name})",
            f"{metrics['epochs']} of {nominal_epochs(metrics)}",
            metrics["seed"],
            *numbers,
            prediction["images"],
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def nominal_epochs(metrics: dict[str, Any]) -> int:
    """Return the epochs of the recipe that a run is named after."""
    stem, _, folder = metrics["name"].partition(".")
    recipe: Recipe = load_recipe(find_recipe(f"{folder}/{stem}"))
    return recipe.epochs


def speed_table(results: Path) -> str:
    """Return the Markdown table of the benchmark, on every device that it has been run on."""
    return markdown({f"results/{file.name}": read_results(file) for file in sorted(results.glob("benchmark-*.json"))})


def write_tables(readme: Path, results: Path) -> None:
    """Replace the tables between the README's markers."""
    text = readme.read_text(encoding="utf-8")
    tables = ((MODELS, markdown_table(catalogue())), (RUNS, table(results)), (SPEED, speed_table(results)))
    for (begin, end), content in tables:
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}\n{content}\n{end}{after}"
    readme.write_text(text, encoding="utf-8")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    adding = commands.add_parser("add", help="copy a finished run's results")
    adding.add_argument("run", type=Path, nargs="+")
    commands.add_parser("table", help="write the tables into README.md")
    commands.add_parser("redraw", help="draw all figures again from the numbers")
    arguments = parser.parse_args()
    if arguments.command == "add":
        for run in arguments.run:
            print(add(run, ROOT / "results"))
    elif arguments.command == "redraw":
        for file in (ROOT / "results").glob("*/metrics.json"):
            draw(file.parent)
    write_tables(ROOT / "README.md", ROOT / "results")


if __name__ == "__main__":
    try:
        main()
    except MbibError as error:
        print(f"results: error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
