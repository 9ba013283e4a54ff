"""Resident images: decoded once into one block of bytes, kept on the disk for the next run; and whether they fit.

An entry of the cache is a folder named by a digest of everything that decides its bytes: each image's path, size and
time of change, the labels, the fixed part of the preprocessing, the versions of Pillow and of this format. It is
written aside and renamed, under a lock that makes a second process wait for the first, and its checksums are compared
on every load.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import PIL
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mbib_timm.data.archives import ArchiveReader
from mbib_timm.data.images import ImageDataset, Split, in_order, pil_mode, sampled_sizes
from mbib_timm.data.transforms import fixed_preprocessing, longest_side, resident_transform
from mbib_timm.environment import World
from mbib_timm.recipe import Recipe

# Of the cache: the version of its format, the bytes that a checksum covers, the files of an entry.
FORMAT = 4
BLOCK_BYTES = 64 << 20
PIXELS, INDEX = "pixels.bin", "index.safetensors"
# What resident images may take of the memory that is free; the rest is for the model and its activations.
SHARE = 0.5
SAMPLED_IMAGES = 64


@dataclass(frozen=True)
class DecodedImages:
    """Images of any sizes in one block.

    Attributes:
        pixels: (P, C), uint8: one black pixel, then image after image, row by row.
        sizes: height and width of each image, (N, 2), int64, in host memory.
        targets: labels (N,), int64, on the device of the pixels.
        index: position in the split of what each image holds, (N,), int64, on the device of the pixels.
        broken: paths of images that could not be read; of a training set each holds pixels, label and position of the
            one after it, of an evaluation they are left out.
        starts: first pixel of each image, (N,), int64, on the device of the pixels; follows from the sizes.
    """

    pixels: Tensor
    sizes: Tensor
    targets: Tensor
    index: Tensor
    broken: tuple[str, ...] = ()
    starts: Tensor = field(init=False)

    def __post_init__(self) -> None:
        areas = self.sizes.prod(dim=1)
        object.__setattr__(self, "starts", (areas.cumsum(0) - areas + 1).to(self.pixels.device))

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
        DataError: no image can be read.
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
    return (item for item in in_order(partial(_array, dataset), len(dataset), workers) if item is not None)


def _array(dataset: ImageDataset, place: int) -> tuple[np.ndarray, np.ndarray] | None:
    item = dataset[place]
    return None if item is None else (np.ascontiguousarray(np.asarray(item[0]).transpose(1, 2, 0)), item[1])


def decode_split(
    split: Split,
    recipe: Recipe,
    input_size: tuple[int, int, int],
    device: torch.device,
    training: bool,
    replace_broken: bool,
    files: str | None = None,
) -> DecodedImages:
    """Bring a split's images onto the device, decoded and through the fixed part of the preprocessing.

    Args:
        split: the images.
        recipe: preprocessing, cache folder, workers.
        input_size: (C, H, W).
        device: where they go.
        training: they are to be augmented.
        replace_broken: take the next image for one that cannot be read; else leave it out.
        files: digest of the images' files, see `FileStates`; None to keep nothing on the disk.

    Raises:
        DataError: no image can be read.
    """
    mode = pil_mode(input_size[0])
    dataset = ImageDataset(split, mode, resident_transform(recipe, input_size, training), replace_broken)
    folder, images = cache_folder(recipe, "images"), None
    if folder is not None and files is not None:
        fixed = fixed_preprocessing(recipe, input_size, training)
        images = _cached(dataset, folder / entry_key(split, mode, replace_broken, fixed, files), recipe.workers)
    return (decode(dataset, recipe.workers) if images is None else images).to(device)


def cache_folder(recipe: Recipe, kind: str) -> Path | None:
    """Return the folder where a recipe's ``images``, or ``features`` of them, are kept; None for none."""
    if recipe.image_cache == "none":
        return None
    if recipe.image_cache == "auto":
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mbib_timm" / kind
    return Path(recipe.image_cache)


