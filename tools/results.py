#!/usr/bin/env python
"""Keep the results of runs in the repository, and the README's tables in step with them.

    python tools/results.py add runs/mbib_resnet32.cifar100_lt_if100    # copy a finished run's figures and numbers
    python tools/results.py table                                       # write the tables into README.md and docs/
    python tools/results.py redraw                                      # draw the figures again from the numbers
    python tools/results.py figure                                      # the README's, of accuracy by method

A result is what a finished run wrote: metrics.json, summary.csv, recipe.yaml, the figures, and analysis.json where it
was analyzed, under `results/<run>-<epochs>e-seed<seed>/`, with `-bfloat16` at its end if it was trained in mixed
precision. Sweeps write theirs there by themselves. The other tables are the zoo's, as `mbib models` prints it, and that
of the `results/benchmark-<device>.json` that `tools/benchmark.py` has written. The README's marker of a sweep names the
one whose table stands there.
"""

import argparse
import re
import shutil
import sys
from pathlib import Path

from benchmarking.results_file import read_results
from benchmarking.table import markdown

from mbib_timm.analysis.analysis_record import analysis_figures, read_analysis, write_analysis
from mbib_timm.drawing import render, write_illustrations
from mbib_timm.errors import MbibError
from mbib_timm.files import write_bytes
from mbib_timm.recipe import longest_epochs
from mbib_timm.reporting.report_figures import comparison_bars
from mbib_timm.results.catalogue import catalogue, markdown_table
from mbib_timm.results.columns import COLUMNS
from mbib_timm.results.record import HISTORY, RECORD, write_record
from mbib_timm.results.redact import redact_recipe
from mbib_timm.results.run_figures import draw_figures
from mbib_timm.results.runs import FinishedRun, group_runs, packaged_recipe, read_run
from mbib_timm.results.tables import Table, cells, markdown_by_start
from mbib_timm.sweeps.show_sweep import markdown as sweep_markdown
from mbib_timm.sweeps.show_sweep import write_results
from mbib_timm.sweeps.sweep_results import epochs_run, listed
from mbib_timm.sweeps.sweep_results import read_results as read_sweep

ROOT = Path(__file__).parents[1]
RUNS = ("<!-- results: tools/results.py table -->\n", "<!-- end of results -->")
MODELS = ("<!-- zoo: tools/results.py table -->\n", "<!-- end of zoo -->")
SPEED = ("<!-- benchmark: tools/results.py table -->\n", "<!-- end of benchmark -->")
SWEEPS = ("<!-- sweeps: tools/results.py table -->\n", "<!-- end of sweeps -->")
# The README's figure, and what it shows: CIFAR-100-LT with imbalance factor 100 and ResNet-32, from scratch.
FIGURE = Path("docs/figures/accuracy.svg")
SHOWN = {
    "cifar_resnet32.ce_cifar100_lt_if100": "CE",
    "cifar_resnet32.bsce_cifar100_lt_if100": "BSCE",
    "bib_resnet32.cifar100_lt_if100": "BIB",
    "mbib_resnet32.cifar100_lt_if100": "MBIB",
    "mbib_resnet32.strong_cifar100_lt_if100": "MBIB, strong recipe",
}
SWEEP = re.compile(r"(<!-- sweep (\S+): tools/results\.py table -->\n).*?(<!-- end of sweep -->)", re.DOTALL)


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
    finished = read_run(run)  # the repository is public: nothing in it says where on a machine things were
    target = results / finished.kept_name(finished.recipe.seed)
    target.mkdir(parents=True, exist_ok=True)
    write_record(target, finished.record)
    (target / "recipe.yaml").write_bytes(redact_recipe(finished.recipe))
    if (run / HISTORY).is_file():
        shutil.copyfile(run / HISTORY, target / HISTORY)
    if (analysis := read_analysis(run)) is not None:
        write_analysis(target, analysis)
    draw(target)
    return target


def draw(result: Path) -> None:
    """Draw a result's figures from its record, its history and its analysis."""
    run = read_run(result)
    draw_figures(result, run.history, run.record)
    if (analysis := read_analysis(result)) is not None:
        write_illustrations(result / "figures", analysis_figures(analysis))


