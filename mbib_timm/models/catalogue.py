"""`mbib models`: the zoo as a table, on the terminal and in the README."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import timm

from mbib_timm.models.complexity import count_macs, count_parameters
from mbib_timm.models.zoo import ZOO, ZooModel

GROUPS = ("top1", "many", "medium", "few")
HEADER = ("model", "params, M", "MACs, G", "input", "data", "overall", "many", "medium", "few", "weights")


@dataclass(frozen=True)
class Entry:
    """A model of the zoo with its size.

    Attributes:
        model: the published name.
        parameters: learnable parameters, of all heads.
        macs: operations of one prediction, as `count_macs` has them.
        input_size: (C, H, W).
    """

    model: ZooModel
    parameters: int
    macs: int
    input_size: tuple[int, int, int]

    def cells(self) -> list[str]:
        """Return the row of the table."""
        height, width = self.input_size[1:]
        return [
            self.model.name,
            f"{self.parameters / 1e6:.2f}",
            f"{self.macs / 1e9:.2f}",
            f"{height}x{width}",
            self.model.dataset.title,
            *self._accuracies(),
            self._weights(),
        ]

    def _accuracies(self) -> list[str]:
        if not self.model.is_trained:
            return ["–"] * len(GROUPS)
        prediction: dict[str, Any] = self.model.metrics["result"]["heads"]["prediction"]
        return ["–" if prediction[group] is None else f"{prediction[group]:.1f}" for group in GROUPS]

    def _weights(self) -> str:
        if not self.model.is_trained:
            return f"no weights: mbib train {self.model.recipe}"
        return "in the package" if self.model.weights is not None else f"hf-hub:{self.model.repository}"


def catalogue() -> list[Entry]:
    """Return every model of the zoo; sizes are counted without memory for weights."""
    entries = []
    for model in ZOO:
        network = timm.create_model(model.name, device="meta").eval()
        size = network.pretrained_cfg["input_size"]
        entries.append(Entry(model, count_parameters(network), count_macs(network, size)["total"], size))
    return entries


def text_table(entries: Sequence[Entry]) -> str:
    """Return the zoo as aligned text."""
    rows = [list(HEADER), *(entry.cells() for entry in entries)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def markdown_table(entries: Sequence[Entry]) -> str:
    """Return the zoo as a Markdown table."""
    rows = [list(HEADER), ["---"] * len(HEADER)]
    for entry in entries:
        name, *rest, weights = entry.cells()
        card = f"[`{name}`](model_cards/{name}.md)" if entry.model.is_trained else f"`{name}`"
        before, colon, command = weights.partition(": ")
        rows.append([card, *rest, f"{before}: `{command}`" if colon else weights])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"
