"""Losses, found by name. A loss maps {head: logits (B, K)} and targets (B,) to named scalars, ``loss`` first.

Its `logit_prior` says which class frequencies the logits are for that it leads to: ``train`` for a plain loss,
``uniform`` for one that adds log n to the logits in training.
"""

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor, nn

from mbib_timm.errors import MbibError
from mbib_timm.losses.baselines import CrossEntropy, FocalLoss, HeadwiseLoss
from mbib_timm.losses.graph import BottleneckLoss, Edge, all_mbib_edges, bib_edges, mbib_edges, se_mbib_edges
from mbib_timm.recipe import Recipe
from mbib_timm.registry import Registry

__all__ = ["LOSSES", "BottleneckLoss", "CrossEntropy", "Edge", "FocalLoss", "HeadwiseLoss", "create_loss"]

ClassCounts = Sequence[int] | np.ndarray | Tensor
LOSSES: Registry[Callable[[Recipe, ClassCounts, Sequence[str]], nn.Module]] = Registry("loss")


def create_loss(recipe: Recipe, class_counts: ClassCounts, head_names: Sequence[str]) -> nn.Module:
    """Build the recipe's loss.

    Args:
        recipe: names the loss and its constants.
        class_counts: training images of each class, (K,).
        head_names: the model's heads, in the order in which it returns them.

    Raises:
        MbibError: an unknown loss, one that the model's heads do not allow, or a class without images.
    """
    return LOSSES[recipe.loss](recipe, class_counts, head_names)


@LOSSES.register("ce")
def _ce(recipe: Recipe, class_counts: ClassCounts, head_names: Sequence[str]) -> nn.Module:
    return HeadwiseLoss(CrossEntropy())


@LOSSES.register("bsce")
def _bsce(recipe: Recipe, class_counts: ClassCounts, head_names: Sequence[str]) -> nn.Module:
    return HeadwiseLoss(CrossEntropy(class_counts))


@LOSSES.register("focal")
def _focal(recipe: Recipe, class_counts: ClassCounts, head_names: Sequence[str]) -> nn.Module:
    return HeadwiseLoss(FocalLoss(recipe.focal_gamma))


def _bottleneck(recipe: Recipe, class_counts: ClassCounts, edges: Sequence[Edge]) -> BottleneckLoss:
    return BottleneckLoss(
        edges,
        class_counts,
        recipe.beta,
        recipe.gamma,
        recipe.class_weight_power,
        recipe.normalize_class_weights,
        recipe.logit_adjustment,
    )


def _require_bottleneck(recipe: Recipe, head_names: Sequence[str]) -> None:
    if len(head_names) < 2 or head_names[-1] != "z":
        raise MbibError(
            f"loss {recipe.loss!r} needs a model with observations and a bottleneck, such as mbib_resnet50; "
            f"{recipe.model!r} returns only {', '.join(head_names)}"
        )


@LOSSES.register("bib")
def _bib(recipe: Recipe, class_counts: ClassCounts, head_names: Sequence[str]) -> nn.Module:
    _require_bottleneck(recipe, head_names)
    return _bottleneck(recipe, class_counts, bib_edges(head_names))


@LOSSES.register("mbib")
def _mbib(recipe: Recipe, class_counts: ClassCounts, head_names: Sequence[str]) -> nn.Module:
    _require_bottleneck(recipe, head_names)
    return _bottleneck(recipe, class_counts, mbib_edges(head_names, recipe.observation_weights))


@LOSSES.register("se_mbib")
def _se_mbib(recipe: Recipe, class_counts: ClassCounts, head_names: Sequence[str]) -> nn.Module:
    _require_bottleneck(recipe, head_names)
    return _bottleneck(recipe, class_counts, se_mbib_edges(head_names))


@LOSSES.register("all_mbib")
def _all_mbib(recipe: Recipe, class_counts: ClassCounts, head_names: Sequence[str]) -> nn.Module:
    _require_bottleneck(recipe, head_names)
    return _bottleneck(recipe, class_counts, all_mbib_edges(head_names, recipe.observation_weights))
