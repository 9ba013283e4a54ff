"""What a run trains: the model of a recipe, with its input size and, on request, weights to start from."""

from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from timm.models import load_state_dict
from torch import Tensor, nn

from mbib_timm.errors import CheckpointError, MbibError, unknown_name
from mbib_timm.models.load import find_source
from mbib_timm.recipe import Recipe


def build_model(recipe: Recipe, num_classes: int) -> nn.Module:
    """Create the recipe's model.

    Args:
        recipe: gives the name, keyword arguments, image size and initial weights.
        num_classes: classes K of the classifiers.

    Raises:
        MbibError: an unknown model or keyword, or weights that do not exist.
        CheckpointError: weights that do not fit.
    """
    if "num_classes" in recipe.model_kwargs:
        raise MbibError("recipe key 'model_kwargs': the number of classes is that of the data; see key 'num_classes'")
    kwargs: dict[str, Any] = {"num_classes": num_classes, **recipe.model_kwargs}
    if ":" in recipe.model:
        if recipe.initial_checkpoint is not None:
            raise MbibError(
                f"recipe key 'initial_checkpoint': {recipe.model} has weights of its own; see key 'pretrained'"
            )
        if find_source(recipe.model).config().get("model_args", {}).get("training_heads") is False:
            kwargs.setdefault("training_heads", True)  # it was published for inference; training needs them
    elif not timm.is_model(recipe.model.partition(".")[0]):
        raise unknown_name("model", recipe.model, timm.list_models())
    else:
        cfg = timm.get_pretrained_cfg(recipe.model, allow_unregistered=True)
        if recipe.img_size is not None and cfg is not None and cfg.fixed_input_size:
            kwargs.setdefault("img_size", recipe.img_size)
    if recipe.initial_checkpoint is not None:
        weights = read_weights(Path(recipe.initial_checkpoint))
        kwargs["pretrained_cfg_overlay"] = weights_overlay(weights, recipe.model)
    try:
        return timm.create_model(
            recipe.model, pretrained=recipe.pretrained or recipe.initial_checkpoint is not None, **kwargs
        )
    except TypeError as error:
        raise MbibError(f"recipe key 'model_kwargs': {error}") from None
    except (RuntimeError, ValueError, OSError) as error:  # OSError: no such repository, or no way to it
        raise MbibError(f"model {recipe.model!r}: {str(error).splitlines()[0]}") from None


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a weights file, or ``model.safetensors`` of a run's folder.

    Raises:
        CheckpointError: missing or unreadable.
    """
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"no weights at {file}")
    try:
        return load_state_dict(str(file), weights_only=True)
    except (RuntimeError, ValueError, EOFError, SafetensorError) as error:
        raise CheckpointError(f"{file} is not a weights file ({str(error).splitlines()[0]})") from None


def weights_overlay(weights: dict[str, Tensor], model_name: str) -> dict[str, Any]:
    """Return the cfg entries that make timm load `weights`, and see of how many classes their classifiers are."""
    cfg = timm.get_pretrained_cfg(model_name, allow_unregistered=True)
    classifiers = (cfg.classifier if cfg else None) or ()
    names = (classifiers,) if isinstance(classifiers, str) else classifiers
    overlay: dict[str, Any] = {"state_dict": weights, "hf_hub_id": None, "url": None}
    for name in names:
        if f"{name}.weight" in weights:
            overlay["num_classes"] = len(weights[f"{name}.weight"])
    return overlay


def input_size(recipe: Recipe, model: nn.Module) -> tuple[int, int, int]:
    """Return the size (C, H, W) of the images that a recipe feeds to its model."""
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    channels, height, width = cfg.get("input_size", (3, 224, 224))
    channels = recipe.model_kwargs.get("in_chans", channels)
    return (channels, recipe.img_size, recipe.img_size) if recipe.img_size else (channels, height, width)
