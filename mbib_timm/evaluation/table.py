"""The table at the end of a run: every head by shot group, beside the training counts the groups come from."""

from collections.abc import Mapping
from typing import Any

import numpy as np

COLUMNS = {"overall": "top1", "many": "many", "medium": "medium", "few": "few"}


def results_table(results: Mapping[str, Mapping[str, Any]], class_counts: np.ndarray) -> str:
    """Return the top-1 accuracies in percent as a text table; ``-`` where a group has nothing to measure.

    Args:
        results: metrics by head, as `evaluate` returns them.
        class_counts: training images of each class, (K,).
    """
    classes = next(iter(results.values()))["classes"]
    counts = {"overall": len(class_counts), **classes}
    images = {"overall": int(class_counts.sum()), **_group_images(class_counts)}
    rows = [
        ["top-1, %", *COLUMNS],
        ["classes", *(str(counts[column]) for column in COLUMNS)],
        ["training images", *(str(images[column]) for column in COLUMNS)],
    ]
    heads = [name for name in results if name != "prediction"] + ["prediction"]
    for head in heads:
        values = [results[head][metric] for metric in COLUMNS.values()]
        rows.append([head, *("-" if value is None else f"{value:.2f}" for value in values)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]  # fmt: skip
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:3], rule, *lines[3:]])


def _group_images(class_counts: np.ndarray) -> dict[str, int]:
    from mbib_timm.data.class_counts import shot_groups

    return {name: int(class_counts[classes].sum()) for name, classes in shot_groups(class_counts).items()}
