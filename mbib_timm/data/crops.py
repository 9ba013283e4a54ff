"""Crops of resident images, with their flips: what the network sees of them, cut out in batches on the device.

Resized crops are cut out of images of different sizes that lie in one block of bytes: many at once, on any device.
"""

import math
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from mbib_timm.data.batch import send
from mbib_timm.data.decoding import DecodedImages
from mbib_timm.data.transforms import longest_side
from mbib_timm.recipe import Recipe

Draws = dict[str, Tensor]
# What a crop or an operation takes per pixel: a few int64 places, and levels as float32.
WORK_BYTES = 64
# Of random resized crops, by recipe key `interpolation`: the share that is resized with the bicubic filter.
BICUBIC_SHARE = {"bilinear": 0.0, "random": 0.5, "bicubic": 1.0}
ATTEMPTS = 10  # as timm and torchvision, before they take the central crop
# Memory for the crops of one pair of batched products.
CHUNK_BYTES = 256 << 20
# Filter weights are multiples of 2**-15: with pixels of 8 bits and weights whose magnitudes add up to less than 2,
# float32 then adds without rounding, in any order. No pixel depends on the chunk, its padding, or the kernel.
WEIGHT_ONE = 2.0**15


class Crop(Protocol):
    """Cuts what the network sees out of decoded images."""

    bytes_per_image: int
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
        self.bytes_per_image = WORK_BYTES * height * width

    def draw(self, sizes: Tensor, generator: torch.Generator) -> Draws:
        """Draw the crops of n images; `sizes` (n, 2) only tells how many."""
        n, pad_y, pad_x = len(sizes), self.height // 8, self.width // 8
        return {
            "tops": torch.randint(2 * pad_y + 1, (n,), generator=generator) - pad_y,
            "lefts": torch.randint(2 * pad_x + 1, (n,), generator=generator) - pad_x,
            "flips": torch.rand(n, generator=generator) < self.flip,
        }

    def __call__(self, images: DecodedImages, chosen: Tensor, draws: Draws) -> Tensor:
        """Return the crops of the chosen images (n,) as (n, H, W, C), uint8: one gather for all of them."""
        device, height, width = images.pixels.device, self.height, self.width
        tops, lefts, flips = (send(draws[name], device)[:, None] for name in ("tops", "lefts", "flips"))
        rows = tops + torch.arange(height, device=device)
        columns = torch.arange(width, device=device)
        columns = lefts + torch.where(flips, width - 1 - columns, columns)
        # What lies outside gets an index far below 0, however it is added up; 0 is the black pixel.
        outside = -(2**60)
        row_starts = images.starts[send(chosen, device), None] + rows * width
        row_starts = row_starts.masked_fill((rows < 0) | (rows >= height), outside)
        columns = columns.masked_fill((columns < 0) | (columns >= width), outside)
        places = (row_starts[:, :, None] + columns[:, None, :]).clamp_(min=0)
        return images.pixels.index_select(0, places.flatten()).unflatten(0, places.shape)


