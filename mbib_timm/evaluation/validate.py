"""`mbib validate`: evaluate a run's folder, an exported folder, a published name, or any timm model."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mbib_timm.environment import Environment, describe_environment, join_world, leave_world
from mbib_timm.evaluation.evaluate import evaluate
from mbib_timm.evaluation.target import find_target, open_target
from mbib_timm.files import to_json
from mbib_timm.results.record import HeadMetrics
from mbib_timm.results.tables import accuracy_table


@dataclass(frozen=True)
class Validation:
    """What a trained model achieves on a split.

    Attributes:
        target: the model, as it was asked for.
        split: of the images.
        class_counts: training images of each class, which decide the shot groups.
        heads: metrics of ``prediction``, and of each head and expert where there are several.
        environment: versions, hardware, command.
    """

    target: str
    split: str
    class_counts: list[int]
    heads: dict[str, HeadMetrics]
    environment: Environment


def validate(
    target: str,
    *,
    recipe: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    split: str | None = None,
    results_file: Path | None = None,
) -> Validation:
    """Evaluate a trained model and print its table.

    Args:
        target: a run's folder, ``local-dir:FOLDER``, ``hf-hub:REPO``, or a timm model name.
        recipe: name of the recipe that says which data; a run's folder and a published model have their own.
        overrides: recipe keys to replace.
        split: split to evaluate; by default the one that the run's result is on.
        results_file: where to write the metrics as JSON.

    Returns:
        What the file holds.

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
        results = Validation(target, opened.split, opened.class_counts.tolist(), heads, describe_environment(world))
        if world.is_main:
            print("\n".join([*opened.notes, f"{target} on {opened.split}:"]))
            print(accuracy_table(heads, opened.class_counts))
            if results_file is not None:
                results_file.write_bytes(to_json(results))
        return results
    finally:
        leave_world()
