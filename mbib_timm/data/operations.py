"""The operations of augmentation policies on batches of images, each image with an argument of its own, as PIL does
them one by one: geometry, levels, histograms, holes.

Images are (n, H, W, C), uint8, on any device. Which image an operation changes, and by what, is known on the host, so
that nothing on the device is waited for.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from mbib_timm.data.color import BRIGHTNESS, CONTRAST, SATURATION, SHARPNESS, enhance
from mbib_timm.data.loaders import send

# Argument of each operation; a policy names an operation by its place in this order.
ARGUMENTS = {
    "shear_x": "pixels to the right a row",
    "shear_y": "pixels down a column",
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

# The enhancements' numbers by those of the operations, from brightness on.
_ENHANCEMENTS = torch.tensor([BRIGHTNESS, CONTRAST, SATURATION, SHARPNESS])
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
        fill: value outside the image, one a channel.
        interpolation: of geometric operations: ``nearest``, ``bilinear`` or ``bicubic``.
    """
    height, width = images.shape[1:3]

    def geometric(some: Tensor, places: Tensor) -> Tensor:
        matrices = affine_matrices(operations[places], arguments[places], height, width)
        return affine(some, matrices, fill, interpolation)

    def enhancing(some: Tensor, places: Tensor) -> Tensor:
        kinds = _ENHANCEMENTS[operations[places] - NUMBER["brightness"]]
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
        fill: value outside the image, one a channel.
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
