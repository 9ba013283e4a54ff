"""Brightness, contrast and saturation of batches of images, changed as torchvision's `ColorJitter` does it."""

import torch
from torch import Tensor

# Rec. 601 luma in 16-bit fixed point, as PIL converts to grey: up to 256 * 2**16, so that float32 sums are exact.
LUMA = (19595.0, 38470.0, 7471.0)
LUMA_ONE = 65536.0

# Images are changed in blocks of this many float32 bytes: on a CPU they stay in its cache, a GPU keeps memory free.
CPU_BLOCK_BYTES = 2 << 20
BLOCK_BYTES = 256 << 20


def draw_color_jitter(n: int, strength: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw the parameters of `color_jitter` for n images.

    Args:
        n: images.
        strength: factors are uniform in max(0, 1 - strength)..1 + strength, as with timm's ``color_jitter``.
        generator: on the CPU.

    Returns:
        Factors of brightness, contrast and saturation, (n, 3), float32; and the order in which the three are applied,
        a random permutation of 0, 1, 2 for each image, (n, 3), int64.
    """
    low, high = max(0.0, 1 - strength), 1 + strength
    factors = low + (high - low) * torch.rand(n, 3, generator=generator)
    return factors, torch.rand(n, 3, generator=generator).argsort(dim=1)


def color_jitter(images: Tensor, factors: Tensor, orders: Tensor) -> Tensor:
    """Change brightness, contrast and saturation, each image's in its own order.

    Each operation blends the image with black, with the mean of its grey, or with its grey:
    ``factor * image + (1 - factor) * other``, which PIL clamps to 0..255 and truncates to whole levels.

    Args:
        images: (n, H, W, C), uint8; C is 3 (RGB), or 1, where saturation has no effect.
        factors: of brightness, contrast and saturation, (n, 3), float32, with the images.
        orders: which of the three comes first, second and third, (n, 3), int64, with the images.

    Returns:
        (n, H, W, C), uint8.
    """
    factors, orders = factors[..., None, None, None], orders[..., None, None, None]
    block_bytes = CPU_BLOCK_BYTES if images.device.type == "cpu" else BLOCK_BYTES
    block = max(1, block_bytes // (4 * images[0].numel()))
    changed = torch.empty_like(images)
    for begin in range(0, len(images), block):
        piece = slice(begin, begin + block)
        # Channel after channel, for long inner loops.
        pixels = images[piece].permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        for operations in orders[piece].unbind(1):
            factor = factors[piece].gather(1, operations[:, None])[:, 0]
            pixels = torch.lerp(_blended_with(pixels, operations), pixels, factor).clamp_(0, 255).floor_()
        changed[piece] = pixels.permute(0, 2, 3, 1)
    return changed


def _blended_with(pixels: Tensor, operations: Tensor) -> Tensor:
    """Return the other image of each blend, (n, 1, H, W), for pixels (n, C, H, W) and operations (n, 1, 1, 1)."""
    grey = pixels
    if pixels.shape[1] == 3:
        red, green, blue = pixels.split(1, dim=1)
        grey = (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])
        grey = grey.add_(LUMA_ONE / 2).div_(LUMA_ONE).floor_()
    mean = grey.mean(dim=(2, 3), keepdim=True).add_(0.5).floor_()
    return torch.where(operations == 2, grey, mean * (operations == 1))
