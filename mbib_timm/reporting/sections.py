"""The sections of a report, from runs and sweeps, and the page that holds them."""

import base64
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup, escape

from mbib_timm.analysis.analysis_record import analysis_figures, comparison_figures, read_analysis, six_digits
from mbib_timm.drawing import DARK, Illustration, render
from mbib_timm.environment import Environment
from mbib_timm.errors import MbibError, first_line
from mbib_timm.evaluation.answer_files import ConfidentError, ConfusionMatrix, read_confusion, read_errors
from mbib_timm.files import printable
from mbib_timm.methods import METHODS, method_title
from mbib_timm.models.origin import origin_text
from mbib_timm.reporting.differences import differences
from mbib_timm.reporting.report_figures import (
    CURVES,
    MATRIX,
    comparison_bars,
    comparison_curves,
    confusion_figure,
    sweep_curves,
)
from mbib_timm.results.columns import COLUMNS, INTERVALS
from mbib_timm.results.record import HeadMetrics, RunRecord, is_averaged
from mbib_timm.results.redact import redact_text
from mbib_timm.results.run_figures import run_figures
from mbib_timm.results.run_text import (
    before_finish_text,
    broken_lines,
    chosen_text,
    epochs_text,
    extended_text,
    left_out_text,
    raw_text,
    stages_text,
    time_text,
)
from mbib_timm.results.runs import FinishedRun, RunGroup
from mbib_timm.results.tables import (
    STARTED,
    Table,
    difference,
    mean_and_deviation,
    percent,
    shown_columns,
    split_by_start,
    table_by_head,
    tables_by_start,
)
from mbib_timm.sweeps.show_sweep import closest_to_the_paper, sweep_figure, sweep_table, what_was_run
from mbib_timm.sweeps.sweep_results import SweepResults, cells, headline, listed

CONFUSED = 15  # pairs of classes in a table
SEEDS = ", thin for each seed where there are several, and thick for their mean"  # of a line


@dataclass(frozen=True)
class DrawnFigure:
    """A figure as SVG on light and on dark paper, with its title and how to read it."""

    title: str
    reading: str
    light: bytes
    dark: bytes


@dataclass(frozen=True)
class Block:
    """A piece of a section: its kind, which the template knows, and what it shows."""

    kind: str
    content: str | Sequence[tuple[str, str]] | Sequence[ConfidentError] | Table | DrawnFigure


@dataclass
class Section:
    """A part of the page, and what it shows.

    Attributes:
        title: above it, and in the table of contents.
        anchor: name for links, and of the section's figures' files.
        blocks: one after another. Text is plain, with code in back quotes.
        figures: that were added, with the files that were drawn of them.
    """

    title: str
    anchor: str = ""
    blocks: list[Block] = field(default_factory=list)
    figures: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.anchor = self.anchor or re.sub(r"[^\w.]+", "-", self.title).strip("-")

    def heading(self, text: str) -> None:
        """Add a heading within the section."""
        self.blocks.append(Block("heading", text))

    def paragraphs(self, texts: Iterable[str]) -> None:
        """Add paragraphs."""
        self.blocks.extend(Block("paragraph", text) for text in texts)

    def command(self, text: str) -> None:
        """Add a command line."""
        self.blocks.append(Block("command", text))

    def facts(self, facts: Sequence[tuple[str, str]]) -> None:
        """Add terms and what they stand for."""
        self.blocks.append(Block("facts", facts))

    def table(self, table: Table) -> None:
        """Add a table that slides where the page is narrow; a row's kind is ``paper``, ``difference`` or empty."""
        self.blocks.append(Block("table", table))

    def gallery(self, errors: Sequence[ConfidentError]) -> None:
        """Add small images of errors, with what they are and what they were taken for; of paths the last part alone."""
        self.blocks.append(Block("gallery", [replace(error, image=redact_text(error.image)) for error in errors]))

    def figure(self, illustration: Illustration) -> None:
        """Draw a figure, in light and in dark, and add it with how to read it.

        Raises:
            MbibError: matplotlib is not installed, or the numbers are such that nothing can be drawn of them.
        """
        try:
            drawn = render(illustration.draw, ("png", "pdf", "svg"))
            dark = render(illustration.draw, ("svg",), DARK)["svg"]
        except MbibError:
            raise
        except Exception as error:  # of files that hold what no command writes
            raise MbibError(
                f"{self.title}: the figure {illustration.title!r} cannot be drawn: {first_line(error)}"
            ) from None
        self.figures[illustration.name] = {form: drawn[form] for form in ("png", "pdf")}
        self.blocks.append(Block("figure", DrawnFigure(illustration.title, illustration.reading, drawn["svg"], dark)))


