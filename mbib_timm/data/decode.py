"""The images of a split, decoded once into one block of bytes: the form in which a resident data set lies in memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mbib_timm.data.images import ImageDataset, from_worker
from mbib_timm.errors import DataError
from mbib_timm.progress import Progress

DECODE_BATCH = 64


@dataclass(frozen=True)
class DecodedImages:
    """Images of any sizes in one block.

    Attributes:
        pixels: (P, C), uint8: one black pixel, then image after image, row by row.
        sizes: height and width of each image, (N, 2), int64, in host memory.
        targets: labels (N,), int64, on the device of the pixels.
        index: position in the split of what each image holds, (N,), int64, on the device of the pixels.
        broken: paths of images that could not be read; each holds pixels, label and position of the one after it.
    """

    pixels: Tensor
    sizes: Tensor
    targets: Tensor
    index: Tensor
    broken: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        areas = self.sizes.prod(dim=1)
        starts = (areas.cumsum(0) - areas + 1).to(self.pixels.device)
        object.__setattr__(self, "_starts", starts)

    @property
    def starts(self) -> Tensor:
        """First pixel of each image, (N,), int64, on the device of the pixels."""
        starts: Tensor = self._starts  # type: ignore[attr-defined]
        return starts

    def __len__(self) -> int:
        return len(self.sizes)

    def stacked(self) -> Tensor:
        """Return images of one size as (N, H, W, C), without a copy."""
        height, width = self.sizes[0].tolist()
        return self.pixels[1:].view(len(self), height, width, -1)

    def to(self, device: torch.device) -> "DecodedImages":
        """Return the images on a device."""
        pixels, targets, index = (values.to(device) for values in (self.pixels, self.targets, self.index))
        return DecodedImages(pixels, self.sizes, targets, index, self.broken)


def decode(dataset: ImageDataset, workers: int) -> DecodedImages:
    """Decode a data set into host memory.

    Args:
        dataset: gives images (C, H, W), uint8, after the fixed part of the preprocessing.
        workers: processes that decode.

    Raises:
        DataError: an image that cannot be read and may not be replaced.
    """
    blocks: list[np.ndarray] = []
    sizes, labels = [], []
    for image, label in decoded(dataset, workers):
        if not blocks:
            blocks.append(np.zeros(image.shape[-1], dtype=np.uint8))
        blocks.append(image.reshape(-1))
        sizes.append(image.shape[:2])
        labels.append(label)
    channels = len(blocks[0])
    pixels = torch.from_numpy(np.concatenate(blocks).reshape(-1, channels))
    targets, index = torch.from_numpy(np.stack(labels, axis=1))
    return DecodedImages(pixels, torch.tensor(sizes), targets, index, tuple(dataset.broken()))


def decoded(dataset: ImageDataset, workers: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Give the images (H, W, C), uint8, of a data set in order, with label and position (2,); a bar shows how far."""
    # With a generator of its own, it leaves the global one as it is.
    loader: Any = DataLoader(
        dataset, DECODE_BATCH, num_workers=workers, collate_fn=_arrays, generator=torch.Generator()
    )
    progress = Progress(len(dataset), unit="image")
    try:
        for batch in loader:
            yield from batch
            progress.step(len(batch))
    except DataError as error:
        raise (from_worker(error) if workers else error) from None
    finally:
        progress.close()


def _arrays(batch: list[tuple[Any, np.ndarray]]) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(np.ascontiguousarray(np.asarray(image).transpose(1, 2, 0)), label) for image, label in batch]
