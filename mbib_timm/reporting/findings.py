"""What was found: which of several methods is best, by how much, whether chance could explain it, and how far it is
from the paper, in sentences that the records allow."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from mbib_timm.files import counted
from mbib_timm.models.origin import origin_text
from mbib_timm.reporting.short_titles import epochs_of, short_titles
from mbib_timm.reporting.training_setups import capitalised, data_title, setup_names
from mbib_timm.results.run_text import stages_text
from mbib_timm.results.runs import RunGroup
from mbib_timm.results.tables import difference, percent

MOST_SHOWN = 3  # comparisons that the page opens with, and runs that no other compares with
# Student's t that 95 % lie within, by degrees of freedom from 1.
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)


def outcome(groups: Sequence[RunGroup]) -> list[str]:
    """Return what a report opens with, a paragraph for each set of runs that compare, in plain sentences.

    Each says which method is best, by how much, on what and over how many seeds; whether chance could explain the
    difference; and how far the best is from the paper. Runs that no other compares with are named after them.
    """
    compared = [own for own in comparable_sets(groups) if _first_two(own, "overall")]
    shown = sorted(compared, key=lambda own: -sum(len(group.runs) for group in own))[:MOST_SHOWN]
    sentences = [_ranking(own, groups, is_first=own is shown[0]) for own in shown]
    if len(compared) > len(shown):
        more = counted(len(compared) - len(shown), "further comparison")
        sentences.append(f"The tables below have {more}.")
    ranked = {id(group) for own in compared for group in own}
    if unranked := [group for group in groups if id(group) not in ranked]:
        sentences.append(_unranked(unranked, groups))
    return sentences


def comparable_sets(groups: Sequence[RunGroup]) -> list[list[RunGroup]]:
    """Return the groups that share data, settings and precision, see `FinishedRun.frame`, and were evaluated on the
    same images as far as their records say."""
    sets: list[list[RunGroup]] = []
    for group in groups:
        for own in sets:
            same = (group.first.frame, group.first.precision) == (own[0].first.frame, own[0].first.precision)
            if same and evaluated_alike([*own, group]):
                own.append(group)
                break
        else:
            sets.append([group])
    return sets


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


def _ranking(own: Sequence[RunGroup], groups: Sequence[RunGroup], is_first: bool) -> str:
    """Return what was found among runs that compare; what the first of several paragraphs says is not said again."""
    (mean, best), (number, other) = _first_two(own, "overall")
    titles = dict(zip(map(id, own), short_titles(own, own), strict=True))
    name, rival = titles[id(best)], titles[id(other)]
    methods = list(dict.fromkeys(stages_text(group.first.record.stages) for group in own))
    kinds = f"{len(methods)} methods" if len(methods) > 1 else f"{len(own)} settings of {methods[0]}"
    result = best.first.record.result
    images = f"the {result.prediction.images:,} images of the split `{result.split}`"
    where, gap = _where(best, groups, is_first), _points(mean, number)
    if float(gap) == 0:
        text = (
            f"{where}, {name} and {rival} are level, with the highest accuracy of {kinds}: each classifies "
            f"{percent(mean)} % of {images} correctly ({_runs(best)} and {_runs(other)})."
        )
    else:
        text = (
            f"{where}, {name} has the highest accuracy of {kinds}: it classifies {percent(mean)} % of {images} "
            f"correctly ({_runs(best)}), {gap} points more than {rival} with {percent(number)} % ({_runs(other)}). "
            f"{_chance(best, other, own, float(gap), 'overall')}"
        )
    few = _first_two(own, "few")
    if few and few[0][1] is not best and float(gap := _points(few[0][0], few[1][0])) > 0:
        (high, first), (low, second) = few
        text += (
            f" On the few-shot classes{', which have fewer than 20 training images each,' * is_first} "
            f"{titles[id(first)]} is ahead: {percent(high)} % against {percent(low)} % of {titles[id(second)]}. "
            f"{_chance(first, second, own, float(gap), 'few')}"
        )
    return f"{text}{_from_paper(own, best, titles)}"


def _where(group: RunGroup, groups: Sequence[RunGroup], is_first: bool = True) -> str:
    """Return on what data runs were trained, and how, as far as that is not the same for all of a report or short."""
    names = setup_names(groups)
    setup = names[list(groups).index(group)]
    words = [setup.phrase] * (len(set(names)) > 1 and not setup.phrase.startswith("on "))
    words += [f"after {epochs_of(group)} epochs"] * (group.is_short or len({epochs_of(each) for each in groups}) > 1)
    words += [] if group.origin.is_scratch else [f"started from {origin_text(group.origin)}"]
    if is_first or not words or len({data_title(each) for each in groups}) > 1:
        words = [f"on {data_title(group) or 'the same data'}", *words]
    return capitalised(", ".join(words))


def _runs(group: RunGroup) -> str:
    return "one run" if len(group.runs) == 1 else f"mean of {counted(len(group.runs), 'run')}"


def _chance(best: RunGroup, other: RunGroup, own: Sequence[RunGroup], gap: float, column: str) -> str:
    """Return whether chance could explain two groups' difference in points, by seeds and images, in a sentence.

    The two methods are taken to have the same spread between seeds; where neither has several, it is that of the
    others. Images are taken to be drawn anew for each model, which overstates their part.
    """
    seeds, images = _reach_of_seeds(best, other, own, column), _reach_of_images(best, other, column)
    if seeds is None and images is None:
        return "Whether this is chance, the records do not say."
    reach = percent(math.hypot(seeds or 0.0, images or 0.0))
    if gap <= float(reach):
        verdict = "That is no clear difference"
    elif seeds is None:
        verdict = "That is more than the limited number of images explains"
    else:
        verdict = "That is more than chance makes likely"
    sources = " and ".join(["seeds"] * (seeds is not None) + ["images"] * (images is not None))
    unknown = "; how much other seeds would add is not known" * (seeds is None)
    unknown += "; the records do not say what the number of images adds" * (images is None)
    return f"{verdict}: of differences by chance, 95 % are within {reach} points with these {sources}{unknown}."


def _reach_of_seeds(best: RunGroup, other: RunGroup, own: Sequence[RunGroup], column: str) -> float | None:
    """Return the points that 95 % of differences by the seeds alone are within; None where their spread is unknown."""
    values = _of_several_seeds((best, other), column) or _of_several_seeds(own, column)
    freedom = sum(len(each) - 1 for each in values)
    variance = sum(statistics.variance(each) * (len(each) - 1) for each in values) / freedom if values else 0.0
    if not variance:
        return None
    return student(freedom) * math.sqrt(variance * (1 / len(best.runs) + 1 / len(other.runs)))


def _of_several_seeds(groups: Sequence[RunGroup], column: str) -> list[list[float]]:
    values = ([value for value in group.values(column) if value is not None] for group in groups)
    return [each for each in values if len(each) > 1]


def student(freedom: int) -> float:
    """Return Student's t that 95 % lie within, to a hundredth."""
    return STUDENT[freedom - 1] if freedom <= len(STUDENT) else 1.96 + 2.37 / freedom + 2.8 / freedom**2


