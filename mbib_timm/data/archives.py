"""Tar files as they lie on the disk: what is in one, by its headers, and its images, read by offset.

Names of members never lead to the disk.
"""

import gzip
import io
import os
import re
import tarfile
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from mbib_timm.data.paths import Names
from mbib_timm.errors import DataError, first_line

SUFFIXES = (".tar", ".tar.gz", ".tgz")
# Of archives that are not read.
OTHER_ARCHIVES = (".zip", ".7z", ".rar", ".gz", ".bz2", ".xz", ".zst", ".tbz2", ".txz")
GZIP_MAGIC = b"\x1f\x8b"
# First bytes of archives that are not read, whatever their names.
OTHER_MAGIC = {
    b"PK": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"7z\xbc\xaf": "7z", b"Rar!": "RAR", b"\x28\xb5\x2f\xfd": "zstd",
}  # fmt: skip
# Bytes that an archive may have in memory, whatever its size; times its size, which images are not compressed by, and
# bytes, above that.
SMALL, MOST_TIMES, MOST = 64 * 2**20, 50, 16 * 2**30
# What gzip and tarfile raise; the latter lets pass what the numbers in a damaged header lead to.
DAMAGED = (tarfile.TarError, OSError, EOFError, zlib.error, ValueError, ArithmeticError, LookupError)
# Archives that a process keeps open.
MOST_OPEN = 64
# What members are.
FILE, FOLDER, LINK, SPARSE, OTHER = "file", "folder", "link", "sparse", "other"
BLOCK = tarfile.BLOCKSIZE
# What extended headers of most archives hold, no more: times of changes to fractions of a second.
TIMES = re.compile(rb"(?:[0-9]+ [acm]time=[0-9.]+\n)+")


class Member(NamedTuple):
    """What one header of a tar says.

    Attributes:
        name: as it stands there.
        start: first byte of the content, in the file that holds the tar.
        size: of the content, in bytes.
        kind: `FILE`, `FOLDER`, `LINK`, `SPARSE` (whose content is not that of the file) or `OTHER`: devices, pipes.
    """

    name: str
    start: int
    size: int
    kind: str


class ArchiveReader:
    """Images in tars.

    Args:
        archives: the files.
        firsts: index of the first image in each, ascending.
        names: of the images, in their archives.
        places: first byte and size of each, (N, 2), int64.
        contents: the bytes that the places are in; None to read them from the files.
    """

    def __init__(
        self,
        archives: Sequence[Path],
        firsts: Sequence[int],
        names: Names,
        places: np.ndarray,
        contents: bytes | None = None,
    ) -> None:
        self.archives, self.firsts, self.names = archives, firsts, names
        self.places, self.contents = places, contents
        # Of this process, by number of the archive, that of the last use last.
        self._opened: dict[int, BinaryIO] = {}
        self._process = 0

    def read(self, index: int) -> Image.Image:
        """Open an image."""
        start, size = self.places[index].tolist()
        if size == 0:
            raise OSError("empty file, or none in the archive")
        if self.contents is not None:
            return Image.open(io.BytesIO(self.contents[start : start + size]))
        file = self._file(self._archive_of(index))
        file.seek(start)
        return Image.open(io.BytesIO(file.read(size)))

    def path(self, index: int) -> str:
        """Return the paths of the archive and of the image in it, joined."""
        return f"{self.archives[self._archive_of(index)]}/{self.names[index]}"

    def files(self, places: np.ndarray | None) -> Iterator[bytes]:
        """Give the paths of some images, or of all, those of the archives normalised."""
        before = [os.fsencode(os.path.normpath(archive)) + b"/" for archive in self.archives]
        wanted = np.arange(len(self.names)) if places is None else places
        numbers = np.searchsorted(self.firsts, wanted, side="right") - 1
        return (before[n] + name for n, name in zip(numbers.tolist(), self.names.some(places), strict=True))

    def _archive_of(self, index: int) -> int:
        return bisect_right(self.firsts, index) - 1

    def _file(self, number: int) -> BinaryIO:
        """Return this process's own handle: one that came over a fork shares its position with the parent's."""
        if self._process != os.getpid():
            self._opened, self._process = {}, os.getpid()
        file = self._opened.pop(number, None) or self.archives[number].open("rb")
        self._opened[number] = file
        if len(self._opened) > MOST_OPEN:
            self._opened.pop(next(iter(self._opened))).close()
        return file

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": {}}


def is_archive(path: Path) -> bool:
    """Return whether a path is that of an archive, by its name."""
    return path.name.lower().endswith(SUFFIXES) and path.is_file()


def refuse_packed(path: Path) -> None:
    """Raise DataError for an archive that is not read."""
    if path.name.lower().endswith(OTHER_ARCHIVES) and not is_archive(path):
        raise DataError(f"{path} is an archive of an unsupported kind (supported: {', '.join(SUFFIXES)}); unpack it")


class OpenTar(NamedTuple):
    """An archive while it is read.

    Attributes:
        file: at its beginning.
        end: its bytes.
        unzipped: its content, of an archive that is compressed; None for one that stays on the disk.
    """

    file: BinaryIO
    end: int
    unzipped: bytes | None