def render_page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """Return the page: one HTML file without network and script, light and dark. Whatever is text is escaped.

    Args:
        title: of the page.
        lead: paragraph under it.
        sections: its parts, each with an anchor of its own.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mbib_timm.reporting", "."),
        autoescape=True,
        finalize=_finalize,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"inline": inline, "breakable": _breakable, "data_url": _data_url}
    return environment.get_template("report.html.j2").render(title=title, lead=lead, sections=sections)


def _finalize(value: object) -> object:
    """Return what a template shows: names are somebody else's."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def inline(text: str) -> Markup:
    """Return text as HTML: escaped, and with ``<code>`` for what stands in back quotes."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(printable(text)))))


def _breakable(text: str) -> Markup:
    """Return a text, or its HTML, as HTML that may break after the underscores and dots of names."""
    html = text if isinstance(text, Markup) else escape(printable(text))
    return Markup(re.sub(r"([_.])(?=[^\W\d])", r"\1<wbr>", str(html)))


def _data_url(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


def give_unique_anchors(sections: Sequence[Section]) -> None:
    """End the anchors of sections that are alike in the section's place."""
    names = [section.anchor for section in sections]
    for place, section in enumerate(sections, start=1):
        if names.count(section.anchor) > 1:
            section.anchor += f"-{place}"


def run_section(group: RunGroup) -> Section:
    """Return what is to be said of runs of one recipe: what they were, results, distance from the paper, figures."""
    section = Section(group.title)
    run = group.first
    section.facts(_facts(group))
    section.command(run.record.environment.command)

    section.heading("Result")
    result, best = run.record.result, run.record.best
    when = method_title(run.record.method) if result.epoch is None else f"epoch {result.epoch}, the last"
    spread = f": mean ± sample standard deviation over n = {len(group.runs)} seeds" if len(group.runs) > 1 else ""
    images = result.prediction.images
    section.paragraphs([f"In percent on {images:,} images of the split `{result.split}` after {when}{spread}."])
    label = f"95 % interval, seed {run.record.seed}" if len(group.runs) > 1 else ""
    section.table(table_by_head(run.heads, lambda head, column: mean_and_deviation(group.values(column, head)), label))
    section.paragraphs([INTERVALS])
    for member in group.runs:
        if chosen := chosen_text(member.record):
            section.paragraphs([f"{chosen} (seed {member.record.seed})."])
        if raw := raw_text(member.record):
            section.paragraphs([f"{raw} (seed {member.record.seed})."])
    if best is not None:
        section.paragraphs(
            [
                f"The best of the evaluated epochs was {best.epoch} with {best.prediction.top1:.1f} %"
                f"{before_finish_text(run.record)}; it was chosen on the split `{best.split}`, and is not the result."
            ]
        )
    if group.paper:
        section.heading("Beside the paper")
        section.table(_beside_the_paper(group))
        section.paragraphs(differences(group))
    section.paragraphs(run.notes)
    others = [member.history for member in group.runs[1:]]
    illustrations, analysis = run_figures(run.history, run.record, others), read_analysis(run.folder)
    if analysis is not None:
        of_analysis = analysis_figures(analysis)
        found, reported = ({head: each.accuracies() for head, each in of.heads.items()} for of in (analysis, run))
        if found == six_digits(reported):
            # The analysis has the same figure, of the same numbers.
            illustrations = [figure for figure in illustrations if figure.name != "shot_groups"]
        else:
            section.paragraphs(
                [
                    f"The figures from `{of_analysis[0].title}` on are of the analysis, in float32 on "
                    f"{analysis.images:,} images of the split `{analysis.split}`; those before, and the tables, are of "
                    f"the result, in {run.precision} on {images:,} images of the split `{result.split}`."
                ]
            )
        illustrations += of_analysis
        if analysis.trained_on:
            section.paragraphs([f"In the analysis, {analysis.trained_on}."])
    for illustration in illustrations:
        section.figure(illustration)
    _errors(section, group)
    if analysis is None:
        section.paragraphs(["`mbib analyze` of the run adds posteriors, distances, t-SNE, calibration and costs."])
    return section


