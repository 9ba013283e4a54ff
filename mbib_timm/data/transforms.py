"""Augmentation and preprocessing of single images, from PIL to uint8 (C, H, W); the loader normalises."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image
from timm.data import (
    RandomResizedCropAndInterpolation,
    auto_augment_transform,
    create_transform,
    rand_augment_transform,
    str_to_interp_mode,
    str_to_pil_interp,
)
from timm.data.auto_augment import augment_and_mix_transform
from torch import Tensor
from torchvision import transforms

from mbib_timm.data.images import Transform, channelwise
from mbib_timm.data.policies import CIFAR10, CIFAR10_FILL, mean_color
from mbib_timm.recipe import WHOLE_IMAGES, Recipe
from mbib_timm.recipe.policy_names import parse_policy

# What resident images are shrunk to for an input of this side or less: the crops of a larger input are cut from more.
LONGEST_SIDE, LONGEST_SIDE_INPUT = 500, 224
# Of timm's blur: a kernel of 23 pixels, with a standard deviation between these.
BLUR_RADIUS, BLUR_SIGMAS = 11, (0.1, 2.0)


def train_transform(recipe: Recipe, input_size: tuple[int, int, int], whole: bool = False) -> Transform:
    """Build the training transform: what `mbib_timm.data.augment` does to batches, by timm's and torchvision's own.

    ``pad``: zero-pad by an eighth, crop at random, flip: 32-crops of the 4-padded image for CIFAR (Cao et al. 2019).
    ``rrc``: timm's random resized crop with flip. ``none``: as in evaluation.

    Args:
        recipe: which crop, and what follows it.
        input_size: (C, H, W) of what it gives.
        whole: cut it from the whole image resized to height x width, as ``pad`` always does.
    """
    channels, height, width = input_size
    steps: list[Callable] = []
    if whole or recipe.train_crop_mode == "pad":
        steps.append(_resize(recipe, height, width))
    if recipe.train_crop_mode == "pad":
        steps.append(transforms.RandomCrop((height, width), padding=(width // 8, height // 8)))
    elif recipe.train_crop_mode == "rrc":
        scale, ratio = (recipe.scale[0], recipe.scale[1]), (recipe.ratio[0], recipe.ratio[1])
        steps.append(RandomResizedCropAndInterpolation((height, width), scale, ratio, recipe.settled("interpolation")))
    elif not whole:
        steps += [eval_transform(recipe, input_size), torch.as_tensor, transforms.ToPILImage()]
    if recipe.train_crop_mode != "none":
        steps.append(transforms.RandomHorizontalFlip(recipe.hflip))
    steps += _operations(recipe, channels, min(height, width))
    transform: Transform = transforms.Compose([*steps, transforms.PILToTensor()])
    return transform


def _operations(recipe: Recipe, channels: int, side: int) -> Iterator[Callable[[Image.Image], Image.Image]]:
    """Yield what follows the crop, in the order of `mbib_timm.data.augment`. `side` is the images' shorter one."""
    if recipe.rotation:
        yield transforms.RandomRotation(recipe.rotation)
    if recipe.aa == CIFAR10:
        yield transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10, fill=CIFAR10_FILL)
    elif recipe.aa is not None:
        yield _timm_policy(recipe, recipe.aa, channels, side)
    if recipe.color_jitter or recipe.hue:
        jitter = transforms.ColorJitter(*[recipe.color_jitter] * 3, recipe.hue)
        yield transforms.RandomApply([jitter], recipe.color_jitter_prob)
    if recipe.grayscale_prob:
        yield transforms.RandomGrayscale(recipe.grayscale_prob)
    if recipe.gaussian_blur_prob:
        reach = min(BLUR_RADIUS, side - 1)
        blur = transforms.GaussianBlur(2 * reach + 1, BLUR_SIGMAS)
        yield transforms.RandomApply([blur], recipe.gaussian_blur_prob)
    if recipe.cutout:
        yield partial(_cut_out, side=recipe.cutout)


