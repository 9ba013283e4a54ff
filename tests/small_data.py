"""Small images in memory and in folders, and loaders of them, for the tests of resident images."""

import numpy as np
import torch
from PIL import Image

from mbib_timm.data import Batch, Split, Splits, create_loaders
from mbib_timm.data.images import ArrayReader
from mbib_timm.recipe import Recipe

CPU = torch.device("cpu")
SIZE = (3, 16, 16)


def recipe(**keys):
    base = {"workers": 0, "train_crop_mode": "pad", "img_size": 16, "batch_size": 8, "validation_batch_size": 8}
    return Recipe(**{**base, "image_cache": "none", "loader": "resident", **keys})


def splits(count=50, height=16, width=16, classes=5):
    rng = np.random.RandomState(0)
    images = rng.randint(0, 256, (count, height, width, 3), dtype=np.uint8)
    split = Split(ArrayReader(images, "arrays"), np.arange(count) % classes)
    return Splits(split, split, None, np.bincount(split.targets), None)


def loaders(settings, data=None, rank=0, world_size=1):
    return create_loaders(data or splits(), settings, SIZE, CPU, rank, world_size)


def epoch(loader, number):
    loader.set_epoch(number)
    batches = [item[0] if isinstance(item, tuple) and not isinstance(item, Batch) else item for item in loader]
    return tuple(torch.cat(parts) for parts in zip(*((b.images, b.targets, b.index) for b in batches), strict=True))


def image_folder(root):
    """Class folders of 6 and 4 images, of different sizes."""
    rng = np.random.RandomState(0)
    for label, count in {"ant": 6, "bee": 4}.items():
        (root / "images" / label).mkdir(parents=True)
        for i in range(count):
            pixels = rng.randint(0, 256, (20 + i, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "images" / label / f"{i}.png")
    return root / "images"