@contextmanager
def open_tar(path: Path, unzip: bool = True) -> Iterator[OpenTar]:
    """Open an archive.

    One that is compressed cannot be read by offset: it is decompressed into memory, which suits some hundred megabytes.

    Whether it is so is seen from its first bytes: downloads are unpacked on the way and keep their name.

    Args:
        path: a tar, or a tar compressed by gzip.
        unzip: False to refuse one that is compressed.

    Raises:
        DataError: a file that is no tar, truncated or damaged, also where that is found while it is open.
    """
    try:
        with path.open("rb") as file:
            tar, first = None, file.read(8)
            if kind := next((kind for magic, kind in OTHER_MAGIC.items() if first.startswith(magic)), None):
                raise DataError(f"{path} is an archive of another kind ({kind}) than its name says; unpack it")
            if first.startswith(GZIP_MAGIC):
                if not unzip:
                    raise DataError(f"{path} is compressed, and its images are read by offset; unpack it")
                tar = _unzip(path)
            contents = file if tar is None else io.BytesIO(tar)
            end = contents.seek(0, os.SEEK_END)
            contents.seek(0)
            yield OpenTar(contents, end, tar)
    except (MemoryError, RecursionError):
        raise DataError(f"cannot read {path} as a tar archive: a damaged header claims an impossible size") from None
    except DAMAGED as error:
        raise DataError(f"cannot read {path} as a tar archive: {first_line(error)}") from None


def _unzip(path: Path) -> bytes:
    """Return the content of a compressed archive. Raises DataError where it is a bomb, or too large for the memory."""
    size = path.stat().st_size
    most = min(max(SMALL, MOST_TIMES * size), MOST)
    unpacked = io.BytesIO()
    with gzip.open(path) as compressed:
        while block := compressed.read(1 << 20):
            if unpacked.write(block) and unpacked.tell() > most:
                raise DataError(
                    f"{path} has {size / 2**20:,.1f} MB and unpacks to more than {most / 2**20:,.0f}, which are not "
                    "held in memory; unpack it"
                )
    return unpacked.getvalue()


def members(file: BinaryIO, end: int, name: str = "") -> Iterator[Member]:
    """Give what is in the tar that begins at the file's position, in its order.

    Headers with nothing out of the ordinary are read here, in a third of the time that tarfile takes; it reads the
    others. Whoever takes a member may move the file's position.

    Args:
        file: can be sought.
        end: of the tar in the file.
        name: of a tar within another, for messages.

    Raises:
        tarfile.ReadError: the tar is truncated or damaged.
        Exception: one of `DAMAGED`, likewise.
    """
    of, at, count = f" of {name}" if name else "", file.tell(), 0
    with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="backslashreplace") as tar:
        file.seek(tar.offset)  # where there is no first member, Python 3.10 would seek before the beginning
        tar.next()  # the first member, which opening has read already
        while True:
            found = None if tar.pax_headers else _plain_member(file, at)  # what those say holds for all that follow
            if found is None:
                found = _any_member(tar, file, at)
            if found is None:
                break
            member, after = found
            count += 1
            if after <= at:  # a negative size leads back, and round in circles
                raise tarfile.ReadError(f"damaged header of {member.name[:80]}")
            if after > end:
                raise tarfile.ReadError(f"unexpected end of data after {count} members{of}")
            at = after
            yield member
    # tarfile takes a damaged header, and a file that ends between two members, for the end.
    file.seek(at)
    if at >= end or file.read(BLOCK) != bytes(BLOCK):
        raise tarfile.ReadError(f"truncated or damaged after {count} members{of}")


def _any_member(tar: tarfile.TarFile, file: BinaryIO, at: int) -> tuple[Member, int] | None:
    """Return the member whose header begins at a place, and where the next one does; None at the end."""
    file.seek(at)
    tar.offset = at
    if (found := tar.next()) is None:
        return None
    tar.members.clear()  # type: ignore[attr-defined]  # which it would keep all
    if found.issparse():
        kind = SPARSE
    elif found.isdir():
        kind = FOLDER
    elif found.isreg():
        kind = FILE
    else:
        kind = LINK if found.islnk() or found.issym() else OTHER
    return Member(found.name, found.offset_data, found.size, kind), tar.offset


def _plain_member(file: BinaryIO, at: int) -> tuple[Member, int] | None:
    """Return the same of a file whose header is plain; None for whatever else there is."""
    file.seek(at)
    header = _plain_header(file.read(BLOCK))
    if header is not None and header[0] == b"x" and header[2] <= BLOCK:  # an extended header goes before it
        if not TIMES.fullmatch(file.read(BLOCK)[: header[2]]):
            return None
        at += 2 * BLOCK
        header = _plain_header(file.read(BLOCK))
    if header is None or header[0] != b"0":
        return None
    _, name, size = header
    start = at + BLOCK
    return Member(name, start, size, FILE), start + -(-size // BLOCK) * BLOCK


def _plain_header(block: bytes) -> tuple[bytes, str, int] | None:
    """Return type, name and size of a header whose name is short and ASCII and whose numbers are octal digits; None of
    one that is another, or whose checksum is wrong."""
    name, size, checksum = block[:100].rstrip(b"\0"), block[124:136].rstrip(b"\0 "), block[148:156].rstrip(b"\0 ")
    prefixed = block[345:346] != b"\0"  # with the beginning of a long name
    if block[257:262] != b"ustar" or prefixed or not (size.isdigit() and checksum.isdigit() and name.isascii()):
        return None
    if b"\0" in name or not name or len(block) < BLOCK:
        return None
    try:
        # The checksum counts as eight spaces.
        if sum(block) - sum(block[148:156]) + 8 * ord(" ") != int(checksum, 8):
            return None
        return block[156:157], name.decode(), int(size, 8)
    except ValueError:  # digits above 7
        return None
