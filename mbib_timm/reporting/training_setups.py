"""Which runs were trained alike, what a reader may call those that were, and what sets them apart, in words."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from mbib_timm.models.zoo import split_tag
from mbib_timm.recipe import KEYS, data_of
from mbib_timm.results.runs import RunGroup
from mbib_timm.results.tables import Table

NAMED_BY = 2  # as many settings as fit in a name
# What settings are called, up to a comma in names of setups; the others go by the help of their key.
_LABELS = {
    "model": "network",
    "img_size": "image size",
    "aa": "augmentation policy",
    "cutout": "Cutout, the side of a black square put into each image",
    "rotation": "rotation, the largest angle",
    "mixup": "mixup, its alpha",
    "cutmix": "CutMix, its alpha",
    "smoothing": "label smoothing",
    "batch_size": "batch size",
    "opt": "optimizer",
    "lr": "learning rate",
    "momentum": "momentum",
    "weight_decay": "weight decay",
    "sched": "learning-rate schedule",
    "decay_rate": "decay factor, which multiplies the learning rate at each milestone",
    "model_ema": "moving average of the weights, which is evaluated in their place",
}
# What timm's names of optimizers do not say.
_OPTIMIZERS = {
    "sgd": "SGD with Nesterov momentum",
    "nesterov": "SGD with Nesterov momentum",
    "momentum": "SGD with classical momentum (not Nesterov's)",
}
_UNITS = {"img_size": "pixels", "cutout": "pixels", "rotation": "degrees"}


class SetupName(NamedTuple):
    """What a training setup is called.

    Attributes:
        short: in titles and tables: ``strong recipe``.
        phrase: in a sentence: ``with the strong recipe``.
    """

    short: str
    phrase: str


def capitalised(text: str) -> str:
    """Return a text that begins with a capital letter; the others are as they were."""
    return text[:1].upper() + text[1:]


def _setup(group: RunGroup) -> dict[str, Any]:
    """Return what runs that were trained alike have in common: keys of recipes with their values."""
    return {"model": group.first.network, **group.first.training}


def _setups(groups: Sequence[RunGroup]) -> list[dict[str, Any]]:
    """Return the training setups, each once, in order of appearance."""
    setups = [_setup(group) for group in groups]
    return [setup for place, setup in enumerate(setups) if setup not in setups[:place]]


def data_title(group: RunGroup) -> str:
    """Return what the data of runs are called."""
    return group.first.dataset.title if group.first.dataset else data_of(group.first.name)


def setup_names(groups: Sequence[RunGroup]) -> list[SetupName]:
    """Return for each group the name of its training setup: groups of one name were trained alike.

    It is named after its data, its recipe, the few settings that set it apart, or its network, whichever tells all
    setups apart; ``setup 1`` where nothing does.
    """
    kinds = _setups(groups)
    names = _names(kinds, [[group for group in groups if _setup(group) == kind] for kind in kinds])
    return [names[kinds.index(_setup(group))] for group in groups]


def _names(kinds: Sequence[dict[str, Any]], members: Sequence[Sequence[RunGroup]]) -> list[SetupName]:
    data = [{data_title(group) for group in own} for own in members]
    by_data = ["".join(titles) if len(titles) == 1 else "" for titles in data]
    if _tell_apart(by_data):
        return [SetupName(name, f"on {name}") for name in by_data]
    by_recipe = [_recipe_word(own) for own in members]
    if _tell_apart(by_recipe):
        return [SetupName(f"{word} recipe", f"with the {word} recipe") for word in by_recipe]
    if len(keys := _differing_keys(kinds)) <= NAMED_BY:
        by_settings = [", ".join(_said(key, kind[key]) for key in keys) for kind in kinds]
        if _tell_apart(by_settings):
            return [SetupName(name, f"with {name}") for name in by_settings]
    for by_network in ([kind["model"] for kind in kinds], [_said("img_size", kind["img_size"]) for kind in kinds]):
        if _tell_apart(by_network):
            return [SetupName(name, f"with {name}") for name in by_network]
    return [SetupName(f"setup {number}", f"with setup {number}") for number in range(1, len(members) + 1)]


def _tell_apart(names: Sequence[str]) -> bool:
    return all(names) and len(set(names)) == len(names)


def _recipe_word(groups: Sequence[RunGroup]) -> str:
    """Return what tells the recipes of runs that were trained alike from others: ``paper's``, or the words that their
    tags have before the data, as ``strong``; empty where these are others."""
    if any(group.is_papers for group in groups):
        return "paper's"
    words = [split_tag(data_of(group.first.name))[0].split("_") for group in groups]
    shared = words[0]
    for each in words[1:]:
        shared = [word for word, other in zip(shared, each, strict=False) if word == other]
    return " ".join(shared)


def differing_settings(groups: Sequence[RunGroup]) -> Table:
    """Return the settings in which training setups differ, in words and by their keys, with their values in each."""
    kinds = _setups(groups)
    rows = [
        [
            f"{_LABELS.get(key, KEYS[key].metadata['help'])} (`{key}`)",
            *(value_text(key, kind[key]) for kind in kinds),
        ]
        for key in _differing_keys(kinds)
    ]
    return Table(["setting", *dict.fromkeys(name.short for name in setup_names(groups))], rows)


def _differing_keys(kinds: Sequence[dict[str, Any]]) -> list[str]:
    return [key for key in kinds[0] if any(kind[key] != kinds[0][key] for kind in kinds)]


def _said(key: str, value: Any) -> str:
    """Return a setting in a few words: ``weight decay 0.0005``, ``no Cutout``."""
    label = _LABELS.get(key, f"`{key}`").partition(",")[0]
    text = value_text(key, value)
    return {"no": f"no {label}", "none": f"no {label}", "yes": label}.get(text, f"{label} {text}")


def value_text(key: str, value: Any) -> str:
    """Return the value of a setting in words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or (value == 0 and key in ("cutout", "rotation", "mixup", "cutmix", "smoothing")):
        return "none"
    if key == "opt":
        return _OPTIMIZERS.get(value, value)
    if key == "aa":
        kind = "RandAugment" if value.startswith("rand-") else ""
        return "AutoAugment's for CIFAR" if value == "cifar10" else f"{kind} {value}".strip()
    return f"{value} {_UNITS[key]}" if key in _UNITS else f"{value}"
