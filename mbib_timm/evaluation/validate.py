"""`mbib validate`: evaluate a run's folder, an exported folder, a published name, or any timm model."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mbib_timm.environment import Environment, describe_environment, join_world, leave_world
from mbib_timm.errors import MbibError
from mbib_timm.evaluation.answer_files import write_answers
from mbib_timm.evaluation.evaluate import AnswerLog, evaluate
from mbib_timm.evaluation.target import find_target, open_target
from mbib_timm.files import to_json, write_bytes
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
        results_file: where to write the metrics as JSON. Beside it, ``NAME.json``, come ``NAME_predictions.csv``,
            ``NAME_confusion.csv`` and ``NAME_classes.csv``; see `write_answers`. Its folder is made.

    Returns:
        What the file holds.

    Raises:
        MbibError: nothing there to evaluate, or data that do not fit the model.
    """
    if results_file is not None:
        _check(results_file)
    found = find_target(target, recipe, overrides)
    world = join_world(found.recipe.device)
    try:
        opened = open_target(found, world, split)
        channels_last = found.recipe.channels_last
        log = AnswerLog()
        heads = evaluate(
            opened.model,
            opened.loader,
            opened.class_counts,
            device=world.device,
            channels_last=channels_last,
            answers=log,
        )
        answers = log.read()
        results = Validation(target, opened.split, opened.class_counts.tolist(), heads, describe_environment(world))
        if world.is_main:
            print("\n".join([*opened.notes, f"{target} on {opened.split}:"]))
            print(accuracy_table(heads, opened.class_counts))
            if results_file is not None:
                results_file.parent.mkdir(parents=True, exist_ok=True)
                write_bytes(results_file, to_json(results))
                files = write_answers(
                    results_file.parent,
                    answers,
                    opened.images,
                    opened.class_counts,
                    opened.class_names,
                    found.recipe.data_dir,
                    prefix=f"{results_file.stem}_",
                )
                print("\n".join(map(str, [results_file, *files])))
        return results
    finally:
        leave_world()


def _check(results_file: Path) -> None:
    if results_file.suffix != ".json" or results_file.is_dir():
        raise MbibError(f"--results {results_file}: expected the name of a JSON file, such as results/metrics.json")
