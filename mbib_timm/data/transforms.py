"""Crops and preprocessing of single images: from PIL to uint8 (C, H, W); the loader normalises on the device."""

from collections.abc import Callable
from functools import partial
from typing import Any

from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform
from timm.data.transforms import str_to_interp_mode, str_to_pil_interp
from torchvision import transforms

from mbib_timm.recipe import Recipe

LONGEST_SIDE = 500


def train_crop(recipe: Recipe, height: int, width: int, whole: bool = False) -> Callable[..., Any]:
    """Build the training crop of a recipe, with its flips, for images of any size.

    ``pad``: zero-pad by an eighth, crop at random, flip: 32-crops of the 4-padded image for CIFAR (Cao et al. 2019).
    ``rrc``: timm's random resized crop with flip. ``none``: as in evaluation.

    Args:
        recipe: which crop.
        height: of the crop.
        width: of the crop.
        whole: cut it from the whole image resized to height x width, as ``pad`` always does.
    """
    resize = _resize(recipe, height, width)
    if recipe.train_crop_mode == "pad":
        return transforms.Compose(
            [
                resize,
                transforms.RandomCrop((height, width), padding=(width // 8, height // 8)),
                transforms.RandomHorizontalFlip(recipe.hflip),
                transforms.PILToTensor(),
            ]
        )
    if recipe.train_crop_mode == "none":
        return (
            transforms.Compose([resize, transforms.PILToTensor()]) if whole else eval_transform(recipe, height, width)
        )
    crop = create_transform(
        (3, height, width),
        is_training=True,
        use_prefetcher=True,
        scale=tuple(recipe.scale),
        ratio=tuple(recipe.ratio),
        hflip=recipe.hflip,
        color_jitter=None,
        interpolation=recipe.interpolation,
    )
    return transforms.Compose([resize, crop]) if whole else crop


def timm_policy(aa: str, recipe: Recipe, side: int) -> Callable[[Image.Image], Image.Image]:
    """Build an augmentation policy of timm's as its `create_transform` does, for images of a smaller side `side`."""
    settings: dict[str, Any] = {
        "translate_const": int(0.45 * side),
        "img_mean": tuple(min(255, round(255 * value)) for value in recipe.mean),
    }
    if recipe.interpolation != "random":
        settings["interpolation"] = str_to_pil_interp(recipe.interpolation)
    kind = aa.partition("-")[0]
    if kind == "augmix":
        settings["translate_pct"] = 0.3
    build = {"augmix": augment_and_mix_transform, "rand": rand_augment_transform}.get(kind, auto_augment_transform)
    return build(aa, settings)


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
