"""The accuracies that every table shows: one line per column, for text, cards, reports, sweeps and the Hub."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """An accuracy that every table shows.

    Attributes:
        metric: attribute of `HeadMetrics`.
        title: of the metric in a card's metadata.
    """

    metric: str
    title: str


COLUMNS: Mapping[str, Column] = {
    "overall": Column("top1", "Top-1 accuracy, %"),
    "many": Column("many", "Top-1 accuracy on many-shot classes, %"),
    "medium": Column("medium", "Top-1 accuracy on medium-shot classes, %"),
    "few": Column("few", "Top-1 accuracy on few-shot classes, %"),
}
