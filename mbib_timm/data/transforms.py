"""Augmentation and preprocessing of single images, from PIL to uint8 (C, H, W); the loader normalises."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_interp_mode, str_to_pil_interp
from torch import Tensor
from torchvision import transforms

from mbib_timm.data.loaders import channelwise
from mbib_timm.data.policies import CIFAR10, CIFAR10_FILL, mean_color
from mbib_timm.recipe import Recipe

LONGEST_SIDE = 500
# Of timm's blur: a kernel of 23 pixels, with a standard deviation between these.
BLUR_RADIUS, BLUR_SIGMAS = 11, (0.1, 2.0)


def train_transform(recipe: Recipe, input_size: tuple[int, int, int], whole: bool = False) -> Callable[..., Any]:
    """Build the training transform of a recipe: timm's and torchvision's own of what `mbib_timm.data.augment` has for
    batches.

    ``pad``: zero-pad by an eighth, crop at random, flip: 32-crops of the 4-padded image for CIFAR (Cao et al. 2019).
    ``rrc``: timm's random resized crop with flip. ``none``: as in evaluation.

    Args:
        recipe: which crop, and what follows it.
        input_size: (C, H, W) of what it gives.
        whole: cut it from the whole image resized to height x width, as ``pad`` always does.
    """
    channels, height, width = input_size
    steps: list[Callable[..., Any]] = []
    if whole or recipe.train_crop_mode == "pad":
        steps.append(_resize(recipe, height, width))
    if recipe.train_crop_mode == "pad":
        steps.append(transforms.RandomCrop((height, width), padding=(width // 8, height // 8)))
    elif recipe.train_crop_mode == "rrc":
        scale, ratio = (recipe.scale[0], recipe.scale[1]), (recipe.ratio[0], recipe.ratio[1])
        steps.append(RandomResizedCropAndInterpolation((height, width), scale, ratio, recipe.interpolation))
    elif not whole:
        steps += [eval_transform(recipe, height, width), torch.as_tensor, transforms.ToPILImage()]
    if recipe.train_crop_mode != "none":
        steps.append(transforms.RandomHorizontalFlip(recipe.hflip))
    return transforms.Compose([*steps, *_operations(recipe, channels, min(height, width)), transforms.PILToTensor()])


def _operations(recipe: Recipe, channels: int, side: int) -> Iterator[Callable[..., Any]]:
    """Yield what follows the crop, in the order of `mbib_timm.data.augment`. `side` is the images' shorter one."""
    if recipe.rotation:
        yield transforms.RandomRotation(recipe.rotation)
    if recipe.aa == CIFAR10:
        yield transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10, fill=CIFAR10_FILL)
    elif recipe.aa is not None:
        yield timm_policy(recipe.aa, recipe, channels, side)
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


def _cut_out(image: Image.Image, side: int) -> Image.Image:
    """Blacken a square whose centre is any pixel (DeVries and Taylor 2017)."""
    left, top = (int(torch.randint(length, ())) - side // 2 for length in image.size)
    image = image.copy()
    image.paste(0 if image.mode == "L" else (0, 0, 0), (left, top, left + side, top + side))
    return image


class Views:
    """The views of an image, stacked as channels: what timm's loader takes for one image.

    Args:
        transforms: one for each view; each gives (C, H, W), uint8.
    """

    def __init__(self, transforms: Sequence[Callable[..., Any]]) -> None:
        self.transforms = tuple(transforms)

    def __call__(self, image: Image.Image) -> Tensor:
        """Return (V C, H, W), uint8."""
        return torch.cat([transform(image) for transform in self.transforms])


def timm_policy(aa: str, recipe: Recipe, channels: int, side: int) -> Callable[[Image.Image], Image.Image]:
    """Build an augmentation policy of timm's as its `create_transform` does. `side` is the images' shorter one."""
    settings: dict[str, Any] = {
        "translate_const": int(0.45 * side),
        "img_mean": mean_color(channelwise(recipe.mean, channels)),
        "interpolation": str_to_pil_interp(_fixed_interpolation(recipe)),
    }
    kind = aa.partition("-")[0]
    if kind == "augmix":
        settings["translate_pct"] = 0.3
    build = {"augmix": augment_and_mix_transform, "rand": rand_augment_transform}.get(kind, auto_augment_transform)
    policy: Callable[[Image.Image], Image.Image] = build(aa, settings)
    return policy


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
