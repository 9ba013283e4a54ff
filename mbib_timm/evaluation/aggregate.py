"""`mbib aggregate`: experts weighed at test time (Zhang et al. 2022, SADE), on test sets of other class distributions.

    w = softmax(a),  maximise  mean_i cos( softmax(sum_e w_e z_e(x_i')), softmax(sum_e w_e z_e(x_i'')) )

Two random views x' and x'' of an unlabelled image should get one prediction: an expert is the more consistent the
better it knows the classes that the images come from.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mbib_timm.data import build_views_loader
from mbib_timm.data.batch import Loader
from mbib_timm.data.long_tail import exponential_profile, largest_class, long_tailed_indices, named
from mbib_timm.environment import Environment, describe_environment, joined_world, seed_generators
from mbib_timm.errors import DataError, MbibError, unknown_name
from mbib_timm.evaluation.target import OpenTarget, find_target, open_target
from mbib_timm.files import has_fields, make_folder, printable, require_own, to_json, write_bytes
from mbib_timm.models.head_outputs import head_logits, predicting_parts
from mbib_timm.recipe import Recipe
from mbib_timm.results.redact import redact_environment
from mbib_timm.results.tables import Table

FILE = "aggregation.json"
# The random views, as keys of a recipe, whose crop and flip they keep.
COLOURS = {"color_jitter": 0.4, "hue": 0.1, "color_jitter_prob": 0.8, "grayscale_prob": 0.2}
VIEW = {"rotation": 0.0, "aa": None, "cutout": 0, "gaussian_blur_prob": 0.2, **COLOURS}

# The authors' constants for CIFAR.
EPOCHS = 5
BATCH_SIZE = 128
LEARNING_RATE = 0.1
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
SMALLEST_WEIGHT = 0.05

FACTORS = (50, 25, 10, 5, 2)
# Imbalance factor and direction of the test sets: from the training frequencies over the uniform ones to the reversed.
DISTRIBUTIONS: dict[str, tuple[int, int]] = {
    **{f"forward{factor}": (factor, 1) for factor in FACTORS},
    "uniform": (1, 1),
    **{f"backward{factor}": (factor, -1) for factor in reversed(FACTORS)},
}
# What ``uniform`` is called where the classes have different numbers of images: then it is not drawn anew.
AS_IT_IS = "as it is"


def weighted_logits(logits: Tensor, weights: Tensor) -> Tensor:
    """Return ``sum_e w_e z_e``, (B, K), of the experts' logits (E, B, K) and weights (E,)."""
    return torch.tensordot(weights, logits, dims=1)


def view_consistency(first: Tensor, second: Tensor, weights: Tensor) -> Tensor:
    """Return the mean cosine similarity of the predictions for two views of the same images, a scalar.

    Args:
        first, second: logits of the experts, (E, B, K).
        weights: of the experts, (E,).
    """
    one, other = (weighted_logits(logits, weights).softmax(dim=-1) for logits in (first, second))
    return F.cosine_similarity(one, other, dim=-1).mean()


class Learnt(NamedTuple):
    """Weights of experts.

    Attributes:
        weights: (E,), positive; their sum is 1.
        epochs: in which they were learnt.
    """

    weights: Tensor
    epochs: int


def learn_weights(
    epochs: Iterable[Iterable[tuple[Tensor, Tensor]]], experts: int, device: torch.device | str = "cpu"
) -> Learnt:
    """Learn weights under which the experts agree on two views of an image: SGD on E numbers, no labels.

    Learning ends after an epoch that leaves an expert with a weight below `SMALLEST_WEIGHT`.

    Args:
        epochs: for each the logits of the experts for the two views of every batch, (E, B, K) each.
        experts: their number E.
        device: of the logits.
    """
    a = nn.Parameter(torch.full((experts,), 1 / experts, device=device))
    optimizer = torch.optim.SGD([a], LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True)
    done = 0
    for batches in epochs:
        for first, second in batches:
            loss = -view_consistency(first.float(), second.float(), a.softmax(dim=0))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        done += 1
        if a.softmax(dim=0).min().item() < SMALLEST_WEIGHT:  # waits for the device, once an epoch
            break
    return Learnt(a.detach().softmax(dim=0), done)


