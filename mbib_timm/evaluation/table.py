"""The table at the end of a run: every head by shot group, beside the training counts the groups come from."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mbib_timm.data.long_tail import shot_groups

COLUMNS = {"overall": "top1", "many": "many", "medium": "medium", "few": "few"}


def results_table(results: Mapping[str, Mapping[str, Any]], class_counts: np.ndarray) -> str:
    """Return the top-1 accuracies in percent as a text table; ``-`` where a group has nothing to measure.

    Args:
        results: metrics by head, as `evaluate` returns them.
        class_counts: training images of each class, (K,).
    """
    groups = {"overall": np.arange(len(class_counts)), **shot_groups(class_counts)}
    counts = [class_counts[groups[column]] for column in COLUMNS]
    rows = [
        ["top-1, %", *COLUMNS],
        ["classes", *(str(len(group)) for group in counts)],
        ["training images", *(str(group.sum()) for group in counts)],
        ["  of a class", *(f"{group.min()}-{group.max()}" if len(group) else "-" for group in counts)],
    ]
    heads = [name for name in results if name != "prediction"] + ["prediction"]
    for head in heads:
        values = [results[head][metric] for metric in COLUMNS.values()]
        rows.append([head, *("-" if value is None else f"{value:.2f}" for value in values)])
    lines = aligned(rows)
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:4], rule, *lines[4:]])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of cells as lines: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([head.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))])
        for head, *cells in rows
    ]
