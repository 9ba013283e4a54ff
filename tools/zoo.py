#!/usr/bin/env python
"""Keep the zoo: what the package knows of trained models, and their cards.

    python tools/zoo.py add runs/mbib_resnet32.cifar100_lt_if100    # a finished run becomes the package's weights
    python tools/zoo.py cards                                       # write model_cards/ anew from results/

`add` puts a run's config, recipe, metrics, and its weights where they are small, under `mbib_timm/zoo/<arch.tag>/`.
A card is rendered from the folder in `results/` of the packaged seed, with the other seeds beside it;
`python tools/results.py add` has put them there.
"""

import argparse
import re
import sys
from pathlib import Path

from mbib_timm.errors import MbibError, few, unknown_name
from mbib_timm.models.zoo import ZOO, ZooModel
from mbib_timm.publishing.card import render_card
from mbib_timm.publishing.release import make_release
from mbib_timm.results.record import RECORD
from mbib_timm.results.runs import read_run, read_seeds

ROOT = Path(__file__).parents[1]
LARGEST_PACKAGED_BYTES = 8 << 20


def add(run: Path) -> Path:
    """Put a finished run into the package.

    Returns:
        The folder written.

    Raises:
        MbibError: a run that is no recipe's, or not finished, or shorter than its recipe.
    """
    finished = read_run(run)
    models = {model.name: model for model in ZOO}
    if finished.name not in models:
        raise unknown_name("model of the zoo", finished.name, models)
    model = models[finished.name]
    if finished.zoo_model is None:
        raise MbibError(f"{run} differs from the recipe {model.recipe} in {few(finished.differing)}")
    files = make_release(run, model.repository).files
    model.folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "recipe.yaml", RECORD, "model.safetensors"):
        if len(files[name]) <= LARGEST_PACKAGED_BYTES:
            (model.folder / name).write_bytes(files[name])
    return model.folder


def render(model: ZooModel) -> str:
    """Return the card of a trained model, from the results of its runs.

    Raises:
        MbibError: there are no results of the seed whose weights are published.
    """
    packaged = read_run(model.folder)
    results = sorted(
        path
        for path in (ROOT / "results").glob(packaged.kept_name("*"))
        if re.fullmatch(re.escape(packaged.kept_name("#")).replace(r"\#", r"\d+"), path.name)
    )
    own = ROOT / "results" / packaged.kept_name(packaged.record.seed)
    if own not in results:
        raise MbibError(f"{own} is missing: python tools/results.py add RUN")
    run, *others = read_seeds(own, [result for result in results if result != own])
    if run.record.result != packaged.record.result:
        raise MbibError(f"{own} and {model.folder} hold results of different runs")
    return render_card(run, model.repository, others, figures=f"../results/{own.name}/figures")


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
