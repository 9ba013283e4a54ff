"""What every loader offers, and which one a run uses: resident for data that fit into memory, timm's for the rest."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import Sampler
from torch.utils.data.distributed import DistributedSampler

from mbib_timm.errors import DataError
from mbib_timm.recipe import Recipe


class Loader(Protocol):
    """Batches of normalised images (B, C, H, W) and targets (B,), both on the device."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
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


class ShardSampler(Sampler[int]):
    """Every `world_size`-th image in order, from `rank` on: together the ranks see each image once, none twice."""

    def __init__(self, length: int, rank: int, world_size: int) -> None:
        self.places = range(rank, length, world_size)

    def __iter__(self) -> Iterator[int]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: the order of an evaluation is always the same."""


def training_sampler(length: int, recipe: Recipe, place: Place) -> DistributedSampler:
    """Return what shuffles the training images: an order of each epoch, the same with every loader.

    Args:
        length: training images.
        recipe: gives the seed.
        place: this process among those that share the images.

    Raises:
        DataError: fewer images than two a process, which BatchNorm cannot train on.
    """
    sampler: DistributedSampler = DistributedSampler(
        range(length),  # type: ignore[arg-type]  # only its length is asked for
        place.world_size,
        place.rank,
        shuffle=True,
        seed=recipe.seed,
    )
    if len(sampler) < 2:
        raise DataError(f"{length} training images are too few for {place.world_size} processes")
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
