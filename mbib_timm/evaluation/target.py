"""What is to be evaluated: a trained model by any name, and the data that belong to it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from mbib_timm.data import build_eval_loader, open_data
from mbib_timm.data.batch import Loader
from mbib_timm.environment import World
from mbib_timm.errors import MbibError
from mbib_timm.models.weights import Source, create_trained, find_source
from mbib_timm.models.zoo import is_published
from mbib_timm.recipe import Recipe, find_recipe, load_recipe


@dataclass(frozen=True)
class Target:
    """A trained model, and what says which data it belongs to.

    Attributes:
        name: as it was asked for.
        source: where the model is.
        recipe: names the data.
    """

    name: str
    source: Source
    recipe: Recipe

    def class_counts(self) -> np.ndarray:
        """Return the training images of each class: from the checkpoint, or from the training data."""
        counts = self.source.config().class_counts
        return open_data(self.recipe).class_counts if counts is None else counts

    def split(self) -> str:
        """Return the split that the run's result is on."""
        recipe = self.recipe
        has_test = recipe.test_split is not None or recipe.test_list is not None
        return recipe.test_split or "test" if has_test else recipe.val_split


@dataclass(frozen=True)
class OpenTarget:
    """A trained model on its device, with the images to evaluate it on.

    Attributes:
        model: in evaluation mode.
        class_counts: training images of each class, (K,).
        input_size: of the images, (C, H, W).
        split: the images' split.
        loader: gives batches of them.
    """

    model: nn.Module
    class_counts: np.ndarray
    input_size: tuple[int, int, int]
    split: str
    loader: Loader


def find_target(name: str, recipe: str | None = None, overrides: Mapping[str, Any] | None = None) -> Target:
    """Find a trained model, and the recipe that names its data.

    Args:
        name: a run's folder, ``local-dir:FOLDER``, ``hf-hub:REPO``, or a timm model name.
        recipe: name of the recipe that says which data; a run's folder and a published model have their own.
        overrides: recipe keys to replace.

    Raises:
        MbibError: no such model, or nothing that says which data.
    """
    source = find_source(name)
    if recipe is None and is_published(source.name):
        recipe = source.name  # the package's recipe knows where to download the data
    if recipe is not None:
        return Target(name, source, load_recipe(find_recipe(recipe), overrides))
    file = source.file("recipe.yaml")
    if file is None:
        raise MbibError(
            f"{name} does not say which data to use: give --recipe NAME (see mbib recipes), and flags to change it"
        )
    return Target(name, source, load_recipe(file, overrides))


def open_target(target: Target, world: World, split: str | None = None) -> OpenTarget:
    """Create the model and make batches of the images.

    Args:
        target: which model and which data.
        world: this process among others; each gets its share of the images.
        split: the images' split; by default the one that the run's result is on.

    Raises:
        MbibError: weights or images that are missing, or that do not fit one another.
    """
    recipe, source = target.recipe, target.source
    # A run's folder and a published name know their own arguments; a bare timm name takes the recipe's.
    model = create_trained(source, **({} if source.has_files else recipe.model_kwargs))
    counts = target.class_counts()
    num_classes = int(getattr(model, "num_classes", len(counts)))
    if len(counts) != num_classes:
        raise MbibError(f"{target.name} has {num_classes} classes, but the data have {len(counts)}")
    size = _input_size(model, recipe)
    split = split or target.split()
    loader = build_eval_loader(
        recipe,
        split,
        input_size=size,
        num_classes=num_classes,
        device=world.device,
        rank=world.rank,
        world_size=world.world_size,
    )
    return OpenTarget(model.to(world.device), counts, size, split, loader)


def _input_size(model: nn.Module, recipe: Recipe) -> tuple[int, int, int]:
    cfg: Any = getattr(model, "pretrained_cfg", {})
    channels, height, width = cfg.get("input_size", (3, 224, 224))
    return (channels, recipe.img_size or height, recipe.img_size or width)
