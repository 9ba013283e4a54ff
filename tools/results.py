#!/usr/bin/env python
"""Keep the results of runs in the repository, and the tables in step with them.

    python tools/results.py add runs/mbib_resnet32.cifar100_lt_if100    # copy a finished run's figures and numbers
    python tools/results.py table                                       # write the tables into the pages
    python tools/results.py redraw                                      # draw the figures again from the numbers
    python tools/results.py figure                                      # the README's, of accuracy by method

A result is what a finished run wrote: metrics.json, summary.csv, recipe.yaml, the figures, and analysis.json where it
was analyzed, under `results/<run>-<epochs>e-seed<seed>/`, with `-bfloat16` at its end if it was trained in mixed
precision. Sweeps write their own results there. The README has one table, of the methods in its figure and of the
pretrained backbones, recipes/README.md that of the recipes, and results/README.md those of runs, sweeps and the
benchmark; a marker in docs/ names the sweep whose table stands there. docs/generate.py asks for the other tables when
it builds the site: links in them begin in docs/, or in a folder beside it.
"""

import argparse
import json
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarking.results_file import markdown, read_results

from mbib_timm.analysis.analysis_record import analysis_figures, read_analysis, write_analysis
from mbib_timm.drawing import LIGHT, render, write_illustrations
from mbib_timm.errors import MbibError
from mbib_timm.files import write_bytes
from mbib_timm.models.head_outputs import PREDICTION
from mbib_timm.models.origin import OwnData, origin_of
from mbib_timm.recipe import Recipe, data_of, list_sweeps, load_recipe, packaged_recipes, recipe_name
from mbib_timm.reporting.report_figures import comparison_bars
from mbib_timm.results.columns import COLUMNS
from mbib_timm.results.paper import RESULTS as PAPER
from mbib_timm.results.record import HISTORY, RECORD, write_record
from mbib_timm.results.redact import redact_recipe
from mbib_timm.results.run_figures import draw_figures
from mbib_timm.results.run_text import epochs_text
from mbib_timm.results.runs import SAME_RESULT, FinishedRun, RunGroup, group_runs, packaged_recipe, read_run
from mbib_timm.results.tables import NOTHING, Table, cells, markdown_by_start, mean_and_deviation, percent
from mbib_timm.sweeps.show_sweep import markdown as sweep_markdown
from mbib_timm.sweeps.show_sweep import write_results
from mbib_timm.sweeps.sweep import find_sweep
from mbib_timm.sweeps.sweep_plan import on_recipe, plan
from mbib_timm.sweeps.sweep_results import SweepResults, epochs_run, listed
from mbib_timm.sweeps.sweep_results import read_results as read_sweep

ROOT = Path(__file__).parents[1]
# The README's figure, and what it and the README's table show: CIFAR-100-LT with imbalance factor 100. First ResNet-32
# from scratch; then, in tables of their own, what may not be compared with it: ResNet-32 with strong augmentation and
# another optimisation, and EfficientNet-Lite0 with ImageNet-1k weights.
FIGURE = Path("docs/figures/accuracy.svg")
SHOWN = {
    "cifar_resnet32.ce_cifar100_lt_if100": "CE",
    "cifar_resnet32.bsce_cifar100_lt_if100": "BSCE",
    "bib_resnet32.cifar100_lt_if100": "BIB",
    "mbib_resnet32.cifar100_lt_if100": "MBIB",
}
STRONG = {
    "cifar_resnet32.bsce_strong_cifar100_lt_if100": "BSCE, 200 epochs",
    "mbib_resnet32.strong_cifar100_lt_if100": "MBIB, 200 epochs",
    "mbib_resnet32.strong_400e_cifar100_lt_if100": "MBIB, 400 epochs",
}
PRETRAINED = {
    "mbib_efficientnet_lite0.frozen_cifar100_lt_if100": "MBIB heads, backbone frozen",
    "mbib_efficientnet_lite0.finetune_cifar100_lt_if100": "MBIB, all fine-tuned",
}
# A table in a page, between markers that say what it is of, and of which sweep.
TABLE = re.compile(r"(<!-- (\w+)(?: (\S+))?: tools/results\.py table -->\n).*?(<!-- end of \2 -->)", re.DOTALL)


