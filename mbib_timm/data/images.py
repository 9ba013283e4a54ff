"""Images with labels, from an opened file to what a model sees, and what becomes of a broken one."""

import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mbib_timm.data.archives import ArchiveReader
from mbib_timm.data.paths import PathReader
from mbib_timm.environment import seeded_draws
from mbib_timm.errors import DataError, first_line
from mbib_timm.progress import Progress

T = TypeVar("T")
# Torch's advice about more workers than cores: whoever asks for them waits for a disk or a network.
warnings.filterwarnings("ignore", message="This DataLoader will create")
# Large images are read; from twice this size on, Pillow refuses them.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

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


def evenly_spaced(number: int, most: int) -> np.ndarray:
    """Return up to `most` places among so many images, from the first on to the last: (M,), int64."""
    return np.linspace(0, number - 1, min(most, number), dtype=np.int64)


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
        clear = image.info.get("transparency")
        grey = np.asarray(image)
        shown = _to_8_bits(grey)
        image = Image.fromarray(shown if clear is None else np.where(grey == clear, np.uint8(255), shown))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert(mode)
    image.info = {}  # what says how to turn it: it is upright now
    return image


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return width and height of an opened image as it is seen, without decoding it."""
    width, height = image.size
    # Only of formats whose EXIF lies before the pixels: of others it is a rare guest, and PIL would decode them for it.
    turned = image.format in ("JPEG", "MPO") and _orientation(image) in (5, 6, 7, 8)
    return (height, width) if turned else (width, height)


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # EXIF is often malformed, in ways without number, around pixels that are not
        return None


def _to_8_bits(grey: np.ndarray) -> np.ndarray:
    """Scale grey values (H, W) to 8 bits.

    Integers are taken for 16 bits, whatever an image's brightest pixel. Floating-point values have no such range: it
    is 0..1, 0..255 or 0..65535, the first that holds them all. Values beyond 0..65535 are scaled from the image's own
    darkest to its brightest. What is not finite is black.
    """
    values = np.nan_to_num(grey.astype(np.float64), posinf=0.0, neginf=0.0)
    lowest, highest = values.min(), values.max()
    ranges = (1, 255, 65535) if grey.dtype.kind == "f" else (65535,)
    white = next((end for end in ranges if lowest >= 0 and highest <= end), None)
    if white is None:
        values, white = values - lowest, (highest - lowest) or 1
    return np.rint(values * (255 / white)).astype(np.uint8)


def why_unreadable(error: Exception, most_pixels: int | None = None) -> str:
    """Return why an image cannot be read, in a line without its path.

    Args:
        error: that its reading raised.
        most_pixels: that an image may have; what Pillow reads when None.
    """
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or damaged, or of a kind that is not read"
    if isinstance(error, Image.DecompressionBombError):
        pixels = int(re.findall(r"\d+", str(error))[0])
        most = most_pixels or 2 * (Image.MAX_IMAGE_PIXELS or 0)
        return f"it has {pixels / 1e6:,.0f} million pixels, and up to {most // 10**6} million are read: make it smaller"
    return (isinstance(error, OSError) and error.strerror) or first_line(error)


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
        groups: name of each image's group, (N,), of images that belong on one side of a split; an image whose group is
            empty stands alone. None where the recipe names none.
        left_out: what the source has passed over: names of files and folders, by the reason in words.
        chosen: how the images were chosen, in words; empty for a split that the data have of their own.
        missing: a line on listed images that are not there; empty where all are.
        unused: a line on groups that the source names, and the recipe does not ask for; empty where there are none.
        notes: lines on what of the source may be meant otherwise.
        called: its own name, or that by which it was asked for; empty where it has none.
    """

    reader: Reader
    targets: np.ndarray
    indices: np.ndarray | None = None
    class_names: tuple[str, ...] | None = None
    groups: np.ndarray | None = None
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    chosen: str = ""
    missing: str = ""
    unused: str = ""
    notes: tuple[str, ...] = ()
    called: str = ""

    @property
    def said(self) -> str:
        """Which split it is, for messages on its images."""
        return f"of split {self.called!r}" if self.called else "of the split"

    def subset(self, kept: np.ndarray, chosen: str = "") -> "Split":
        """Return the split of the images at these places; `chosen` says how, where that is not as before."""
        indices = self.indices_of(kept)
        groups = None if self.groups is None else self.groups[kept]
        chosen = chosen or self.chosen
        return replace(self, targets=self.targets[kept], indices=indices, groups=groups, chosen=chosen)

    def index_of(self, place: int) -> int:
        """Return the reader's index of the image at a place."""
        return place if self.indices is None else int(self.indices[place])

    def indices_of(self, places: np.ndarray) -> np.ndarray:
        """Return the reader's indices of the images at some places."""
        return places if self.indices is None else self.indices[places]

    @property
    def in_files(self) -> bool:
        """True if every image is a file, or lies in an archive."""
        return isinstance(self.reader, PathReader | ArchiveReader)

    def path(self, place: int) -> str:
        """Return where the image at a place is, for messages."""
        return self.reader.path(self.index_of(place))

    def files(self, places: np.ndarray | None = None) -> Iterator[bytes]:
        """Give where each image is, or each of some, normalised, so that the same image has the same bytes."""
        if isinstance(self.reader, PathReader | ArchiveReader):
            indices = self.indices if places is None else self.indices_of(places)
            return self.reader.files(indices)
        chosen = range(len(self)) if places is None else places.tolist()
        return (os.fsencode(os.path.normpath(self.path(place))) for place in chosen)

    def name(self, place: int, folder: str | None) -> str:
        """Return where the image at a place is: below a folder, if one is given and it lies there."""
        path = self.path(place)
        return os.path.abspath(path).removeprefix(f"{os.path.abspath(folder)}/") if folder else path

    def __len__(self) -> int:
        return len(self.targets)


