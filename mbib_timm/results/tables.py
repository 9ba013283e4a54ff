"""One table for text, Markdown and HTML, and how the numbers in its cells are written."""

import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mbib_timm.data.long_tail import shot_groups
from mbib_timm.files import printable
from mbib_timm.results.columns import COLUMNS
from mbib_timm.results.record import HeadMetrics

NOTHING = "–"


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
        escaped = [[printable(cell).replace("|", "\\|") for cell in row] for row in cells]
        return "\n".join(f"| {' | '.join(row)} |" for row in escaped)

    def kind(self, row: int) -> str:
        """Return the kind of a row."""
        return self.kinds[row] if self.kinds else ""


def _has_numbers(cells: Sequence[str]) -> bool:
    return not cells or any(cell[:1].isdigit() or cell[:1] in ("+", "-", "−", NOTHING) for cell in cells if cell)


def _padded(cells: Sequence[str], right: bool) -> list[str]:
    width = max(map(len, cells))
    return [cell.rjust(width) if right else cell.ljust(width) for cell in cells]


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
    """Return top-1 accuracies in percent by head as text, with the training counts that the shot groups come from.

    Args:
        heads: metrics by head, as `evaluate` returns them.
        class_counts: training images of each class, (K,).
    """
    groups = {"overall": np.arange(len(class_counts)), **shot_groups(class_counts)}
    counts = [class_counts[groups.get(column, groups["overall"])] for column in COLUMNS]
    rows = [
        ["classes", *(str(len(group)) for group in counts)],
        ["training images", *(str(group.sum()) for group in counts)],
        ["  per class", *(f"{group.min()}-{group.max()}" if len(group) else NOTHING for group in counts)],
        *([head, *cells(heads[head], digits=2)] for head in [*(h for h in heads if h != "prediction"), "prediction"]),
    ]
    lines = Table(["top-1, %", *COLUMNS], rows).lines()
    rule = "-" * max(map(len, lines))
    return "\n".join([lines[0], rule, *lines[1:4], rule, *lines[4:]])


def table_by_head(heads: Iterable[str], cell: Callable[[str, str], str]) -> Table:
    """Return a table with a row per head, the prediction's first, and a column for each of `COLUMNS`.

    Args:
        heads: their names.
        cell: gives the text for a head and a column.
    """
    names = ["prediction", *(head for head in heads if head != "prediction")]
    return Table(["head", *COLUMNS], [[name, *(cell(name, column) for column in COLUMNS)] for name in names])


def cells(metrics: HeadMetrics, digits: int = 1) -> list[str]:
    """Return the accuracies of `COLUMNS` in percent."""
    return [percent(value, digits) for value in metrics.accuracies().values()]


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
    """Return how far a percentage is from another in points, with its sign; a dash where there are not both."""
    if ours is None or theirs is None:
        return NOTHING
    return f"{ours - theirs:+.1f}".replace("-", "−")
