"""From the splits of a run to its loaders: resident where the data fit, timm's where they do not."""

import json
from dataclasses import dataclass, field

import torch

from mbib_timm.data.decode import DecodedImages
from mbib_timm.data.images import Split
from mbib_timm.data.loaders import Loader, Place
from mbib_timm.data.memory import decoded_bytes, fits
from mbib_timm.data.resident import decode_split, resident_loader
from mbib_timm.data.sources import open_split
from mbib_timm.data.splits import Splits, check_evaluation, open_data
from mbib_timm.data.timm_loader import timm_eval_loader, timm_train_loader
from mbib_timm.errors import DataError, MbibError
from mbib_timm.recipe import DATA_KEYS, Recipe


@dataclass(frozen=True)
class Loaders:
    """Batches of each split."""

    train: Loader
    val: Loader
    test: Loader | None

    def broken_images(self) -> list[str]:
        """Return the training images that could not be read and were replaced."""
        return self.train.broken_images()


@dataclass
class DataPool:
    """Opened data and resident images, which the runs of one process share."""

    opened: dict[str, Splits] = field(default_factory=dict)
    images: dict[tuple[str, ...], DecodedImages] = field(default_factory=dict)

    def open(self, recipe: Recipe) -> Splits:
        """Open the recipe's data, once; see `open_data`."""
        key = data_key(recipe)
        if key not in self.opened:
            self.opened[key] = open_data(recipe)
        return self.opened[key]


def data_key(recipe: Recipe) -> str:
    """Return what two recipes have in common that see the same images."""
    return json.dumps({name: getattr(recipe, name) for name in DATA_KEYS})


def choose_loader(splits: Splits, recipe: Recipe, input_size: tuple[int, int, int], device: torch.device) -> str:
    """Return which loader a recipe's data take: ``resident`` or ``timm``.

    Raises:
        MbibError: the recipe asks for resident data, which its source or its augmentation does not allow.
    """
    obstacle = None
    if splits.train.stream is not None or splits.val.stream is not None:
        obstacle = f"data source {recipe.dataset!r} streams"
    elif recipe.aa is not None:
        obstacle = "recipe key 'aa' works on single images"
    if recipe.loader == "resident" and obstacle is not None:
        raise MbibError(f"loader: resident holds all images in memory, but {obstacle}; use loader: timm")
    if recipe.loader != "auto":
        return recipe.loader
    if obstacle is not None:
        return "timm"
    evaluated = [split for split in (splits.val, splits.test) if split is not None]
    needed = sum(decoded_bytes(split, recipe, input_size, training=False) for split in evaluated)
    needed += decoded_bytes(splits.train, recipe, input_size, training=True)
    return "resident" if fits(needed, device) else "timm"


def create_loaders(
    splits: Splits,
    recipe: Recipe,
    input_size: tuple[int, int, int],
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    pool: DataPool | None = None,
) -> Loaders:
    """Make batches of a run's splits.

    Args:
        splits: what `open_data` found.
        recipe: loader, augmentation, batch sizes, workers.
        input_size: (C, H, W) of the model.
        device: where the batches go.
        rank: this process.
        world_size: processes that share the data.
        pool: holds resident images for the next run.

    Raises:
        MbibError: a loader that the data or the recipe do not allow.
        DataError: images that cannot be read, or too few of them.
    """
    place = Place(device, rank, world_size)
    pool = pool or DataPool()
    resident = choose_loader(splits, recipe, input_size, device) == "resident"

    def build(name: str, split: Split, training: bool) -> Loader:
        if not resident:
            return (timm_train_loader if training else timm_eval_loader)(split, recipe, input_size, place)
        key = (data_key(recipe), name, str(input_size), str(device))
        if key not in pool.images:
            pool.images[key] = decode_split(split, recipe, input_size, device, training)
        return resident_loader(pool.images[key], recipe, input_size, place, training)

    return Loaders(
        train=build("train", splits.train, True),
        val=build("val", splits.val, False),
        test=None if splits.test is None else build("test", splits.test, False),
    )


def build_eval_loader(
    recipe: Recipe,
    split: str,
    *,
    input_size: tuple[int, int, int],
    num_classes: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
) -> Loader:
    """Make batches of one split alone, for one evaluation: through timm's loader, which decodes as it goes.

    Args:
        recipe: names the data and the preprocessing.
        split: name of the split.
        input_size: (C, H, W) of the model.
        num_classes: classes that the model tells apart.
        device: where the batches go.
        rank: this process.
        world_size: processes that share the data.

    Raises:
        DataError: data that are missing, or have labels that the model has not.
    """
    opened = open_split(recipe, split)
    if opened.class_names is not None and len(opened.class_names) != num_classes:
        raise DataError(f"split {split!r} has {len(opened.class_names)} classes, the model has {num_classes}")
    check_evaluation(split, opened, opened, num_classes)
    return timm_eval_loader(opened, recipe, input_size, Place(device, rank, world_size))
