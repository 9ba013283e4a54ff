"""`mbib models`: the zoo as a table, on the terminal and in docs/; what is not from scratch has a table of its own."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import timm

from mbib_timm.models.complexity import count_macs, count_parameters
from mbib_timm.models.origin import OwnData, origin_of, origin_text
from mbib_timm.models.preprocessing import input_size
from mbib_timm.models.pretraining import Origin
from mbib_timm.models.zoo import WHOLE, ZOO, ZooModel, split_tag
from mbib_timm.recipe import Recipe, find_recipe, load_recipe
from mbib_timm.results.columns import COLUMNS
from mbib_timm.results.record import RunRecord, read_record
from mbib_timm.results.tables import NOTHING, Table, cells, markdown_by_start, split_by_start

# The data are not among them: the names say which.
HEADER = ("model", "params, M", "MACs, G", "input", *COLUMNS, "weights")
WIDTH = 120  # of lines of text
# Where weights are, as text has it, and what has to be said of it below.
PACKAGE, HEADS, HUB, NONE = "package", "heads", "Hub", "none"
SAID = {
    HEADS: "heads: the package has those of the heads; the backbone's are the pretrained ones",
    NONE: "none: mbib train MODEL trains them",
}


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

    @property
    def weights(self) -> str:
        """Where the weights are, in a word."""
        if not self.model.is_trained:
            return NONE
        file = self.model.weights
        return HUB if file is None else PACKAGE if file.name == WHOLE else HEADS

    def cells(self) -> list[str]:
        """Return the row of the table, but for the weights."""
        height, width = self.input_size[1:]
        return [
            self.model.name,
            f"{self.parameters / 1e6:.2f}",
            f"{self.macs / 1e9:.2f}",
            f"{height}x{width}",
            *([NOTHING] * len(COLUMNS) if self.record is None else cells(self.record.result.prediction)),
        ]


def catalogue(trained_only: bool = False) -> list[Entry]:
    """Return the models of the zoo, those with weights first or alone; sizes are counted without memory for weights."""
    entries, sizes = [], dict[str, tuple[int, int, tuple[int, int, int]]]()
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
            sizes[key] = count_parameters(network), count_macs(network, size)["total"], size
        record = read_record(model.folder) if model.is_trained else None
        origin = origin_of(recipe, OwnData(split_tag(model.tag)[1])) if record is None else record.origin
        entries.append(Entry(model, *sizes[key], origin, record))
    return entries


def text_table(entries: Sequence[Entry]) -> str:
    """Return the zoo as aligned text: a table of what is from scratch, and one for each other start."""
    parts = []
    for said, kind in split_by_start(entries, lambda entry: entry.origin):
        above = [said] if said else []
        starts = dict.fromkeys(origin_text(entry.origin) for entry in kind)
        for start in starts:
            rows = [[*each.cells(), each.weights] for each in kind if origin_text(each.origin) == start]
            if len(starts) > 1:  # of one alone, what is said has the name
                above.append(f"Started from {start}:")
            parts.append("\n".join([*(textwrap.fill(line, WIDTH) for line in above), Table(HEADER, rows).text()]))
            above = []
    notes = [note for word, note in SAID.items() if any(entry.weights == word for entry in entries)]
    return "\n\n".join([*parts, *(["\n".join(notes)] if notes else [])])


def markdown_table(entries: Sequence[Entry]) -> str:
    """Return the zoo as Markdown tables, for a page in docs/."""
    rows = []
    for entry in entries:
        name, *rest = entry.cells()
        card = f"[`{name}`](../model_cards/{name}.md)" if entry.model.is_trained else f"`{name}`"
        weights = {
            PACKAGE: "in the package",
            HEADS: "heads in the package, beside the pretrained backbone",
            HUB: f"hf-hub:{entry.model.repository}",
            NONE: f"no weights: `mbib train {entry.model.recipe}`",
        }
        rows.append((entry.origin, [card, *rest, weights[entry.weights]]))
    return markdown_by_start(HEADER, rows)
