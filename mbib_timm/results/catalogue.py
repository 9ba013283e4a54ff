"""`mbib models`: the zoo as a table, on the terminal and in the README."""

from collections.abc import Sequence
from dataclasses import dataclass

import timm

from mbib_timm.models.complexity import count_macs, count_parameters
from mbib_timm.models.zoo import ZOO, ZooModel
from mbib_timm.results.columns import COLUMNS
from mbib_timm.results.record import read_record
from mbib_timm.results.tables import NOTHING, Table, cells

HEADER = ("model", "params, M", "MACs, G", "input", "data", *COLUMNS, "weights")


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
            return [NOTHING] * len(COLUMNS)
        return cells(read_record(self.model.folder).result.prediction)

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
    return Table(HEADER, [entry.cells() for entry in entries]).text()


def markdown_table(entries: Sequence[Entry]) -> str:
    """Return the zoo as a Markdown table."""
    rows = []
    for entry in entries:
        name, *rest, weights = entry.cells()
        card = f"[`{name}`](model_cards/{name}.md)" if entry.model.is_trained else f"`{name}`"
        before, colon, command = weights.partition(": ")
        rows.append([card, *rest, f"{before}: `{command}`" if colon else weights])
    return Table(HEADER, rows).markdown() + "\n"
