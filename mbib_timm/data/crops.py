"""Crops of resident images, with their flips: what the network sees of them, cut out in batches on the device."""

from typing import Protocol

import torch
from torch import Tensor

from mbib_timm.data.decode import DecodedImages
from mbib_timm.data.loaders import send
from mbib_timm.data.resampling import draw_resized_crops, resized_crops
from mbib_timm.data.transforms import LONGEST_SIDE
from mbib_timm.recipe import Recipe

Draws = dict[str, Tensor]
# What a crop or an operation takes for a pixel: a few int64 places, and levels as float32.
WORK_BYTES = 64


class Crop(Protocol):
    """Cuts what the network sees out of decoded images."""

    bytes_an_image: int
    """Memory that it takes to crop an image."""

    def draw(self, sizes: Tensor, generator: torch.Generator) -> Draws:
        """Draw for n images of `sizes` (n, 2), on the host; every value is (n, ...)."""

    def __call__(self, images: DecodedImages, chosen: Tensor, draws: Draws) -> Tensor:
        """Return the chosen images (n,), cropped as drawn: (n, H, W, C), uint8.

        `chosen` and `draws` are in host memory, the images and what is returned on the device.
        """


def create_crop(recipe: Recipe, height: int, width: int) -> Crop:
    """Build the crop that a recipe asks for."""
    if recipe.train_crop_mode == "pad":
        return PadAndCrop(height, width, recipe.hflip)
    return ResizedCrop(height, width, recipe) if recipe.train_crop_mode == "rrc" else Whole(height, width)


class PadAndCrop:
    """Random crops of images that are padded with black by an eighth, and random flips (Cao et al. 2019, for CIFAR).

    Args:
        height, width: of the images and of the crops.
        flip: probability of a horizontal flip.
    """

    def __init__(self, height: int, width: int, flip: float) -> None:
        self.height, self.width, self.flip = height, width, flip
        self.bytes_an_image = WORK_BYTES * height * width

    def draw(self, sizes: Tensor, generator: torch.Generator) -> Draws:
        """Draw the crops of n images; `sizes` (n, 2) only tells how many."""
        n, pad_y, pad_x = len(sizes), self.height // 8, self.width // 8
        return {
            "tops": torch.randint(2 * pad_y + 1, (n,), generator=generator) - pad_y,
            "lefts": torch.randint(2 * pad_x + 1, (n,), generator=generator) - pad_x,
            "flips": torch.rand(n, generator=generator) < self.flip,
        }

    def __call__(self, images: DecodedImages, chosen: Tensor, draws: Draws) -> Tensor:
        """Return the crops of the chosen images (n,) as (n, H, W, C), uint8."""
        device = images.pixels.device
        sent = {name: send(values, device) for name, values in draws.items()}
        return shifted_crops(images, send(chosen, device), self.height, self.width, **sent)


class ResizedCrop:
    """Random resized crops and random flips: timm's training transform without its colours.

    Args:
        height, width: of the crops.
        recipe: ranges of area and aspect ratio, probability of a flip, interpolation.
    """

    def __init__(self, height: int, width: int, recipe: Recipe) -> None:
        self.height, self.width, self.recipe = height, width, recipe
        # First what `resized_crops` takes for the largest box.
        self.bytes_an_image = 24 * LONGEST_SIDE**2 + WORK_BYTES * height * width

    def draw(self, sizes: Tensor, generator: torch.Generator) -> Draws:
        """Draw for n images of height and width `sizes` (n, 2)."""
        recipe, n = self.recipe, len(sizes)
        scale, ratio = (recipe.scale[0], recipe.scale[1]), (recipe.ratio[0], recipe.ratio[1])
        return {
            "boxes": draw_resized_crops(sizes, scale, ratio, generator),
            "flips": torch.rand(n, generator=generator) < recipe.hflip,
            "bicubic": torch.rand(n, generator=generator) < {"bilinear": 0, "random": 0.5}.get(recipe.interpolation, 1),
        }

    def __call__(self, images: DecodedImages, chosen: Tensor, draws: Draws) -> Tensor:
        """Return the chosen images (n,), cropped and resized, as (n, H, W, C), uint8."""
        device = images.pixels.device
        return resized_crops(
            images.pixels,
            images.starts[send(chosen, device)],
            images.sizes[chosen],
            draws["boxes"],
            draws["flips"],
            self.height,
            self.width,
            draws["bicubic"],
        )


def shifted_crops(
    images: DecodedImages, chosen: Tensor, height: int, width: int, tops: Tensor, lefts: Tensor, flips: Tensor
) -> Tensor:
    """Cut windows out of images of height x width, black where they reach beyond: one gather for all of them.

    Args:
        images: all of height x width.
        chosen: which images, (n,).
        height: of images and windows.
        width: of images and windows.
        tops: first row of each window, (n,); negative above the image.
        lefts: first column, (n,).
        flips: mirror the window, (n,), bool.

    Returns:
        (n, H, W, C), uint8.
    """
    device = images.pixels.device
    rows = tops[:, None] + torch.arange(height, device=device)
    columns = torch.arange(width, device=device)
    columns = lefts[:, None] + torch.where(flips[:, None], width - 1 - columns, columns)
    # What lies outside gets an index far below 0, however it is added up; 0 is the black pixel.
    outside = -(2**60)
    row_starts = images.starts[chosen, None] + rows * width
    row_starts = row_starts.masked_fill((rows < 0) | (rows >= height), outside)
    columns = columns.masked_fill((columns < 0) | (columns >= width), outside)
    places = (row_starts[:, :, None] + columns[:, None, :]).clamp_(min=0)
    return images.pixels.index_select(0, places.flatten()).unflatten(0, places.shape)


class Whole:
    """No crop: images as an evaluation sees them, all of height x width."""

    def __init__(self, height: int, width: int) -> None:
        self.bytes_an_image = WORK_BYTES * height * width

    def draw(self, sizes: Tensor, generator: torch.Generator) -> Draws:
        """Draw nothing."""
        return {}

    def __call__(self, images: DecodedImages, chosen: Tensor, draws: Draws) -> Tensor:
        """Return the chosen images (n,) as (n, H, W, C), uint8."""
        return images.stacked().index_select(0, send(chosen, images.pixels.device))
