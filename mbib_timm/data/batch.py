"""What a loader gives: batches of images, labels and positions, on the device; and what a loader is."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Batch(NamedTuple):
    """A batch on the device.

    Attributes:
        views: the images, each (B, C, H, W), normalised; one view, unless the method asks for more.
        targets: labels (B,), int64; or, in training with a recipe that mixes images or smooths labels, soft targets
            (B, K), float32, whose rows sum to 1.
        index: positions (B,), int64, in the split, or in training in the training subset. If a broken image was
            replaced, this is the position of the replacement, so that ``split.targets[index]`` are the labels. For a
            mixed image, it is the position of the image that another one was mixed into.
    """

    views: tuple[Tensor, ...]
    targets: Tensor
    index: Tensor  # type: ignore[assignment]  # hides a method of tuples that nothing calls on a batch

    @property
    def images(self) -> Tensor:
        """The first view."""
        return self.views[0]

    def laid_out(self, channels_last: bool) -> "Batch":
        """Return a batch with its images in the channels-last memory format; as it is where that is not wanted."""
        if not channels_last:
            return self
        return self._replace(views=tuple(view.contiguous(memory_format=torch.channels_last) for view in self.views))


class Loader(Protocol):
    """Batches of one stream of images, on the device."""

    def __iter__(self) -> Iterator[Batch]:
        """Give the batches of one pass."""

    def __len__(self) -> int:
        """Return the number of batches of one pass."""

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the order of an epoch, a function of the recipe's seed and this number; and its first batch, where the
        ones before are done: they are not read."""

    def broken_images(self) -> list[str]:
        """Return the paths of images that could not be read: replaced in training, left out of an evaluation."""


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

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose an epoch and its first batch, as a `Loader` does."""
        for stream in self.streams:
            stream.set_epoch(epoch, start)

    def broken_images(self) -> list[str]:
        """Return the paths of images that were replaced because they could not be read, each once."""
        return list(dict.fromkeys(path for stream in self.streams for path in stream.broken_images()))


def send(values: Tensor, device: torch.device) -> Tensor:
    """Return values on a device; a copy from memory that is not pinned would wait for the device's earlier work."""
    if values.device.type == "cpu" and device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