def _reach_of_images(best: RunGroup, other: RunGroup, column: str) -> float | None:
    """Return the points that 95 % of differences by the images alone are within; None without intervals."""
    intervals = [group.heads["prediction"].interval(column) for group in (best, other)]
    halves = [(high - low) / 2 for low, high in filter(None, intervals)]
    return math.hypot(*halves) if len(halves) == 2 else None


def _from_paper(own: Sequence[RunGroup], best: RunGroup, titles: dict[int, str]) -> str:
    """Return how far the best is from the paper's number, and the others from theirs; empty for what has none."""
    apart = {id(group): _paper_difference(group) for group in own}
    if not (of_best := apart[id(best)]):
        return ""
    source, number, points = of_best
    others = [found[2] for key, found in apart.items() if found and key != id(best)]
    said = f" The paper has {percent(number)} % for {titles[id(best)]} ({source}); ours is {_apart(points)}"
    if others:
        low, high = difference(min(others), 0.0), difference(max(others), 0.0)
        span = f"{low} points" if low == high else f"{low} to {high} points"
        said += f", and {'the other is' if len(others) == 1 else 'the others are'} {span} from the paper's"
    return f"{said}."


def _paper_difference(group: RunGroup) -> tuple[str, float, float] | None:
    """Return the table, the paper's number and how far ours is from it in points; None where they do not compare."""
    number, mean = group.papers_number("overall"), group.mean("overall")
    if number is None or mean is None:
        return None
    points = float(percent(mean)) - float(percent(number))
    return group.paper[0].source, number, round(points, 1)


def _apart(points: float) -> str:
    if points == 0:
        return "the same"
    return f"{abs(points):.1f} points {'above' if points > 0 else 'below'}"


def _unranked(unranked: Sequence[RunGroup], groups: Sequence[RunGroup]) -> str:
    """Return the accuracies of runs that no other was trained like, with the paper's numbers."""
    titles = dict(zip(map(id, groups), short_titles(groups), strict=True))
    if len(groups) == 1:
        result = unranked[0].first.record.result
        of = f" of {result.prediction.images:,} images of the split `{result.split}`"
        paper = f", {_beside_paper(unranked[0])}" * bool(_paper_difference(unranked[0]))
        mean = percent(unranked[0].mean("overall"))
        name = titles[id(unranked[0])]
        return f"{_where(unranked[0], groups)}, {name} classifies {mean} %{of} correctly ({_runs(unranked[0])}){paper}."
    listed = [
        f"{titles[id(group)]} with {percent(group.mean('overall'))} % "
        f"({'; '.join(filter(None, (_runs(group), _beside_paper(group))))})"
        for group in unranked[:MOST_SHOWN]
    ]
    if len(unranked) > len(listed):
        listed.append(f"{len(unranked) - len(listed)} more, below")
    why = "trained with the same settings and precision and evaluated on the same images"
    if len(unranked) == len(groups):
        return f"These runs are not ranked, because no two were {why}: {'; '.join(listed)}."
    return f"Not ranked, because no other run here was {why}: {'; '.join(listed)}."


def _beside_paper(group: RunGroup) -> str:
    """Return how far runs are from the paper's number; empty where they do not compare."""
    if not (found := _paper_difference(group)):
        return ""
    source, number, points = found
    return f"{_apart(points)}{' as' * (points == 0)} the paper's {percent(number)} % in {source}"


def evaluated_alike(groups: Sequence[RunGroup]) -> bool:
    """Return whether results are on the same images, as far as their records say: older ones say less.

    Of the same data the same images may have been held out in two ways, such as by chance and by a table.
    """
    records = [run.record for group in groups for run in group.runs]
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