def table(results: Path) -> str:
    """Return the Markdown tables of all results, the last epoch's, with the epochs of the schedule beside them."""
    rows = []
    for file in sorted(results.glob(f"*/{RECORD}")):
        run = read_run(file.parent)
        prediction = run.record.result.prediction
        link = f"[{run.name}](results/{file.parent.name})"
        row = [link, epochs(run), str(run.record.seed), run.precision, *cells(prediction), str(prediction.images)]
        rows.append((run.origin, row))
    return markdown_by_start(["run", "epochs", "seed", "precision", *COLUMNS, "test images"], rows)


def accuracy_figure(results: Path) -> dict[str, bytes]:
    """Draw the accuracy of the recipes of `SHOWN` by shot group, as SVG: of each the precision with most seeds.

    Raises:
        MbibError: no whole run of one of them.
    """
    runs = [read_run(file.parent) for file in sorted(results.glob(f"*/{RECORD}"))]
    groups = group_runs([run for run in runs if run.name in SHOWN])
    chosen = []
    for name in SHOWN:
        own = [group for group in groups if group.first.name == name and not group.is_short]
        if not own:
            raise MbibError(f"results/ has no whole run of {name}, which the figure shows")
        chosen.append(max(own, key=lambda group: (len(group.runs), group.first.precision != "float32")))
    return render(lambda: comparison_bars(chosen, [*SHOWN.values()]), ("svg",))


def epochs(run: FinishedRun) -> str:
    """Return a run's epochs, of the longest stage, beside those of the recipe that it is named after."""
    own = packaged_recipe(run.name)
    return f"{longest_epochs(run.recipe)}" + (f" of {longest_epochs(own)}" if own is not None else "")


def speed_table(results: Path) -> str:
    """Return the Markdown table of the benchmark, on every device that it has been run on."""
    return markdown({f"results/{file.name}": read_results(file) for file in sorted(results.glob("benchmark-*.json"))})


def sweeps_table(results: Path) -> str:
    """Return the Markdown table of all sweeps that were run: what, how long, how often."""
    rows = []
    for file in sorted(results.glob("*/sweep.json")):
        sweep = read_sweep(file)
        hardware = sorted({run.environment.machine for run in sweep.runs})
        link = f"[{sweep.name}](results/{file.parent.name}/table.md)"
        runs = f"{len(sweep.runs)} of {sweep.planned}"
        rows.append([link, sweep.title, epochs_run(sweep), listed(sweep.seeds), runs, listed(hardware)])
    return Table(["sweep", "what", "epochs", "seeds", "runs", "hardware"], rows).markdown() + "\n"


def sweep_table(folder: Path) -> str:
    """Return the table of a sweep, without its title."""
    return sweep_markdown(read_sweep(folder)).partition("\n\n")[2]


def write_tables(readme: Path, results: Path) -> None:
    """Replace the tables between the README's markers."""
    text = readme.read_text(encoding="utf-8")
    tables = (
        (MODELS, markdown_table(catalogue())),
        (RUNS, table(results)),
        (SWEEPS, sweeps_table(results)),
        (SPEED, speed_table(results)),
    )
    for (begin, end), content in tables:
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}\n{content}\n{end}{after}"
    readme.write_text(with_sweeps(text, results), encoding="utf-8")


def with_sweeps(text: str, results: Path) -> str:
    """Return text with the tables of sweeps between their markers."""
    return SWEEP.sub(lambda found: f"{found[1]}\n{sweep_table(results / found[2])}\n{found[3]}", text)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    adding = commands.add_parser("add", help="copy a finished run's results")
    adding.add_argument("run", type=Path, nargs="+")
    commands.add_parser("table", help="write the tables into README.md and docs/")
    commands.add_parser("redraw", help="draw all figures again from the numbers")
    commands.add_parser("figure", help="draw the README's figure")
    arguments = parser.parse_args()
    if arguments.command == "add":
        for run in arguments.run:
            print(add(run, ROOT / "results"))
    elif arguments.command == "figure":
        (ROOT / FIGURE).parent.mkdir(exist_ok=True)
        write_bytes(ROOT / FIGURE, accuracy_figure(ROOT / "results")["svg"])
    elif arguments.command == "redraw":
        for file in (ROOT / "results").glob(f"*/{RECORD}"):
            draw(file.parent)
        for file in (ROOT / "results").glob("*/sweep.json"):
            write_results(file.parent, read_sweep(file))
    write_tables(ROOT / "README.md", ROOT / "results")
    for page in (ROOT / "docs").glob("*.md"):
        page.write_text(with_sweeps(page.read_text(encoding="utf-8"), ROOT / "results"), encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except MbibError as error:
        print(f"results: error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
