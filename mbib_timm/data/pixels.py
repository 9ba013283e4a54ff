"""Operations on the pixels of batches, each image with a parameter of its own, as PIL and torchvision change images one
by one: colours, blur, geometry, levels, histograms, holes.

Images are (n, H, W, C), uint8, on any device. Which image an operation changes, and by what, is known on the host, so
that nothing on the device is waited for.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as tv

from mbib_timm.data.batch import send

# Rec. 601 luma in 16-bit fixed point, as PIL converts to grey: up to 256 * 2**16, so that float32 sums are exact.
LUMA = (19595.0, 38470.0, 7471.0)
LUMA_ONE = 65536.0

# Images are changed in blocks of this many float32 bytes: on a CPU they stay in its cache, a GPU keeps memory free.
CPU_BLOCK_BYTES = 2 << 20
BLOCK_BYTES = 256 << 20

# The enhancements, by number: in the order of the operations, see `ARGUMENTS`.
BRIGHTNESS, CONTRAST, SATURATION, SHARPNESS = range(4)


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


# Argument of each operation; a policy names an operation by its place in this order.
ARGUMENTS = {
    "shear_x": "pixels to the right per row",
    "shear_y": "pixels down per column",
    "translate_x": "share of the width",
    "translate_y": "share of the height",
    "rotate": "degrees",
    "brightness": "factor",
    "contrast": "factor",
    "color": "factor",
    "sharpness": "factor",
    "posterize": "bits that are kept",
    "solarize": "level from which on an image is inverted",
    "solarize_add": "what is added to levels below 128",
    "autocontrast": "none",
    "equalize": "none",
    "invert": "none",
}
NAMES = tuple(ARGUMENTS)
NUMBER = {name: number for number, name in enumerate(NAMES)}
NOTHING = -1

FIXED_ONE = 65536  # PIL computes the places of nearest neighbours in 16-bit fixed point


def change_some(images: Tensor, chosen: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Change some of the images in place.

    Args:
        images: (n, H, W, C).
        chosen: which, (n,), bool, in host memory.
        change: from the chosen images, and their places (m,) in host memory, to what they become.
    """
    places = chosen.nonzero().squeeze(1)
    if len(places) == len(images):
        images.copy_(change(images, places))
    elif len(places):
        on_device = send(places, images.device)
        images.index_copy_(0, on_device, change(images.index_select(0, on_device), places))


def apply_operations(
    images: Tensor, operations: Tensor, arguments: Tensor, fill: tuple[int, ...], interpolation: str = "nearest"
) -> None:
    """Apply one operation to each image, in place.

    Args:
        images: (n, H, W, C), uint8.
        operations: numbers of the operations, (n,), int64, or `NOTHING`; in host memory.
        arguments: see `ARGUMENTS`, (n,), float64, in host memory.
        fill: value outside the image, one per channel.
        interpolation: of geometric operations: ``nearest``, ``bilinear`` or ``bicubic``.
    """
    height, width = images.shape[1:3]

    def geometric(some: Tensor, places: Tensor) -> Tensor:
        matrices = affine_matrices(operations[places], arguments[places], height, width)
        return affine(some, matrices, fill, interpolation)

    def enhancing(some: Tensor, places: Tensor) -> Tensor:
        kinds = operations[places] - NUMBER["brightness"]
        return enhance(some, send(kinds, some.device), send(arguments[places].float(), some.device))

    change_some(images, (operations >= 0) & (operations <= NUMBER["rotate"]), geometric)
    enhancements = (operations >= NUMBER["brightness"]) & (operations <= NUMBER["sharpness"])
    change_some(images, enhancements, enhancing)
    for name, change in _LEVELS.items():

        def with_arguments(some: Tensor, places: Tensor, change: Callable[[Tensor, Tensor], Tensor] = change) -> Tensor:
            return change(some, send(arguments[places].float(), some.device)[:, None, None, None])

        change_some(images, operations == NUMBER[name], with_arguments)


def _posterize(images: Tensor, bits: Tensor) -> Tensor:
    dropped = 2 ** (8 - bits.round().int())
    return (images.int() // dropped * dropped).to(torch.uint8)


def _solarize(images: Tensor, thresholds: Tensor) -> Tensor:
    return torch.where(images < thresholds, images, 255 - images)


def _solarize_add(images: Tensor, added: Tensor) -> Tensor:
    return torch.where(images < 128, (images + added).clamp(0, 255).floor().to(torch.uint8), images)


def _on_channels(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function of torchvision's, which takes (n, C, H, W), for images (n, H, W, C) and no argument."""
    return lambda images, arguments: change(images.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


_LEVELS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "autocontrast": _on_channels(tv.autocontrast),
    "equalize": _on_channels(tv.equalize),
    "invert": _on_channels(tv.invert),
}


def affine_matrices(operations: Tensor, arguments: Tensor, height: int, width: int) -> Tensor:
    """Return the maps of geometric operations from places in the result to places in the image.

    Args:
        operations: numbers of geometric operations, (n,).
        arguments: see `ARGUMENTS`, (n,), float64.
        height: of the images.
        width: of the images.

    Returns:
        (n, 6), float64: a, b, c, d, e, f of ``(a x + b y + c, d x + e y + f)``, PIL's order.
    """
    matrices = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 0.0], dtype=torch.float64).repeat(len(operations), 1)
    for name, column, factor in (
        ("shear_x", 1, 1.0),
        ("shear_y", 3, 1.0),
        ("translate_x", 2, width),
        ("translate_y", 5, height),
    ):
        chosen = operations == NUMBER[name]
        matrices[chosen, column] = factor * arguments[chosen]
    turned = operations == NUMBER["rotate"]
    matrices[turned] = rotations(arguments[turned], height, width)
    return matrices