def sampled_sizes(split: Split, most: int) -> list[tuple[int, int]]:
    """Return width and height of up to `most` evenly spaced images, of which the headers are read; without broken ones,
    which are counted elsewhere."""
    sizes = []
    for place in evenly_spaced(len(split), most).tolist():
        with suppress(Exception), split.reader.read(split.index_of(place)) as image:
            sizes.append(upright_size(image))
    return sizes


class Drawn(NamedTuple):
    """An image whose random transforms are a function of a key, and not of what was drawn before.

    Attributes:
        place: in the split.
        key: of the draws.
    """

    place: int
    key: tuple[int, ...]


class ImageDataset(Dataset[tuple[Tensor, np.ndarray] | None]):
    """The images of a split, transformed; each with its label and its position in the split, (2,), int64.

    timm's collate function makes one tensor (B, 2) of these, which reaches the device with the images.

    Args:
        split: which images, with which labels.
        mode: PIL mode that every image is converted to: ``RGB``, or ``L`` for one channel.
        transform: applied to each image.
        replace_broken: give the next image for one that cannot be decoded; else None. Either is remembered.
    """

    def __init__(self, split: Split, mode: str, transform: Transform, replace_broken: bool) -> None:
        self.split = split
        self.mode, self.transform, self.replace_broken = mode, transform, replace_broken
        # In shared memory, so that the workers' finds are known to the main process.
        self._broken = torch.zeros(len(split), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int | Drawn) -> tuple[Tensor, np.ndarray] | None:
        if isinstance(index, Drawn):
            with seeded_draws(index.key):
                return self._read(index.place)
        return self._read(index)

    def _read(self, index: int) -> tuple[Tensor, np.ndarray] | None:
        reason = ""
        for attempt in range(len(self)):
            place = (index + attempt) % len(self)
            try:
                image = convert_image(self.split.reader.read(self.split.index_of(place)), self.mode)
            except Exception as error:  # PIL's decoders raise OSError, SyntaxError, struct.error, EOFError and more
                reason = f"{self.split.path(place)}: {why_unreadable(error)}"
                self._broken[place] = 1
                if not self.replace_broken:
                    if self._broken.all():
                        break
                    return None
            else:
                return self.transform(image), np.array([self.split.targets[place], place], dtype=np.int64)
        hint = "; mbib data FOLDER lists them" if self.split.in_files else ""
        raise DataError(
            f"none of the {len(self)} images {self.split.said} can be read; the last error: cannot read image "
            f"{reason}{hint}"
        )

    def broken(self) -> list[str]:
        """Return the paths of the images that could not be read so far, in any worker."""
        return [self.split.path(i) for i in self._broken.nonzero().flatten().tolist()]


