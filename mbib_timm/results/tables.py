"""One table for text, Markdown and HTML, and how the numbers in its cells are written."""

import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar

import numpy as np

from mbib_timm.data.long_tail import shot_groups
from mbib_timm.files import printable
from mbib_timm.models.head_outputs import PREDICTION, heads_of_expert
from mbib_timm.models.origin import origin_text
from mbib_timm.models.pretraining import Origin
from mbib_timm.results.columns import COLUMNS, MODEL_COLUMNS
from mbib_timm.results.record import HeadMetrics

T = TypeVar("T")
NOTHING = "–"
# Above tables, and the column that says it.
FROM_SCRATCH = "From scratch:"
_FROM_WEIGHTS = (
    "These models, or their teachers, started from {}. Compare them only with models that started from the same "
    "weights, never with models trained from scratch."
)
FROM_WEIGHTS = _FROM_WEIGHTS.format("trained weights")
STARTED = "started from"


@dataclass(frozen=True)
class Table:
    """A table of cells that are text.

    Attributes:
        header: names of the columns.
        rows: cells, as many in each row.
        kinds: of each row a word by which HTML is styled; all plain when empty.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    kinds: Sequence[str] = ()

    def text(self) -> str:
        """Return aligned lines: the first column and columns of words to the left, those with numbers to the right."""
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        """Return the lines of `text`, the header's first."""
        cells = [[printable(cell) for cell in row] for row in (self.header, *self.rows)]
        columns = [
            _padded(column, place > 0 and _has_numbers(column[1:]))
            for place, column in enumerate(zip(*cells, strict=True))
        ]
        return ["  ".join(row).rstrip() for row in zip(*columns, strict=True)]

    def markdown(self) -> str:
        """Return the table as Markdown, without a line break at its end. Cells are Markdown; see `markdown_text`."""
        cells = [self.header, ["---"] * len(self.header), *self.rows]
        escaped = [[printable(cell.strip()).replace("|", "\\|") for cell in row] for row in cells]
        return "\n".join(f"| {' | '.join(row)} |" for row in escaped)

    def kind(self, row: int) -> str:
        """Return the kind of a row."""
        return self.kinds[row] if self.kinds else ""


def _has_numbers(cells: Sequence[str]) -> bool:
    return not cells or any(cell[:1].isdigit() or cell[:1] in ("+", "-", "−", NOTHING) for cell in cells if cell)


def _padded(cells: Sequence[str], right: bool) -> list[str]:
    width = max(map(len, cells))
    return [cell.rjust(width) if right else cell.ljust(width) for cell in cells]


def split_by_start(
    items: Sequence[T], origin: Callable[[T], Origin], escape: Callable[[str], str] = str
) -> list[tuple[str, list[T]]]:
    """Return results from scratch, then those that started from weights, which never stand in one column.

    Returns:
        What is to be said above each kind, and its results; a kind without any is left out, and a single one that is
        from scratch needs no word.
    """
    scratch = [item for item in items if origin(item).is_scratch]
    others = [item for item in items if not origin(item).is_scratch]
    parts = [(FROM_SCRATCH if others else "", scratch), (from_weights(map(origin, others), escape), others)]
    return [(said, kind) for said, kind in parts if kind]


def from_weights(origins: Iterable[Origin], escape: Callable[[str], str] = str) -> str:
    """Return what is to be said above results that started from weights: from which, where these are the same."""
    named = {origin_text(origin) for origin in origins}
    return _FROM_WEIGHTS.format(escape(named.pop())) if len(named) == 1 else FROM_WEIGHTS


def tables_by_start(
    header: Sequence[str], rows: Sequence[tuple[Origin, Sequence[str]]], escape: Callable[[str], str] = str
) -> list[tuple[str, Table]]:
    """Return rows as `split_by_start` does: what to say above a table, and the table.

    Rows that started from different weights have another column, the last: what these were, escaped as the cells are.
    """
    tables = []
    for said, kind in split_by_start(rows, lambda row: row[0], escape):
        starts = [escape(origin_text(origin)) for origin, _ in kind]
        if len(set(starts)) == 1:
            tables.append((said, Table(header, [cells for _, cells in kind])))
        else:
            shown = [[*cells, start] for start, (_, cells) in zip(starts, kind, strict=True)]
            tables.append((said, Table([*header, STARTED], shown)))
    return tables


def markdown_by_start(header: Sequence[str], rows: Sequence[tuple[Origin, Sequence[str]]]) -> str:
    """Return `tables_by_start` as Markdown, with a line break at its end. Cells are Markdown."""
    tables = tables_by_start(header, rows, markdown_text)
    parts = [part for said, table in tables for part in (said, table.markdown()) if part]
    return "\n\n".join(parts) + "\n"


_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;"})


def markdown_text(text: str) -> str:
    """Return text as Markdown that shows it as it is: nothing in it is markup, a link, a formula, or HTML.

    It may stand in a paragraph, a heading, or a cell of a table. Underscores within words stay as they are.
    """
    escaped = re.sub(r"[\\`*\[\]~$]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", printable(text).strip())
    escaped = escaped.translate(_ENTITIES)
    escaped = escaped.replace("://", "&#58;//")  # GitHub makes links of bare addresses
    escaped = re.sub(r"(?<=[\w.+-])@(?=\w)", "&#64;", escaped)
    escaped = re.sub(r"(?i)\bwww\.", lambda match: f"{match[0][:-1]}&#46;", escaped)
    escaped = re.sub(r"^(\d+)([.)])", r"\1\\\2", escaped)  # what would begin a list, a heading or a rule
    return re.sub(r"^[#+=-]", r"\\\g<0>", escaped)