def _errors(section: Section, group: RunGroup) -> None:
    """Add which classes the first run takes for one another, and its most confident errors, where it has left them."""
    run = group.first
    of_seed = f" (seed {run.record.seed})" if len(group.runs) > 1 else ""
    matrix, errors = read_confusion(run.folder), read_errors(run.folder)
    if matrix is not None and len(run.record.class_counts) <= MATRIX and len(matrix.names) > 1:
        section.figure(
            Illustration(
                "confusion_matrix",
                f"Confusion matrix{of_seed}",
                "Rows are true classes and columns predictions; a cell counts the images of its row that are predicted "
                "as its column, and is darker the larger its share of the row. The diagonal is correct. Classes go "
                "from the most to the fewest training images.",
                partial(confusion_figure, matrix, np.array(run.record.class_counts)),
            )
        )
    elif matrix is not None and len(rows := _confused(matrix)):
        section.heading("Most confused classes")
        section.paragraphs([f"The pairs of classes with the most errors{of_seed}; all are in `confusion.csv`."])
        section.table(Table(["class", "taken for", "images", "of the class, %"], rows))
    if errors:
        section.heading("Most confident errors")
        section.paragraphs(
            [
                f"The wrong predictions with the highest probability{of_seed}, each with the true class. All "
                "predictions are in `predictions.csv`."
            ]
        )
        section.gallery(errors)


def _confused(matrix: ConfusionMatrix) -> list[list[str]]:
    """Return a row for each of the pairs of classes with the most errors."""
    total = np.bincount(matrix.rows, weights=matrix.images, minlength=len(matrix.names))
    wrong = np.flatnonzero(matrix.rows != matrix.columns)
    cells = [
        (matrix.images[i], matrix.images[i] / total[matrix.rows[i]], matrix.rows[i], matrix.columns[i]) for i in wrong
    ]
    return [
        [matrix.names[row], matrix.names[column], f"{images:,}", f"{100 * share:.1f}"]
        for images, share, row, column in sorted(cells, key=lambda cell: (-cell[0], -cell[1], *cell[2:]))[:CONFUSED]
    ]


def _facts(group: RunGroup) -> list[tuple[str, str]]:
    run = group.first
    counts = np.array(run.record.class_counts)
    environment = run.record.environment
    papers = list(dict.fromkeys(filter(None, (METHODS[stage].citation for stage in run.record.stages))))
    seeds = ", ".join(str(member.record.seed) for member in group.runs)
    epochs = _epochs(run)
    if group.is_short:
        epochs += f" of the {group.recipe_epochs} that the recipe asks for: not comparable with another schedule"
    settings = ", ".join(f"`{key}` {value}" for key, value in group.settings.items())
    return [
        ("model", f"`{run.record.model}`"),
        ("method", stages_text(run.record.stages) + (f" ({'; '.join(papers)})" if papers else "")),
        (
            "training data",
            f"{counts.sum():,} images in {len(counts):,} classes, {counts.max()} to {counts.min()} per class",
        ),
        *([("held out", run.record.held_out)] if run.record.held_out else []),
        *([("trained on before", run.record.trained_before)] if run.record.trained_before else []),
        *([("left out", left_out_text(run.record))] if run.record.left_out else []),
        *([("broken images", "; ".join(broken))] if (broken := broken_lines(run.record)) else []),
        ("epochs", epochs),
        *([] if run.origin.is_scratch else [(STARTED, f"{origin_text(run.origin)}. {run.overlap}".strip())]),
        *([("changed from the recipe", settings)] if settings else []),
        ("seeds", f"{seeds} (n = {len(group.runs)})"),
        ("time", time_text([member.record for member in group.runs])),
        ("hardware", environment.machine),
        (
            "software",
            f"{environment.versions}, commit {environment.commit or 'unknown'}",
        ),
    ]