def _cached(dataset: ImageDataset, entry: Path, workers: int) -> DecodedImages | None:
    """Return a data set's images from the disk, after decoding them into it where they are not there yet; None where
    it does not take them."""
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        remove_halves(entry.parent)
        with FileLock(f"{entry}.lock"):
            if (images := load_entry(entry)) is not None:
                return images
            write_entry(entry, dataset, workers)
            return load_entry(entry)
    except OSError as error:  # no room, no right to write: the run does not depend on it
        print(f"decoded images are not kept: {error.strerror or error} ({entry.parent})")
        return None


def remove_halves(folder: Path) -> None:
    """Remove the half-written entries that killed processes have left in a cache: those whose lock nobody holds."""
    for half in folder.glob("*.*"):
        name = re.fullmatch(r"([0-9a-f]{32})\.\w{8}", half.name)
        if name and half.is_dir():
            with contextlib.suppress(Timeout), FileLock(f"{folder / name[1]}.lock", timeout=0):
                shutil.rmtree(half, ignore_errors=True)


def entry_key(split: Split, mode: str, replace_broken: bool, preprocessing: str, files: str) -> str:
    """Return the digest that names the entry of a split's images.

    Args:
        split: the images.
        mode: PIL mode that they are converted to.
        replace_broken: the next image is taken for one that cannot be read; else it is left out.
        preprocessing: described.
        files: digest of their files, see `FileStates`.
    """
    digest = hashlib.sha256(f"{FORMAT} {PIL.__version__} {mode} {replace_broken}".encode())
    digest.update(preprocessing.encode())
    digest.update(np.ascontiguousarray(split.targets, dtype=np.int64).data)
    digest.update(files.encode())
    return digest.hexdigest()[:32]


class FileStates:
    """What shows whether the files of images have changed since a cache was written: path, size and time of change of
    each. They are looked up once for a split, and by the main process alone: of ten million images it takes minutes."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Split, str | None]] = {}  # with the split, whose number stays its own

    def of(self, split: Split, world: World) -> str | None:
        """Return a digest of a split's files; None for images that are not in files. All processes have to ask."""
        if id(split) not in self._known:
            self._known[id(split)] = split, world.of_main(partial(_digest_of_files, split))
        return self._known[id(split)][1]


def _digest_of_files(split: Split) -> str | None:
    if isinstance(split.reader, ArchiveReader):
        return _digest_of_archives(split.reader, split.indices)
    digest, in_files = hashlib.sha256(), False
    for place, path in enumerate(split.files()):
        state = _file_state(path)
        if state is None:  # where the reader alone knows
            path = os.fsencode(split.path(place))
            state = _file_state(path)
        in_files = in_files or state is not None
        digest.update(b"%b\0%b\n" % (path, (state or "none").encode()))
    return digest.hexdigest() if in_files else None


def _digest_of_archives(reader: ArchiveReader, indices: np.ndarray | None) -> str:
    """Return a digest of the archives, and of which of their images a split has."""
    digest = hashlib.sha256()
    for archive, first in zip(reader.archives, reader.firsts, strict=True):
        path = os.fsencode(os.path.normpath(archive))
        digest.update(b"%b\0%b %d\n" % (path, (_file_state(path) or "none").encode(), first))
    digest.update(reader.names.buffer)
    for numbers in (reader.names.ends, reader.places, indices):
        if numbers is not None:
            digest.update(np.ascontiguousarray(numbers, dtype=np.int64).data)
    return digest.hexdigest()


