"""What was found: which of several methods is best, by how much, whether that is more than chance, and how far it is
from the paper, in sentences that the records allow."""

import statistics
from collections.abc import Sequence
from typing import Any

from mbib_timm.files import counted
from mbib_timm.models.origin import origin_text
from mbib_timm.reporting.short_titles import epochs_of, short_titles
from mbib_timm.reporting.training_setups import capitalised, data_title, numbered, setup_names, setups
from mbib_timm.results.record import RunRecord
from mbib_timm.results.run_text import stages_text
from mbib_timm.results.runs import RunGroup
from mbib_timm.results.tables import difference, percent

MOST = 3  # comparisons that the page opens with, and runs beside them
# Student's t that 95 % lie within, by degrees of freedom from 1; beyond, 1.96 + 2.4 / df is as good.
_STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)


def findings(groups: Sequence[RunGroup], titles: Sequence[str]) -> list[str]:
    """Return what was found among the groups of each frame: see `FinishedRun.frame`.

    Only runs in one precision are ranked, and the sentences say which others stand beside them.
    """
    said = []
    for own in _by_frame(groups):
        ranked = _comparable(own)
        named = {id(group): title for group, title in zip(groups, titles, strict=True)}
        said += _best(ranked, [named[id(group)] for group in ranked])
        beside = [f"{named[id(group)]} ({_runs(group)})" for group in own if all(group is not each for each in ranked)]
        if ranked and beside:
            verb = "is" if len(beside) == 1 else "are"
            said.append(
                f"Ranked are the runs in {ranked[0].first.precision}; {' and '.join(beside)} {verb} in another "
                f"precision, and {verb} beside them in the table."
            )
    return said


def _by_frame(groups: Sequence[RunGroup]) -> list[list[RunGroup]]:
    frames = numbered([group.first.frame for group in groups])
    return [
        [group for group, number in zip(groups, frames, strict=True) if number == frame]
        for frame in dict.fromkeys(frames)
    ]


def _comparable(groups: Sequence[RunGroup]) -> list[RunGroup]:
    """Return those groups of a frame that are in one precision, the one that most runs are in among those with the
    most to compare: several methods, or else several settings; none where every precision has one group."""
    by_precision: dict[str, list[RunGroup]] = {}
    for group in groups:
        by_precision.setdefault(group.first.precision, []).append(group)
    several = [own for own in by_precision.values() if len(own) > 1]
    of_methods = [own for own in several if len(_methods(own)) > 1]
    return max(of_methods or several, key=lambda own: sum(len(group.runs) for group in own), default=[])


def _methods(groups: Sequence[RunGroup]) -> list[str]:
    return list(dict.fromkeys(stages_text(group.first.record.stages) for group in groups))


def _first_two(groups: Sequence[RunGroup], column: str) -> list[tuple[float, RunGroup]]:
    """Return the group with the highest mean and the best of another method, or of other settings where there is one
    method alone; none where fewer than two have been measured."""
    ranked = sorted(
        ((mean, group) for group in groups if (mean := group.mean(column)) is not None), key=lambda pair: -pair[0]
    )
    if len(ranked) < 2:
        return []
    best, *rest = ranked
    others = [pair for pair in rest if pair[1].first.record.stages != best[1].first.record.stages]
    return [best, (others or rest)[0]]