def unreadable(split: Split, workers: int) -> dict[int, str]:
    """Decode every image of a split once.

    Returns:
        Places of the images that cannot be read, and why.
    """
    return {place: why for place, why in enumerate(examine(split, _reason, workers)) if why}


def _reason(reader: Reader, index: int) -> str:
    """Return why an image cannot be read; empty for one that can."""
    try:
        convert_image(reader.read(index), "RGB")
    except Exception as error:
        return why_unreadable(error)
    return ""


def examine(split: Split, look: Callable[[Reader, int], T], workers: int) -> Iterator[T]:
    """Look at every image of a split, in order; a bar shows how far.

    Args:
        split: the images.
        look: returns what there is to know, of a reader and an index.
        workers: processes that look.
    """
    return in_order(partial(_look, split, look), len(split), workers)


def _look(split: Split, look: Callable[[Reader, int], T], place: int) -> T:
    return look(split.reader, split.index_of(place))


def in_order(
    get: Callable[[int], T], count: int, workers: int, batch_size: int = 64, unit: str = "image"
) -> Iterator[T]:
    """Give what a function returns for the numbers from 0 on, in order; a bar shows how far.

    Args:
        get: the function, which other processes can have.
        count: of the numbers.
        workers: processes that call it; 0 for this one.
        batch_size: results that a process hands over at once.
        unit: what a result is of.

    Raises:
        DataError: the function's own, without the trace of the process that it was raised in.
    """
    # With a generator of its own, it leaves the global one as it is.
    loader = DataLoader(
        _Results(get, count), batch_size, num_workers=workers, collate_fn=list, generator=torch.Generator()
    )
    progress = Progress(count, unit=unit)
    try:
        for batch in loader:
            yield from batch
            progress.step(len(batch))
    except DataError as error:
        raise (from_worker(error) if workers else error) from None
    finally:
        progress.close()


class _Results(Dataset[T]):
    def __init__(self, get: Callable[[int], T], count: int) -> None:
        self.get, self.count = get, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> T:
        return self.get(number)


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
    """Images behind one of timm's readers: Hugging Face data sets.

    Args:
        reader: timm's reader.
        inside: the data set that holds the images, for messages.
    """

    def __init__(self, reader: Any, inside: str) -> None:
        self.reader, self.inside = reader, inside

    def read(self, index: int) -> Image.Image:
        """Return the image."""
        return Image.open(self.reader[index][0])

    def path(self, index: int) -> str:
        """Return the image's path."""
        name = self.reader.filename(index, absolute=True)
        return f"{self.inside}/{name}" if name else f"{self.inside}[{index}]"


def pil_mode(channels: int) -> str:
    """Return the PIL mode of images with so many channels. Raises DataError for numbers other than 1 and 3."""
    if channels not in (1, 3):
        raise DataError(f"images have 1 or 3 channels, the model takes {channels}")
    return "L" if channels == 1 else "RGB"


def channelwise(values: list[float], channels: int) -> tuple[float, ...]:
    """Return one value per channel; grey images take the mean of the three."""
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels
