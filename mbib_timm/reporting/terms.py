"""What the words of a report mean, as far as its runs need them."""

import re
from collections.abc import Sequence

from mbib_timm.methods import METHODS, method_title
from mbib_timm.methods.mbib import CITATION
from mbib_timm.models.head_outputs import HEADS_TEXT, labelled_heads
from mbib_timm.reporting.sections import Section
from mbib_timm.reporting.short_titles import short_titles
from mbib_timm.results.columns import DEFINITIONS, INTERVALS, macro_is_overall
from mbib_timm.results.record import is_averaged
from mbib_timm.results.run_figures import AVERAGE, RAW
from mbib_timm.results.run_text import stages_text
from mbib_timm.results.runs import FinishedRun, RunGroup

WORDS = "What the words mean"
TOP1 = (
    "The share of images for which the class with the highest score is the true one; every accuracy in this report is "
    "of this kind, in percent."
)
LOGITS = "The scores that a classifier gives to the classes of an image, one each, before they become probabilities."
CHANCE = (
    "Two equally good methods differ by no more than the stated points in about 95 % of cases. The number covers the "
    "spread between seeds where there are several, and the number of evaluated images where intervals are recorded; it "
    "does not allow for having picked the best of several."
)


def terms_section(groups: Sequence[RunGroup]) -> Section:
    """Return what was trained on which data by which methods, and how its numbers are to be read."""
    section = Section(WORDS, folded="Open the explanations: data, accuracies, methods and intervals")
    runs = [run for group in groups for run in group.runs]
    terms = [*_data_terms(groups), ("top-1 accuracy", TOP1), ("overall, macro, many, medium, few", DEFINITIONS)]
    stages = [stage for stage in dict.fromkeys(each for run in runs for each in run.record.stages) if stage in METHODS]
    terms += [(method_title(stage), _method_text(stage)) for stage in stages]
    several = {stages_text(run.record.stages): run for run in runs if len(run.heads) > 1}
    if several:
        answers = [f"for {method} of {answer}" for method, run in several.items() if (answer := _answer(run))]
        of = f" The prediction, a model's answer, is the mean of the logits {', '.join(answers)}." if answers else ""
        terms.append(("heads", f"{HEADS_TEXT}{of}"))
    if any(is_averaged(run.history) for run in runs):
        text = (
            f"The mean of the weights after many steps, in which late ones weigh most; those of the last are the {RAW}."
        )
        terms.append((AVERAGE, text))
    terms.append(("logits", LOGITS))
    terms.append(("n, ±", "n is the number of runs, with a seed each, behind a mean; ± their standard deviation."))
    terms.append(("95 % interval", f"{INTERVALS} That of several seeds is the mean of theirs."))
    if len(groups) > 1:
        terms.append(("chance", CHANCE))
    if any(run.precision != "float32" for run in runs):
        text = "The numbers that training computes with: float32, or in large part shorter ones, such as bfloat16."
        terms.append(("precision", text))
    if any(group.paper for group in groups) or CITATION in {METHODS[stage].citation for stage in stages}:
        terms.append(("the paper", f"{CITATION}. Its numbers are its authors', of runs of their own."))
    section.facts(terms)
    return section


def _answer(run: FinishedRun) -> str:
    labels = labelled_heads(run.heads)
    return " and ".join(labels[head] for head in run.record.prediction_heads if head in labels)


def _data_terms(groups: Sequence[RunGroup]) -> list[tuple[str, str]]:
    """Return what is to be said of the data of each run: once where it is the same, and where it is not of which."""
    names: dict[tuple[str, str], list[str]] = {}
    titles = short_titles(groups) if len(groups) > 1 else [groups[0].first.name]
    for group, title in zip(groups, titles, strict=True):
        known = group.first.dataset
        names.setdefault((known.title if known is not None else "", _data_text(group.first)), []).append(title)
    of_all = len(names) == 1 and len(groups) > 1
    return [
        (known or ("data" if of_all else f"data of {', and of '.join(of)}"), text)
        for (known, text), of in names.items()
    ]


def _data_text(run: FinishedRun) -> str:
    counts, prediction = run.record.class_counts, run.record.result.prediction
    tail = ""
    if max(counts) > min(counts):
        factor = f"an imbalance factor (IF) of {max(counts)} / {min(counts)} = {max(counts) / min(counts):g}"
        tail = f"; the largest class has {max(counts):,}, the smallest {min(counts):,}: {factor}"
    # An older record has no images by class; where these are equally many, its two means are one number.
    by_class, means = {*prediction.class_images}, [(prediction.top1, prediction.macro)]
    equal = ", equally many of each class" * (len(by_class) == 1 if by_class else macro_is_overall(means))
    long_tailed = "Long-tailed (LT): few classes have most of the images. " if tail else ""
    return (
        f"{long_tailed}{sum(counts):,} training images in {len(counts):,} classes{tail}. Evaluated on "
        f"{prediction.images:,} images of the split `{run.record.result.split}`{equal}."
    )


def _method_text(name: str) -> str:
    """Return the first sentence of a method's documentation, and its paper."""
    text = " ".join((METHODS[name].__doc__ or "").split("\n\n")[0].split())
    sentence = re.split(r"(?<=\.) (?=[A-Z])", text)[0]
    citation = "the paper" if METHODS[name].citation == CITATION else METHODS[name].citation
    return f"{sentence} From {citation}." if citation else sentence
