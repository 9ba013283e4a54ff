"""Runs side by side: apart where they were not trained alike, with what was found, tables and figures."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from mbib_timm.analysis.analysis_record import Analysis, comparison_figures, read_analysis
from mbib_timm.drawing import Illustration
from mbib_timm.reporting.differences import known_differences
from mbib_timm.reporting.findings import evaluated_alike
from mbib_timm.reporting.report_figures import comparison_bars, comparison_curves
from mbib_timm.reporting.sections import SEEDS, Section
from mbib_timm.reporting.short_titles import epochs_of, short_titles
from mbib_timm.reporting.training_setups import capitalised, differing_settings, setup_names
from mbib_timm.results.columns import COLUMNS, macro_is_overall
from mbib_timm.results.record import HeadMetrics, is_averaged
from mbib_timm.results.runs import RunGroup
from mbib_timm.results.tables import (
    NOTHING,
    difference,
    from_weights,
    mean_and_deviation,
    percent,
    shown_columns,
    split_by_start,
    tables_by_start,
)
from mbib_timm.sweeps.sweep_results import SweepResults

NOT_ALIKE = (
    "Not all of these runs were trained alike: the next table has the settings that differ. Compare methods only among "
    "runs that were trained alike: between the columns of this table, a difference in accuracy says nothing of the "
    "methods."
)


def comparison_section(groups: Sequence[RunGroup], sweeps: Sequence[SweepResults] = ()) -> Section:
    """Return runs of several recipes side by side: those from scratch, then those that started from weights, and of
    each those that were trained alike. `sweeps` are those of the report, see `known_differences`."""
    section = Section("Side by side")
    if not evaluated_alike(groups):
        section.paragraphs(
            "These runs were not evaluated on the same images, and so their numbers do not compare: each run's own "
            "section says on which."
        )
    names = setup_names(groups)
    several = len(set(names)) > 1
    if several:
        section.paragraphs(NOT_ALIKE)
        section.table(differing_settings(groups))
    parts: list[tuple[str, str, list[RunGroup]]] = []
    for said, kind in split_by_start(groups, lambda group: group.origin):
        own = {name: [group for group in kind if names[groups.index(group)] == name] for name in names}
        own = {name: members for name, members in own.items() if members}
        if len(own) < len(kind) or len(own) == 1:
            headings = [capitalised(name.phrase) * several for name in own]
            starts = [[group.origin for group in members] for members in own.values()]
            above = [said if origins[0].is_scratch else from_weights(origins) for origins in starts]
            parts += zip(above, headings, own.values(), strict=True)
        else:  # no two were trained alike, and a table each would show a row
            parts.append((said, "", kind))
    before = ""
    for place, (said, heading, members) in enumerate(parts, start=1):
        if said not in ("", before):
            section.paragraphs(said)
        before = said
        if heading:
            section.heading(heading)
        titles = short_titles(members, groups)
        _compare(section, members, titles, groups, f"-{place}" if len(parts) > 1 else "")
    if known := known_differences(groups, sweeps):
        section.heading("What is known to differ from the paper")
        section.paragraphs(*known)
    return section


def _compare(
    section: Section, groups: Sequence[RunGroup], titles: Sequence[str], of: Sequence[RunGroup], suffix: str
) -> None:
    """Add a table and the figures of runs of one kind, which end in a suffix; `of` are all groups of the section."""
    results = [run.record.result.prediction for group in groups for run in group.runs]
    # Fewer columns, so that the table fits the page.
    one_number = macro_is_overall((each.top1, each.macro) for each in results)
    columns = [*COLUMNS] if one_number else shown_columns(results)
    has_paper = any(group.is_papers for group in groups)
    rows = []
    for group, title in zip(groups, short_titles(groups, of, ("epochs", "precision")), strict=True):
        number = group.papers_number("overall")
        paper = NOTHING if number is None else f"{percent(number)} ({group.paper[0].source})"
        accuracies = [mean_and_deviation(group.values(column)) for column in columns]
        beside = [paper, difference(group.mean("overall"), number)] * has_paper
        cells = [title, epochs_of(group), group.first.precision, str(len(group.runs)), *accuracies, *beside]
        rows.append((group.origin, cells))
    papers = ["paper", "difference"] * has_paper
    for _, table in tables_by_start(["method", "epochs", "precision", "n", *columns, *papers], rows):
        section.table(table)
    section.paragraphs(*_uncertainty(results))
    reading = _how_to_read_bars(groups)
    bars = partial(comparison_bars, groups, titles)
    section.figure(Illustration(f"accuracy{suffix}", "Accuracy by shot group", reading, bars))
    histories = [run.history for group in groups for run in group.runs]
    if any(row.val is not None for history in histories for row in history):
        seeds = SEEDS * _has_several_seeds(groups)
        said = "; the legend says which weights a line is of" * any(map(is_averaged, histories))
        reading = f"Each line is a run{seeds}; where lines cross, the ranking depends on when training stops{said}."
        curves = partial(comparison_curves, groups, titles)
        section.figure(Illustration(f"curves{suffix}", "Accuracy over the epochs", reading, curves))
    analyzed = [
        (group, replace(analysis, name=title))
        for group, title in zip(groups, titles, strict=True)
        if (analysis := read_analysis(group.first.folder)) is not None
    ]
    for place, pair in enumerate(analyzed[1:], start=1):
        for illustration in _posterior_change(analyzed[0], pair):
            section.figure(replace(illustration, name=f"{illustration.name}{suffix}-{place}"))


def _posterior_change(first: tuple[RunGroup, Analysis], other: tuple[RunGroup, Analysis]) -> list[Illustration]:
    """Return the figures of two analyses of the same classes, and say that each is of one run, of which precision."""
    (group, analysis), (other_group, of_other) = first, other
    if (analysis.class_counts, analysis.class_names) != (of_other.class_counts, of_other.class_names):
        return []
    precisions = dict.fromkeys((other_group.first.precision, group.first.precision))
    other_precision = f", one in {' and one in '.join(precisions)}" * (len(precisions) > 1)
    said = f"These are single runs{other_precision}, so that the difference is not of the method alone."
    return [replace(each, reading=f"{each.reading} {said}") for each in comparison_figures(analysis, of_other)]


def _has_several_seeds(groups: Sequence[RunGroup]) -> bool:
    return any(len(group.runs) > 1 for group in groups)


def _how_to_read_bars(groups: Sequence[RunGroup]) -> str:
    means = ", and bars are means over its seeds with their standard deviation" if _has_several_seeds(groups) else ""
    papers = any(group.is_papers for group in groups)
    diamonds = "; diamonds are the paper's numbers, where recipe and schedule are the paper's" if papers else ""
    return f"Each row is a run{means}{diamonds}."


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
