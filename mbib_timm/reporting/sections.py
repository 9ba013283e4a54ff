"""From runs and sweeps to the sections of a report."""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from mbib_timm.analysis.figures import analysis_figures, comparison_figures
from mbib_timm.drawing import Illustration
from mbib_timm.evaluation.table import COLUMNS
from mbib_timm.methods import METHODS, method_title
from mbib_timm.reporting.differences import differences
from mbib_timm.reporting.figures import CURVES, comparison_bars, comparison_curves, sweep_curves
from mbib_timm.reporting.inputs import RunGroup
from mbib_timm.reporting.page import Section
from mbib_timm.sweeps.figure import sweep_figure
from mbib_timm.sweeps.results import SweepResults, cells, headline
from mbib_timm.sweeps.table import closest_to_the_paper, header, mean_and_deviation, signed, table_row, what_was_run
from mbib_timm.training.report import chosen_text, raw_text, run_figures, stages_text


def run_section(group: RunGroup) -> Section:
    """Return what is to be said of runs of one recipe: what they were, results, distance from the paper, figures."""
    section = Section(group.title)
    run = group.first
    section.facts(_facts(group))
    section.command(run.metrics["environment"]["command"])

    section.heading("Result")
    result, best = run.metrics["result"], run.metrics["best"]
    when = f"the last epoch, {result['epoch'] + 1}" if result["epoch"] >= 0 else method_title(run.metrics["method"])
    spread = f": mean ± sample standard deviation over n = {len(group.runs)} seeds" if len(group.runs) > 1 else ""
    images = run.heads["prediction"]["images"]
    section.paragraphs(
        [f"Top-1 accuracy in percent on {images:,} images of the split `{result['split']}` after {when}{spread}."]
    )
    heads = ["prediction", *(head for head in run.heads if head != "prediction")]
    rows = [[head, *(mean_and_deviation(group.values(column, head)) for column in COLUMNS)] for head in heads]
    section.table(["head", *COLUMNS], rows)
    for member in group.runs:
        if chosen := chosen_text(member.metrics):
            section.paragraphs([f"{chosen} (seed {member.metrics['seed']})."])
        if raw := raw_text(member.metrics):
            section.paragraphs([f"{raw} (seed {member.metrics['seed']})."])
    if best is not None:
        best_top1 = best["heads"]["prediction"]["top1"]
        section.paragraphs(
            [
                f"The best of the evaluated epochs was {best['epoch'] + 1} with {best_top1:.1f} %; it was chosen on "
                f"the split `{best['selected_on']}`, and is not the result."
            ]
        )
    if group.paper:
        section.heading("Beside the paper")
        section.table(["", *COLUMNS], *_beside_the_paper(group))
        section.paragraphs(differences(group))
    section.paragraphs(run.notes)
    illustrations = run_figures(run.history, run.metrics)
    if run.analysis is not None:
        # The analysis has the same figure, of the same numbers.
        illustrations = [figure for figure in illustrations if figure.name != "shot_groups"]
        illustrations += analysis_figures(run.analysis)
    for illustration in illustrations:
        section.figure(illustration)
    if run.analysis is None:
        section.paragraphs(["`mbib analyze` of the run adds posteriors, distances, t-SNE, calibration and costs."])
    return section


