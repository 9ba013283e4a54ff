"""What a run's distance from the paper's numbers amounts to, in words that the numbers allow."""

import statistics

from mbib_timm.methods import METHODS
from mbib_timm.methods.mbib import CITATION
from mbib_timm.results.paper import PaperResult
from mbib_timm.results.run_text import extended_text
from mbib_timm.results.runs import RunGroup

# Differences beyond this many points get a paragraph.
NOTABLE = 1.0


def differences(group: RunGroup) -> list[str]:
    """Return a paragraph on every difference of more than one point from a number of the paper.

    Each says how far it is, and sets it beside what is known of chance: the interval that the test images leave, and
    the spread over seeds where there is one. What may account for the rest is said once, at the end.

    Args:
        group: runs of a recipe that the paper reports on.
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
    if paragraphs:
        paragraphs.append(known_differences(group))
    return paragraphs


def _paragraph(group: RunGroup, column: str, mean: float, number: float, result: PaperResult) -> str:
    difference = mean - number
    where = "all classes" if column == "overall" else f"{column}-shot classes"
    setting = f", with {result.setting}" if result.setting else ""
    text = (
        f"On {where} the top-1 accuracy is {mean:.1f} %, {abs(difference):.1f} points "
        f"{'above' if difference > 0 else 'below'} the {number:.1f} % of the paper's {result.source}{setting}."
    )
    # All seeds see the same images: their mean is as uncertain as one of them, and its interval is the mean of theirs.
    predictions = [run.record.result.prediction for run in group.runs]
    intervals = [*filter(None, (each.interval(column) for each in predictions))]
    measured = predictions[0].measured.get(column)
    if len(intervals) == len(predictions) and measured is not None:
        low, high = (statistics.mean(ends) for ends in zip(*intervals, strict=True))
        inside = "contains" if low <= number <= high else "does not contain"
        of_mean = " of this mean" if len(predictions) > 1 else ""
        text += (
            f" The 95 % interval{of_mean} from the {measured[0]:,} test images alone, {low:.1f} to {high:.1f}, "
            f"{inside} that number."
        )
    known = [value for value in group.values(column) if value is not None]
    if len(known) > 1:
        spread = statistics.stdev(known)
        text += f" Over {len(known)} seeds our accuracy has a standard deviation of {spread:.1f} points."
    return text


def known_differences(group: RunGroup) -> str:
    """Return what is known to differ from the paper, and what the paper leaves open."""
    known = []
    if group.settings:
        known.append(f"the recipe was changed in {', '.join(f'`{key}`' for key in group.settings)}")
    if group.first.has_other_subset:
        known.append(
            "the long-tailed subset has as many images of each class as the paper's, but other images, because the "
            "files of a folder come in another order than those of the original release"
        )
    if group.first.precision != "float32":
        known.append(f"training used {group.first.precision} mixed precision")
    if len(group.runs) == 1:
        known.append(f"only one seed was run in {group.first.precision}, so the spread between seeds is unknown")
    differing = f"What is known to differ: {'; '.join(known)}. " if known else ""
    text = (
        f"{differing}The paper leaves open how the layers are initialised, and whether the last epoch or the best is "
        "reported. "
    )
    if METHODS[group.first.record.method].citation == CITATION:
        text += (
            "It also leaves open what an observation is, whether z is rectified, and which beta was used; the sweep "
            "`open_choices` varies these. "
        )
    return f"{text}Until these have been compared in full, none is known to account for the difference."
