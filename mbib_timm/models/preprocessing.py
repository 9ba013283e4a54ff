"""How images become a model's input: as its weights have seen them, where a recipe does not say otherwise."""

from collections.abc import Collection, Mapping
from typing import Any

import timm
from timm.data import resolve_data_config
from timm.layers import to_2tuple
from torch import nn

from mbib_timm.errors import MbibError
from mbib_timm.recipe import MODEL_KEYS, WHOLE_IMAGES, Recipe


def own_preprocessing(network: nn.Module) -> dict[str, Any]:
    """Return timm's data config of a network, or of the model in it: that of the cfg with which it was created.

    Returns:
        ``input_size`` (C, H, W), ``mean``, ``std``, ``crop_pct``, ``crop_mode``, ``interpolation``; timm's defaults for
        what the cfg leaves out, and for a network without one.
    """
    cfgs = (getattr(module, "pretrained_cfg", None) for module in network.modules())
    cfg = next((cfg for cfg in cfgs if cfg), None)
    config: dict[str, Any] = resolve_data_config({"in_chans": 3}, pretrained_cfg=cfg)
    return config


def settle(recipe: Recipe, network: nn.Module) -> Recipe:
    """Return a recipe in which the keys that it leaves to the model have the model's own values.

    `img_size` is that of `input_size`, and stays open where the images are not square. With padded crops
    nothing is cut off, whatever the model's own.

    Raises:
        MbibError: a value that a recipe cannot have.
    """
    side = {"img_size": _side(input_size(recipe, network))}
    own = {**_own_keys(network), **side, **(WHOLE_IMAGES if recipe.train_crop_mode == "pad" else {})}
    try:
        return recipe.replace(**{key: own[key] for key in MODEL_KEYS if getattr(recipe, key) is None})
    except MbibError as error:
        raise MbibError(
            f"model {recipe.model!r}: of its own preprocessing: {error}; a recipe may override it"
        ) from None


def as_predicted(recipe: Recipe, network: nn.Module, said: Collection[str]) -> Recipe:
    """Return a recipe whose evaluation sees images as `mbib predict` does: as a trained model's own cfg says.

    Args:
        recipe: names the data; what it says of `MODEL_KEYS` may be of another model.
        network: the trained model.
        said: keys that whoever asks for the evaluation has given, which stay as they are.

    Raises:
        MbibError: a value that a recipe cannot have.
    """
    own = {key: value for key, value in _own_keys(network).items() if key in MODEL_KEYS and key not in said}
    if recipe.train_crop_mode == "pad":
        if "train_crop_mode" in said:
            own |= {key: whole for key, whole in WHOLE_IMAGES.items() if key in own}
        elif any(own.get(key, whole) != whole for key, whole in WHOLE_IMAGES.items()):
            own |= {"train_crop_mode": "rrc", "views": None}  # evaluations of padded crops are of whole images
    try:
        return recipe.replace(**own)
    except MbibError as error:
        raise MbibError(f"of the model's own preprocessing: {error}; a flag may override it") from None


def inherited(recipe: Recipe) -> Recipe:
    """Return the recipe of a stage with the preprocessing of the stage before, whose model it trains on."""
    before = recipe.previous
    if before is None or before.model != recipe.model:
        return recipe
    alike = before.train_crop_mode == recipe.train_crop_mode
    taken = [key for key in MODEL_KEYS if getattr(recipe, key) is None and (alike or key not in WHOLE_IMAGES)]
    return recipe.replace(**{key: getattr(before, key) for key in taken})


def input_size(recipe: Recipe, network: nn.Module) -> tuple[int, int, int]:
    """Return the size (C, H, W) of the images that a recipe feeds to its network."""
    channels, *sides = own_preprocessing(network)["input_size"]
    channels = recipe.model_kwargs.get("in_chans", channels)
    height, width = to_2tuple(recipe.img_size or recipe.model_kwargs.get("img_size") or sides)
    return channels, height, width


def declared_side(recipe: Recipe) -> int | None:
    """Return the shorter side of the images that a recipe feeds to its network, without building it; None where only
    the network says it."""
    if given := recipe.img_size or recipe.model_kwargs.get("img_size"):
        return min(to_2tuple(given))
    name = str(recipe.model_kwargs.get("backbone", recipe.model))
    if not timm.is_model(name.partition(".")[0]):
        return None
    cfg = timm.get_pretrained_cfg(name)
    return None if cfg is None else min(cfg.input_size[1:])


def departures(recipe: Recipe, network: nn.Module) -> str | None:
    """Return, in a line, what a recipe that starts from weights says otherwise than these; None for nothing."""
    if not recipe.takes_weights:
        return None
    own = _own_keys(network)
    named = [key for key in MODEL_KEYS if key not in WHOLE_IMAGES or recipe.train_crop_mode != "pad"]
    said = [
        f"{key} {_text(getattr(recipe, key))} (the weights had {_text(own[key])})"
        for key in named
        if getattr(recipe, key) not in (None, own[key])
    ]
    return f"preprocessing by the recipe: {', '.join(said)}" if said else None


def _own_keys(network: nn.Module) -> Mapping[str, Any]:
    """Return the model's own values of `MODEL_KEYS`, as a recipe has them."""
    own = own_preprocessing(network)
    lists = {key: [float(value) for value in own[key]] for key in ("mean", "std")}
    return {**own, **lists, "img_size": _side(own["input_size"])}


def _side(size: tuple[int, int, int]) -> int | None:
    """Return the side of square images (C, H, W); None of others."""
    _, height, width = size
    return height if height == width else None


def _text(value: Any) -> str:
    values = value if isinstance(value, list) else [value]
    return " ".join(f"{each:.4g}" if isinstance(each, float) else str(each) for each in values)