def _facts(group: RunGroup) -> list[tuple[str, str]]:
    run = group.first
    counts = np.array(run.metrics["class_counts"])
    environment = run.metrics["environment"]
    papers = list(dict.fromkeys(filter(None, (METHODS[stage].citation for stage in run.metrics["stages"]))))
    seeds = ", ".join(str(member.metrics["seed"]) for member in group.runs)
    hours = statistics.mean(member.metrics["training_seconds"] for member in group.runs) / 3600
    epochs = " + ".join(str(stage.epochs) for stage in run.recipe.chain())
    if group.is_short:
        epochs += f" of the {group.recipe_epochs} that the recipe asks for: compares with no other schedule"
    settings = ", ".join(f"`{key}` {value}" for key, value in group.settings.items())
    return [
        ("model", f"`{run.metrics['model']}`"),
        ("method", stages_text(run.metrics) + (f" ({'; '.join(papers)})" if papers else "")),
        (
            "training data",
            f"{counts.sum():,} images in {len(counts):,} classes, {counts.max()} to {counts.min()} per class",
        ),
        ("epochs", epochs),
        *([("set otherwise than in the recipe", settings)] if settings else []),
        ("seeds", f"{seeds} (n = {len(group.runs)})"),
        ("time", f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"),
        ("hardware", f"{environment['hardware']} ({environment['device']})"),
        (
            "software",
            ", ".join(f"{name} {environment[name]}" for name in ("mbib_timm", "torch", "timm"))
            + f", commit {environment['commit'] or 'unknown'}",
        ),
    ]


def _beside_the_paper(group: RunGroup) -> tuple[list[list[str]], list[str]]:
    """Return the rows of the table, and the kind of each."""
    rows = [[f"this run (n = {len(group.runs)})", *(mean_and_deviation(group.values(column)) for column in COLUMNS)]]
    kinds = [""]
    for result in group.paper:
        setting = f", {result.setting}" if result.setting else ""
        numbers = [result.accuracies.get(column) for column in COLUMNS]
        means = [group.mean(column) for column in COLUMNS]
        rows.append([f"{result.source}{setting}", *("–" if n is None else f"{n:.1f}" for n in numbers)])
        kinds.append("paper")
        if not group.is_short:
            pairs = zip(means, numbers, strict=True)
            rows.append(["difference", *("–" if n is None or m is None else signed(m - n) for m, n in pairs)])
            kinds.append("difference")
    return rows, kinds


def comparison_section(groups: Sequence[RunGroup]) -> Section:
    """Return runs of several recipes side by side."""
    section = Section("Side by side")
    rows = []
    for group in groups:
        number = group.paper[0] if group.is_papers else None
        paper = "–" if number is None else f"{number.accuracies['overall']:.1f} ({number.source})"
        mean = group.mean("overall")
        difference = "–" if number is None or mean is None else signed(mean - number.accuracies["overall"])
        epochs = str(group.epochs) + (f" of {group.recipe_epochs}" if group.is_short else "")
        accuracies = [mean_and_deviation(group.values(column)) for column in COLUMNS]
        rows.append([group.title, epochs, str(len(group.runs)), *accuracies, paper, difference])
    section.table(["run", "epochs", "n", *COLUMNS, "paper", "difference"], rows)
    section.figure(
        Illustration(
            "accuracy",
            "Accuracy by shot group",
            "Each colour is a run, and bars are means over its seeds with their standard deviation; diamonds are the "
            "paper's numbers, where recipe and schedule are the paper's.",
            partial(comparison_bars, groups),
        )
    )
    if any(row.get("val_top1") is not None for group in groups for row in group.first.history):
        section.figure(
            Illustration(
                "curves",
                "Accuracy over the epochs",
                "Each line is the first run of a colour; where lines cross, an earlier stop would have told another "
                "story.",
                partial(comparison_curves, groups),
            )
        )
    analyses = [group.first.analysis for group in groups if group.first.analysis is not None]
    for place, other in enumerate(analyses[1:], start=1):
        if analyses[0]["class_counts"] == other["class_counts"]:
            for illustration in comparison_figures(analyses[0], other):
                section.figure(replace(illustration, name=f"{illustration.name}-{place}"))
    return section


def sweep_section(results: SweepResults) -> Section:
    """Return what a sweep has found: its figure, its table, its curves, and by which commands."""
    section = Section(headline(results))
    section.paragraphs(text.replace("**", "") for text in what_was_run(results))
    section.figure(
        Illustration(
            "figure",
            results.title or results.name,
            _how_to_read(results),
            partial(sweep_figure, results),
        )
    )
    rows = cells(results)
    section.table(header(results), [table_row(results, row) for row in rows])
    section.paragraphs(filter(None, [closest_to_the_paper(results, rows)]))
    section.paragraphs(f"Failed: {label}: {reason}" for label, reason in results.failed.items())
    configurations = {run["configuration"] for run in results.runs}
    if len(configurations) <= CURVES:
        section.figure(
            Illustration(
                "curves",
                "Accuracy over the epochs",
                "Each line is a configuration, the mean over its seeds after each evaluated epoch; the last point is "
                "the result.",
                partial(sweep_curves, results),
            )
        )
    section.heading("Commands")
    for command in dict.fromkeys(_command(run["environment"]) for run in results.runs):
        section.command(command)
    return section


def _command(environment: dict[str, Any]) -> str:
    return f"{environment['command']}  # commit {environment['commit'] or 'unknown'}, torch {environment['torch']}"


def _how_to_read(results: SweepResults) -> str:
    seeds = "means over the seeds with their standard deviation" if len(results.seeds) > 1 else "of one seed"
    kind = results.figure["kind"]
    if kind == "heatmap":
        return f"Each cell is the accuracy of a pair of values, {seeds}; the brighter the better."
    if kind == "lines":
        return f"Points are {seeds}; a line that rises and falls has its best value inside the range."
    beside = ""
    if results.is_papers:
        beside = ", and diamonds are the paper's numbers"
    elif results.is_short or results.settings or results.paper is not None:
        beside = ", and none of them compares with the paper"
    return f"Bars are {seeds}{beside}; higher is better."
