#!/usr/bin/env python
"""Keep the zoo: what the package knows of trained models, and their cards.

    python tools/zoo.py add runs/mbib_resnet32.cifar100_lt_if100    # a finished run becomes the package's weights
    python tools/zoo.py cards                                       # write model_cards/ anew from results/

`add` puts a run's config, recipe, metrics, and its weights where they are small, under `mbib_timm/zoo/<arch.tag>/`. The
weights are rounded to half precision, and evaluated anew: the metrics are those of the weights that are kept.
A card is rendered from the folder in `results/` of the packaged seed, with the other seeds beside it;
`python tools/results.py add` has put them there.
"""

import argparse
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load, save
from torch import Tensor

from mbib_timm.errors import MbibError, few, unknown_name
from mbib_timm.evaluation.validate import validate
from mbib_timm.models.backbones import PREFIX
from mbib_timm.models.origin import Origin
from mbib_timm.models.pip_weights import backbone_weights
from mbib_timm.models.weights import load_model, prefix_backbone
from mbib_timm.models.zoo import HEADS, WHOLE, ZOO, ZooModel, backbone_digest
from mbib_timm.publishing.card import render_card
from mbib_timm.publishing.release import make_release
from mbib_timm.results.record import RECORD, RunRecord, write_record
from mbib_timm.results.runs import read_run, read_seeds

ROOT = Path(__file__).parents[1]
LARGEST_PACKAGED_BYTES = 8 << 20


def add(run: Path, data_dir: str | None = None) -> Path:
    """Put a finished run into the package, its weights rounded to half precision, with the results that these have.

    Where the backbone is as it was pretrained, the heads alone are kept.

    Args:
        run: the run's folder.
        data_dir: folder of its data, where they are no longer where the run found them.

    Raises:
        MbibError: a run that is no recipe's, or not finished, or shorter than its recipe; or data that are missing, for
            the rounded weights are evaluated.
    """
    finished = read_run(run)
    models = {model.name: model for model in ZOO}
    if finished.name not in models:
        raise unknown_name("model of the zoo", finished.name, models)
    model = models[finished.name]
    if finished.zoo_model is None:
        raise MbibError(f"{run} differs from the recipe {model.recipe} in {few(finished.differing)}")
    files = make_release(run, model.repository).files
    weights = load(files[WHOLE])
    backbone = pretrained_backbone(run, weights, finished.origin)
    rounded = {name: value if backbone and name.startswith(PREFIX) else half(value) for name, value in weights.items()}
    record = rounded_record(run, rounded, finished.record, data_dir)
    model.folder.mkdir(parents=True, exist_ok=True)
    for name in (WHOLE, HEADS):
        (model.folder / name).unlink(missing_ok=True)
    if backbone is not None:
        heads = {name: value for name, value in rounded.items() if not name.startswith(PREFIX)}
        said = {"format": "pt", "backbone": backbone, "backbone_sha256": backbone_digest(rounded)}
        (model.folder / HEADS).write_bytes(save(heads, said))
    elif len(content := save(rounded, {"format": "pt"})) <= LARGEST_PACKAGED_BYTES:
        (model.folder / WHOLE).write_bytes(content)
    for name in ("config.json", "recipe.yaml"):
        (model.folder / name).write_bytes(files[name])
    write_record(model.folder, record)
    return model.folder


def half(value: Tensor) -> Tensor:
    """Return a matrix or a kernel in half precision, and what is smaller as it is. Raises MbibError if it overflows."""
    if value.dtype != torch.float32 or value.ndim < 2:
        return value
    if not torch.isfinite(rounded := value.half()).all():
        raise MbibError("a weight is too large for half precision")
    return rounded


def pretrained_backbone(run: Path, weights: dict[str, Tensor], origin: Origin) -> str | None:
    """Return the name of the weights that a run's backbone still has from its start; None where it has changed."""
    started = [start.name for start in origin.weights if start.source in ("timm", "package")]
    if not started:
        return None
    network = load_model(str(run)).module
    before = prefix_backbone(backbone_weights(started[-1]), network)
    same = all(torch.equal(value, weights[name]) for name, value in before.items())
    return started[-1] if same else None


def rounded_record(run: Path, weights: dict[str, Tensor], record: RunRecord, data_dir: str | None) -> RunRecord:
    """Return a run's record with the results of its rounded weights on the images of its result."""
    with TemporaryDirectory() as folder:
        for name in ("config.json", "recipe.yaml", RECORD):
            shutil.copyfile(run / name, Path(folder, name))
        Path(folder, WHOLE).write_bytes(save(weights, {"format": "pt"}))
        found = validate(folder, overrides={} if data_dir is None else {"data_dir": data_dir})
    result = replace(record.result, heads=found.heads)
    return replace(record, result=result, rounded_from=record.rounded_from or record.result.prediction.top1)


def render(model: ZooModel) -> str:
    """Return the card of a trained model, from the results of its runs.

    Raises:
        MbibError: there are no results of the seed whose weights are published.
    """
    packaged = read_run(model.folder)
    found = sorted((ROOT / "results").glob(packaged.kept_name("*")))  # in mixed precision too, whose names are longer
    results = [path for path in found if read_run(path).precision == packaged.precision]
    own = ROOT / "results" / packaged.kept_name(packaged.record.seed)
    if own not in results:
        raise MbibError(f"{own} is missing: python tools/results.py add RUN")
    run, *_ = runs = read_seeds(own, [result for result in results if result != own])
    before = packaged.record.rounded_from
    if before is None or run.record.result.prediction.top1 != before:
        raise MbibError(f"{own} and {model.folder} hold results of different runs")
    rounded = replace(run, record=packaged.record)
    return render_card(rounded, model.repository, runs, figures=f"../results/{own.name}/figures")


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
    adding.add_argument("--data-dir", metavar="DIR", help="folder of the runs' data, where they have moved")
    commands.add_parser("cards", help="write the cards")
    arguments = parser.parse_args()
    if arguments.command == "add":
        for run in arguments.run:
            print(add(run, arguments.data_dir))
    else:
        print("\n".join(map(str, write_cards())))


if __name__ == "__main__":
    try:
        main()
    except MbibError as error:
        print(f"zoo: error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