def _epochs(run: FinishedRun) -> str:
    """Return the epochs of a run's stages, and how it came by them, where not from the start."""
    epochs, extended = epochs_text(run.recipe), extended_text(run.record)
    return f"{epochs} ({extended})" if extended else epochs


def _beside_the_paper(group: RunGroup) -> Table:
    rows = [[f"this run (n = {len(group.runs)})", *(mean_and_deviation(group.values(column)) for column in COLUMNS)]]
    kinds = [""]
    for result in group.paper:
        setting = f", {result.setting}" if result.setting else ""
        numbers = [result.accuracies.get(column) for column in COLUMNS]
        means = [group.mean(column) for column in COLUMNS]
        rows.append([f"{result.source}{setting}", *map(percent, numbers)])
        kinds.append("paper")
        if not group.is_short:
            rows.append(["difference", *map(difference, means, numbers)])
            kinds.append("difference")
    return Table(["", *COLUMNS], rows, kinds)


def comparison_section(groups: Sequence[RunGroup]) -> Section:
    """Return runs of several recipes side by side: those from scratch, then those that started from weights."""
    section = Section("Side by side")
    if not _evaluated_alike([run.record for group in groups for run in group.runs]):
        section.paragraphs(
            [
                "These runs were not evaluated on the same images, and so their numbers do not compare: each run's own "
                "section says on which."
            ]
        )
    kinds = split_by_start(groups, lambda group: group.origin)
    for place, (said, kind) in enumerate(kinds):
        section.paragraphs([said] if said else [])
        _compare(section, kind, f"-{place + 1}" if len(kinds) > 1 else "")
    return section


def _evaluated_alike(records: Sequence[RunRecord]) -> bool:
    """Return whether results are on the same images, as far as their records say: older ones say less."""
    results = [(record, record.result.prediction) for record in records]
    said: list[list[Any]] = [
        [(result.images, record.held_out) for record, result in results],
        [result.class_images for _, result in results if result.class_images],
        [record.class_names for record in records if record.class_names],
    ]
    return all(each == values[0] for values in said for each in values)


def _compare(section: Section, groups: Sequence[RunGroup], suffix: str) -> None:
    """Add a table and the figures of runs of one kind, which end in a suffix: all from scratch, or none."""
    results = [run.record.result.prediction for group in groups for run in group.runs]
    # Where classes have equally many images, overall and macro are one number, and the table is as wide as the page.
    balanced = all(each.macro is not None and abs(each.macro - each.top1) < 1e-3 for each in results)
    columns = [*COLUMNS] if balanced else shown_columns(results)
    rows = []
    for group in groups:
        result = group.paper[0] if group.is_papers else None
        number = None if result is None else result.accuracies.get("overall")
        paper = percent(number) if result is None or number is None else f"{percent(number)} ({result.source})"
        epochs = _epochs(group.first) + (f" of {group.recipe_epochs}" if group.is_short else "")
        accuracies = [mean_and_deviation(group.values(column)) for column in columns]
        beside = [paper, difference(group.mean("overall"), number)] if group.origin.is_scratch else []
        method = stages_text(group.first.record.stages)
        rows.append((group.origin, [group.title, method, epochs, str(len(group.runs)), *accuracies, *beside]))
    papers = ["paper", "difference"] if groups[0].origin.is_scratch else []
    for _, table in tables_by_start(["run", "method", "epochs", "n", *columns, *papers], rows):
        section.table(table)
    section.paragraphs(_uncertainty(results))
    section.figure(
        Illustration(
            f"accuracy{suffix}",
            "Accuracy by shot group",
            _how_to_read_bars(groups),
            partial(comparison_bars, groups),
        )
    )
    histories = [run.history for group in groups for run in group.runs]
    if any(row.val is not None for history in histories for row in history):
        seeds = SEEDS * _has_several_seeds(groups)
        said = "; the legend says which weights a line is of" * any(map(is_averaged, histories))
        section.figure(
            Illustration(
                f"curves{suffix}",
                "Accuracy over the epochs",
                f"Each line is a run{seeds}; where lines cross, the ranking depends on when training stops{said}.",
                partial(comparison_curves, groups),
            )
        )
    analyses = [analysis for group in groups if (analysis := read_analysis(group.first.folder)) is not None]
    for place, other in enumerate(analyses[1:], start=1):
        first = analyses[0]
        if (first.class_counts, first.class_names) == (other.class_counts, other.class_names):
            for illustration in comparison_figures(first, other):
                section.figure(replace(illustration, name=f"{illustration.name}{suffix}-{place}"))