def rotations(degrees: Tensor, height: int, width: int) -> Tensor:
    """Return the maps (n, 6) of rotations about the centre, counter-clockwise by degrees (n,), float64."""
    radians = degrees * (-math.pi / 180)
    cos, sin = radians.cos(), radians.sin()
    x, y = width / 2, height / 2
    return torch.stack([cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y], dim=1)


def affine(images: Tensor, matrices: Tensor, fill: tuple[int, ...], interpolation: str = "nearest") -> Tensor:
    """Map each image by a matrix of its own, as PIL's ``Image.transform`` with ``AFFINE`` does.

    Args:
        images: (n, H, W, C), uint8.
        matrices: see `affine_matrices`, (n, 6), float64, in host memory.
        fill: value outside the image, one per channel.
        interpolation: ``nearest``, ``bilinear`` or ``bicubic`` (PIL's, whose parameter is -1).

    Returns:
        (n, H, W, C), uint8.
    """
    n, height, width, channels = images.shape
    device = images.device
    outside = send(torch.tensor(fill, dtype=torch.uint8), device)
    a, b, c, d, e, f = matrices.unbind(1)
    at_centres = torch.stack([a, b, c + (a + b) / 2, d, e, f + (d + e) / 2], dim=1)
    # In fixed point, places are the same on every device.
    fixed = send((at_centres * FIXED_ONE + 0.5).floor().long(), device)[:, :, None, None]
    columns, rows = torch.arange(width, device=device), torch.arange(height, device=device)[:, None]
    x = fixed[:, 2] + fixed[:, 0] * columns + fixed[:, 1] * rows
    y = fixed[:, 5] + fixed[:, 3] * columns + fixed[:, 4] * rows
    inside = (x >= 0) & (x < width * FIXED_ONE) & (y >= 0) & (y < height * FIXED_ONE)
    flat = images.reshape(-1, channels)
    firsts = (height * width * torch.arange(n, device=device))[:, None, None]

    def level(row: Tensor, column: Tensor) -> Tensor:
        places = firsts + width * row.clamp(0, height - 1) + column.clamp(0, width - 1)
        return flat.index_select(0, places.flatten()).unflatten(0, places.shape)

    if interpolation == "nearest":
        result = level(y >> 16, x >> 16)
    else:
        x, y = x - FIXED_ONE // 2, y - FIXED_ONE // 2
        taps = range(2) if interpolation == "bilinear" else range(-1, 3)
        weigh = _linear if interpolation == "bilinear" else _cubic
        across, down = (weigh((place & (FIXED_ONE - 1)).float() / FIXED_ONE)[..., None, :] for place in (x, y))
        total = torch.zeros(images.shape, device=device)
        for i, row in enumerate(taps):
            line = torch.zeros(images.shape, device=device)
            for j, column in enumerate(taps):
                line += across[..., j] * level((y >> 16) + row, (x >> 16) + column)
            total += down[..., i] * line
        result = total.clamp_(0, 255).to(torch.uint8)
    return torch.where(inside[..., None], result, outside)


def _linear(d: Tensor) -> Tensor:
    return torch.stack([1 - d, d], dim=-1)


def _cubic(d: Tensor) -> Tensor:
    squared, cubed = d**2, d**3
    return torch.stack(
        [-d + 2 * squared - cubed, 1 - 2 * squared + cubed, d + squared - cubed, cubed - squared], dim=-1
    )


def cut_out(images: Tensor, tops: Tensor, lefts: Tensor, side: int) -> None:
    """Blacken a square of each image, in place; what lies beyond the border is cut off (DeVries and Taylor 2017).

    Args:
        images: (n, H, W, C), uint8.
        tops: first rows, (n,), with the images; negative above the image.
        lefts: first columns, (n,).
        side: of the squares, in pixels.
    """
    rows = torch.arange(images.shape[1], device=images.device) - tops[:, None]
    columns = torch.arange(images.shape[2], device=images.device) - lefts[:, None]
    hole = ((rows >= 0) & (rows < side))[:, :, None] & ((columns >= 0) & (columns < side))[:, None, :]
    images.masked_fill_(hole[..., None], 0)
