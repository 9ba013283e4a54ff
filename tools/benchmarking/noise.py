"""What the contestants are given: noise. No operation here takes longer for one image than for another of its size."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mbib_timm.data import Split, Splits
from mbib_timm.data.decoding import DecodedImages
from mbib_timm.data.images import ArrayReader
from mbib_timm.data.long_tail import exponential_profile


def class_counts(subject: str) -> np.ndarray:
    """Return training images of each class, (K,): CIFAR-100-LT's at imbalance factor 100, or ImageNet-LT's range."""
    classes, largest, factor = {"resnet32": (100, 500, 100), "resnext50": (1000, 1280, 256)}[subject]
    return np.array(exponential_profile(classes, largest, factor))


def cifar_like(limit: int | None) -> Splits:
    """Return noise in the shape of CIFAR-100-LT IF100, at most `limit` images of each split.

    These are 10,847 training and 10,000 evaluation images of 32x32.
    """
    generator = np.random.default_rng(0)

    def split(targets: np.ndarray) -> Split:
        pixels = generator.integers(0, 256, (len(targets), 32, 32, 3), dtype=np.uint8)
        return Split(ArrayReader(pixels, "noise"), targets)

    counts = class_counts("resnet32")
    train = generator.permutation(np.repeat(np.arange(len(counts)), counts))
    return Splits(split(train[:limit]), split(np.arange(10_000)[:limit] % len(counts)), None, counts, None)


def single_image(counts: np.ndarray) -> Splits:
    """Return splits of one image, where training images of each class (K,) are all that is asked for."""
    split = Split(ArrayReader(np.zeros((1, 32, 32, 3), np.uint8), "noise"), np.zeros(1, np.int64))
    return Splits(split, split, None, counts, None)


def decoded_noise(images: int, height: int, width: int, classes: int, device: torch.device) -> DecodedImages:
    """Return images on the device, as the resident loader holds them."""
    pixels = torch.randint(0, 256, (1 + images * height * width, 3), dtype=torch.uint8, device=device)
    targets = torch.randint(0, classes, (images,), device=device)
    index = torch.arange(images, device=device)
    return DecodedImages(pixels, torch.tensor([[height, width]] * images), targets, index)


def normalized_noise(batch_size: int, size: int, classes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a batch on the device: images (B, 3, size, size), channels last, and targets (B,)."""
    images = torch.randn(batch_size, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    return images, torch.randint(0, classes, (batch_size,), device=device)


def photographs(folder: Path, images: int, size: tuple[int, int]) -> None:
    """Make a folder of files about as large as photographs of a width and height are.

    They are smooth colours with some noise, PNG below 100 pixels, else JPEG.
    """
    folder.mkdir()
    generator = np.random.default_rng(0)
    kind = "png" if min(size) < 100 else "jpg"
    for number in range(images):
        coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = smooth + generator.integers(-12, 13, smooth.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.{kind}")