class ResizedCrop:
    """Random resized crops and random flips: timm's training transform without its colours.

    Args:
        height, width: of the crops.
        recipe: ranges of area and aspect ratio, probability of a flip, interpolation.
    """

    def __init__(self, height: int, width: int, recipe: Recipe) -> None:
        self.height, self.width, self.recipe = height, width, recipe
        # First what `resized_crops` takes for the largest box.
        self.bytes_per_image = 24 * longest_side(height, width) ** 2 + WORK_BYTES * height * width

    def draw(self, sizes: Tensor, generator: torch.Generator) -> Draws:
        """Draw for n images of height and width `sizes` (n, 2)."""
        recipe, n = self.recipe, len(sizes)
        scale, ratio = (recipe.scale[0], recipe.scale[1]), (recipe.ratio[0], recipe.ratio[1])
        return {
            "boxes": draw_resized_crops(sizes, scale, ratio, generator),
            "flips": torch.rand(n, generator=generator) < recipe.hflip,
            "bicubic": torch.rand(n, generator=generator) < BICUBIC_SHARE[recipe.settled("interpolation")],
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


class Whole:
    """No crop: images as an evaluation sees them, all of height x width."""

    def __init__(self, height: int, width: int) -> None:
        self.bytes_per_image = WORK_BYTES * height * width

    def draw(self, sizes: Tensor, generator: torch.Generator) -> Draws:
        """Draw nothing."""
        return {}

    def __call__(self, images: DecodedImages, chosen: Tensor, draws: Draws) -> Tensor:
        """Return the chosen images (n,) as (n, H, W, C), uint8."""
        return images.stacked().index_select(0, send(chosen, images.pixels.device))


def draw_resized_crops(
    sizes: Tensor, scale: tuple[float, float], ratio: tuple[float, float], generator: torch.Generator
) -> Tensor:
    """Draw boxes as timm's `RandomResizedCropAndInterpolation` does: area uniform, aspect ratio log-uniform.

    Of ten attempts the first that fits into the image counts; failing all, a central crop of the nearest ratio does.
    An image takes the same number of draws whatever its size, so that its box does not depend on the others' sizes.

    Args:
        sizes: height and width of each image, (n, 2), int64, on the CPU.
        scale: least and greatest area of the box, as shares of the image's.
        ratio: least and greatest width / height of the box.
        generator: on the CPU.

    Returns:
        Top, left, height and width of each box, (n, 4), int64; at least one pixel, where timm may draw none.
    """
    draws = torch.rand(len(sizes), 2 * ATTEMPTS + 2, dtype=torch.float64, generator=generator)
    area_draws, ratio_draws, place_draws = draws.split([ATTEMPTS, ATTEMPTS, 2], dim=1)
    image_heights, image_widths = sizes.double().split(1, dim=1)
    areas = image_heights * image_widths * (scale[0] + (scale[1] - scale[0]) * area_draws)
    ratios = torch.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * ratio_draws)
    heights, widths = (areas / ratios).sqrt().round(), (areas * ratios).sqrt().round()
    central_heights = torch.minimum(image_heights, (image_widths / ratio[0]).round())
    central_widths = torch.minimum(image_widths, (image_heights * ratio[1]).round())
    heights = torch.cat([heights, central_heights], dim=1).clamp_(min=1)
    widths = torch.cat([widths, central_widths], dim=1).clamp_(min=1)
    # argmax gives the first of equals; the central crop, last, always fits.
    chosen = ((heights <= image_heights) & (widths <= image_widths)).int().argmax(dim=1, keepdim=True)
    box_sizes = torch.cat([heights.gather(1, chosen), widths.gather(1, chosen)], dim=1)
    room = sizes - box_sizes
    corners = torch.where(chosen == ATTEMPTS, room / 2, (room + 1) * place_draws).floor()
    return torch.cat([corners, box_sizes], dim=1).long()


def resized_crops(
    pixels: Tensor,
    starts: Tensor,
    sizes: Tensor,
    boxes: Tensor,
    flips: Tensor,
    height: int,
    width: int,
    bicubic: Tensor,
) -> Tensor:
    """Cut a box out of each image and resize it, as PIL's `resize` does with its antialiasing filters.

    Like PIL up to version 12, always first along the rows, to whole levels, then along the columns; PIL 13 begins with
    the columns of some boxes, which hard edges under the bicubic filter show. Nothing on a device is waited for.

    On a CPU, PyTorch's own kernel resizes image by image; elsewhere, resizing is two batched matrix products. Along
    either axis, both are at most one level off PIL's for boxes of up to 32 times the result. So are products in TF32,
    if torch is set to it: pixels are exact in it, and weights keep 11 bits.

    Args:
        pixels: (P, C), uint8, of all images, one after another, row by row.
        starts: first pixel of each image, (n,), int64, on the CPU or with the pixels.
        sizes: height and width of each image, (n, 2), int64, on the CPU.
        boxes: top, left, height and width of what is cut out of each image, (n, 4), int64, on the CPU.
        flips: mirror the result horizontally, (n,), bool, on the CPU or with the pixels.
        height: of the results.
        width: of the results.
        bicubic: resize with the bicubic (a = -0.5) and not the bilinear filter, (n,), bool, as `flips`.

    Returns:
        (n, height, width, C), uint8, with the pixels.
    """
    if pixels.device.type == "cpu":
        return _by_interpolation(pixels, starts, sizes, boxes, flips, height, width, bicubic)
    return _by_products(pixels, starts, sizes, boxes, flips, height, width, bicubic)


