#!/usr/bin/env python
"""Keep the zoo: what the package knows of trained models, and their cards.

    python tools/zoo.py add runs/mbib_resnet32.cifar100_lt_if100    # a finished run becomes the package's weights
    python tools/zoo.py cards                                       # write model_cards/ anew from results/

`add` puts a run's config, recipe, metrics, and its weights where they are small, under `mbib_timm/zoo/<arch.tag>/`.
A card is rendered from `results/<arch.tag>-<epochs>e-seed<seed>/` of the packaged seed, with the other seeds beside it;
`python tools/results.py add` has put them there.
"""

import argparse
import json
import sys
from pathlib import Path

from mbib_timm.errors import MbibError, unknown_name
from mbib_timm.models.zoo import ZOO, ZooModel
from mbib_timm.publishing.card import render_card
from mbib_timm.publishing.record import read_record
from mbib_timm.publishing.release import make_release
from mbib_timm.recipe import find_recipe, load_recipe, longest_epochs

ROOT = Path(__file__).parents[1]
LARGEST_PACKAGED_BYTES = 8 << 20


def add(run: Path) -> Path:
    """Put a finished run into the package.

    Returns:
        The folder written.

    Raises:
        MbibError: a run that is no recipe's, or not finished, or shorter than its recipe.
    """
    record = read_record(run)
    models = {model.name: model for model in ZOO}
    if record.name not in models:
        raise unknown_name("model of the zoo", record.name, models)
    model = models[record.name]
    asked_for = load_recipe(find_recipe(model.recipe))
    if longest_epochs(record.recipe) != longest_epochs(asked_for):
        raise MbibError(
            f"{run} has {longest_epochs(record.recipe)} epochs; the recipe asks for {longest_epochs(asked_for)}"
        )
    files = make_release(run, model.repository).files
    model.folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "recipe.yaml", "metrics.json", "model.safetensors"):
        if len(files[name]) <= LARGEST_PACKAGED_BYTES:
            (model.folder / name).write_bytes(files[name])
    return model.folder


def render(model: ZooModel) -> str:
    """Return the card of a trained model, from the results of its runs.

    Raises:
        MbibError: there are no results of the seed whose weights are published.
    """
    epochs, seed = longest_epochs(load_recipe(model.folder / "recipe.yaml")), model.metrics["seed"]
    results = sorted((ROOT / "results").glob(f"{model.name}-{epochs}e-seed*"))
    own = ROOT / "results" / f"{model.name}-{epochs}e-seed{seed}"
    if own not in results:
        raise MbibError(f"{own} is missing: python tools/results.py add RUN")
    published = json.loads((own / "metrics.json").read_text(encoding="utf-8"))
    if published["result"] != model.metrics["result"]:
        raise MbibError(f"{own} and {model.folder} hold results of different runs")
    record = read_record(own, [result for result in results if result != own])
    return render_card(record, model.repository, figures=f"../results/{own.name}/figures")


def write_cards() -> list[Path]:
    """Write the card of every trained model. Returns the files."""
    written = []
    for model in ZOO:
        if model.is_trained:
            file = ROOT / "model_cards" / f"{model.name}.md"
            file.parent.mkdir(exist_ok=True)
            file.write_text(render(model), encoding="utf-8")
            written.append(file)
    return written


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    adding = commands.add_parser("add", help="put a finished run into the package")
    adding.add_argument("run", type=Path, nargs="+")
    commands.add_parser("cards", help="write the cards")
    arguments = parser.parse_args()
    if arguments.command == "add":
        for run in arguments.run:
            print(add(run))
    else:
        print("\n".join(map(str, write_cards())))


if __name__ == "__main__":
    try:
        main()
    except MbibError as error:
        print(f"zoo: error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
