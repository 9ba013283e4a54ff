"""What is known of a trained model: what its runs have written, without what it says of the machine."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mbib_timm.errors import MbibError
from mbib_timm.models.zoo import ZOO
from mbib_timm.recipe import Recipe, load_recipe
from mbib_timm.training.public import public_metrics

FIGURES = {
    "class_accuracy.png": "Accuracy of each class, in the order of its training images.",
    "shot_groups.png": "Accuracy by head and shot group.",
    "training_curves.png": "Training loss, learning rate, and accuracy after each evaluated epoch.",
}


@dataclass(frozen=True)
class Record:
    """What is known of a trained model.

    Attributes:
        name: ``arch.tag``.
        recipe: of the run whose weights these are.
        metrics: of that run.
        others: metrics of further runs, which differ in the seed alone.
        figures: names of the figures that there are.
    """

    name: str
    recipe: Recipe
    metrics: Mapping[str, Any]
    others: tuple[Mapping[str, Any], ...] = ()
    figures: tuple[str, ...] = ()

    @property
    def in_zoo(self) -> bool:
        """True for a model of a published name; False for somebody's own."""
        return self.name in {model.name for model in ZOO}

    @property
    def runs(self) -> tuple[Mapping[str, Any], ...]:
        """Metrics of all runs, by seed."""
        return tuple(sorted((self.metrics, *self.others), key=lambda metrics: metrics["seed"]))


def read_record(run: Path, others: Sequence[Path] = ()) -> Record:
    """Read what a run's folder, or a folder of results, says.

    Args:
        run: the folder.
        others: folders of runs that differ in the seed alone.

    Raises:
        MbibError: a run that is not finished, or another recipe's among the others.
    """
    recipe, metrics = _recipe(run), _metrics(run)
    further = []
    for other in others:
        if _computation(_recipe(other)) != _computation(recipe):
            raise MbibError(f"{other} is a run of another recipe than {run}: more than the seed differs")
        further.append(_metrics(other))
    seeds = [m["seed"] for m in (metrics, *further)]
    if len(set(seeds)) < len(seeds):
        raise MbibError(f"two of the runs have the same seed: {', '.join(map(str, seeds))}")
    figures = tuple(name for name in FIGURES if (run / "figures" / name).is_file())
    return Record(metrics["name"], recipe, metrics, tuple(further), figures)


def _metrics(run: Path) -> dict[str, Any]:
    file = run / "metrics.json"
    if not file.is_file():
        raise MbibError(f"{run} has no metrics.json: the run is not finished, and has no result")
    return public_metrics(json.loads(file.read_text(encoding="utf-8")))


def _recipe(run: Path) -> Recipe:
    if not (run / "recipe.yaml").is_file():
        raise MbibError(f"{run} has no recipe.yaml: it is no run's folder")
    return load_recipe(run / "recipe.yaml")


def _computation(recipe: Recipe) -> dict[str, Any]:
    return recipe.everywhere(seed=0).computation()
