"""Runs side by side: apart where they were not trained alike, with what was found, tables and figures."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from mbib_timm.analysis.analysis_record import Analysis, comparison_figures, read_analysis
from mbib_timm.drawing import Illustration
from mbib_timm.recipe import KEYS, data_of
from mbib_timm.reporting.differences import known_differences
from mbib_timm.reporting.report_figures import comparison_bars, comparison_curves
from mbib_timm.reporting.sections import SEEDS, Section, epochs_of
from mbib_timm.results.columns import COLUMNS, macro_is_overall
from mbib_timm.results.record import HeadMetrics, RunRecord, is_averaged
from mbib_timm.results.redact import last_part
from mbib_timm.results.run_text import stages_text
from mbib_timm.results.runs import RunGroup
from mbib_timm.results.tables import (
    NOTHING,
    Table,
    difference,
    from_weights,
    mean_and_deviation,
    percent,
    shown_columns,
    split_by_start,
    tables_by_start,
)

NOT_ALIKE = (
    "These runs differ in more than their methods, as the next table says. Compare only runs of one training setup: "
    "between setups, a difference says nothing of the methods."
)


def setups(groups: Sequence[RunGroup]) -> list[int]:
    """Return for each group the number of its training setup, from 1: groups of a number were trained alike."""
    return _numbered([_setup(group) for group in groups])


def _setup(group: RunGroup) -> dict[str, Any]:
    """Return what runs of a number have in common: keys of recipes with their values."""
    return {"model": group.first.network, **group.first.training}


def _numbered(values: Sequence[Any]) -> list[int]:
    """Return for each value, which need not hash, the number of those that equal it, from 1 in order of appearance."""
    kinds: list[Any] = []
    for value in values:
        if value not in kinds:
            kinds.append(value)
    return [1 + kinds.index(value) for value in values]


def short_titles(groups: Sequence[RunGroup], of: Sequence[RunGroup] = (), in_columns: Sequence[str] = ()) -> list[str]:
    """Return names of groups for a reader: the method, and whatever else differs among them.

    Args:
        groups: to tell apart.
        of: all groups, whose training setups are numbered; `groups` when empty.
        in_columns: of ``epochs`` and ``precision`` what columns of their own say.
    """
    numbers = setups(of or groups)
    told = [
        {
            "method": stages_text(group.first.record.stages),
            "data": group.first.dataset.title if group.first.dataset else data_of(group.first.name),
            "model": group.first.network,
            "img_size": f"{group.first.training['img_size']} pixels",
            "setup": f"setup {numbers[(of or groups).index(group)]}",
            **_class_balance(group),
            "epochs": f"{epochs_of(group)} epochs",
            "precision": group.first.precision,
        }
        for group in groups
    ]
    differing = [key for key in told[0] if key != "method" and len({each[key] for each in told}) > 1]
    titles = []
    for group, each in zip(groups, told, strict=True):
        words = [each["method"], *(each[key] for key in differing if each[key] and key not in in_columns)]
        alone = told.count(each) == 1
        titles.append(", ".join(words) if alone else f"{', '.join(words)} ({_own_title(group)})")
    return titles


def _own_title(group: RunGroup) -> str:
    """Return the group's title, with the name of its folder where somebody has chosen that in place of the run's."""
    chosen, settings = group.first.experiment, group.title.removeprefix(group.first.name)
    return f"{chosen}{settings}".removesuffix(f" ({chosen})") if chosen else group.title


def _class_balance(group: RunGroup) -> dict[str, str]:
    """Return what the longest stage does for rare classes beside its method, in words; empty for nothing."""
    stage = group.first.longest_stage
    weights = "" if stage.class_weights == "none" else last_part(stage.class_weights)
    return {
        "class_weights": f"class weights {weights}" if weights else "",
        "sampler": f"sampler {stage.sampler}" if stage.sampler else "",
    }


def comparison_section(groups: Sequence[RunGroup]) -> Section:
    """Return runs of several recipes side by side: those from scratch, then those that started from weights, and of
    each those that were trained alike."""
    section = Section("Side by side")
    alike = _evaluated_alike([run.record for group in groups for run in group.runs])
    if not alike:
        section.paragraphs(
            [
                "These runs were not evaluated on the same images, and so their numbers do not compare: each run's own "
                "section says on which."
            ]
        )
    numbers = setups(groups)
    if max(numbers) > 1:
        section.paragraphs([NOT_ALIKE])
        section.table(_differing(groups, numbers))
    parts: list[tuple[str, str, list[RunGroup]]] = []
    for said, kind in split_by_start(groups, lambda group: group.origin):
        own = {number: [group for group in kind if numbers[groups.index(group)] == number] for number in numbers}
        own = {number: members for number, members in own.items() if members}
        if len(own) < len(kind) or len(own) == 1:
            headings = [f"Training setup {number}" * (max(numbers) > 1) for number in own]
            starts = [[group.origin for group in members] for members in own.values()]
            above = [said if origins[0].is_scratch else from_weights(origins) for origins in starts]
            parts += zip(above, headings, own.values(), strict=True)
        else:  # no two were trained alike, and a table each would show a row
            parts.append((said, "", kind))
    before = ""
    for place, (said, heading, members) in enumerate(parts, start=1):
        section.paragraphs([said] if said not in ("", before) else [])
        before = said
        if heading:
            section.heading(heading)
        titles = short_titles(members, groups)
        if alike:
            section.paragraphs(findings(members, titles))
        _compare(section, members, titles, groups, f"-{place}" if len(parts) > 1 else "")
    if known := known_differences(groups):
        section.heading("What is known to differ from the paper")
        section.paragraphs(known)
    return section


def _differing(groups: Sequence[RunGroup], numbers: Sequence[int]) -> Table:
    """Return the settings in which training setups differ, with their values in each."""
    kinds = [_setup(groups[numbers.index(number)]) for number in range(1, max(numbers) + 1)]
    rows = [
        [f"`{key}`: {KEYS[key].metadata['help']}", *(_value(kind[key]) for kind in kinds)]
        for key in kinds[0]
        if any(kind[key] != kinds[0][key] for kind in kinds)
    ]
    return Table(["setting", *(f"setup {number}" for number in range(1, max(numbers) + 1))], rows)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else f"{value}"


def findings(groups: Sequence[RunGroup], titles: Sequence[str]) -> list[str]:
    """Return what was found among the groups of each frame: see `FinishedRun.frame`."""
    frames = _numbered([group.first.frame for group in groups])
    said = []
    for frame in dict.fromkeys(frames):
        own = [place for place, number in enumerate(frames) if number == frame]
        said += _best([groups[place] for place in own], [titles[place] for place in own])
    return said


def _best(groups: Sequence[RunGroup], titles: Sequence[str]) -> list[str]:
    """Return which group has the best mean accuracy on all classes and on few-shot classes, and how far ahead it is."""
    said = []
    named = {id(group): f"{title} (n = {len(group.runs)})" for group, title in zip(groups, titles, strict=True)}
    for column, where in (("overall", "all classes"), ("few", "few-shot classes")):
        ranked = sorted(
            ((mean, group) for group in groups if (mean := group.mean(column)) is not None), key=lambda pair: -pair[0]
        )
        if len(ranked) < 2:
            continue
        (mean, best), *rest = ranked
        others = [pair for pair in rest if pair[1].first.record.stages != best.first.record.stages]
        number, other = (others or rest)[0]
        gap = difference(mean, number).lstrip("+−")
        if float(gap) == 0:
            said.append(f"On {where}, {named[id(best)]} and {named[id(other)]} are level with {percent(mean)} %.")
            continue
        text = (
            f"On {where}, {named[id(best)]} is best with {percent(mean)} %, {gap} points above "
            f"{'the best other method, ' * bool(others)}{named[id(other)]} with {percent(number)} %"
        )
        ours, theirs = (group.heads["prediction"].interval(column) for group in (best, other))
        if ours is not None and theirs is not None:
            (low, high), (other_low, other_high) = ours, theirs
            apart = "do not overlap" if other_high < low else "overlap"
            text += (
                f"; their 95 % intervals ({percent(low)} to {percent(high)}, and {percent(other_low)} to "
                f"{percent(other_high)}) {apart}"
            )
        said.append(f"{text}.")
    return said


def _evaluated_alike(records: Sequence[RunRecord]) -> bool:
    """Return whether results are on the same images, as far as their records say: older ones say less.

    Of the same data the same images may have been held out in two ways, such as by chance and by a table.
    """
    results = [(record, record.result.prediction) for record in records]
    digests = {record.inputs[-1].data if record.inputs else None for record in records}
    same_data = len(digests) == 1 and None not in digests
    said: list[list[Any]] = [
        [(result.images, None if same_data else record.held_out) for record, result in results],
        [result.class_images for _, result in results if result.class_images],
        [record.class_names for record in records if record.class_names],
    ]
    return all(each == values[0] for values in said for each in values)


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
        result = group.paper[0] if group.is_papers else None
        number = None if result is None else result.accuracies.get("overall")
        paper = percent(number) if result is None or number is None else f"{percent(number)} ({result.source})"
        accuracies = [mean_and_deviation(group.values(column)) for column in columns]
        beside = [paper, difference(group.mean("overall"), number) if number is not None else NOTHING] * has_paper
        cells = [title, epochs_of(group), group.first.precision, str(len(group.runs)), *accuracies, *beside]
        rows.append((group.origin, cells))
    papers = ["paper", "difference"] * has_paper
    for _, table in tables_by_start(["method", "epochs", "precision", "n", *columns, *papers], rows):
        section.table(table)
    section.paragraphs(_uncertainty(results))
    section.figure(
        Illustration(
            f"accuracy{suffix}",
            "Accuracy by shot group",
            _how_to_read_bars(groups),
            partial(comparison_bars, groups, titles),
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
                partial(comparison_curves, groups, titles),
            )
        )
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
