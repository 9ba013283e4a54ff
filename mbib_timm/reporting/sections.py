"""The sections of a report, from runs and sweeps, and the page that holds them."""

import base64
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import jinja2
import numpy as np
from markupsafe import Markup, escape

from mbib_timm.analysis.analysis_record import analysis_figures, read_analysis, six_digits
from mbib_timm.drawing import DARK, Illustration, render
from mbib_timm.environment import Environment
from mbib_timm.errors import MbibError, first_line
from mbib_timm.evaluation.answer_files import ConfidentError, ConfusionMatrix, read_confusion, read_errors
from mbib_timm.files import printable
from mbib_timm.methods import METHODS, method_title
from mbib_timm.models.head_outputs import labelled_heads
from mbib_timm.models.origin import origin_text
from mbib_timm.reporting.differences import differences, known_differences
from mbib_timm.reporting.report_figures import CURVES, MATRIX, confusion_figure, sweep_curves
from mbib_timm.reporting.short_titles import epochs_of_run
from mbib_timm.results.columns import COLUMNS
from mbib_timm.results.record import RunRecord
from mbib_timm.results.redact import redact_text
from mbib_timm.results.run_figures import run_figures
from mbib_timm.results.run_text import (
    before_finish_text,
    broken_lines,
    chosen_text,
    left_out_text,
    other_best,
    raw_text,
    stages_text,
    time_text,
)
from mbib_timm.results.runs import RunGroup
from mbib_timm.results.tables import (
    STARTED,
    Table,
    difference,
    mean_and_deviation,
    percent,
    table_by_head,
)
from mbib_timm.sweeps.show_sweep import sweep_figure, sweep_table, what_was_run
from mbib_timm.sweeps.sweep_results import SweepResults, cells, listed

CONFUSED = 15  # pairs of classes in a table
FIGURE_TITLE = "mbib report: figure"  # in the files: another of such a name is not replaced
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
        folded: what its blocks are called where they show only when a reader opens them; empty for what always shows.
    """

    title: str
    anchor: str = ""
    blocks: list[Block] = field(default_factory=list)
    figures: dict[str, dict[str, bytes]] = field(default_factory=dict)
    folded: str = ""

    def __post_init__(self) -> None:
        self.anchor = self.anchor or re.sub(r"[^\w.]+", "-", self.title).strip("-")

    def heading(self, text: str) -> None:
        """Add a heading within the section."""
        self.blocks.append(Block("heading", text))

    def paragraphs(self, *texts: str) -> None:
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
            drawn = render(illustration.draw, ("png", "pdf", "svg"), title=FIGURE_TITLE)
            dark = render(illustration.draw, ("svg",), DARK)["svg"]
        except MbibError:
            raise
        except Exception as error:  # of files that hold what no command writes
            raise MbibError(
                f"{self.title}: the figure {illustration.title!r} cannot be drawn: {first_line(error)}"
            ) from None
        self.figures[illustration.name] = {form: drawn[form] for form in ("png", "pdf")}
        self.blocks.append(Block("figure", DrawnFigure(illustration.title, illustration.reading, drawn["svg"], dark)))


def render_page(title: str, lead: str, sections: Sequence[Section], outcome: Sequence[str] = ()) -> str:
    """Return the page: one HTML file without network and script, light and dark. Whatever is text is escaped.

    Args:
        title: of the page.
        lead: paragraph under it, on what the page is.
        sections: its parts, each with an anchor of its own.
        outcome: paragraphs on what was found, which come before all else.
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
    return environment.get_template("report.html.j2").render(title=title, lead=lead, sections=sections, outcome=outcome)


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


