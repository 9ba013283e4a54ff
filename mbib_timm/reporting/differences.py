"""What a run's distance from the paper's numbers amounts to, in words that the numbers allow."""

import statistics
from collections.abc import Sequence

from mbib_timm.data.sources import LEFT_OUT
from mbib_timm.methods import METHODS
from mbib_timm.methods.mbib import CITATION
from mbib_timm.results.paper import PaperResult
from mbib_timm.results.run_text import extended_text, stages_text
from mbib_timm.results.runs import SAME_RESULT, RunGroup
from mbib_timm.results.tables import NOTHING, difference, mean_of, percent
from mbib_timm.sweeps.sweep_results import SweepResults, cells, epochs_run, listed, row_name

# Differences beyond this many points get a paragraph.
NOTABLE = 1.0
NAMED = 4  # as many rows of a sweep as a paragraph names


def differences(group: RunGroup) -> list[str]:
    """Return a paragraph on every difference of more than one point from a number of the paper.

    Each says how far it is, and sets it beside what is known of chance: the interval that the test images leave, and
    the spread over seeds where there is one. What may account for the rest is in `known_differences`.
    """
    if group.is_short:
        epochs = f"{group.epochs} of {group.recipe_epochs} epochs"
        if extended := extended_text(group.first.record):
            epochs += f" ({extended})"
        return [f"With {epochs} the schedule is not the paper's, so nothing is compared with its numbers."]
    paragraphs = []
    for result in group.paper:
        for column, number in result.accuracies.items():
            mean = group.mean(column)
            if mean is not None and abs(mean - number) > NOTABLE:
                paragraphs.append(_paragraph(group, column, mean, number, result))
    return paragraphs


def _paragraph(group: RunGroup, column: str, mean: float, number: float, result: PaperResult) -> str:
    where = "all classes" if column == "overall" else f"{column}-shot classes"
    setting = f", with {result.setting}" if result.setting else ""
    text = (
        f"On {where} the top-1 accuracy is {percent(mean)} %, {difference(mean, number)[1:]} points "
        f"{'above' if mean > number else 'below'} the {number:.1f} % of the paper's {result.source}{setting}."
    )
    prediction = group.heads["prediction"]
    interval, measured = prediction.interval(column), prediction.measured.get(column)
    if interval is not None and measured is not None:
        low, high = interval
        inside = "contains" if low <= number <= high else "does not contain"
        of_mean = " of this mean" if len(group.runs) > 1 else ""
        text += (
            f" The 95 % interval{of_mean} from the {measured[0]:,} test images alone, {low:.1f} to {high:.1f}, "
            f"{inside} that number."
        )
    known = [value for value in group.values(column) if value is not None]
    if len(known) > 1:
        spread = statistics.stdev(known)
        text += f" Over {len(known)} seeds our accuracy has a standard deviation of {spread:.1f} points."
    return text


def known_differences(groups: Sequence[RunGroup], sweeps: Sequence[SweepResults] = ()) -> list[str]:
    """Return a paragraph on what is known to differ from the paper, and what the paper leaves open; and one on what
    sweeps of these runs' recipes have found.

    None where nothing is far from it: groups that are as the paper's, or not compared with it, are passed over. What
    does not hold for all the others has the methods for which it does.
    """
    far = [group for group in groups if not group.is_short and differences(group)]
    if not far:
        return []
    known: dict[str, list[str]] = {}
    for group in far:
        for fact in _facts(group):
            known.setdefault(fact, []).append(stages_text(group.first.record.stages))
    said = [fact + (f" ({', '.join(dict.fromkeys(of))})" if len(of) < len(far) else "") for fact, of in known.items()]
    differing = f"What is known to differ: {'; '.join(said)}. " if said else ""
    text = (
        f"{differing}The paper leaves open how the layers are initialised, and whether the last epoch or the best is "
        "reported. "
    )
    if any(METHODS[group.first.record.method].citation == CITATION for group in far):
        text += (
            "It also leaves open what an observation is, whether z is rectified, and which beta was used; the sweep "
            "`open_choices` varies these. "
        )
    names = {group.first.name for group in far}
    if compared := [_compared(results) for results in sweeps if results.recipe in names]:
        return [
            f"{text}What accounts for the difference can be told only from runs that differ in one thing alone. The "
            "sweeps of these recipes, which have sections of their own below, have such runs:",
            *compared,
        ]
    return [
        f"{text}What accounts for the difference can be told only from runs that differ in one thing alone, and this "
        "report has no sweep of these recipes."
    ]


def _compared(results: SweepResults) -> str:
    """Return what the rows of a sweep have reached, and where they compare with the paper's number, how far from it."""
    rows = [(mean, cell) for cell in cells(results) if (mean := mean_of(cell.values["overall"])) is not None]
    paper = results.paper_beside
    # Mixed precision is among what is known to differ, and no reason to say nothing.
    is_full = not results.is_short and results.settings.keys() <= SAME_RESULT | {"amp", "amp_dtype"}
    beside = is_full and paper is not None and paper.recipe == results.recipe
    apart = [difference(mean, cell.paper.get("overall") if beside else None) for mean, cell in rows]
    if len(rows) <= NAMED:
        found = "; ".join(
            f"{row_name(results, cell.coordinates)} {percent(mean)} %" + f" ({points})" * (points != NOTHING)
            for (mean, cell), points in zip(rows, apart, strict=True)
        )
    else:
        means = [mean for mean, _ in rows]
        found = f"{len(rows)} rows between {percent(min(means))} and {percent(max(means))} %"
    split = results.runs[0].split
    where = "training images that the long-tailed subset leaves out" if split == LEFT_OUT else f"the split `{split}`"
    seeds = listed(sorted({cell.n for _, cell in rows}))
    text = f"`{results.name}` ({results.title}), {epochs_run(results)}, n = {seeds}, on {where}: {found}."
    known = [abs(float(points.replace("−", "-"))) for points in apart if points != NOTHING]
    if not known:
        return f"{text} These numbers compare only with one another."
    near = sum(gap <= NOTABLE for gap in known)
    brackets = " In brackets are the points from the paper's number." * (len(rows) <= NAMED)
    within = f" {near or 'None'} of them {'is' if near < 2 else 'are'} within a point of the paper's number."
    return f"{text}{brackets}{within * (len(known) > 1)}"


def _facts(group: RunGroup) -> list[str]:
    facts = []
    if group.settings:
        facts.append(f"the recipe was changed in {', '.join(f'`{key}`' for key in group.settings)}")
    if group.first.has_other_subset:
        facts.append(
            "the long-tailed subset has as many images of each class as the paper's, but other images, because the "
            "files of a folder come in another order than those of the original release"
        )
    if group.first.precision != "float32":
        facts.append(f"training used {group.first.precision} mixed precision")
    if len(group.runs) == 1:
        facts.append(f"only one seed was run in {group.first.precision}, so the spread between seeds is unknown")
    return facts