def _best(groups: Sequence[RunGroup], titles: Sequence[str]) -> list[str]:
    """Return which group has the best mean accuracy on all classes and on few-shot classes, and how far ahead it is."""
    said = []
    named = {id(group): f"{title} (n = {len(group.runs)})" for group, title in zip(groups, titles, strict=True)}
    for column, where in (("overall", "all classes"), ("few", "few-shot classes")):
        if not (pairs := _first_two(groups, column)):
            continue
        (mean, best), (number, other) = pairs
        gap = _points(mean, number)
        if float(gap) == 0:
            said.append(f"On {where}, {named[id(best)]} and {named[id(other)]} are level with {percent(mean)} %.")
            continue
        is_other_method = other.first.record.stages != best.first.record.stages
        text = (
            f"On {where}, {named[id(best)]} is best with {percent(mean)} %, {gap} points above "
            f"{'the best other method, ' * is_other_method}{named[id(other)]} with {percent(number)} %"
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


def outcome(groups: Sequence[RunGroup]) -> list[str]:
    """Return what a report opens with, a paragraph for each set of runs that compare, in plain sentences.

    Each says which method is best, by how much, on what and over how many seeds; whether the difference is more than
    these seeds and images can tell; and how far the best is from the paper. Runs that nothing compares with are named
    after them.
    """
    frames = [own for own in map(_comparable, _by_frame(groups)) if own and evaluated_alike(_records(own))]
    frames = [own for own in frames if _first_two(own, "overall")]
    shown = sorted(frames, key=lambda own: -sum(len(group.runs) for group in own))[:MOST]
    said = [_ranking(own, groups, is_first=own is shown[0]) for own in shown]
    if len(frames) > len(shown):
        said.append(f"Further comparisons, below: {len(frames) - len(shown)}.")
    compared = {id(group) for own in frames for group in own}
    alone = [group for group in groups if id(group) not in compared]
    if alone:
        said.append(_unranked(alone, groups))
    return said


def _ranking(own: Sequence[RunGroup], groups: Sequence[RunGroup], is_first: bool) -> str:
    """Return what was found among runs that compare; what the first of several paragraphs says is not said again."""
    (mean, best), (number, other) = _first_two(own, "overall")
    titles = dict(zip(map(id, own), short_titles(own, own), strict=True))
    name, rival = titles[id(best)], titles[id(other)]
    methods = _methods(own)
    kinds = f"{len(methods)} methods" if len(methods) > 1 else f"{len(own)} settings of {methods[0]}"
    result = best.first.record.result
    images = f"the {result.prediction.images:,} images of the split `{result.split}`"
    where = _where(best, groups, is_first)
    gap = _points(mean, number)
    if float(gap) == 0:
        text = (
            f"{where}, {name} and {rival} are level, with the highest accuracy of {kinds}: each classifies "
            f"{percent(mean)} % of {images} correctly ({_runs(best)} and {_runs(other)})."
        )
    else:
        verdict = _chance(best, other, own, float(gap))
        text = (
            f"{where}, {name} has the highest accuracy of {kinds}: it classifies {percent(mean)} % of {images} "
            f"correctly ({_runs(best)}), {gap} points more than {rival} with {percent(number)} % ({_runs(other)}). "
            f"{verdict}"
        )
    few = _first_two(own, "few")
    if few and few[0][1] is not best and float(_points(few[0][0], few[1][0])) > 0:
        (high, first), (low, second) = few
        text += (
            f" On the few-shot classes{', which have fewer than 20 training images each,' * is_first} "
            f"{titles[id(first)]} is ahead: {percent(high)} % against {percent(low)} % of {titles[id(second)]}."
        )
    return f"{text}{_from_paper(own, best, titles)}"


def _where(group: RunGroup, groups: Sequence[RunGroup], is_first: bool = True) -> str:
    """Return on what data runs were trained, and how, as far as that is not the same for all of a report or short."""
    numbers, names = setups(groups), setup_names(groups)
    setup = names[numbers[list(groups).index(group)] - 1]
    words = [setup.phrase] * (len(names) > 1 and not setup.phrase.startswith("on "))
    words += [f"after {epochs_of(group)} epochs"] * (group.is_short or len({epochs_of(each) for each in groups}) > 1)
    words += [] if group.origin.is_scratch else [f"started from {origin_text(group.origin)}"]
    if is_first or not words or len({data_title(each) for each in groups}) > 1:
        words = [f"on {data_title(group) or 'the same data'}", *words]
    return capitalised(", ".join(words))


def _runs(group: RunGroup) -> str:
    return "one run" if len(group.runs) == 1 else f"mean of {counted(len(group.runs), 'run')}"


def _chance(best: RunGroup, other: RunGroup, own: Sequence[RunGroup], gap: float) -> str:
    """Return whether two groups' difference in points is more than seeds and images account for, in a sentence.

    The spread between seeds is taken to be the same for all methods of a comparison, and the images that two models are
    evaluated on to be drawn anew for each, which makes the uncertainty large rather than small.
    """
    seeds, images = _seeds_reach(best, other, own), _images_reach(best, other)
    reaches = [reach for reach in (seeds, images) if reach is not None]
    if not reaches:
        return "How much of this is chance, the records do not say."
    reach = sum(value**2 for value in reaches) ** 0.5
    is_larger = gap > float(percent(reach))
    if seeds is None:
        unknown = "with one run each it is not known how much other seeds would add"
        if is_larger:
            return f"That is more than the limited number of images explains ({percent(reach)} points); {unknown}."
        return (
            f"That is no clear difference: the limited number of images alone can account for up to {percent(reach)} "
            f"points by chance (95 %), and {unknown}."
        )
    sources = "seeds and images" if images is not None else "seeds"
    if is_larger:
        return f"That is more than chance accounts for with these {sources} (up to {percent(reach)} points, 95 %)."
    return (
        f"That is no clear difference: with so few {sources}, chance alone can account for up to {percent(reach)} "
        "points (95 %)."
    )


def _seeds_reach(best: RunGroup, other: RunGroup, own: Sequence[RunGroup]) -> float | None:
    """Return the points that the means of two groups may be apart by their seeds, 95 %; None where none has several."""
    values = [[value for value in group.values("overall") if value is not None] for group in own]
    several = [each for each in values if len(each) > 1]
    freedom = sum(len(each) - 1 for each in several)
    if not freedom:
        return None
    variance = sum(statistics.variance(each) * (len(each) - 1) for each in several) / freedom
    student = _STUDENT[freedom - 1] if freedom <= len(_STUDENT) else 1.96 + 2.4 / freedom
    return float(student * (variance * (1 / len(best.runs) + 1 / len(other.runs))) ** 0.5)


def _images_reach(best: RunGroup, other: RunGroup) -> float | None:
    """Return the points that two accuracies may be apart by the images evaluated, 95 %; None without intervals."""
    intervals = [group.heads["prediction"].interval("overall") for group in (best, other)]
    halves = [(high - low) / 2 for low, high in filter(None, intervals)]
    return float(sum(half**2 for half in halves) ** 0.5) if len(halves) == 2 else None


def _from_paper(own: Sequence[RunGroup], best: RunGroup, titles: dict[int, str]) -> str:
    """Return how far the best is from the paper's number, and the others from theirs; empty for what has none."""
    apart = {id(group): _paper_difference(group) for group in own}
    if not (of_best := apart[id(best)]):
        return ""
    source, number, points = of_best
    others = [found[2] for key, found in apart.items() if found and key != id(best)]
    said = f" The paper has {percent(number)} % for {titles[id(best)]} ({source}); ours is {_apart(points)}"
    if others:
        low, high = (f"{value:+.1f}".replace("-", "−") for value in (min(others), max(others)))
        span = f"{low} points" if low == high else f"{low} to {high} points"
        said += f", and {'the other is' if len(others) == 1 else 'the others are'} {span} from the paper's"
    return f"{said}."


def _paper_difference(group: RunGroup) -> tuple[str, float, float] | None:
    """Return the table, the paper's number and how far ours is from it in points; None where they do not compare."""
    number = group.paper[0].accuracies.get("overall") if group.is_papers else None
    mean = group.mean("overall")
    if number is None or mean is None:
        return None
    points = float(percent(mean)) - float(percent(number))
    return group.paper[0].source, number, round(points, 1)


def _apart(points: float) -> str:
    if points == 0:
        return "the same"
    return f"{abs(points):.1f} points {'above' if points > 0 else 'below'}"


def _unranked(alone: Sequence[RunGroup], groups: Sequence[RunGroup]) -> str:
    """Return the accuracies of runs that no other was trained like, with the paper's numbers."""
    titles = dict(zip(map(id, groups), short_titles(groups), strict=True))
    if len(groups) == 1:
        result = alone[0].first.record.result
        of = f" of {result.prediction.images:,} images of the split `{result.split}`"
        paper = f", {_beside_paper(alone[0])}" * bool(_paper_difference(alone[0]))
        mean = percent(alone[0].mean("overall"))
        name = titles[id(alone[0])]
        return f"{_where(alone[0], groups)}, {name} classifies {mean} %{of} correctly ({_runs(alone[0])}){paper}."
    listed = [
        f"{titles[id(group)]} with {percent(group.mean('overall'))} % "
        f"({'; '.join(filter(None, (_runs(group), _beside_paper(group))))})"
        for group in alone[:MOST]
    ]
    if len(alone) > len(listed):
        listed.append(f"{len(alone) - len(listed)} more, below")
    why = "trained with the same settings and precision and evaluated on the same images"
    if len(alone) == len(groups):
        return f"These runs are not ranked, because no two were {why}: {'; '.join(listed)}."
    return f"Not ranked, because no other run here was {why}: {'; '.join(listed)}."


def _beside_paper(group: RunGroup) -> str:
    """Return how far runs are from the paper's number; empty where they do not compare."""
    if not (found := _paper_difference(group)):
        return ""
    source, number, points = found
    return f"{_apart(points)}{' as' * (points == 0)} the paper's {percent(number)} % in {source}"


def _records(groups: Sequence[RunGroup]) -> list[RunRecord]:
    return [run.record for group in groups for run in group.runs]


def evaluated_alike(records: Sequence[RunRecord]) -> bool:
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


def _points(ours: float, theirs: float) -> str:
    return difference(ours, theirs).lstrip("+−")