def run_section(group: RunGroup, title: str = "", alone: bool = True, sweeps: Sequence[SweepResults] = ()) -> Section:
    """Return what is to be said of runs of one recipe: what they were, results, distance from the paper, figures.

    Args:
        group: the runs.
        title: of the section; the group's by default.
        alone: no other section says what is known to differ from the paper.
        sweeps: of the report, see `known_differences`.
    """
    section = Section(title or group.title)
    run = group.first
    section.facts(_facts(group))
    for command in dict.fromkeys(member.record.environment.command for member in group.runs):
        section.command(command)
    if run.command_today:
        said = f"The command is as that version recorded it. Today, `{run.command_today}` trains this recipe."
        section.paragraphs(said)
    if run.command_lacks_data:
        section.paragraphs("The command is without the folder of the images: add `--data-dir FOLDER`.")

    section.heading("Result")
    result = run.record.result
    best = next(filter(None, (other_best(member.record) for member in group.runs)), None)
    when = method_title(run.record.method) if result.epoch is None else f"epoch {result.epoch}, the last"
    spread = f": mean ± sample standard deviation over n = {len(group.runs)} seeds" if len(group.runs) > 1 else ""
    images = result.prediction.images
    section.paragraphs(f"In percent on {images:,} images of the split `{result.split}` after {when}{spread}.")
    titles = labelled_heads(group.heads)

    def cell(head: str, column: str) -> str:
        return mean_and_deviation(group.values(column, head))

    section.table(table_by_head(group.heads, cell, titles=titles))
    for member in group.runs:
        if chosen := chosen_text(member.record):
            section.paragraphs(f"{chosen} (seed {member.record.seed}).")
        if raw := raw_text(member.record):
            section.paragraphs(f"{raw} (seed {member.record.seed}).")
    if best is not None:

        def of_record(record: RunRecord) -> str:
            own = other_best(record)
            return "the last" if own is None else f"{own.epoch} with {own.prediction.top1:.1f} %"

        epochs = _by_seed(group, of_record)
        section.paragraphs(
            f"The best of the evaluated epochs was {epochs}{before_finish_text(run.record)}; it was chosen on the "
            f"split `{best.split}`, and is not the result."
        )
    if group.paper:
        section.heading("Beside the paper")
        section.table(_beside_the_paper(group))
        section.paragraphs(*differences(group))
        if alone:
            section.paragraphs(*known_differences([group], sweeps))
    section.paragraphs(*run.notes)
    others = [member.history for member in group.runs[1:]]
    mean = replace(run.record, result=replace(result, heads=dict(group.heads)))
    illustrations, analysis = run_figures(run.history, mean, others), read_analysis(run.folder)
    if len(group.runs) > 1:
        said = f"Numbers are means over the {len(group.runs)} seeds."
        of_result = ("class_accuracy", "shot_groups")
        illustrations = [
            replace(each, reading=f"{each.reading} {said}") if each.name in of_result else each
            for each in illustrations
        ]
    of_heads = ("shot_groups", "accuracy_by_head") * (len(group.heads) == 1)  # whose accuracies the table has
    illustrations = [each for each in illustrations if each.name not in of_heads]
    if analysis is not None:
        of_analysis = [each for each in analysis_figures(analysis) if each.name not in of_heads]
        found, reported = ({head: each.accuracies() for head, each in of.heads.items()} for of in (analysis, group))
        if found == six_digits(reported):
            # The analysis has the same figure, of the same numbers.
            illustrations = [figure for figure in illustrations if figure.name != "shot_groups"]
        else:
            section.paragraphs(
                f"The figures from `{of_analysis[0].title}` on are of the analysis{_of_seed(group)}, in float32 on "
                f"{analysis.images:,} images of the split `{analysis.split}`; those before, and the tables, are of "
                f"the result, in {run.precision} on {images:,} images of the split `{result.split}`."
            )
        illustrations += of_analysis
        if analysis.trained_on:
            section.paragraphs(f"In the analysis, {analysis.trained_on}.")
    for illustration in illustrations:
        section.figure(illustration)
    _errors(section, group)
    if analysis is None:
        section.paragraphs("`mbib analyze` of the run adds posteriors, distances, t-SNE, calibration and costs.")
    return section


def _of_seed(group: RunGroup) -> str:
    """Return which seed what only the first run has is of; empty where there is one run."""
    return f" (seed {group.first.record.seed})" if len(group.runs) > 1 else ""


def _by_seed(group: RunGroup, say: Callable[[RunRecord], str]) -> str:
    """Return what is to be said of each run's record, with its seed where that is not the same for all."""
    said = [say(run.record) for run in group.runs]
    if len(set(said)) == 1:
        return said[0]
    return "; ".join(f"{text} (seed {run.record.seed})" for text, run in zip(said, group.runs, strict=True))


def _errors(section: Section, group: RunGroup) -> None:
    """Add which classes the first run takes for one another, and its most confident errors, where it has left them."""
    run = group.first
    of_seed = _of_seed(group)
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
        section.paragraphs(f"The pairs of classes with the most errors{of_seed}; all are in `confusion.csv`.")
        section.table(Table(["class", "taken for", "images", "of the class, %"], rows))
    if errors:
        section.heading("Most confident errors")
        section.paragraphs(
            f"The wrong predictions with the highest probability{of_seed}, each with the true class. All "
            "predictions are in `predictions.csv`."
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
    papers = list(dict.fromkeys(filter(None, (METHODS[stage].citation for stage in run.record.stages))))
    seeds = ", ".join(str(member.record.seed) for member in group.runs)
    epochs = epochs_of_run(run)
    if group.is_short:
        epochs += f" of the {group.recipe_epochs} that the recipe asks for: not comparable with another schedule"
    average = ", the mean of the seeds" * (len(group.runs) > 1)
    settings = ", ".join(f"`{key}` {value}" for key, value in group.settings.items())
    return [
        ("run", f"`{run.name}`"),
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
        ("precision", run.precision),
        ("time", time_text([member.record for member in group.runs]) + average),
        ("hardware", _by_seed(group, lambda record: record.environment.machine)),
        ("software", _by_seed(group, lambda record: _software(record.environment))),
    ]


def _software(environment: Environment) -> str:
    return f"{environment.versions}, commit {environment.commit or 'unknown'}"


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


def sweep_section(results: SweepResults) -> Section:
    """Return what a sweep has found: its figure, its table, its curves, and by which commands."""
    section = Section(": ".join(dict.fromkeys(filter(None, (results.name, results.title)))))
    section.paragraphs(*(text.replace("**", "") for text in what_was_run(results)))
    title, reading = results.title or results.name, _how_to_read(results)
    section.figure(Illustration("figure", title, reading, partial(sweep_figure, results)))
    rows = cells(results)
    section.table(sweep_table(results, rows))
    section.paragraphs(*(f"Failed: {label}: {reason}" for label, reason in results.failed.items()))
    configurations = {run.configuration for run in results.runs}
    if len(configurations) <= CURVES:
        seeds = SEEDS * (len(results.runs) > len(configurations))
        reading = f"Each line is a configuration after each evaluated epoch{seeds}; {_last_point(results)}."
        section.figure(Illustration("curves", "Accuracy over the epochs", reading, partial(sweep_curves, results)))
    section.heading("Commands")
    for command in dict.fromkeys(_command(run.environment) for run in results.runs):
        section.command(command)
    return section


def _last_point(results: SweepResults) -> str:
    """Return what the last points of a sweep's curves are, beside its results."""
    last = [(run.curve.val_top1[-1:], run.heads["prediction"]["overall"]) for run in results.runs]
    if all(point == [result] for point, result in last):
        return "the last point is the result"
    return f"the last point is not the result, which is on split {listed(run.split for run in results.runs)}"


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
