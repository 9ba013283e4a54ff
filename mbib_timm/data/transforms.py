"""Augmentation and preprocessing: from a PIL image to uint8 (C, H, W); the loader normalises on the device."""

from collections.abc import Callable
from functools import partial
from typing import Any

from PIL import Image
from timm.data import create_transform
from timm.data.transforms import str_to_interp_mode
from torchvision import transforms

from mbib_timm.errors import MbibError
from mbib_timm.recipe import Recipe

LONGEST_SIDE = 500


def train_transform(recipe: Recipe, height: int, width: int) -> Callable[..., Any]:
    """Build the training transform of a recipe for images of height x width.

    ``pad``: zero-pad by an eighth, crop at random, flip: 32-crops of the 4-padded image for CIFAR (Cao et al. 2019).
    ``rrc``: timm's random resized crop with flip, colour jitter and auto-augment. ``none``: as in evaluation.

    Raises:
        MbibError: a key that the crop mode would ignore.
    """
    if recipe.train_crop_mode != "rrc":
        for key in ("color_jitter", "aa"):
            if getattr(recipe, key):
                raise MbibError(f"recipe key {key!r} needs train_crop_mode: rrc, not {recipe.train_crop_mode!r}")
    if recipe.train_crop_mode == "none":
        return eval_transform(recipe, height, width)
    if recipe.train_crop_mode == "pad":
        return transforms.Compose(
            [
                _resize(recipe, height, width),
                transforms.RandomCrop((height, width), padding=(width // 8, height // 8)),
                transforms.RandomHorizontalFlip(recipe.hflip),
                transforms.PILToTensor(),
            ]
        )
    return create_transform(
        (3, height, width),
        is_training=True,
        use_prefetcher=True,
        scale=tuple(recipe.scale),
        ratio=tuple(recipe.ratio),
        hflip=recipe.hflip,
        color_jitter=recipe.color_jitter or None,
        auto_augment=recipe.aa,
        interpolation=recipe.interpolation,
    )


def eval_transform(recipe: Recipe, height: int, width: int) -> Callable[..., Any]:
    """Build the evaluation transform: resize and centre crop; with ``pad`` the whole image."""
    if recipe.train_crop_mode == "pad":
        return transforms.Compose([_resize(recipe, height, width), transforms.PILToTensor()])
    return create_transform(
        (3, height, width),
        is_training=False,
        use_prefetcher=True,
        crop_pct=recipe.crop_pct,
        interpolation=_fixed_interpolation(recipe),
    )


def resident_transform(recipe: Recipe, height: int, width: int, training: bool) -> Callable[..., Any]:
    """Build the part of the preprocessing that is the same in every epoch, which resident images have behind them.

    What random resized crops are cut from keeps its size, but for sides beyond `LONGEST_SIDE`.
    """
    if not training or recipe.train_crop_mode == "none":
        return eval_transform(recipe, height, width)
    if recipe.train_crop_mode == "pad":
        return transforms.Compose([_resize(recipe, height, width), transforms.PILToTensor()])
    return transforms.Compose([partial(_shrink, interpolation=_fixed_interpolation(recipe)), transforms.PILToTensor()])


def _shrink(image: Image.Image, interpolation: str) -> Image.Image:
    scale = LONGEST_SIDE / max(image.size)
    if scale >= 1:
        return image
    width, height = (max(1, round(scale * side)) for side in image.size)
    return image.resize((width, height), Image.Resampling[interpolation.upper()])


def _fixed_interpolation(recipe: Recipe) -> str:
    return "bilinear" if recipe.interpolation == "random" else recipe.interpolation


def _resize(recipe: Recipe, height: int, width: int) -> transforms.Resize:
    """Resize to exactly height x width; images of this size stay as they are."""
    return transforms.Resize((height, width), interpolation=str_to_interp_mode(_fixed_interpolation(recipe)))
