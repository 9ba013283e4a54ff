"""What a network says of its heads, and what it gives for a batch: logits and features by name.

A network of several heads names them in `head_names`, in `prediction_heads` those whose mean is its prediction, and
where it has experts in `expert_heads` the heads of each. Any other network has a prediction alone.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from mbib_timm.errors import MbibError

PREDICTION = "prediction"
# The features that the classifier of a network's last map sees; after its normalisation, where it has one.
POOLED = "v"
# Images of a batch that suits a CPU's cache, where their longer side has more pixels than the second number.
CACHE_SIZED, THUMBNAIL = 16, 64


def classifiers_of(model: nn.Module) -> tuple[nn.Module, ...]:
    """Return a model's classifiers, in the order of its heads.

    Raises:
        MbibError: a model that does not say what they are.
    """
    if not hasattr(model, "get_classifier"):
        raise MbibError(f"{type(model).__name__} does not say what its classifier is")
    found: Any = model.get_classifier()  # type: ignore[operator]
    return tuple(found) if isinstance(found, tuple | list) else (found,)


def prediction_heads(model: nn.Module) -> tuple[str, ...]:
    """Return the heads whose logits' mean is a model's prediction; none for a network of one head."""
    return tuple(getattr(model, "prediction_heads", ()))


def expert_heads(model: nn.Module) -> Mapping[str, tuple[str, ...]]:
    """Return the heads of each of a model's experts, by the expert's name; none for a network without experts."""
    heads: Mapping[str, tuple[str, ...]] = getattr(model, "expert_heads", {})
    return heads


def reported_heads(model: nn.Module) -> tuple[str, ...]:
    """Return what is reported of a model beside its prediction: its heads and its experts, where it has several."""
    heads: tuple[str, ...] = tuple(getattr(model, "head_names", ()))
    return (*heads, *_experts(model)) if len(heads) > 1 else ()


def predicting_parts(model: nn.Module) -> tuple[str, ...]:
    """Return what a prediction is the mean of: the experts, or the heads, by name; none for a model of one head."""
    if not reported_heads(model):
        return ()
    return tuple(expert_heads(model)) or prediction_heads(model)


def head_titles(model: nn.Module) -> dict[str, str]:
    """Return what a page calls each of `reported_heads`: ``Head z``, ``Expert 2``."""
    experts = expert_heads(model)
    return {
        name: f"Expert {name.removeprefix('expert')}" if name in experts else f"Head {name}"
        for name in reported_heads(model)
    }


# What the heads of MBIB's networks are, for a reader who has only their names.
HEADS_TEXT = (
    "Classifiers at several places of one network: v1, v2, ... on maps of the backbone from shallow to deep, the last "
    "of them on its last map, and z on the bottleneck, a layer behind that map. The same number can be another map in "
    "another network."
)


def labelled_heads(names: Iterable[str]) -> dict[str, str]:
    """Return names of heads with what each sees, as far as they say it: ``v2 (map 2 of 3)``, ``v3 (last map)``."""
    names = list(names)
    maps = {name: re.fullmatch(r"(.*_|)v(\d+)", name) for name in names}
    last: dict[str, int] = {}
    for place in filter(None, maps.values()):
        last[place[1]] = max(last.get(place[1], 0), int(place[2]))
    labels = {}
    for name in names:
        if found := maps[name]:
            deepest = last[found[1]]
            said = " (last map)" if int(found[2]) == deepest else f" (map {found[2]} of {deepest})"
        else:
            said = " (bottleneck)" * bool(re.fullmatch(r"(.*_|)z", name))
        labels[name] = f"{name}{said}"
    return labels


def _experts(model: nn.Module) -> dict[str, list[str]]:
    """Return the heads that an expert predicts with, by its name, of experts that have several heads."""
    predicting = prediction_heads(model)
    return {
        expert: [head for head in heads if head in predicting]
        for expert, heads in expert_heads(model).items()
        if len(heads) > 1
    }


def head_of_expert(expert: str, head: str) -> str:
    """Return the name of an expert's head, of an expert that has several."""
    return f"{expert}_{head}"


def heads_of_expert(expert: str, names: Iterable[str]) -> list[str]:
    """Return those of some names that `head_of_expert` has made for an expert; none for what is no expert."""
    return [name for name in names if name.startswith(head_of_expert(expert, ""))]


def cache_sized(images: Tensor) -> tuple[Tensor, ...]:
    """Split images (B, C, H, W) into the batches in which a network in evaluation mode takes them fastest.

    On a CPU those are few: the maps of a large batch do not fit its cache, and EfficientNet-Lite0 takes twice as long
    for each image. Thumbnails fit, and a GPU takes what it gets.
    """
    if images.device.type != "cpu" or max(images.shape[-2:]) <= THUMBNAIL:
        return (images,)
    return images.split(CACHE_SIZED)


def head_logits(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Return the logits (B, K) of the prediction, and of each of `reported_heads`."""
    if not reported_heads(model):
        return {PREDICTION: model(images)}
    return _by_name(model, model.forward_heads(images))  # type: ignore[operator]


def logits_and_features(model: Any, images: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return `head_logits` and the features (B, C) by name, from one forward pass where the model can.

    Raises:
        MbibError: a model that does not give its features.
    """
    parts = zip(*(_logits_and_features(model, batch) for batch in cache_sized(images)), strict=True)
    logits, features = ({name: torch.cat([part[name] for part in of]) for name in of[0]} for of in parts)
    return logits, features


def _logits_and_features(model: Any, images: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    if hasattr(model, "heads_and_features"):
        logits, features = model.heads_and_features(images)
        return _by_name(model, logits), features
    if hasattr(model, "pool_features"):
        (features,) = model.pool_features(images)
        return {PREDICTION: model.forward_pooled((features,))}, {POOLED: features}
    if not (hasattr(model, "forward_features") and hasattr(model, "forward_head")):
        raise MbibError(
            f"{type(model).__name__} does not give its features: expected timm's forward_features and forward_head"
        )
    maps = model.forward_features(images)
    pooled = {POOLED: model.forward_head(maps, pre_logits=True)}
    return head_logits(model, images) if reported_heads(model) else {PREDICTION: model.forward_head(maps)}, pooled


def _by_name(model: Any, logits: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the prediction and all that is reported, of the logits of every head in order."""
    heads = dict(zip(model.head_names, logits, strict=True))
    prediction = {PREDICTION: _mean([heads[name] for name in model.prediction_heads])}
    if len(heads) == 1:
        return prediction
    experts = {expert: _mean([heads[name] for name in names]) for expert, names in _experts(model).items()}
    return {**prediction, **heads, **experts}


def _mean(logits: list[Tensor]) -> Tensor:
    return sum(logits[1:], logits[0]) / len(logits)