def _file_state(path: bytes) -> str | None:
    """Return size and time of change of a file; None where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return f"{status.st_size} {status.st_mtime_ns}"


def write_entry(entry: Path, dataset: ImageDataset, workers: int) -> None:
    """Decode a data set into an entry, which is there as a whole or not at all.

    Raises:
        OSError: the disk does not take it.
        DataError: no image can be read.
    """
    aside = Path(tempfile.mkdtemp(prefix=f"{entry.name}.", dir=entry.parent))
    try:
        sizes: list[tuple[int, int]] = []
        labels: list[np.ndarray] = []

        def rows() -> Iterator[bytes]:
            for image, label in decoded(dataset, workers):
                if not sizes:
                    yield bytes(image.shape[-1])  # the black pixel
                sizes.append(image.shape[:2])
                labels.append(label)
                yield image.tobytes()

        checksums = _write_blocks(aside / PIXELS, rows())
        targets, positions = np.stack(labels, axis=1)
        index = {
            "sizes": torch.tensor(sizes, dtype=torch.int64),
            "targets": torch.from_numpy(targets),
            "positions": torch.from_numpy(positions),
            "checksums": torch.tensor(checksums, dtype=torch.int64),
        }
        save_file(index, aside / INDEX, metadata={"broken": json.dumps(dataset.broken())})
        shutil.rmtree(entry, ignore_errors=True)  # what is there has failed to load
        aside.rename(entry)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_blocks(file: Path, rows: Iterator[bytes]) -> list[int]:
    """Write bytes to a file and return the CRC-32 of each block of it."""
    checksums, block = [], bytearray()
    with file.open("wb") as out:
        for row in rows:
            block += row
            while len(block) >= BLOCK_BYTES:
                out.write(block[:BLOCK_BYTES])
                checksums.append(zlib.crc32(block[:BLOCK_BYTES]))
                del block[:BLOCK_BYTES]
        if block:
            out.write(block)
            checksums.append(zlib.crc32(block))
        out.flush()
        os.fsync(out.fileno())
    return checksums


def load_entry(entry: Path) -> DecodedImages | None:
    """Map an entry into memory; None where there is none, or one that is damaged."""
    try:
        with safe_open(entry / INDEX, "pt") as index:
            names = ("sizes", "targets", "positions", "checksums")
            sizes, targets, positions, checksums = (index.get_tensor(name) for name in names)
            broken = json.loads(index.metadata()["broken"])
        # Processes that map the same file share its memory; what is written to it, if ever, stays with the process.
        pixels = np.memmap(entry / PIXELS, dtype=np.uint8, mode="c")
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, ValueError, KeyError):
        sizes = targets = positions = checksums = pixels = None
    if pixels is None or _checksums(pixels) != checksums.tolist():
        print(f"{entry} is damaged; its images are decoded again")
        return None
    channels = len(pixels) // (int(sizes.prod(dim=1).sum()) + 1)
    return DecodedImages(torch.from_numpy(pixels).view(-1, channels), sizes, targets, positions, tuple(broken))


def _checksums(pixels: np.ndarray) -> list[int]:
    blocks = [pixels[begin : begin + BLOCK_BYTES].data for begin in range(0, len(pixels), BLOCK_BYTES)]
    with ThreadPoolExecutor() as pool:
        return list(pool.map(zlib.crc32, blocks))


def decoded_bytes(split: Split, recipe: Recipe, input_size: tuple[int, int, int], training: bool) -> int:
    """Return the memory that a split's decoded images take; where they keep their own sizes, by a sample of them.

    Args:
        split: the images.
        recipe: preprocessing.
        input_size: (C, H, W).
        training: the split is trained on.
    """
    channels, height, width = input_size
    if not (training and recipe.train_crop_mode == "rrc"):
        return len(split) * channels * height * width
    longest = longest_side(height, width)
    sizes = np.array(sampled_sizes(split, SAMPLED_IMAGES) or [(longest, longest)])
    area = np.mean(sizes.prod(axis=1) * np.minimum(1.0, longest / sizes.max(axis=1)) ** 2)
    return int(len(split) * channels * area)


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on a device; on the CPU also within the limit of the control group."""
    if device.type == "cuda":
        # What torch keeps of what earlier runs have given back is free for the next.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    free = _available_to_the_machine()
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError, KeyError):  # no control group, or one without a limit
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # Cached files count as used, but give way.
        used = int((group / "memory.current").read_text()) - int(statistics["file"])
        free = min(free, int((group / "memory.max").read_text()) - used)
    return free


def _available_to_the_machine() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        # Where the system does not tell what is free: a quarter of what is there, or of 8 GB where it says nothing.
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 8 << 30
        return pages // 4


def fits(needed: int, device: torch.device) -> bool:
    """Return whether so many bytes of images fit onto a device."""
    return needed <= SHARE * free_memory(device)