def _has_several_seeds(groups: Sequence[RunGroup]) -> bool:
    return any(len(group.runs) > 1 for group in groups)


def _how_to_read_bars(groups: Sequence[RunGroup]) -> str:
    means = ", and bars are means over its seeds with their standard deviation" if _has_several_seeds(groups) else ""
    papers = any(group.is_papers for group in groups)
    diamonds = "; diamonds are the paper's numbers, where recipe and schedule are the paper's" if papers else ""
    return f"Each colour is a run{means}{diamonds}."


def _uncertainty(results: Sequence[HeadMetrics]) -> list[str]:
    """Return a sentence on how far overall accuracy's widest interval reaches; none where there is none."""
    intervals = [(result.top1, interval) for result in results if (interval := result.interval("overall")) is not None]
    reaches = [max(top1 - low, high - top1) for top1, (low, high) in intervals]
    if not reaches:
        return []
    return [
        f"The limited number of evaluated images alone leaves overall accuracy uncertain by up to {max(reaches):.1f} "
        "points (95 % interval); the difference between training runs comes on top."
    ]


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
    section.table(sweep_table(results, rows))
    section.paragraphs(filter(None, [closest_to_the_paper(results, rows)]))
    section.paragraphs(f"Failed: {label}: {reason}" for label, reason in results.failed.items())
    configurations = {run.configuration for run in results.runs}
    if len(configurations) <= CURVES:
        seeds = SEEDS * (len(results.runs) > len(configurations))
        section.figure(
            Illustration(
                "curves",
                "Accuracy over the epochs",
                f"Each line is a configuration after each evaluated epoch{seeds}; {_last_point(results)}.",
                partial(sweep_curves, results),
            )
        )
    section.heading("Commands")
    for command in dict.fromkeys(_command(run.environment) for run in results.runs):
        section.command(command)
    return section


def _last_point(results: SweepResults) -> str:
    """Return what the last points of a sweep's curves are, beside its results."""
    last = [(run.curve.val_top1[-1:], run.heads["prediction"]["overall"]) for run in results.runs]
    if all(point == [result] for point, result in last):
        return "the last point is the result"
    splits = listed(list(dict.fromkeys(run.split for run in results.runs)))
    return f"the last point is not the result, which is on split {splits}"


def _command(environment: Environment) -> str:
    return f"{environment.command}  # commit {environment.commit or 'unknown'}, torch {environment.torch}"


def _how_to_read(results: SweepResults) -> str:
    seeds = "means over the seeds with their standard deviation" if len(results.seeds) > 1 else "of one seed"
    kind = results.figure["kind"]
    if kind == "heatmap":
        return f"Each cell is the accuracy of a pair of values, {seeds}; brighter is better."
    if kind == "lines":
        return f"Points are {seeds}; a line that rises and then falls has its best value inside the range."
    beside = ""
    if results.is_papers:
        beside = ", and diamonds are the paper's numbers"
    elif results.is_short or results.settings or results.paper is not None:
        beside = ", and none is comparable with the paper"
    return f"Bars are {seeds}{beside}; higher is better."
