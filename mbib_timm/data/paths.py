"""Images at paths: ten million of them without an object each, which of them are there, and what has changed."""

import os
import stat
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from mbib_timm.errors import DataError
from mbib_timm.files import counted, printable

# Images of a list that are looked for before training; of more, as many evenly spaced ones as the second number says.
MOST_LOOKED_FOR, LOOKED_FOR = 1_000_000, 100_000
# So many images of a folder are found sooner by listing it than one by one.
WORTH_LISTING = 50
# Names that are hashed at once.
BLOCK = 1 << 18
# Odd, with bits all over: the fractional parts of the golden ratio and of the square root of 3.
MULTIPLIERS = np.array([0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B], dtype=np.uint64)


class Names:
    """Text after text in one buffer of UTF-8.

    Args:
        buffer: all of them, one behind the other.
        ends: where each ends in it, (N,), integers.
    """

    def __init__(self, buffer: bytes | bytearray, ends: np.ndarray) -> None:
        self.buffer = buffer
        self.ends = ends.astype(np.uint32 if len(buffer) < 2**32 else np.int64, copy=False)

    @classmethod
    def of(cls, names: Sequence[str]) -> "Names":
        """Pack names."""
        encoded = [name.encode() for name in names]
        return cls(b"".join(encoded), np.cumsum([len(name) for name in encoded], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        return self.buffer[start : self.ends[index]].decode()

    def some(self, places: np.ndarray | None = None) -> Iterator[bytes]:
        """Give some of the names, or all, undecoded."""
        for start, end in self._bounds(places):
            yield from (bytes(self.buffer[a:b]) for a, b in zip(start.tolist(), end.tolist(), strict=True))

    def hashes(self, places: np.ndarray | None = None) -> np.ndarray:
        """Return a number of 64 bits for each of some names, or of all, (n,), uint64: the same for the same name.

        Different names may share one, so that whoever finds two alike compares the names.
        """
        padded = np.frombuffer(self.buffer, dtype=np.uint8)
        if len(padded) < 8:
            padded = np.concatenate([padded, np.zeros(8, dtype=np.uint8)])
        # Eight bytes from every place on.
        words = np.ndarray((len(padded) - 7,), dtype="<u8", buffer=padded, strides=(1,))
        found = np.empty(len(self) if places is None else len(places), dtype=np.uint64)
        done = 0
        for start, end in self._bounds(places):
            length = end - start
            sums = length.astype(np.uint64)
            left = np.arange(len(start))
            for first in range(0, int(length.max(initial=0)), 8):
                left = left[length[left] > first]
                at = start[left] + first
                wanted = np.minimum(length[left] - first, 8)
                # The last words of the buffer are read from a place before; what is not the name's is shifted out.
                early = np.minimum(at, len(words) - 1)
                value = words[early] >> (8 * (at - early)).astype(np.uint64)
                value &= np.uint64(2**64 - 1) >> (8 * (8 - wanted)).astype(np.uint64)
                mixed = (sums[left] ^ value) * MULTIPLIERS[0]
                sums[left] = (mixed ^ (mixed >> np.uint64(29))) * MULTIPLIERS[1]
            found[done : done + len(sums)] = sums ^ (sums >> np.uint64(32))
            done += len(sums)
        return found

    def _bounds(self, places: np.ndarray | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Give where names begin and end, (n,), int64 each, a block of them at a time."""
        count = len(self) if places is None else len(places)
        for begin in range(0, count, BLOCK):
            if places is None:
                ends = self.ends[max(0, begin - 1) : begin + BLOCK].astype(np.int64)
                yield (ends[:-1], ends[1:]) if begin else (np.concatenate([[0], ends[:-1]]), ends)
            else:
                block = places[begin : begin + BLOCK]
                starts = np.where(block > 0, self.ends[block - 1].astype(np.int64), 0)
                yield starts, self.ends[block].astype(np.int64)


class PathReader:
    """Images at paths under a root.

    Args:
        root: folder that the paths are relative to.
        names: relative paths, or absolute ones.
    """

    def __init__(self, root: Path, names: Names) -> None:
        self.root, self.names = root, names

    def name(self, index: int) -> str:
        """Return a path as it was given."""
        return self.names[index]

    def path(self, index: int) -> str:
        """Return a path as it is on the disk."""
        return str(self.root / self.names[index])

    @cached_property
    def is_plain(self) -> bool:
        """Whether all names are relative, and as ``os.path.normpath`` leaves them; False also where some only look as
        if they were not."""
        buffer, ends = self.names.buffer, self.names.ends
        firsts = np.frombuffer(buffer, dtype=np.uint8)[ends[:-1]]
        is_relative = buffer[:1] != b"/" and not (firsts == ord("/")).any()
        return is_relative and b"./" not in buffer and b"//" not in buffer

    @property
    def _before(self) -> bytes:
        """What goes before a relative name, normalised and absolute, as a name may be."""
        return os.fsencode(os.path.abspath(self.root)).rstrip(b"/") + b"/"

    def files(self, places: np.ndarray | None) -> Iterator[bytes]:
        """Give the absolute paths of some images, or of all; a microsecond each, where `path` takes twenty."""
        before = self._before
        if self.is_plain:
            return (before + name for name in self.names.some(places))
        return (os.path.normpath(os.path.join(before, name)) for name in self.names.some(places))

    def names_alike(self, other: "PathReader") -> bool:
        """Return whether an image that is in both has the same name in both."""
        return self.is_plain and other.is_plain and self._before == other._before

    def read(self, index: int) -> Image.Image:
        """Open an image."""
        return open_image(self.path(index))

    def __len__(self) -> int:
        return len(self.names)


def open_image(path: str) -> Image.Image:
    """Open an image file. Raises OSError for an empty one, and for what is no file: a pipe would keep us waiting."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError("no regular file")
    if status.st_size == 0:
        raise OSError("empty file")
    return Image.open(path)


def missing_images(file: Path, count: int, missing: Sequence[str], root: Path, listed: int | None = None) -> str:
    """Return a line on images of a list that are not there.

    Args:
        file: the list, for messages.
        count: images that were looked for.
        missing: names of those that are not there.
        root: where they were looked for.
        listed: images of the list, where that is another number.

    Raises:
        DataError: more than half are not there.
    """
    names = ", ".join(map(printable, missing[:3])) + (", ..." if len(missing) > 3 else "")
    looked_for = counted(count, "image") + ("" if listed in (None, count) else " that were looked for")
    if 2 * len(missing) > count:
        raise DataError(
            f"{file}: of its {looked_for}, {len(missing):,} cannot be found under {root}: {names}; is data_dir the "
            "folder that its paths begin at?"
        )
    return (
        f"{file}: of its {looked_for}, {len(missing):,} cannot be found: {names}; training replaces them, an "
        "evaluation leaves them out; --broken skip takes them out of the class counts too"
    )


def look_for_images(reader: PathReader, file: Path, confined: bool = False) -> str:
    """Look for the images of a list before training on them, folder by folder; none is opened.

    Args:
        reader: of all images.
        file: the list, for messages.
        confined: refuse links that lead out of the reader's root.

    Returns:
        A line on the images that are not there; empty where all are.

    Raises:
        DataError: more than half are not there, or a link leads out of the root.
    """
    count = len(reader) if len(reader) <= MOST_LOOKED_FOR else LOOKED_FOR
    by_folder: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for place in np.linspace(0, len(reader) - 1, count, dtype=np.int64).tolist():
        folder, _, name = reader.name(place).rpartition("/")
        by_folder[folder].append((name, place))
    root, missing = os.path.realpath(reader.root), []
    for folder, wanted in by_folder.items():
        path = os.path.join(reader.root, f"{folder}/" if folder else "")
        links = _files(path, [name for name, _ in wanted])
        leads_out = confined and not _is_below(path, root)
        for name, place in wanted:
            # Not among them, it may be there under another spelling, or where the reader alone knows.
            link = links.get(name)
            if link is None and not os.path.isfile(reader.path(place)):
                missing.append(place)
            elif leads_out or (confined and link is not False and not _is_below(reader.path(place), root)):
                raise DataError(
                    f"{file}: {reader.name(place)} is a link, or below one, that leads out of data_dir {reader.root}; "
                    "give the folder that holds the images themselves"
                )
    if not missing:
        return ""
    return missing_images(file, count, [reader.name(place) for place in sorted(missing)], reader.root, len(reader))


def _files(folder: str, wanted: Sequence[str]) -> dict[str, bool]:
    """Return names of files in a folder, those that are wanted among them, and whether each is a link; empty where it
    cannot be opened."""
    found = {}
    if len(wanted) < WORTH_LISTING:
        for name in wanted:
            with suppress(OSError, ValueError):
                mode = os.lstat(os.path.join(folder, name)).st_mode
                if stat.S_ISLNK(mode) or stat.S_ISREG(mode):
                    found[name] = stat.S_ISLNK(mode)
    else:
        with suppress(OSError, ValueError), os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_symlink() or entry.is_file():
                    found[entry.name] = entry.is_symlink()
    return {name: link for name, link in found.items() if not link or os.path.isfile(os.path.join(folder, name))}


def _is_below(path: str, root: str) -> bool:
    return os.path.commonpath([root, os.path.realpath(path)]) == root