def _timm_policy(recipe: Recipe, aa: str, channels: int, side: int) -> Callable[[Image.Image], Image.Image]:
    """Build a policy of timm's, as its `create_transform` does. Raises MbibError where it has none of this name."""
    parse_policy(aa)
    settings = {
        "translate_const": int(0.45 * side),
        "img_mean": mean_color(recipe, channels),
        "interpolation": str_to_pil_interp(_fixed_interpolation(recipe)),
    }
    kind = aa.partition("-")[0]
    if kind == "augmix":
        settings["translate_pct"] = 0.3
    build = {"augmix": augment_and_mix_transform, "rand": rand_augment_transform}.get(kind, auto_augment_transform)
    policy: Callable[[Image.Image], Image.Image] = build(aa, settings)
    return policy


def _cut_out(image: Image.Image, side: int) -> Image.Image:
    """Blacken a square whose centre is any pixel (DeVries and Taylor 2017)."""
    left, top = (int(torch.randint(length, ())) - side // 2 for length in image.size)
    image = image.copy()
    image.paste(0 if image.mode == "L" else (0, 0, 0), (left, top, left + side, top + side))
    return image


def stacked_views(transforms: Sequence[Transform], image: Image.Image) -> Tensor:
    """Return the views of an image, each (C, H, W), uint8, as channels (V C, H, W): timm's loader takes one image."""
    return torch.cat([transform(image) for transform in transforms])


def evaluation_crop(recipe: Recipe) -> dict[str, Any]:
    """Return how an evaluation cuts its images, in the names of timm's `create_transform` and `create_loader`.

    It sees what the recipe's keys leave of an image; with ``pad`` all of it, squashed.
    """
    whole = recipe.train_crop_mode == "pad"
    crop = WHOLE_IMAGES if whole else {key: recipe.settled(key) for key in WHOLE_IMAGES}
    return {**crop, "interpolation": _fixed_interpolation(recipe)}


def eval_transform(recipe: Recipe, input_size: tuple[int, int, int]) -> Transform:
    """Build the transform of an evaluation to images of `input_size` (C, H, W), see `evaluation_crop`."""
    mean = channelwise(recipe.settled("mean"), input_size[0])  # the colour of a border
    transform: Transform = create_transform(input_size, use_prefetcher=True, mean=mean, **evaluation_crop(recipe))
    return transform


def resident_transform(recipe: Recipe, input_size: tuple[int, int, int], training: bool) -> Transform:
    """Build the part of the preprocessing that is the same in every epoch, which resident images have behind them.

    What random resized crops are cut from keeps its size, but for sides beyond `longest_side`.
    """
    if not training or recipe.train_crop_mode != "rrc":
        return eval_transform(recipe, input_size)
    shrink = partial(_shrink, longest=longest_side(*input_size[1:]), interpolation=_fixed_interpolation(recipe))
    transform: Transform = transforms.Compose([shrink, transforms.PILToTensor()])
    return transform


def fixed_preprocessing(recipe: Recipe, input_size: tuple[int, int, int], training: bool) -> str:
    """Return a description of what decoded images have behind them: images that agree in it are the same."""
    crop = evaluation_crop(recipe)
    if training and recipe.train_crop_mode == "rrc":
        return f"whole {longest_side(*input_size[1:])} {crop['interpolation']}"
    border = f" {recipe.settled('mean')}" if crop["crop_mode"] == "border" else ""
    return f"{input_size} {crop['crop_pct']} {crop['crop_mode']} {crop['interpolation']}{border}"


def longest_side(height: int, width: int) -> int:
    """Return the longest side of resident images from which random resized crops of height x width are cut."""
    return max(LONGEST_SIDE, math.ceil(LONGEST_SIDE * max(height, width) / LONGEST_SIDE_INPUT))


def _shrink(image: Image.Image, longest: int, interpolation: str) -> Image.Image:
    scale = longest / max(image.size)
    if scale >= 1:
        return image
    width, height = (max(1, round(scale * side)) for side in image.size)
    return image.resize((width, height), Image.Resampling[interpolation.upper()])


def _fixed_interpolation(recipe: Recipe) -> str:
    return "bilinear" if (own := recipe.settled("interpolation")) == "random" else str(own)


def _resize(recipe: Recipe, height: int, width: int) -> transforms.Resize:
    """Resize to exactly height x width; images of this size stay as they are."""
    return transforms.Resize((height, width), interpolation=str_to_interp_mode(_fixed_interpolation(recipe)))