def draw_test_set(
    distribution: str,
    targets: np.ndarray,
    class_counts: np.ndarray,
    seed: int,
    class_names: Sequence[str] | None = None,
) -> np.ndarray:
    """Choose the images of a test set with another class distribution.

    Args:
        distribution: one of `DISTRIBUTIONS`: ``uniform`` for all images, ``forward10`` for frequencies that fall as the
            training images do, from the class with the most to that with the fewest, by a factor of 10 in all, and
            ``backward10`` for frequencies that rise.
        targets: labels (N,) of the test images.
        class_counts: training images of each class, (K,).
        seed: chooses the images.
        class_names: names for the error message.

    Returns:
        Their places, ascending.

    Raises:
        DataError: too few test images for the distribution.
    """
    factor, direction = DISTRIBUTIONS[distribution]
    if factor == 1:
        return np.arange(len(targets))
    order = np.argsort(-class_counts, kind="stable")[::direction]
    available = np.bincount(targets, minlength=len(class_counts))[order]
    counts = np.empty(len(order), dtype=np.int64)
    names = named(class_names, len(order))
    largest = largest_class(available, "exp", factor, [names[label] for label in order])
    counts[order] = exponential_profile(len(order), largest, factor)
    return np.sort(long_tailed_indices(targets, counts.tolist(), seed))


@dataclass(frozen=True)
class TestSet:
    """The experts on a test set of some class distribution.

    Attributes:
        test_set: name of the distribution; ``as it is`` of all images, where some classes have more of them.
        images: how many it has.
        top1: accuracy in percent of each expert, of their ``mean``, and with the weights ``learnt``.
        weights: that were learnt, by expert.
        epochs: of learning.
    """

    test_set: str
    images: int
    top1: dict[str, float]
    weights: dict[str, float]
    epochs: int


@dataclass(frozen=True)
class Aggregation:
    """What `aggregate` finds.

    Attributes:
        target: the model, as it was asked for.
        split: that the test sets were drawn from.
        seed: of the test sets, their order and the views.
        test_sets: in the order of `DISTRIBUTIONS`.
        environment: versions, hardware, command.
    """

    target: str
    split: str
    seed: int
    test_sets: list[TestSet]
    environment: Environment


def aggregate(
    target: str,
    *,
    recipe: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    split: str | None = None,
    distributions: Sequence[str] | None = None,
    seed: int = 0,
    results_file: Path | None = None,
) -> Aggregation:
    """Learn the weights of a model's experts on test sets of several class distributions, and print their accuracies.

    Learning sees random views of a test set's images, and no label; the accuracies are of the images as an evaluation
    sees them.

    Args:
        target: a run's folder, ``local-dir:FOLDER``, ``hf-hub:REPO``, or a timm model name.
        recipe: name of the recipe that says which data; a run's folder and a published model have their own.
        overrides: recipe keys to replace.
        split: split that the test sets are drawn from; by default the one that the run's result is on.
        distributions: some of `DISTRIBUTIONS`; by default all that the split has images enough for.
        seed: of the test sets, their order and the views.
        results_file: where to write the results as JSON; by default ``aggregation.json`` in the run's folder, if the
            target is one.

    Returns:
        What the file holds.

    Raises:
        MbibError: a model of one head, several processes, an unknown distribution, or data that do not fit the model.
        DataError: too few test images for a distribution that was asked for.
    """
    for name in distributions or ():
        if name not in DISTRIBUTIONS:
            raise unknown_name("test distribution", name, DISTRIBUTIONS)
    if results_file is not None:
        own = has_fields("target", "split", "test_sets", "environment")
        require_own("--results", results_file, own, "holds no results of this command")
    found = find_target(target, recipe, overrides)
    with joined_world(found.recipe.device) as world:
        world.require_alone("mbib aggregate")
        opened = open_target(found, world, split)
        parts = predicting_parts(opened.model)
        if len(parts) < 2:
            raise MbibError(
                f"{target}: {type(opened.model).__name__} has one head, so there is nothing to weight; mbib aggregate "
                "is for the experts of a model such as experts_resnet32"
            )
        for note in opened.notes:
            print(note)
        test_sets = _draw(distributions, opened.images.targets, opened.class_counts, seed, opened.class_names)
        rows = _measure(opened, parts, test_sets, seed)
        environment = redact_environment(describe_environment(world))
        results = Aggregation(target, opened.split, seed, rows, environment)
    print(f"{target} on {opened.split}, top-1, %:")
    print(table(rows, parts))
    source = found.source
    if results_file is None and source.folder is not None and source.name.startswith("local-dir:"):
        results_file = source.folder / FILE
    if results_file is not None:
        make_folder(results_file.parent)
        write_bytes(results_file, to_json(results))
        print(results_file)
    return results


def _draw(
    distributions: Sequence[str] | None,
    targets: np.ndarray,
    class_counts: np.ndarray,
    seed: int,
    names: Sequence[str] | None,
) -> dict[str, np.ndarray]:
    """Return the places of each test set's images; where nothing was asked for, of all test sets that can be drawn."""
    if distributions:
        return {name: draw_test_set(name, targets, class_counts, seed, names) for name in distributions}
    chosen = {}
    for name in DISTRIBUTIONS:
        try:
            chosen[name] = draw_test_set(name, targets, class_counts, seed, names)
        except DataError as error:
            print(printable(f"left out: {name}: {error}"))
    return chosen


