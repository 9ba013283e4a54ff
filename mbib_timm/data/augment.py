"""Training augmentation: a crop, then operations on batches of images, each drawn for every image by itself.

Everything is drawn on the host for a whole epoch and applied in batches on the device. What is drawn depends on a
generator alone, never on the device or on how the epoch is cut into pieces. `mbib_timm.data.transforms` has the same
for single images.

    crop, flip -> rotation -> policy (aa) -> colour jitter -> grey -> blur -> Cutout
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from mbib_timm.data.batch import send
from mbib_timm.data.crops import Crop, Draws, create_crop
from mbib_timm.data.decoding import DecodedImages
from mbib_timm.data.pixels import (
    SATURATION,
    affine,
    apply_operations,
    blur,
    change_some,
    color_jitter,
    cut_out,
    enhance,
    rotations,
)
from mbib_timm.data.policies import CIFAR10, CIFAR10_FILL, Policy, create_policy, mean_color
from mbib_timm.data.transforms import BLUR_RADIUS, BLUR_SIGMAS
from mbib_timm.errors import MbibError
from mbib_timm.recipe import Recipe

# Factors of brightness, contrast and saturation, and the shift of the hue, that change nothing.
UNCHANGED = torch.tensor([1.0, 1.0, 1.0, 0.0])


class Operation(Protocol):
    """Changes a batch of images."""

    def draw(self, n: int, generator: torch.Generator | None) -> Draws:
        """Draw for n images, on the host, with a generator or torch's own; every value is (n, ...)."""

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """Return images (n, H, W, C), uint8, changed as drawn; it may change them in place."""


class Augmentation:
    """What a training image goes through in every epoch.

    Args:
        crop: comes first.
        operations: follow one another.
    """

    def __init__(self, crop: Crop, operations: Sequence[Operation]) -> None:
        self.crop, self.operations = crop, tuple(operations)
        self.bytes_per_image = crop.bytes_per_image

    def draw(self, sizes: Tensor, generator: torch.Generator) -> list[Draws]:
        """Draw for n images of `sizes` (n, 2), on the host: for the crop, then for each operation."""
        return [
            self.crop.draw(sizes, generator),
            *(operation.draw(len(sizes), generator) for operation in self.operations),
        ]

    def __call__(self, images: DecodedImages, chosen: Tensor, draws: Sequence[Draws]) -> Tensor:
        """Return the chosen images (n,), augmented as drawn: (n, H, W, C), uint8, on the images' device.

        `chosen` and `draws` are in host memory.
        """
        first, *others = draws
        pixels = self.crop(images, chosen, first)
        for operation, drawn in zip(self.operations, others, strict=True):
            pixels = operation(pixels, drawn)
        return pixels


def create_augmentation(recipe: Recipe, input_size: tuple[int, int, int]) -> Augmentation | None:
    """Build what a recipe asks for, for images of `input_size` (C, H, W); None where training sees images as an
    evaluation does.

    Raises:
        MbibError: an augmentation that images of this size or these channels have no use for.
    """
    crop = create_crop(recipe, *input_size[1:])
    operations = create_operations(recipe, input_size)
    return Augmentation(crop, operations) if operations or recipe.train_crop_mode != "none" else None


def check_augmentation(recipe: Recipe, input_size: tuple[int, int, int]) -> None:
    """Raise MbibError for an augmentation that images of `input_size` (C, H, W) have no use for."""
    channels, height, width = input_size
    if recipe.train_crop_mode == "pad" and min(height, width) < 8:
        raise MbibError(
            f"recipe key 'train_crop_mode': pad moves images by up to an eighth of their side, which is zero for "
            f"{height}x{width} pixels; expected none or rrc"
        )
    if recipe.cutout >= min(height, width):
        raise MbibError(
            f"recipe key 'cutout': a square of {recipe.cutout} pixels would blacken whole images of {height}x{width}; "
            f"expected at most {min(height, width) - 1}"
        )
    if channels == 1 and (recipe.hue or recipe.grayscale_prob):
        key = "hue" if recipe.hue else "grayscale_prob"
        raise MbibError(f"recipe key {key!r}: the model takes grey images, which have no colour to change")


def create_operations(recipe: Recipe, input_size: tuple[int, int, int]) -> list[Operation]:
    """Build what follows the crop. Raises MbibError as `create_augmentation` does."""
    check_augmentation(recipe, input_size)
    channels = input_size[0]
    operations: list[Operation] = []
    if recipe.rotation:
        operations.append(Rotation(recipe.rotation))
    if recipe.aa is not None:
        operations.append(_policy_operation(recipe.aa, recipe, channels))
    if recipe.color_jitter or recipe.hue:
        operations.append(ColorJitter(recipe.color_jitter, recipe.hue, recipe.color_jitter_prob))
    if recipe.grayscale_prob:
        operations.append(Grayscale(recipe.grayscale_prob))
    if recipe.gaussian_blur_prob:
        operations.append(GaussianBlur(recipe.gaussian_blur_prob))
    if recipe.cutout:
        operations.append(Cutout(recipe.cutout))
    return operations


def _policy_operation(aa: str, recipe: Recipe, channels: int) -> Operation:
    policy = create_policy(aa)
    if policy is None:
        raise MbibError(f"recipe key 'aa': {aa!r} works on single images; use loader: timm")
    if aa == CIFAR10:
        return PolicyOperation(policy, (CIFAR10_FILL,) * channels, "nearest")
    interpolation = "bicubic" if recipe.settled("interpolation") == "bicubic" else "bilinear"
    return PolicyOperation(policy, mean_color(recipe, channels), interpolation)