def code_span(text: str) -> str:
    """Return text as code in a line of Markdown, between more back quotes than it holds in a row."""
    text = printable(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if text[:1] in ("`", " ", "") or text[-1:] in ("`", " ") else ""
    return f"{fence}{space}{text}{space}{fence}"


def accuracy_table(heads: Mapping[str, HeadMetrics], class_counts: np.ndarray) -> str:
    """Return the numbers of `MODEL_COLUMNS` by head as text, with the images and classes that they come from.

    Where there are other heads than the prediction, a line below says what their rows are.

    Args:
        heads: metrics by head, as `evaluate` returns them.
        class_counts: training images of each class, (K,).
    """
    columns = shown_columns(heads.values())
    groups = {"overall": np.arange(len(class_counts)), **shot_groups(class_counts)}
    counts = [class_counts[groups.get(column, groups["overall"])] for column in columns]
    above = [
        ["classes", *(str(len(group)) for group in counts)],
        ["training images", *(str(group.sum()) for group in counts)],
        ["  per class", *(f"{group.min()}-{group.max()}" if len(group) else NOTHING for group in counts)],
        *measured_rows(heads[PREDICTION], columns),
    ]
    below = [
        *([head, *cells(metrics, 2, columns)] for head, metrics in heads.items() if head != PREDICTION),
        [PREDICTION, *cells(heads[PREDICTION], 2, columns)],
        *interval_row(heads[PREDICTION], columns),
    ]
    lines = Table(["%", *columns], [*above, *below]).lines()
    rule = "-" * max(map(len, lines))
    table = [lines[0], rule, *lines[1 : len(above) + 1], rule, *lines[len(above) + 1 :]]
    return "\n".join([*table, *_heads_line([head for head in heads if head != PREDICTION])])


def _heads_line(names: Sequence[str]) -> list[str]:
    """Return a line on the rows of a network's heads, and of experts that are the mean of several; none without any."""
    if not names:
        return []
    rows = " and ".join(names) if len(names) < 3 else f"{names[0]} to {names[-1]}"
    what = "single heads and experts" if any(heads_of_expert(name, names) for name in names) else "single heads"
    return [f"{rows} are {what} of the network; prediction is its answer"]


def shown_columns(metrics: Iterable[HeadMetrics]) -> list[str]:
    """Return the names of `MODEL_COLUMNS`, without macro F1 where none of the results has recorded it."""
    known = {name for each in metrics for name, value in each.numbers().items() if value is not None}
    return [name for name in MODEL_COLUMNS if name in known or name in COLUMNS]


def measured_rows(metrics: HeadMetrics, columns: Sequence[str]) -> list[list[str]]:
    """Return the rows of a table that say how many classes and images a number comes from; none where it is unknown."""
    if not metrics.measured:
        return []
    behind = [metrics.measured.get(column, metrics.measured["overall"]) for column in columns]
    return [
        ["evaluated classes", *(f"{classes:,}" for _, classes in behind)],
        ["evaluated images", *(f"{images:,}" for images, _ in behind)],
    ]


def interval_row(metrics: HeadMetrics, columns: Sequence[str], label: str = "95 % interval") -> list[list[str]]:
    """Return the row of a table with the intervals of the prediction; none where there are none."""
    intervals = [metrics.interval(column) for column in columns]
    if not any(intervals):
        return []
    return [[f"  {label}", *(NOTHING if each is None else f"{each[0]:.1f}-{each[1]:.1f}" for each in intervals)]]


def table_by_head(
    heads: Mapping[str, HeadMetrics],
    cell: Callable[[str, str], str],
    label: str = "",
    titles: Mapping[str, str] = MappingProxyType({}),
) -> Table:
    """Return a table with a row per head, the prediction's first, and a column for each of `shown_columns`.

    The prediction's row is followed by its intervals, and the last rows say what the numbers come from.

    Args:
        heads: metrics by head: of one of the runs, where a cell is of several.
        cell: gives the text for a head and a column.
        label: of the intervals, where they are of one of several runs.
        titles: of the heads; their names by default.
    """
    columns = shown_columns(heads.values())
    names = [PREDICTION, *(head for head in heads if head != PREDICTION)]
    rows = [[titles.get(name, name), *(cell(name, column) for column in columns)] for name in names]
    intervals = interval_row(heads[PREDICTION], columns, label or "95 % interval")
    measured = measured_rows(heads[PREDICTION], columns)
    kinds = ["", *["note"] * len(intervals), *[""] * (len(rows) - 1), *["note"] * len(measured)]
    return Table(["head", *columns], [rows[0], *intervals, *rows[1:], *measured], kinds)


def cells(metrics: HeadMetrics, digits: int = 1, columns: Iterable[str] = tuple(COLUMNS)) -> list[str]:
    """Return the numbers of columns in percent."""
    numbers = metrics.numbers()
    return [percent(numbers[column], digits) for column in columns]


def percent(value: float | None, digits: int = 1) -> str:
    """Return a percentage without its sign; a dash where there is nothing to measure."""
    return NOTHING if value is None else f"{value:.{digits}f}"


def mean_of(values: Sequence[float | None]) -> float | None:
    """Return the mean of what was measured; None where nothing was."""
    measured = [value for value in values if value is not None]
    return statistics.mean(measured) if measured else None


def mean_and_deviation(values: Sequence[float | None], digits: int = 1) -> str:
    """Return ``mean ± sample standard deviation`` of percentages, of one the value alone; a dash of none."""
    measured = [value for value in values if value is not None]
    mean = percent(mean_of(measured), digits)
    return f"{mean} ± {statistics.stdev(measured):.{digits}f}" if len(measured) > 1 else mean


def difference(ours: float | None, theirs: float | None) -> str:
    """Return how far a percentage is from another in points, as the two are printed, with its sign; a dash where there
    are not both."""
    if ours is None or theirs is None:
        return NOTHING
    return f"{float(percent(ours)) - float(percent(theirs)):+.1f}".replace("-", "−")
