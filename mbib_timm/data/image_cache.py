"""Decoded images on the disk, so that the next run starts with them.

An entry is a folder named by a digest of everything that decides its bytes: each image's path, size and time of change,
the labels, the fixed part of the preprocessing, the versions of Pillow and of this format. It is written aside and
renamed, under a lock that makes a second process wait for the first, and its checksums are compared on every load.
"""

import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL
import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mbib_timm.data.decode import DecodedImages, decode, decoded
from mbib_timm.data.images import ImageDataset

FORMAT = 2
BLOCK_BYTES = 64 << 20
PIXELS, INDEX = "pixels.bin", "index.safetensors"


def default_folder() -> Path:
    """Return the folder of this package in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mbib_timm" / "images"


def cached_decode(dataset: ImageDataset, preprocessing: str, folder: Path | None, workers: int) -> DecodedImages:
    """Return a data set's images, from the disk where they are and into it where they are not.

    Args:
        dataset: gives the images after the fixed part of the preprocessing.
        preprocessing: describes that part.
        folder: of the cache; None for none.
        workers: processes that decode.

    Raises:
        DataError: an image that cannot be read and may not be replaced.
    """
    key = None if folder is None else entry_key(dataset, preprocessing)
    if folder is None or key is None:
        return decode(dataset, workers)
    entry = folder / key
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{entry}.lock"):
            if (images := load_entry(entry)) is not None:
                return images
            write_entry(entry, dataset, workers)
            images = load_entry(entry)
    except OSError as error:  # no room, no right to write: the run does not depend on it
        print(f"decoded images are not kept: {error.strerror or error} ({folder})")
        images = None
    return decode(dataset, workers) if images is None else images


def entry_key(dataset: ImageDataset, preprocessing: str) -> str | None:
    """Return the digest that names a data set's entry; None for images that are not in files."""
    digest = hashlib.sha256(f"{FORMAT} {PIL.__version__} {dataset.mode} {dataset.replace_broken}".encode())
    digest.update(preprocessing.encode())
    digest.update(np.ascontiguousarray(dataset.targets, dtype=np.int64).tobytes())
    archives: dict[str, str | None] = {}
    in_files = False
    for index in dataset.indices:
        path = dataset.reader.path(int(index))
        state = _file_state(path, archives)
        in_files = in_files or state is not None
        digest.update(f"{path}\0{state}\n".encode())
    return digest.hexdigest()[:32] if in_files else None


def _file_state(path: str, archives: dict[str, str | None]) -> str | None:
    """Return size and time of change of a file, or of the archive that a path leads into; None where there is none."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        parent = os.path.dirname(path)
        if parent not in archives:
            archives[parent] = _file_state(parent, archives)
        return archives[parent]
    return f"{status.st_size} {status.st_mtime_ns}"


def write_entry(entry: Path, dataset: ImageDataset, workers: int) -> None:
    """Decode a data set into an entry, which is there as a whole or not at all.

    Raises:
        OSError: the disk does not take it.
        DataError: an image that cannot be read and may not be replaced.
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
