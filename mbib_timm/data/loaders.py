"""What loaders share: one stream of batches or two, the order of training, shards of an evaluation, the last batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mbib_timm.data.batch import Batch
from mbib_timm.data.samplers import ClassIndex, Key, TrainingSampler
from mbib_timm.errors import DataError
from mbib_timm.recipe import Recipe


class Loader(Protocol):
    """Batches of one stream of images, on the device."""

    def __iter__(self) -> Iterator[Batch]:
        """Give the batches of one pass."""

    def __len__(self) -> int:
        """Return the number of batches of one pass."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; it is a function of the recipe's seed and this number."""

    def broken_images(self) -> list[str]:
        """Return the paths of images that were replaced because they could not be read."""


@dataclass(frozen=True)
class Place:
    """Where batches go: the device, and this process among those that share the data."""

    device: torch.device
    rank: int = 0
    world_size: int = 1


class TrainLoader:
    """What a run trains on: one batch of each stream at a time. A run has one stream, or two side by side.

    Args:
        streams: as long as one another; over the same images, each with an order and an augmentation of its own.
    """

    def __init__(self, streams: Sequence[Loader]) -> None:
        self.streams = tuple(streams)

    def __iter__(self) -> Iterator[tuple[Batch, ...]]:
        """Give the batches of one pass: ``(batch,)``, or ``(batch, other)``."""
        return zip(*self.streams, strict=True)

    def __len__(self) -> int:
        return len(self.streams[0])

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; it is a function of the recipe's seed and this number."""
        for stream in self.streams:
            stream.set_epoch(epoch)

    def broken_images(self) -> list[str]:
        """Return the paths of images that were replaced because they could not be read, each once."""
        return list(dict.fromkeys(path for stream in self.streams for path in stream.broken_images()))


class IndexSampler(Protocol):
    """Gives the indices of a pass, one by one."""

    def __iter__(self) -> Iterator[int]:
        """Give the indices of a pass."""

    def __len__(self) -> int:
        """Return how many those are."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""


class ShardSampler:
    """Every `world_size`-th image in order, from `rank` on: together the ranks see each image once, none twice."""

    def __init__(self, length: int, rank: int, world_size: int) -> None:
        self.places = range(rank, length, world_size)

    def __iter__(self) -> Iterator[int]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: the order of an evaluation is always the same."""


def training_sampler(
    targets: np.ndarray,
    num_classes: int,
    recipe: Recipe,
    place: Place,
    name: str = "instance",
    *,
    epochs: int = 1,
    stage: int = 0,
    stream: int = 0,
) -> TrainingSampler:
    """Return what orders the training images: a plan of each epoch, the same with every loader.

    Args:
        targets: labels (N,) of the training images.
        num_classes: classes K.
        recipe: gives the seed.
        place: this process among those that share the images.
        name: of one sampler, with its number if need be.
        epochs: of the stage.
        stage: of the run, 0 for the first.
        stream: 0, or 1 for the second of two streams.

    Raises:
        DataError: fewer images than two a process, which BatchNorm cannot train on.
    """
    sampler = TrainingSampler(
        name,
        ClassIndex.of(targets, num_classes),
        Key(recipe.seed, 0, stage, stream),
        epochs,
        place.rank,
        place.world_size,
    )
    if len(sampler) < 2:
        raise DataError(f"{len(targets)} training images are too few for {place.world_size} processes")
    return sampler


def drops_last(images: int, batch_size: int) -> bool:
    """Return whether the last short batch of training is left out: only that of a single image is."""
    return images % batch_size == 1


def pil_mode(channels: int) -> str:
    """Return the PIL mode of images with so many channels. Raises DataError for numbers other than 1 and 3."""
    if channels not in (1, 3):
        raise DataError(f"images have 1 or 3 channels, the model takes {channels}")
    return "L" if channels == 1 else "RGB"


def channelwise(values: list[float], channels: int) -> tuple[float, ...]:
    """Return one value a channel; grey images take the mean of the three."""
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels


def send(values: Tensor, device: torch.device) -> Tensor:
    """Return values on a device; a copy from memory that is not pinned would wait for the device's earlier work."""
    if values.device.type == "cpu" and device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
