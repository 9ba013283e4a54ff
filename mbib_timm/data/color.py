"""Colours of batches of images, changed as PIL and torchvision change them, each image by a factor of its own."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

# Rec. 601 luma in 16-bit fixed point, as PIL converts to grey: up to 256 * 2**16, so that float32 sums are exact.
LUMA = (19595.0, 38470.0, 7471.0)
LUMA_ONE = 65536.0

# Images are changed in blocks of this many float32 bytes: on a CPU they stay in its cache, a GPU keeps memory free.
CPU_BLOCK_BYTES = 2 << 20
BLOCK_BYTES = 256 << 20

# Factors of brightness, contrast and saturation, and the shift of the hue, that change nothing.
UNCHANGED = torch.tensor([1.0, 1.0, 1.0, 0.0])
# The enhancements, by number.
BRIGHTNESS, CONTRAST, SATURATION, SHARPNESS = range(4)


def draw_color_jitter(
    n: int, strength: float, generator: torch.Generator | None, hue: float = 0.0, probability: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Draw the parameters of `color_jitter` for n images.

    Args:
        n: images.
        strength: factors are uniform in max(0, 1 - strength)..1 + strength, as with timm's ``color_jitter``.
        generator: on the CPU; None for torch's own.
        hue: shifts of the hue are uniform in -hue..hue, in turns of the colour wheel.
        probability: of an image to be changed at all.

    Returns:
        Factors of brightness, contrast and saturation, (n, 3), float32, and with `hue` its shifts, (n, 4); and the
        order in which they are applied, a random permutation for each image, (n, 3) or (n, 4), int64; 3 is the hue.
    """
    low, high = max(0.0, 1 - strength), 1 + strength
    factors = low + (high - low) * torch.rand(n, 3, generator=generator)
    if hue:
        factors = torch.cat([factors, hue * (2 * torch.rand(n, 1, generator=generator) - 1)], dim=1)
    orders = torch.rand(factors.shape, generator=generator).argsort(dim=1)
    if probability < 1:
        unchanged = torch.rand(n, 1, generator=generator) >= probability
        factors = torch.where(unchanged, UNCHANGED[: factors.shape[1]], factors)
    return factors, orders


def color_jitter(
    images: Tensor, factors: Tensor, orders: Tensor, hues: Tensor | None = None, hue_at: int = 0
) -> Tensor:
    """Change brightness, contrast and saturation, each image's in its own order, and the hue at one place in it.

    The first three blend the image with another, see `enhanced`.

    Args:
        images: (n, H, W, C), uint8; C is 3 (RGB), or 1, where saturation and hue have no effect.
        factors: of brightness, contrast and saturation, (n, 3), float32, with the images.
        orders: which of the three comes first, second and third, (n, 3), int64, with the images.
        hues: shifts of the hue, (n,), float32, with the images; None for none.
        hue_at: how many of the three come before the hue.

    Returns:
        (n, H, W, C), uint8.
    """
    factors, orders = factors[..., None, None, None], orders[..., None, None, None]

    def change(pixels: Tensor, block: slice) -> Tensor:
        for step in range(4):
            if hues is not None and step == hue_at:
                pixels = shifted_hue(pixels, hues[block, None, None, None])
            if step < 3:
                chosen = orders[block, step]
                pixels = enhanced(pixels, chosen, factors[block].gather(1, chosen[:, None])[:, 0])
        return pixels

    return in_blocks(images, change)


def enhance(images: Tensor, kinds: Tensor, factors: Tensor) -> Tensor:
    """Change one property of each image: its brightness, contrast, saturation or sharpness, as PIL's ImageEnhance does.

    Args:
        images: (n, H, W, C), uint8.
        kinds: numbers of the enhancements, (n,), int64, with the images.
        factors: (n,), float32, with the images; 1 leaves an image as it is.

    Returns:
        (n, H, W, C), uint8.
    """
    kinds, factors = kinds[:, None, None, None], factors[:, None, None, None]

    def change(pixels: Tensor, block: slice) -> Tensor:
        return enhanced(pixels, kinds[block], factors[block], sharpness=True)

    return in_blocks(images, change)


def in_blocks(images: Tensor, change: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """Change images (n, H, W, C), uint8, a block at a time.

    Args:
        images: to change.
        change: from whole levels (b, C, H, W), float32, and the block's place among the images to such levels.
    """
    block_bytes = CPU_BLOCK_BYTES if images.device.type == "cpu" else BLOCK_BYTES
    size = max(1, block_bytes // (4 * images[0].numel()))
    changed = torch.empty_like(images)
    for begin in range(0, len(images), size):
        block = slice(begin, begin + size)
        # Channel after channel, for long inner loops.
        pixels = images[block].permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        changed[block] = change(pixels, block).permute(0, 2, 3, 1)
    return changed


def enhanced(pixels: Tensor, kinds: Tensor, factors: Tensor, sharpness: bool = False) -> Tensor:
    """Blend each image with another: ``factor * image + (1 - factor) * other``, clamped to 0..255 and truncated, as PIL
    does. The other is black for the brightness, the mean of the grey image for the contrast, the grey image for the
    saturation, and the smoothed image for the sharpness.

    Args:
        pixels: whole levels (n, C, H, W), float32.
        kinds: numbers of the enhancements, (n, 1, 1, 1).
        factors: (n, 1, 1, 1), float32.
        sharpness: it may be among them.
    """
    grey = luma(pixels) if pixels.shape[1] == 3 else pixels
    mean = grey.mean(dim=(2, 3), keepdim=True).add_(0.5).floor_()
    other = torch.where(kinds == SATURATION, grey, mean * (kinds == CONTRAST))
    if sharpness:
        other = torch.where(kinds == SHARPNESS, smoothed(pixels), other)
    return torch.lerp(other, pixels, factors).clamp_(0, 255).floor_()


def luma(pixels: Tensor) -> Tensor:
    """Return the grey levels (n, 1, H, W) of RGB images (n, 3, H, W), as PIL converts."""
    red, green, blue = pixels.split(1, dim=1)
    grey = (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])
    return grey.add_(LUMA_ONE / 2).div_(LUMA_ONE).floor_()


def smoothed(pixels: Tensor) -> Tensor:
    """Return images (n, C, H, W) under PIL's SMOOTH filter, 1/13 (1 1 1, 1 5 1, 1 1 1); their borders stay as they
    are."""
    if min(pixels.shape[-2:]) < 3:
        return pixels
    inner = pixels[..., 1:-1, 1:-1]
    columns = pixels[..., :-2] + pixels[..., 1:-1] + pixels[..., 2:]
    total = columns[..., :-2, :] + columns[..., 1:-1, :] + columns[..., 2:, :] + 4 * inner
    smooth = pixels.clone()
    smooth[..., 1:-1, 1:-1] = total.div_(13).add_(0.5).floor_()
    return smooth


def shifted_hue(pixels: Tensor, shifts: Tensor) -> Tensor:
    """Turn the hue of RGB images; others stay as they are.

    With M the largest and C the range of a pixel's three levels, a channel of hue h is
    ``M - C min(max(min(k, 4 - k), 0), 1)`` with ``k = (o + 6 h) mod 6`` and o = 5, 3, 1 for red, green, blue.

    Args:
        pixels: whole levels (n, C, H, W), float32.
        shifts: in turns, (n, 1, 1, 1).
    """
    if pixels.shape[1] != 3:
        return pixels
    red, green, blue = pixels.split(1, dim=1)
    smallest, largest = torch.aminmax(pixels, dim=1, keepdim=True)
    spread = largest - smallest
    divisor = spread.clamp(min=1)
    sixths = torch.where(
        largest == red,
        (green - blue) / divisor,
        torch.where(largest == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    offsets = torch.arange(5, 0, -2, device=pixels.device)[:, None, None]
    k = (offsets + sixths + 6 * shifts).remainder(6)
    return (largest - spread * torch.minimum(k, 4 - k).clamp_(0, 1)).round_()


def blur(images: Tensor, sigmas: Tensor, radius: int) -> Tensor:
    """Blur each image by a Gaussian of its own width, mirrored at the borders.

    Along either axis the filter is a product with a matrix, one for each image.

    Args:
        images: (n, H, W, C), uint8.
        sigmas: standard deviations in pixels, (n,), float32, with the images.
        radius: pixels to either side that the filter reaches; at most those that an image has to mirror.

    Returns:
        (n, H, W, C), uint8.
    """

    def change(pixels: Tensor, block: slice) -> Tensor:
        height, width = pixels.shape[-2:]
        rows = _filters(sigmas[block], height, radius)[:, None]
        columns = _filters(sigmas[block], width, radius)[:, None]
        return (rows @ pixels @ columns.mT).round_().clamp_(0, 255)

    return in_blocks(images, change)


def _filters(sigmas: Tensor, side: int, radius: int) -> Tensor:
    """Return the matrices (n, side, side) that filter along an axis."""
    reach = min(radius, side - 1)
    offsets = torch.arange(-reach, reach + 1, device=sigmas.device)
    weights = F.softmax(-0.5 * (offsets / sigmas[:, None]) ** 2, dim=1)
    places = torch.arange(side, device=sigmas.device)[:, None] + offsets
    places = (side - 1) - ((side - 1) - places.abs()).abs()  # mirrored, without repeating the border
    shape = (len(sigmas), *places.shape)
    matrices = torch.zeros(len(sigmas), side, side, device=sigmas.device)
    return matrices.scatter_add_(2, places.expand(shape), weights[:, None].expand(shape))
