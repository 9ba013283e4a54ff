"""`mbib validate`: evaluate a run's folder, an exported folder, a published name, or any timm model."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mbib_timm.data import unread_classes
from mbib_timm.data.class_values import label_names
from mbib_timm.data.sources import UNREADABLE
from mbib_timm.environment import Environment, World, describe_environment, joined_world
from mbib_timm.errors import MbibError
from mbib_timm.evaluation.answer_files import require_own_answers, write_answers
from mbib_timm.evaluation.evaluate import AnswerLog, evaluate
from mbib_timm.evaluation.priors import ESTIMATE, estimate_prior, log_shift, trained_shares, wanted_shares
from mbib_timm.evaluation.target import OpenTarget, Target, find_target, open_target
from mbib_timm.files import has_fields, in_words, make_folder, printable, require_own, to_json, write_bytes
from mbib_timm.models.head_outputs import PREDICTION, expert_heads
from mbib_timm.results.record import HeadMetrics
from mbib_timm.results.run_text import UNMEASURED, start_text
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
        prior: class frequencies that the logits were shifted to, by class, their sum 1; None where they were not.
        left_out_images: broken images, which are not measured.
        trained_on: a line on the images that the model was trained on; None where there are none.
    """

    target: str
    split: str
    class_counts: list[int]
    heads: dict[str, HeadMetrics]
    environment: Environment
    prior: list[float] | None = None
    left_out_images: list[str] = field(default_factory=list)
    trained_on: str | None = None


def validate(
    target: str,
    *,
    recipe: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    split: str | None = None,
    prior: str | None = None,
    results_file: Path | None = None,
) -> Validation:
    """Evaluate a trained model and print its table.

    Args:
        target: a run's folder, ``local-dir:FOLDER``, ``hf-hub:REPO``, or a timm model name.
        recipe: name of the recipe that says which data; a run's folder and a published model have their own.
        overrides: recipe keys to replace.
        split: split to evaluate; by default the one that the run's result is on.
        prior: class frequencies that the logits of every head are shifted to: ``train``, ``uniform``, a file, see
            `read_prior`; or ``estimate``, for those under which the images are most likely for the prediction. None
            leaves the logits as they are. Experts, whose logits are for frequencies of their own, are then left out.
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
    with joined_world(found.recipe.device) as world:
        opened = open_target(found, world, split)
        shares, shift, note = (None, None, "") if prior is None else _move_prior(prior, found, opened, world)
        log = AnswerLog(opened.images.groups)
        heads = evaluate(
            opened.model,
            opened.loader,
            opened.class_counts,
            device=world.device,
            channels_last=opened.recipe.channels_last,
            shift=None if shift is None else shift.to(world.device),
            answers=log,
        )
        if shift is not None and expert_heads(opened.model):  # each is trained for class frequencies of its own
            heads = {PREDICTION: heads[PREDICTION]}
        answers = log.read()
        broken = world.gather(opened.loader.broken_images())
        results = Validation(
            target=target,
            split=opened.split,
            class_counts=opened.class_counts.tolist(),
            heads=heads,
            environment=describe_environment(world),
            prior=None if shares is None else shares.tolist(),
            left_out_images=broken,
            trained_on=opened.trained_on or None,
        )
        if world.is_main:
            if note:
                print(printable(note))
            unreadable = [f"warning: left out: {in_words({UNREADABLE: broken})}"] if broken else []
            if gone := unread_classes(opened.images, broken):
                unreadable.append(f"warning: {in_words({UNMEASURED: gone})}")
            print("\n".join([*opened.notes, *map(printable, unreadable), f"{target} on {opened.split}:"]))
            print(accuracy_table(heads, opened.class_counts))
            origin = found.source.config.origin
            if origin is not None and (start := start_text(origin)):
                print(start)
            if results_file is not None:
                make_folder(results_file.parent)
                write_bytes(results_file, to_json(results))
                files = write_answers(
                    results_file.parent,
                    answers,
                    opened.images,
                    opened.class_counts,
                    opened.class_names,
                    found.recipe.data_dir,
                    prefix=_prefix(results_file),
                )
                print("\n".join(map(str, [results_file, *files])))
        return results


def _move_prior(prior: str, target: Target, opened: OpenTarget, world: World) -> tuple[np.ndarray, Tensor, str]:
    """Return class frequencies, (K,), what is added to logits for them, (K,), and a line on how they were estimated."""
    config, counts, note = target.source.config, opened.class_counts, ""
    trained = trained_shares(target.name, config.logit_prior, counts)
    if prior != ESTIMATE:
        shares = wanted_shares(prior, counts, config.class_names)
    elif world.world_size > 1:
        raise MbibError(f"--prior estimate runs in one process, not in {world.world_size}: omit torchrun")
    else:
        found = estimate_prior(_probabilities(opened), trained)
        shares, note = found.shares, found.describe(label_names(config.class_names, len(counts)))
    return shares, torch.from_numpy(log_shift(shares, trained)), note


@torch.no_grad()
def _probabilities(opened: OpenTarget) -> np.ndarray:
    """Return the prediction's probabilities of all images, without a prior, (N, K)."""
    found = []
    for batch in opened.loader:
        images = batch.laid_out(opened.recipe.channels_last).images
        found.append(opened.model(images).double().softmax(dim=-1).cpu().numpy())
    return np.concatenate(found)


def _check(results_file: Path) -> None:
    if results_file.suffix != ".json" or results_file.is_dir():
        raise MbibError(f"--results {results_file}: expected the name of a JSON file, such as results/metrics.json")
    own = has_fields("target", "split", "heads", "environment")
    require_own("--results", results_file, own, "holds no results of this command")
    require_own_answers("--results", results_file.parent, _prefix(results_file))


def _prefix(results_file: Path) -> str:
    """Return what the names of the files beside the results begin with."""
    return f"{results_file.stem}_"
