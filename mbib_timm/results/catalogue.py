"""`mbib models`: the zoo as a table, on the terminal and in docs/; what is not from scratch has a table of its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import timm

from mbib_timm.models.complexity import count_macs, count_parameters
from mbib_timm.models.origin import OwnData, origin_of
from mbib_timm.models.preprocessing import input_size
from mbib_timm.models.pretraining import Origin
from mbib_timm.models.zoo import WHOLE, ZOO, ZooModel, split_tag
from mbib_timm.recipe import Recipe, find_recipe, load_recipe
from mbib_timm.results.columns import COLUMNS
from mbib_timm.results.record import RunRecord, read_record
from mbib_timm.results.tables import NOTHING, cells, markdown_by_start, tables_by_start

HEADER = ("model", "params, M", "MACs, G", "input", "data", *COLUMNS, "weights")


class _Size(NamedTuple):
    parameters: int
    macs: int
    input_size: tuple[int, int, int]


@dataclass(frozen=True)
class Entry:
    """A model of the zoo with its size.

    Attributes:
        model: the published name.
        parameters: learnable parameters, of all heads.
        macs: operations of one prediction, as `count_macs` has them.
        input_size: (C, H, W).
        origin: where its training starts.
        record: of its run; None for one that is not trained.
    """

    model: ZooModel
    parameters: int
    macs: int
    input_size: tuple[int, int, int]
    origin: Origin
    record: RunRecord | None

    def cells(self) -> list[str]:
        """Return the row of the table."""
        height, width = self.input_size[1:]
        return [
            self.model.name,
            f"{self.parameters / 1e6:.2f}",
            f"{self.macs / 1e9:.2f}",
            f"{height}x{width}",
            self.model.dataset.title,
            *([NOTHING] * len(COLUMNS) if self.record is None else cells(self.record.result.prediction)),
            self._weights(),
        ]

    def _weights(self) -> str:
        if not self.model.is_trained:
            return f"no weights: mbib train {self.model.recipe}"
        weights = self.model.weights
        if weights is None:
            return f"hf-hub:{self.model.repository}"
        return "in the package" if weights.name == WHOLE else "heads in the package, beside the pretrained backbone"


def catalogue(trained_only: bool = False) -> list[Entry]:
    """Return the models of the zoo, those with weights first; sizes are counted without memory for weights.

    Args:
        trained_only: leave out those without.
    """
    entries, sizes = [], dict[str, _Size]()
    for model in sorted(ZOO, key=lambda model: not model.is_trained):
        if trained_only and not model.is_trained:
            break
        recipe = Recipe() if model.is_trained else load_recipe(find_recipe(model.recipe))
        # Networks that agree in these are of one size; a trained one is built as its config.json says.
        config = model.config
        arguments = {**config.model_args, **recipe.model_kwargs}
        asked = (recipe.img_size, model.dataset.preprocessing, config.preprocessing.get("input_size"))
        key = repr((model.architecture, model.dataset.num_classes, sorted(arguments.items()), asked))
        if key not in sizes:
            network = timm.create_model(model.name, device="meta", **recipe.model_kwargs).eval()
            size = input_size(recipe, network)
            sizes[key] = _Size(count_parameters(network), count_macs(network, size)["total"], size)
        record = read_record(model.folder) if model.is_trained else None
        origin = origin_of(recipe, OwnData(split_tag(model.tag)[1])) if record is None else record.origin
        entries.append(Entry(model, *sizes[key], origin, record))
    return entries


def text_table(entries: Sequence[Entry]) -> str:
    """Return the zoo as aligned text."""
    tables = tables_by_start(HEADER, [(entry.origin, entry.cells()) for entry in entries])
    return "\n\n".join("\n".join(filter(None, [said, table.text()])) for said, table in tables)


def markdown_table(entries: Sequence[Entry]) -> str:
    """Return the zoo as Markdown tables, for a page in docs/; without the data, which the names say, to fit on it."""
    place, rows = HEADER.index("data"), []
    for entry in entries:
        cells = entry.cells()
        name, *rest, weights = *cells[:place], *cells[place + 1 :]
        card = f"[`{name}`](../model_cards/{name}.md)" if entry.model.is_trained else f"`{name}`"
        before, colon, command = weights.partition(": ")
        rows.append((entry.origin, [card, *rest, f"{before}: `{command}`" if colon else weights]))
    return markdown_by_start([*HEADER[:place], *HEADER[place + 1 :]], rows)
