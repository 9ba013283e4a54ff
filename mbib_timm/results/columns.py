"""The accuracies that tables show: one line per column, for text, cards, reports, sweeps and the Hub."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """A number that tables show.

    Attributes:
        metric: attribute of `HeadMetrics`.
        title: of the metric in a card's metadata.
        kind: of the metric there, as the Hub calls it.
    """

    metric: str
    title: str
    kind: str = "accuracy"


# What papers report, and so what sweeps and comparisons show.
COLUMNS: Mapping[str, Column] = {
    "overall": Column("top1", "Top-1 accuracy, %"),
    "many": Column("many", "Top-1 accuracy on many-shot classes, %"),
    "medium": Column("medium", "Top-1 accuracy on medium-shot classes, %"),
    "few": Column("few", "Top-1 accuracy on few-shot classes, %"),
}
# What tables of one model show: where classes have unequally many test images, overall is that of the large ones.
MODEL_COLUMNS: Mapping[str, Column] = {
    "overall": COLUMNS["overall"],
    "macro": Column("macro", "Macro accuracy, %"),
    "macro F1": Column("macro_f1", "Macro F1, %", kind="f1"),
    **{name: column for name, column in COLUMNS.items() if name != "overall"},
}
# What these mean, said wherever they stand.
DEFINITIONS = (
    "Overall is the share of all images that are classified correctly. Macro is the mean of the class accuracies, and "
    "the accuracy of a shot group is the mean over its classes. Macro F1 is, for each class, the harmonic mean of "
    "recall (the share of its images that are predicted as the class) and precision (the share of the images predicted "
    "as the class that belong to it), averaged over the classes. These means are over the classes that have evaluated "
    "images, with equal weight for each. Shot groups are by training images per class: many more than 100, medium 20 "
    "to 100, few fewer than 20."
)
ROUNDING = 1e-3  # of a sum of accuracies in percent
# Of a class: fewer say little of its accuracy, and draws of them little of how it may differ.
FEW_IMAGES = 10
INTERVALS = (
    "The 95 % intervals cover the uncertainty from the limited number of evaluated images, not how another training "
    "run would differ. They are Wilson's for overall, and from a bootstrap over the images (1,000 draws) for the "
    f"others; where a class has fewer than {FEW_IMAGES} images, they are Wilson's with the effective number of images "
    "behind the mean over classes. Where images were held out in groups, a group counts as one image."
)


def macro_is_overall(pairs: Iterable[tuple[float | None, float | None]]) -> bool:
    """Return whether overall and macro accuracy are one number, as where classes have equally many evaluated images.

    Args:
        pairs: overall and macro accuracy of each result, in percent; what was not measured says nothing.
    """
    measured = [(overall, macro) for overall, macro in pairs if overall is not None and macro is not None]
    return all(abs(overall - macro) < ROUNDING for overall, macro in measured)