class Rotation:
    """Random rotations about the centre, black outside, to the nearest pixel, as torchvision's `RandomRotation`.

    Args:
        degrees: the largest angle, either way.
    """

    def __init__(self, degrees: float) -> None:
        self.degrees = degrees

    def draw(self, n: int, generator: torch.Generator | None) -> Draws:
        """Draw n angles."""
        return {"degrees": self.degrees * (2 * torch.rand(n, dtype=torch.float64, generator=generator) - 1)}

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """Return images (n, H, W, C), rotated."""
        _, height, width, channels = images.shape
        return affine(images, rotations(draws["degrees"], height, width), (0,) * channels)


class PolicyOperation:
    """A policy of operations, see `create_policy`.

    Args:
        policy: draws the operations.
        fill: value outside the image, one per channel.
        interpolation: of geometric operations.
    """

    def __init__(self, policy: Policy, fill: tuple[int, ...], interpolation: str) -> None:
        self.policy, self.fill, self.interpolation = policy, fill, interpolation

    def draw(self, n: int, generator: torch.Generator | None) -> Draws:
        """Draw the operations of n images, and their arguments."""
        operations, arguments = self.policy.draw(n, generator)
        return {"operations": operations, "arguments": arguments}

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """Return images (n, H, W, C) after their operations."""
        for operations, arguments in zip(draws["operations"].unbind(1), draws["arguments"].unbind(1), strict=True):
            apply_operations(images, operations, arguments, self.fill, self.interpolation)
        return images


class ColorJitter:
    """Random brightness, contrast, saturation and hue.

    Args:
        strength: factors of the first three are uniform in max(0, 1 - strength)..1 + strength, as with timm's
            ``color_jitter``.
        hue: the largest shift of the hue, either way, in turns of the colour wheel.
        probability: of an image to be changed.
    """

    def __init__(self, strength: float, hue: float = 0.0, probability: float = 1.0) -> None:
        self.strength, self.hue, self.probability = strength, hue, probability

    def draw(self, n: int, generator: torch.Generator | None) -> Draws:
        """Draw the factors of n images, and the orders in which they are applied: random permutations of three, or with
        the hue of four, which comes last among the factors."""
        low, high = max(0.0, 1 - self.strength), 1 + self.strength
        factors = low + (high - low) * torch.rand(n, 3, generator=generator)
        if self.hue:
            factors = torch.cat([factors, self.hue * (2 * torch.rand(n, 1, generator=generator) - 1)], dim=1)
        orders = torch.rand(factors.shape, generator=generator).argsort(dim=1)
        if self.probability < 1:
            unchanged = torch.rand(n, 1, generator=generator) >= self.probability
            factors = torch.where(unchanged, UNCHANGED[: factors.shape[1]], factors)
        return {"factors": factors, "orders": orders}

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """Return images (n, H, W, C), jittered."""
        factors, orders = draws["factors"], draws["orders"]
        device = images.device
        if not self.hue:
            return color_jitter(images, send(factors, device), send(orders, device))
        # Together those whose hue has the same place in the order: it takes longer than the other three.
        is_hue = orders == 3
        others = orders[~is_hue].view(-1, 3)
        for place, chosen in enumerate(is_hue.unbind(1)):

            def jitter(some: Tensor, places: Tensor, place: int = place) -> Tensor:
                own = send(factors[places], device)
                return color_jitter(some, own[:, :3], send(others[places], device), own[:, 3], place)

            change_some(images, chosen & (factors != UNCHANGED).any(dim=1), jitter)
        return images


class Grayscale:
    """Makes some images grey.

    Args:
        probability: of each image.
    """

    def __init__(self, probability: float) -> None:
        self.probability = probability

    def draw(self, n: int, generator: torch.Generator | None) -> Draws:
        """Draw which of n images."""
        return {"grey": torch.rand(n, generator=generator) < self.probability}

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """Return images (n, H, W, C), some of them grey."""

        def grey(some: Tensor, places: Tensor) -> Tensor:
            kinds = torch.full((len(some),), SATURATION, device=some.device)
            return enhance(some, kinds, torch.zeros(len(some), device=some.device))

        change_some(images, draws["grey"], grey)
        return images


class GaussianBlur:
    """Blurs some images, each by a standard deviation of its own, uniform between `BLUR_SIGMAS` pixels.

    Args:
        probability: of each image.
    """

    def __init__(self, probability: float) -> None:
        self.probability = probability

    def draw(self, n: int, generator: torch.Generator | None) -> Draws:
        """Draw which of n images, and how much."""
        low, high = BLUR_SIGMAS
        return {
            "blurred": torch.rand(n, generator=generator) < self.probability,
            "sigmas": low + (high - low) * torch.rand(n, generator=generator),
        }

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """Return images (n, H, W, C), some of them blurred."""
        change_some(
            images,
            draws["blurred"],
            lambda some, places: blur(some, send(draws["sigmas"][places], some.device), BLUR_RADIUS),
        )
        return images


class Cutout:
    """Blackens a square of every image, whose centre is any of its pixels (DeVries and Taylor 2017).

    Args:
        side: of the square, in pixels.
    """

    def __init__(self, side: int) -> None:
        self.side = side

    def draw(self, n: int, generator: torch.Generator | None) -> Draws:
        """Draw n centres, as shares of height and width."""
        return {"centres": torch.rand(n, 2, generator=generator)}

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """Return images (n, H, W, C) with holes."""
        sides = torch.tensor(images.shape[1:3])
        corners = (draws["centres"] * sides).long().minimum(sides - 1) - self.side // 2
        tops, lefts = send(corners, images.device).unbind(1)
        cut_out(images, tops, lefts, self.side)
        return images