def add(run: Path, results: Path) -> Path:
    """Copy a finished run's results into a folder among all results, and return it.

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


def kept_runs(results: Path) -> list[FinishedRun]:
    """Return all runs of which results are kept, by the names of their folders."""
    return [read_run(file.parent) for file in sorted(results.glob(f"*/{RECORD}"))]


def table(results: Path) -> str:
    """Return the Markdown tables of all results, the last epoch's, with the epochs of the schedule beside them."""
    rows = []
    for run in kept_runs(results):
        prediction = run.record.result.prediction
        link = f"[{run.name}](../results/{run.folder.name})"
        row = [link, epochs(run), str(run.record.seed), run.precision, *cells(prediction), str(prediction.images)]
        rows.append((run.origin, row))
    return markdown_by_start(["run", "epochs", "seed", "precision", *COLUMNS, "test images"], rows)


def shown_groups(results: Path, names: Iterable[str]) -> list[RunGroup]:
    """Return the runs of each recipe by its full schedule: of each the precision with most seeds.

    Raises:
        MbibError: no whole run of one of them.
    """
    groups = group_runs([run for run in kept_runs(results) if run.name in names])
    chosen = []
    for name in names:
        own = [group for group in groups if group.first.name == name and not group.is_short]
        if not own:
            raise MbibError(f"{results} has no whole run of {name}, which the README shows")
        chosen.append(best_measured(own))
    return chosen


def best_measured(groups: Sequence[RunGroup]) -> RunGroup:
    """Return, of one recipe's groups, that of the precision with most seeds."""
    return max(groups, key=lambda group: (len(group.runs), group.first.precision != "float32"))


def accuracy_figure(results: Path) -> dict[str, bytes]:
    """Draw the accuracy of the recipes of `SHOWN` by shot group, as SVG. Raises MbibError as `shown_groups` does."""
    groups = shown_groups(results, SHOWN)

    def draw() -> Any:
        figure = comparison_bars(groups, [*SHOWN.values()])
        # The README's reader has read nothing yet.
        figure.suptitle("CIFAR-100-LT, imbalance factor 100, ResNet-32 from scratch", fontsize=10)
        return figure

    files = render(draw, ("svg",))
    # On a page that is dark, too.
    on_white = f'<svg style="background: {LIGHT.background}" '.encode()
    return {form: content.replace(b"<svg ", on_white, 1) for form, content in files.items()}


def readme_table(results: Path) -> str:
    """Return the README's tables: of the recipes of `SHOWN`, with the paper's numbers, of `STRONG` and of `PRETRAINED`.

    Raises:
        MbibError: as `shown_groups` does.
    """
    titles = {**SHOWN, **STRONG, **PRETRAINED}
    groups = dict(zip(titles, shown_groups(results, titles), strict=True))
    compared = [
        [*_row(title, groups[name]), percent(groups[name].papers_number("overall"))] for name, title in SHOWN.items()
    ]
    strong, pretrained = ([_row(title, groups[name]) for name, title in of.items()] for of in (STRONG, PRETRAINED))
    tables = (
        Table(["ResNet-32 from scratch", "n", *COLUMNS, "paper"], compared),
        Table(["ResNet-32 from scratch, strong recipe", "n", *COLUMNS], strong),
        Table(["EfficientNet-Lite0 with ImageNet-1k weights", "n", *COLUMNS], pretrained),
    )
    return "\n\n".join(table.markdown() for table in tables) + "\n"


def _row(title: str, group: RunGroup) -> list[str]:
    return [title, str(len(group.runs)), *(mean_and_deviation(group.values(column)) for column in COLUMNS)]


def epochs(run: FinishedRun) -> str:
    """Return the epochs of a run's stages, with those of the recipe that it is named after where they differ."""
    own = packaged_recipe(run.name)
    done, asked = epochs_text(run.recipe), "" if own is None else epochs_text(own)
    return done if asked in ("", done) else f"{done} of {asked}"


def recipes_table(results: Path) -> str:
    """Return the Markdown tables of the packaged recipes: the paper's number, and the mean of whole runs in results/.

    A run of a sweep counts where all that it computed is what a packaged recipe asks for.
    """
    groups = group_runs(kept_runs(results))
    of_sweeps = runs_of_sweeps(results)
    rows = []
    for name, path in packaged_recipes().items():
        recipe, run_name = load_recipe(path), recipe_name(path)
        own = [group for group in groups if group.first.name == run_name and not group.is_short and not group.settings]
        kept = best_measured(own).values("overall") if own else []
        values = max(kept, of_sweeps.get(name, []), key=len)  # a kept run may be one of a sweep's seeds
        measured = f"{mean_and_deviation(values)} (n = {len(values)})" if values else "not run"
        numbers = [number for number in PAPER.get(run_name, ()) if "overall" in number.accuracies]
        paper = [f"{number.accuracies['overall']:.1f} ({number.source})" for number in numbers[:1]]
        methods = " + ".join(stage.method["name"] for stage in recipe.chain())
        origin = origin_of(recipe, OwnData(data_of(name)))
        rows.append((origin, [f"`{name}`", methods, *(paper or [NOTHING]), measured]))
    return markdown_by_start(["recipe", "method", "paper", "this project"], rows)


