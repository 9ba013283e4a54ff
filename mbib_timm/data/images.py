"""Images with labels, from an opened file to what a model sees, and what becomes of a broken one."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor
from torch.utils.data import Dataset

from mbib_timm.errors import DataError, first_line

# From an image as it is decoded to the pixels (C, H, W), uint8.
Transform = Callable[[Image.Image], Tensor]


def from_worker(error: DataError) -> DataError:
    """Return the error that a worker process raised: it sends its whole traceback, of which the last line is ours."""
    return DataError(str(error).strip().splitlines()[-1].rpartition("DataError: ")[2])


# What EXIF's orientations ask for; 1 is upright.
TRANSPOSED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def convert_image(image: Image.Image, mode: str) -> Image.Image:
    """Return an opened image as a model sees it: the first frame, upright, 8 bits a channel, nothing transparent.

    Grey values of more than 8 bits are scaled from their whole range, see `_to_8_bits`. Transparency is composited on
    white.

    Args:
        image: any mode; it is decoded, and otherwise left as it is.
        mode: ``RGB``, or ``L`` for one channel.

    Raises:
        Exception: whatever PIL's decoders raise: OSError, SyntaxError, struct.error, EOFError and more.
    """
    image.seek(0)
    image.load()  # a TIFF turns itself upright here, and says so
    if (turn := TRANSPOSED.get(_orientation(image))) is not None:
        image = image.transpose(turn)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(_to_8_bits(np.asarray(image)))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # EXIF is often malformed, in ways without number, around pixels that are not
        return None


def _to_8_bits(grey: np.ndarray) -> np.ndarray:
    """Scale grey values to 8 bits.

    Integers are taken for 16 bits, whatever an image's brightest pixel. Floating-point values have no such range: it
    is 0..1, 0..255 or 0..65535, the first that holds them all. Values beyond 0..65535 are scaled from the image's own
    darkest to its brightest. What is not finite is black.

    Args:
        grey: (H, W).

    Returns:
        The same image, uint8.
    """
    values = np.nan_to_num(grey.astype(np.float64), posinf=0.0, neginf=0.0)
    lowest, highest = values.min(), values.max()
    ranges = (1, 255, 65535) if grey.dtype.kind == "f" else (65535,)
    white = next((end for end in ranges if lowest >= 0 and highest <= end), None)
    if white is None:
        values, white = values - lowest, (highest - lowest) or 1
    return np.rint(values * (255 / white)).astype(np.uint8)


class Reader(Protocol):
    """Gives the images of a source by index."""

    def read(self, index: int) -> Image.Image:
        """Open an image; decoding may happen later. Raises OSError where there is none."""

    def path(self, index: int) -> str:
        """Return where the image is, for messages."""


@dataclass(frozen=True)
class Split:
    """One split of a data source: which images, with which labels.

    Attributes:
        reader: gives the images.
        targets: labels (N,), int64.
        indices: the reader's index of each image, (N,).
        class_names: in label order, where the source knows them.
    """

    reader: Reader
    targets: np.ndarray
    indices: np.ndarray | None = None
    class_names: tuple[str, ...] | None = None

    def subset(self, kept: np.ndarray) -> "Split":
        """Return the split of the images at these places."""
        indices = kept if self.indices is None else self.indices[kept]
        return replace(self, targets=self.targets[kept], indices=indices)

    def __len__(self) -> int:
        return len(self.targets)


class ImageDataset(Dataset[tuple[Tensor, np.ndarray]]):
    """The images of a split, transformed; each with its label and its position in the split, (2,), int64.

    timm's collate function makes one tensor (B, 2) of these, which reaches the device with the images.

    Args:
        split: which images, with which labels.
        mode: PIL mode that every image is converted to: ``RGB``, or ``L`` for one channel.
        transform: applied to each image.
        replace_broken: give the next image for one that cannot be decoded, and remember it; else raise.
    """

    def __init__(self, split: Split, mode: str, transform: Transform, replace_broken: bool) -> None:
        self.reader, self.targets = split.reader, split.targets
        self.indices = np.arange(len(split)) if split.indices is None else split.indices
        self.mode, self.transform, self.replace_broken = mode, transform, replace_broken
        # In shared memory, so that the workers' finds are known to the main process.
        self._broken = torch.zeros(len(split), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, np.ndarray]:
        unreadable = None
        for attempt in range(len(self)):
            place = (index + attempt) % len(self)
            try:
                image = convert_image(self.reader.read(int(self.indices[place])), self.mode)
            except Exception as error:  # PIL's decoders raise OSError, SyntaxError, struct.error, EOFError and more
                path = self.reader.path(int(self.indices[place]))
                unreadable = DataError(f"cannot read image {path}: {first_line(error)}")
                if not self.replace_broken:
                    raise unreadable from None
                self._broken[place] = 1
            else:
                return self.transform(image), np.array([self.targets[place], place], dtype=np.int64)
        raise DataError(f"none of the {len(self)} training images can be read; the last error: {unreadable}")

    def broken(self) -> list[str]:
        """Return the paths of the images that were replaced so far, in any worker."""
        return [self.reader.path(int(self.indices[i])) for i in self._broken.nonzero().flatten().tolist()]


class ArrayReader:
    """Images in memory.

    Args:
        images: (N, H, W) or (N, H, W, 3), uint8.
        name: of the source, for messages.
    """

    def __init__(self, images: np.ndarray, name: str) -> None:
        self.images, self.name = images, name

    def read(self, index: int) -> Image.Image:
        """Return the image."""
        return Image.fromarray(self.images[index])

    def path(self, index: int) -> str:
        """Return the source's name and the index."""
        return f"{self.name}[{index}]"


class TimmReader:
    """Images behind one of timm's readers: folder, tar, Hugging Face data sets.

    Args:
        reader: timm's reader.
        inside: the tar or data set that holds the images, for messages; None where they are files of their own.
    """

    def __init__(self, reader: Any, inside: str | None = None) -> None:
        self.reader, self.inside = reader, inside

    def read(self, index: int) -> Image.Image:
        """Return the image."""
        return Image.open(self.reader[index][0])

    def path(self, index: int) -> str:
        """Return the image's path."""
        name = self.reader.filename(index, absolute=True)
        if self.inside is None:
            return str(name)
        return f"{self.inside}/{name}" if name else f"{self.inside}[{index}]"


def pil_mode(channels: int) -> str:
    """Return the PIL mode of images with so many channels. Raises DataError for numbers other than 1 and 3."""
    if channels not in (1, 3):
        raise DataError(f"images have 1 or 3 channels, the model takes {channels}")
    return "L" if channels == 1 else "RGB"


def channelwise(values: list[float], channels: int) -> tuple[float, ...]:
    """Return one value per channel; grey images take the mean of the three."""
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels
