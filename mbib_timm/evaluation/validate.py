"""`mbib validate`: evaluate a run's folder, an exported folder, a published name, or any timm model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mbib_timm.environment import describe_environment, join_world, leave_world
from mbib_timm.evaluation.evaluate import evaluate
from mbib_timm.evaluation.table import results_table
from mbib_timm.evaluation.target import find_target, open_target


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
    found = find_target(target, recipe, overrides)
    world = join_world(found.recipe.device)
    try:
        opened = open_target(found, world, split)
        channels_last = found.recipe.channels_last
        heads = evaluate(
            opened.model, opened.loader, opened.class_counts, device=world.device, channels_last=channels_last
        )
        results = {
            "target": target,
            "split": opened.split,
            "class_counts": opened.class_counts.tolist(),
            "heads": heads,
            "environment": describe_environment(world),
        }
        if world.is_main:
            print(f"{target} on {opened.split}:")
            print(results_table(heads, opened.class_counts))
            if results_file is not None:
                results_file.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")
        return results
    finally:
        leave_world()