def runs_of_sweeps(results: Path) -> dict[str, list[float | None]]:
    """Return the accuracies of sweeps' runs, whole ones and of a packaged recipe as it stands, by its name."""
    names = {_computed(load_recipe(path)): name for name, path in packaged_recipes().items()}
    found: dict[str, list[float | None]] = {}
    for file in sorted(results.glob("*/sweep.json")):
        kept = read_sweep(file)
        packaged = next((name for name in list_sweeps() if kept.name.startswith(name)), None)
        if packaged is None:  # of recipes by their names, or of a file
            continue
        planned = {run.configuration: run.recipe for run in plan(on_recipe(find_sweep([packaged]), kept.recipe), {})}
        own: dict[str, list[float | None]] = {}
        for run in kept.runs:
            recipe = planned.get(run.configuration)  # None where the sweep has this value no longer
            name = None if recipe is None else names.get(_computed(recipe))
            if name is not None and run.epochs == run.recipe_epochs and not set(run.settings) - SAME_RESULT:
                own.setdefault(name, []).append(run.heads[PREDICTION]["overall"])
        found = {**own, **found}
    return found


def _computed(recipe: Recipe) -> str:
    return json.dumps(recipe.everywhere(seed=0, val_interval=1).computation(), sort_keys=True)


def speed_table(results: Path) -> str:
    """Return the Markdown table of the benchmark, on every device that it has been run on."""
    return markdown(
        {f"../results/{file.name}": read_results(file) for file in sorted(results.glob("benchmark-*.json"))}
    )


def sweeps_table(results: Path) -> str:
    """Return the Markdown table of all sweeps that were run: what, how long, how often."""
    rows = []
    for file in sorted(results.glob("*/sweep.json")):
        sweep = read_sweep(file)
        hardware = sorted({run.environment.machine for run in sweep.runs})
        link = f"[{sweep.name}](../results/{file.parent.name}/table.md)"
        runs = f"{len(sweep.runs)} of {sweep.planned}"
        rows.append([link, sweep.title, epochs_run(sweep), listed(sweep.seeds), runs, listed(hardware)])
    return Table(["sweep", "what", "epochs", "seeds", "runs", "hardware"], rows).markdown() + "\n"


def measured_tables(results: Path) -> str:
    """Return the Markdown tables of all runs, of all sweeps, and of the benchmark, each under a heading."""
    tables = {"Runs": table(results), "Sweeps": sweeps_table(results), "Speed": speed_table(results)}
    return "\n".join(f"## {title}\n\n{text}" for title, text in tables.items())


def sweep_table(sweep: SweepResults) -> str:
    """Return the table of a sweep, without its title."""
    return sweep_markdown(sweep).partition("\n\n")[2]


def with_tables(text: str, results: Path) -> str:
    """Return a page's text with the tables of today between their markers."""

    def replaced(found: re.Match[str]) -> str:
        if found[2] == "sweep":
            made = sweep_table(read_sweep(results / found[3]))
        else:
            made = {"results": readme_table, "recipes": recipes_table, "measured": measured_tables}[found[2]](results)
        return f"{found[1]}\n{made}\n{found[4]}"

    return TABLE.sub(replaced, text)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    adding = commands.add_parser("add", help="copy a finished run's results")
    adding.add_argument("run", type=Path, nargs="+")
    commands.add_parser("table", help="write the tables into README.md, recipes/, results/ and docs/")
    commands.add_parser("redraw", help="draw all figures again from the numbers")
    commands.add_parser("figure", help="draw the README's figure")
    arguments = parser.parse_args()
    if arguments.command == "add":
        for run in arguments.run:
            print(add(run, ROOT / "results"))
    elif arguments.command == "figure":
        write_bytes(ROOT / FIGURE, accuracy_figure(ROOT / "results")["svg"])
    elif arguments.command == "redraw":
        for file in (ROOT / "results").glob(f"*/{RECORD}"):
            draw(file.parent)
        for file in (ROOT / "results").glob("*/sweep.json"):
            write_results(file.parent, read_sweep(file))
    for page in (*(ROOT / "docs").glob("*.md"), *(ROOT / place / "README.md" for place in ("", "recipes", "results"))):
        page.write_text(with_tables(page.read_text(encoding="utf-8"), ROOT / "results"), encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except MbibError as error:
        print(f"results: error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
