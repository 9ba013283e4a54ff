"""Small images in memory and in folders, and recipes and loaders for them."""

import numpy as np
import torch
from PIL import Image

from mbib_timm.data import Batch, Split, Splits, create_loaders
from mbib_timm.data.images import ArrayReader
from mbib_timm.recipe import WHOLE_IMAGES, Recipe

# A function for programs that tests run: the peak memory of their own process, in kB; ru_maxrss has the parent's in it.
PEAK_MEMORY = """
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""
CPU = torch.device("cpu")
SIZE = (3, 16, 16)
SETTLED = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def cut(train_crop_mode="rrc"):
    """Return how images are cut for a model of ImageNet's, which a recipe leaves to it, or for padded crops."""
    whole = WHOLE_IMAGES if train_crop_mode == "pad" else {"crop_pct": 0.875, "crop_mode": "center"}
    return {"interpolation": "bicubic", **whole}


def settled(**keys):
    """Return a recipe in which nothing is left to the model."""
    return Recipe(**{**SETTLED, **cut(keys.get("train_crop_mode", "rrc")), **keys})


def recipe(**keys):
    base = {"workers": 0, "train_crop_mode": "pad", "img_size": 16, "batch_size": 8, "validation_batch_size": 8}
    return settled(**{**base, "image_cache": "none", "loader": "resident", **keys})


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


def noise_batches(images=25, batch=10):
    """Batches of noise with labels of seven classes, and all their images and labels."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(images, 3, 16, 16, generator=generator)
    y = torch.randint(0, 7, (images,), generator=generator)
    parts = zip(x.split(batch), y.split(batch), torch.arange(images).split(batch), strict=True)
    return [Batch((views,), targets, index) for views, targets, index in parts], x, y


def image_folder(root):
    """Class folders of 6 and 4 images, of different sizes."""
    rng = np.random.RandomState(0)
    for label, count in {"ant": 6, "bee": 4}.items():
        (root / "images" / label).mkdir(parents=True)
        for i in range(count):
            pixels = rng.randint(0, 256, (20 + i, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "images" / label / f"{i}.png")
    return root / "images"


def picture(color, size=(20, 20), mode="RGB"):
    """An image of noise."""
    rng = np.random.RandomState(color)
    return Image.fromarray(rng.randint(0, 256, (*size, 3), dtype=np.uint8)).convert(mode)


def class_folders(root):
    """Class folders of 12, 5, 3 and 1 images."""
    for label, count in {"ant": 12, "bee": 5, "cat": 3, "dog": 1}.items():
        (root / "images" / label).mkdir(parents=True)
        for i in range(count):
            picture(i).save(root / "images" / label / f"{i}.png")
    return root / "images"


def arrays(count=40, classes=4, size=16):
    """A split of images in memory, and the images."""
    rng = np.random.RandomState(0)
    images = rng.randint(0, 256, (count, size, size, 3), dtype=np.uint8)
    return Split(ArrayReader(images, "arrays"), np.arange(count) % classes), images


def normalized_recipe(**keys):
    """A recipe whose normalisation maps levels onto -2 to 2."""
    base = {"workers": 0, "train_crop_mode": "pad", "img_size": 16, "mean": [0.5], "std": [0.25]}
    return settled(**{**base, **keys})


def save_image(path, color=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (color, 0, 0)).save(path)