def _by_interpolation(
    pixels: Tensor,
    starts: Tensor,
    sizes: Tensor,
    boxes: Tensor,
    flips: Tensor,
    height: int,
    width: int,
    bicubic: Tensor,
) -> Tensor:
    results = pixels.new_empty(len(boxes), height, width, pixels.shape[1])
    parameters = (values.tolist() for values in (starts, sizes, boxes, flips, bicubic))
    for result, start, size, (top, left, rows, columns), flip, cubic in zip(results, *parameters, strict=True):
        image = pixels[start : start + size[0] * size[1]].unflatten(0, size)
        crop = image[top : top + rows, left : left + columns].permute(2, 0, 1)[None]
        resized = F.interpolate(
            crop.contiguous(memory_format=torch.channels_last),  # which has a faster kernel
            (height, width),
            mode="bicubic" if cubic else "bilinear",
            antialias=True,
        )
        result.copy_((resized.flip(3) if flip else resized)[0].permute(1, 2, 0))
    return results


def _by_products(
    pixels: Tensor,
    starts: Tensor,
    sizes: Tensor,
    boxes: Tensor,
    flips: Tensor,
    height: int,
    width: int,
    bicubic: Tensor,
) -> Tensor:
    channels, device = pixels.shape[1], pixels.device
    tops, lefts, rows, columns = boxes.unbind(1)
    strides = sizes[:, 1]
    geometry = send(torch.stack([tops * strides + lefts, strides, rows, columns], dim=1), device)
    starts, flips, bicubic = (send(values, device) for values in (starts, flips, bicubic))
    results = pixels.new_empty(len(boxes), height, width, channels)
    # For each pixel an int64 place, and its colours as uint8 and as float32.
    bytes_per_image = int(rows.max() * columns.max()) * (8 + 5 * channels)
    chunk = max(1, CHUNK_BYTES // bytes_per_image)
    for begin in range(0, len(boxes), chunk):
        piece = slice(begin, begin + chunk)
        most_rows, most_columns = boxes[piece, 2:].amax(dim=0).tolist()
        first, stride, rows, columns = geometry[piece, :, None, None].unbind(1)
        # Beyond a box its last pixel again: any will do, for their weight is 0.
        y = torch.arange(most_rows, device=device).minimum(rows - 1)
        x = torch.arange(most_columns, device=device)[:, None].minimum(columns - 1)
        places = starts[piece, None, None] + first + y * stride + x
        # (n, columns, rows * C): what a product sums over comes first.
        crops = pixels.index_select(0, places.flatten()).float().view(len(places), most_columns, -1)
        narrow = _whole_levels(_weights(columns, most_columns, width, bicubic[piece], flips[piece]) @ crops)
        narrow = narrow.unflatten(2, (most_rows, channels)).transpose(1, 2).flatten(2)
        resized = _whole_levels(_weights(rows, most_rows, height, bicubic[piece]) @ narrow)
        results[piece] = resized.unflatten(2, (width, channels))
    return results


def _weights(inputs: Tensor, most_inputs: int, outputs: int, bicubic: Tensor, flips: Tensor | None = None) -> Tensor:
    """Return PIL's antialiasing filters along one axis.

    Args:
        inputs: pixels of each box along the axis, (n, 1, 1).
        most_inputs: their maximum.
        outputs: pixels of the results along the axis.
        bicubic: (n,), bool.
        flips: give the results in reverse order, (n,), bool.

    Returns:
        Weights (n, outputs, most_inputs), 0 beyond a box.
    """
    output = torch.arange(outputs, device=inputs.device)[:, None]
    if flips is not None:
        output = torch.where(flips[:, None, None], outputs - 1 - output, output)
    position = torch.arange(most_inputs, device=inputs.device)
    # Between the centres of an input and an output pixel, in the larger pixels of the two; whole numbers up to here.
    distance = (2 * position + 1) * outputs - (2 * output + 1) * inputs
    distance = distance.abs() / (2 * inputs.clamp(min=outputs))
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
    cubic = torch.where(distance < 1, near, torch.where(distance < 2, far, 0))
    weights = torch.where(bicubic[:, None, None], cubic, (1 - distance).clamp(min=0))
    # Whole numbers, whose sum does not depend on the padding.
    weights = (weights * WEIGHT_ONE).round().masked_fill(position >= inputs, 0)
    return (weights / weights.sum(dim=2, keepdim=True) * WEIGHT_ONE).round() / WEIGHT_ONE


def _whole_levels(values: Tensor) -> Tensor:
    """Round half up, as PIL does, and clamp to 0..255, in place."""
    return values.add_(0.5).floor_().clamp_(0, 255)