def _measure(opened: OpenTarget, parts: Sequence[str], test_sets: Mapping[str, np.ndarray], seed: int) -> list[TestSet]:
    """Return the results on each test set, whose images stand in these places."""
    device = next(opened.model.parameters()).device
    augmented = opened.recipe.replace(seed=seed, batch_size=BATCH_SIZE)
    views = view_recipes(augmented, opened.input_size[0])
    learnt = {}
    for name, places in test_sets.items():
        loader = build_views_loader(
            augmented, opened.images.subset(places), views, input_size=opened.input_size, device=device
        )
        learnt[name] = learn_weights(_epochs(opened.model, loader, parts, augmented), len(parts), device)
    equal = torch.full((len(parts),), 1 / len(parts))
    alone = dict(zip(parts, torch.eye(len(parts)), strict=True))
    weights = {**alone, "mean": equal, **{name: each.weights.cpu() for name, each in learnt.items()}}
    correct = _correct(opened, parts, weights)
    return [
        TestSet(
            test_set=_called(name, opened.images.targets, len(opened.class_counts)),
            images=len(places),
            top1={column: 100.0 * float(correct[column][places].mean()) for column in (*parts, "mean")}
            | {"learnt": 100.0 * float(correct[name][places].mean())},
            weights=dict(zip(parts, learnt[name].weights.tolist(), strict=True)),
            epochs=learnt[name].epochs,
        )
        for name, places in test_sets.items()
    ]


def _called(distribution: str, targets: np.ndarray, num_classes: int) -> str:
    """Return what a test set is called: that of all images is uniform only where all classes have the same number."""
    numbers = np.bincount(targets, minlength=num_classes)
    return AS_IT_IS if DISTRIBUTIONS[distribution][0] == 1 and np.ptp(numbers) else distribution


def view_recipes(recipe: Recipe, channels: int) -> list[Recipe]:
    """Return the recipes of two random views of an image of so many channels: grey ones have no colour to change."""
    view = VIEW if channels > 1 else {**VIEW, "hue": 0.0, "grayscale_prob": 0.0}
    return [recipe.replace(**view)] * 2


@torch.no_grad()
def expert_logits(model: nn.Module, images: Tensor, parts: Sequence[str]) -> Tensor:
    """Return the logits (E, B, K) of the named parts of a model in evaluation mode, for images (B, C, H, W)."""
    logits = head_logits(model, images)
    return torch.stack([logits[part] for part in parts])


def _epochs(
    model: nn.Module, loader: Loader, parts: Sequence[str], recipe: Recipe
) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
    """Give the experts' logits for both views of every batch, epoch by epoch."""
    for epoch in range(EPOCHS):
        seed_generators(recipe.seed, epoch, rank=0)
        loader.set_epoch(epoch)
        yield (
            tuple(expert_logits(model, view, parts) for view in views)  # type: ignore[misc]
            for views in (batch.laid_out(recipe.channels_last).views for batch in loader)
        )


@torch.no_grad()
def _correct(opened: OpenTarget, parts: Sequence[str], weights: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Return which of the split's images, (N,), are predicted correctly with each of several weights, by their name."""
    device = next(opened.model.parameters()).device
    rows = torch.stack([*weights.values()]).to(device)
    correct, index = [], []
    for batch in opened.loader:
        images = batch.laid_out(opened.recipe.channels_last).images
        logits = expert_logits(opened.model, images, parts).float()
        guesses = torch.stack([weighted_logits(logits, row).argmax(dim=-1) for row in rows])
        correct.append((guesses == batch.targets).cpu())
        index.append(batch.index.cpu())
    if broken := opened.loader.broken_images():
        raise DataError(
            f"{len(broken)} images cannot be read, and the test sets are drawn from all: give --broken skip; the first "
            f"is {broken[0]}"
        )
    in_order = torch.cat(correct, dim=1)[:, torch.cat(index).argsort()]
    return dict(zip(weights, in_order.numpy(), strict=True))


def table(rows: Sequence[TestSet], parts: Sequence[str]) -> str:
    """Return the results as text; `parts` are the names of the experts."""
    cells = []
    for row in rows:
        accuracies = [f"{value:.2f}" for value in row.top1.values()]
        weights = " ".join(f"{weight:.2f}" for weight in row.weights.values())
        cells.append([row.test_set, f"{row.images:,}", *accuracies, weights])
    return Table(["test set", "images", *parts, "mean", "learnt", "weights"], cells).text()
