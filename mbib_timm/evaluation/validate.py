"""`mbib validate`: evaluate a run's folder, an exported folder, a published name, or any timm model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from mbib_timm.data import build_eval_loader, open_data
from mbib_timm.data.class_counts import read_class_counts
from mbib_timm.environment import describe_environment, join_world, leave_world
from mbib_timm.errors import MbibError
from mbib_timm.evaluation.evaluate import evaluate
from mbib_timm.evaluation.table import results_table
from mbib_timm.models.load import Source, create_trained, find_source
from mbib_timm.models.zoo import ZOO
from mbib_timm.recipe import Recipe, find_recipe, load_recipe


def validate(
    target: str,
    *,
    recipe: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    split: str | None = None,
    results_file: Path | None = None,
) -> dict[str, Any]:
    """Evaluate a trained model and print its table.

    Args:
        target: a run's folder, ``local-dir:FOLDER``, ``hf-hub:REPO``, or a timm model name.
        recipe: name of the recipe that says which data; a run's folder and a published model have their own.
        overrides: recipe keys to replace.
        split: split to evaluate; by default the one that the run's result is on.
        results_file: where to write the metrics as JSON.

    Returns:
        Metrics by head, with the split, the counts and the environment they belong to.

    Raises:
        MbibError: nothing there to evaluate, or data that do not fit the model.
    """
    settings, source = _resolve(target, recipe, overrides or {})
    world = join_world(settings.device)
    try:
        # A run's folder and a published name know their own arguments; a bare timm name takes the recipe's.
        model = create_trained(source, **({} if source.has_files else settings.model_kwargs))
        counts = _class_counts(source, settings)
        num_classes = int(getattr(model, "num_classes", len(counts)))
        if len(counts) != num_classes:
            raise MbibError(f"{target} tells {num_classes} classes apart, but the data have {len(counts)}")
        size = _input_size(model, settings)
        has_test = settings.test_split is not None or settings.test_list is not None
        split = split or (settings.test_split or "test" if has_test else settings.val_split)
        loader = build_eval_loader(
            settings,
            split,
            input_size=size,
            num_classes=num_classes,
            device=world.device,
            rank=world.rank,
            world_size=world.world_size,
        )
        heads = evaluate(
            model.to(world.device), loader, counts, device=world.device, channels_last=settings.channels_last
        )
        results = {
            "target": target,
            "split": split,
            "class_counts": counts.tolist(),
            "heads": heads,
            "environment": describe_environment(world),
        }
        if world.is_main:
            print(f"{target} on {split}:")
            print(results_table(heads, counts))
            if results_file is not None:
                results_file.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")
        return results
    finally:
        leave_world()


def _resolve(target: str, recipe: str | None, overrides: Mapping[str, Any]) -> tuple[Recipe, Source]:
    """Return the recipe that names the data, and where the model is."""
    source = find_source(target)
    published = {model.name: model.recipe for model in ZOO}
    recipe = recipe or published.get(source.name)  # the package's recipe knows where to download the data
    if recipe is not None:
        return load_recipe(find_recipe(recipe), overrides), source
    file = source.file("recipe.yaml")
    if file is None:
        raise MbibError(
            f"{target} does not say which data: give --recipe NAME (see mbib recipes), and flags to change it"
        )
    return load_recipe(file, overrides), source


def _class_counts(source: Source, recipe: Recipe) -> np.ndarray:
    """Return the training images of each class: from a file, from the checkpoint, or from the training data."""
    if recipe.class_counts is not None:
        return read_class_counts(recipe.class_counts)
    counts = source.config().get("class_counts")
    return open_data(recipe).class_counts if counts is None else np.asarray(counts, dtype=np.int64)


def _input_size(model: nn.Module, recipe: Recipe) -> tuple[int, int, int]:
    cfg: Any = getattr(model, "pretrained_cfg", {})
    channels, height, width = cfg.get("input_size", (3, 224, 224))
    return (channels, recipe.img_size or height, recipe.img_size or width)
