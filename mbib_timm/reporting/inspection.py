"""A look at every image of a run's data before training: sizes, kinds, unreadable files, duplicates."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np

from mbib_timm.data.images import Reader, Split, convert_image, examine, why_unreadable

# Two images are near duplicates whose perceptual hashes of 64 bits differ in at most this many.
NEAR_BITS = 4
# As many parts as make two such hashes agree in one: (first bit, number of bits).
PARTS = ((0, 13), (13, 13), (26, 13), (39, 13), (52, 12))
# Hashes that are compared with all others of a part's value at once.
COMPARED = 1024


@dataclass(frozen=True)
class Look:
    """What a look at an image has found.

    Attributes:
        kind: format of the file and PIL mode, such as ``JPEG RGB``; the mode alone of an image that is in no file.
        size: width and height of the image, upright; (0, 0) where it cannot be read.
        error: why it cannot be read; empty for one that can.
        digest: of the pixels.
        hash: perceptual, 64 bits; None where that was not asked for.
    """

    kind: str = ""
    size: tuple[int, int] = (0, 0)
    error: str = ""
    digest: bytes = b""
    hash: int | None = None


@dataclass(frozen=True)
class Picture:
    """An image of a run's data.

    Attributes:
        path: where it is.
        split: name of its split.
        label: name of its class.
        group: of images that belong together; empty for none.
        look: what it is like.
    """

    path: str
    split: str
    label: str
    group: str
    look: Look


@dataclass(frozen=True)
class Duplicates:
    """Images that are the same, or nearly.

    Attributes:
        sets: of places in the list of pictures, each of two or more; for near duplicates each image has another one
            in its set that is near, and not all need be near one another.
        leaks: places of evaluated images that are also in training, with the place of that image.
    """

    sets: list[list[int]]
    leaks: dict[int, int]


@dataclass(frozen=True)
class Inspection:
    """What there is to know of the images of a run's data.

    Attributes:
        pictures: every image, split by split.
        exact: images of the same pixels.
        near: images that look the same, those of the same pixels among them; None without the library ImageHash.
    """

    pictures: list[Picture]
    exact: Duplicates
    near: Duplicates | None


def inspect(splits: Sequence[tuple[str, Split]], class_names: Sequence[str], workers: int) -> Inspection:
    """Decode every image once, and compare them.

    Args:
        splits: with their names, that of training first.
        class_names: in label order.
        workers: processes that decode.
    """
    with_hashes = find_spec("imagehash") is not None
    look: Callable[[Reader, int], Look] = partial(look_at, perceptual=with_hashes)
    pictures = []
    for name, split in splits:
        groups = np.full(len(split), "") if split.groups is None else split.groups
        for place, found in enumerate(examine(split, look, workers)):
            label = class_names[int(split.targets[place])]
            pictures.append(Picture(split.path(place), name, label, str(groups[place]), found))
    training = splits[0][0]
    exact = duplicates(pictures, training, [picture.look.digest or None for picture in pictures], ())
    near = None
    if with_hashes:
        hashes = [picture.look.hash for picture in pictures]
        near = duplicates(pictures, training, hashes, near_pairs({each for each in hashes if each is not None}))
    return Inspection(pictures, exact, near)


def look_at(reader: Reader, index: int, perceptual: bool) -> Look:
    """Look at an image; `perceptual`: take its perceptual hash."""
    try:
        image = reader.read(index)
        kind = " ".join(filter(None, (image.format, image.mode)))
        pixels = convert_image(image, "RGB")
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, struct.error, EOFError and more
        return Look(error=why_unreadable(error))
    digest = hashlib.blake2b(repr(pixels.size).encode() + pixels.tobytes(), digest_size=16).digest()
    return Look(kind, pixels.size, "", digest, perceptual_hash(pixels) if perceptual else None)


def perceptual_hash(image: Any) -> int:
    """Return ImageHash's pHash of an image as an integer of 64 bits."""
    import imagehash

    return int.from_bytes(np.packbits(imagehash.phash(image).hash).tobytes(), "big")


def near_pairs(hashes: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Give pairs of different hashes of 64 bits that differ in at most `NEAR_BITS`; some more than once.

    Two such hashes agree in one of `PARTS`, so that only those are compared which do.
    """
    values = np.array(sorted(hashes), dtype=np.uint64)
    counts = np.array([bin(value).count("1") for value in range(1 << 16)], dtype=np.uint8)
    for first, bits in PARTS:
        part = (values >> np.uint64(first)) & np.uint64((1 << bits) - 1)
        order = np.argsort(part, kind="stable")
        for same in np.split(order, np.flatnonzero(np.diff(part[order])) + 1):
            for begin in range(0, len(same) if len(same) > 1 else 0, COMPARED):
                rows = values[same[begin : begin + COMPARED]]
                differing = rows[:, None] ^ values[same][None]
                distance = counts[differing[..., None].view(np.uint16)].sum(axis=-1)
                for row, column in zip(*np.nonzero(distance <= NEAR_BITS), strict=True):
                    if same[begin + row] < same[column]:
                        yield int(rows[row]), int(values[same[column]])


def duplicates(
    pictures: Sequence[Picture],
    training: str,
    keys: Sequence[Hashable | None],
    pairs: Iterable[tuple[Hashable, Hashable]],
) -> Duplicates:
    """Find images that share a key, or whose keys make a pair.

    Args:
        pictures: the images.
        training: name of the training split.
        keys: of each image; None for one that cannot be compared.
        pairs: of keys that are near one another.
    """
    places: dict[Hashable, list[int]] = defaultdict(list)
    for place, key in enumerate(keys):
        if key is not None:
            places[key].append(place)
    near: dict[Hashable, set[Hashable]] = {key: {key} for key in places}
    for one, other in pairs:
        near[one].add(other)
        near[other].add(one)
    trained = {key: next((i for i in found if pictures[i].split == training), None) for key, found in places.items()}
    leaks = {}
    for place, key in enumerate(keys):
        if key is not None and pictures[place].split != training:
            twins = [found for each in (key, *near[key]) if (found := trained[each]) is not None]
            if twins:
                leaks[place] = twins[0]
    sets, seen = [], set[Hashable]()
    for key in places:
        together, waiting = [], [key]
        while waiting:
            each = waiting.pop()
            if each not in seen:
                seen.add(each)
                together += places[each]
                waiting += near[each]
        if len(together) > 1:
            sets.append(sorted(together))
    return Duplicates(sorted(sets), leaks)
