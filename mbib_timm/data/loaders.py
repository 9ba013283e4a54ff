"""Batches through timm's `create_loader`, with what it leaves out: seeded order, the last short batch, exact shards."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import create_loader
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torch.utils.data.distributed import DistributedSampler

from mbib_timm.data.images import ImageDataset, Split
from mbib_timm.data.transforms import eval_transform, train_transform
from mbib_timm.errors import DataError
from mbib_timm.recipe import Recipe


class ShardSampler(Sampler[int]):
    """Every `world_size`-th image in order, from `rank` on: together the ranks see each image once, none twice."""

    def __init__(self, length: int, rank: int, world_size: int) -> None:
        self.places = range(rank, length, world_size)

    def __iter__(self) -> Iterator[int]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


class Loader:
    """Batches of normalised images (B, C, H, W) and targets (B,), both on the device.

    Args:
        loader: timm's loader.
        dataset: what it loads.
        sampler: chooses the order; None for streams, which do that themselves.
    """

    def __init__(self, loader: Any, dataset: Any, sampler: Any) -> None:
        self.loader, self.dataset, self.sampler = loader, dataset, sampler

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        try:
            yield from self.loader
        except DataError as error:
            # A worker process sends its whole traceback as the message; the last line is ours.
            raise DataError(str(error).strip().splitlines()[-1].rpartition("DataError: ")[2]) from None

    def __len__(self) -> int:
        return len(self.loader)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; it is a function of the recipe's seed and this number."""
        (self.dataset if self.sampler is None else self.sampler).set_epoch(epoch)

    def broken_images(self) -> list[str]:
        """Return the paths of images that were replaced because they could not be read."""
        return self.dataset.broken()


@dataclass(frozen=True)
class Place:
    """Where batches go: the device, and this process among those that share the data."""

    device: torch.device
    rank: int = 0
    world_size: int = 1


def train_loader(split: Split, recipe: Recipe, input_size: tuple[int, int, int], place: Place) -> Loader:
    """Build the training loader: shuffled, augmented, the last short batch kept.

    Args:
        split: training images.
        recipe: augmentation, batch size, seed, workers.
        input_size: (C, H, W).
        place: device and processes.

    Raises:
        DataError: fewer images than two, which BatchNorm cannot train on.
    """
    channels, height, width = input_size
    transform = train_transform(recipe, height, width)
    if split.stream is not None:
        stream = split.stream(True, _mode(channels))
        return _through_timm(stream, recipe, input_size, place, recipe.batch_size, None, transform)
    dataset = ImageDataset(split, _mode(channels), transform, replace_broken=True)
    sampler: DistributedSampler = DistributedSampler(
        dataset, place.world_size, place.rank, shuffle=True, seed=recipe.seed
    )
    if len(sampler) < 2:
        raise DataError(f"{len(split)} training images are too few for {place.world_size} processes")
    loader = _through_timm(dataset, recipe, input_size, place, recipe.batch_size, sampler, transform)
    # Only a last batch of a single image is dropped: BatchNorm cannot train on it.
    loader.loader.batch_sampler.drop_last = len(sampler) % recipe.batch_size == 1
    return loader


def eval_loader(split: Split, recipe: Recipe, input_size: tuple[int, int, int], place: Place) -> Loader:
    """Build an evaluation loader: in order, every image once over all processes.

    Args:
        split: images to evaluate.
        recipe: preprocessing, batch size, workers.
        input_size: (C, H, W).
        place: device and processes.
    """
    channels, height, width = input_size
    transform = eval_transform(recipe, height, width)
    if split.stream is not None:
        stream = split.stream(False, _mode(channels))
        return _through_timm(stream, recipe, input_size, place, recipe.validation_batch_size, None, transform)
    dataset = ImageDataset(split, _mode(channels), transform, replace_broken=False)
    sampler = ShardSampler(len(dataset), place.rank, place.world_size)
    return _through_timm(dataset, recipe, input_size, place, recipe.validation_batch_size, sampler, transform)


def _mode(channels: int) -> str:
    if channels not in (1, 3):
        raise DataError(f"images have 1 or 3 channels, the model takes {channels}")
    return "L" if channels == 1 else "RGB"


def _through_timm(
    dataset: Dataset,
    recipe: Recipe,
    input_size: tuple[int, int, int],
    place: Place,
    batch_size: int,
    sampler: Sampler | None,
    transform: Any,
) -> Loader:
    on_cuda = place.device.type == "cuda"
    loader = create_loader(
        dataset,
        input_size=input_size,
        batch_size=batch_size,
        is_training=False,
        mean=_channelwise(recipe.mean, input_size[0]),
        std=_channelwise(recipe.std, input_size[0]),
        num_workers=recipe.workers,
        pin_memory=on_cuda if recipe.pin_mem is None else recipe.pin_mem,
        persistent_workers=False,  # workers that live on would keep the random state of the epoch before
        device=place.device,
    )
    dataset.transform = transform  # type: ignore[attr-defined]  # create_loader has put its own
    if sampler is not None:
        loader.batch_sampler.sampler = sampler
    return Loader(loader, dataset, sampler)


def _channelwise(values: list[float], channels: int) -> tuple[float, ...]:
    """Return one value a channel; grey images take the mean of the three."""
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels
