#!/usr/bin/env python
"""Pack a recipe's data into one file, to carry them to a machine without a network.

    python tools/pack.py mbib_resnet32.cifar100_lt_if100 -o cifar100_lt_if100.tar
    python tools/pack.py finetune/mbib_resnet50 --data-dir my_images -o my_images.tar.gz --format webp
    mbib train mbib_resnet32.cifar100_lt_if100 --dataset folder --data-dir cifar100_lt_if100.tar

Of the training split it writes the recipe's long-tailed subset alone, which the recipe then keeps as a whole and in the
same order; beside it the splits that are evaluated: `<split>/<class>/<number>.png`. Images are encoded anew without
loss, as the grey values or RGB that training sees, so those that come as JPEG grow several times. The same images give
the same bytes, as long as the versions of Pillow and zlib are the same.
"""

import argparse
import gzip
import io
import itertools
import re
import sys
import tarfile
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image
from timm.utils.misc import natural_key

from mbib_timm.data import Split, Splits, open_data
from mbib_timm.data.folders import SUFFIXES
from mbib_timm.data.long_tail import long_tailed_indices
from mbib_timm.errors import DataError, MbibError, first_line
from mbib_timm.files import write_atomically
from mbib_timm.flags import Parser, add_recipe_flags, recipe_overrides
from mbib_timm.progress import Progress
from mbib_timm.recipe import KEYS, Recipe, find_recipe, load_recipe

ENCODINGS: dict[str, dict[str, Any]] = {
    "png": {"optimize": True},
    "webp": {"lossless": True, "exact": True, "quality": 100, "method": 6},
}
# Recipe keys that say which images there are.
PACKED_BY = [name for name, item in KEYS.items() if item.metadata["group"] == "data" and item.metadata["evaluation"]]


class Member(NamedTuple):
    """An image of a split, and its name in the archive."""

    name: str
    split: Split
    place: int


def main() -> None:
    """Run the command."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("recipe", help="name of a recipe, or a YAML file")
    parser.add_argument("-o", dest="file", type=Path, required=True, help=f"file to write: {', '.join(SUFFIXES)}")
    parser.add_argument("--format", choices=list(ENCODINGS), default="png", help="of the images")
    add_recipe_flags(parser, PACKED_BY)
    arguments = parser.parse_args()
    recipe = load_recipe(find_recipe(arguments.recipe), recipe_overrides(arguments))
    images = pack(recipe, arguments.file, arguments.format)
    print(f"{arguments.file}: {images} images, {arguments.file.stat().st_size / 1e6:.1f} MB")


def pack(recipe: Recipe, file: Path, image_format: str) -> int:
    """Write a recipe's data as one archive, as a whole or not at all, and return the number of images.

    Args:
        recipe: names the data and the subset.
        file: compressed unless its name ends in ``.tar``.
        image_format: ``png`` or ``webp``.

    Raises:
        MbibError: another name, no such folder, or a file that cannot be written.
        DataError: data that do not fit the recipe, an image that cannot be read, or a split without images of a class.
    """
    if not file.name.lower().endswith(SUFFIXES):
        raise MbibError(f"cannot pack into {file}: expected a name that ends in {', '.join(SUFFIXES)}")
    if not file.parent.is_dir():
        raise MbibError(f"cannot pack into {file}: there is no folder {file.parent}")
    members = sorted(plan(recipe, open_data(recipe), image_format))
    progress = Progress(len(members), unit="image")

    def write(out: BinaryIO) -> None:
        if file.name.lower().endswith(".tar"):
            write_tar(out, members, image_format, progress)
            return
        # gzip would write down the file's name and the time.
        with gzip.GzipFile(filename="", mode="wb", fileobj=out, mtime=0) as packed:
            write_tar(packed, members, image_format, progress)

    try:
        write_atomically(file, write)
    except OSError as error:
        raise MbibError(f"cannot write {file}: {error.strerror or error}") from None
    finally:
        progress.close()
    return len(members)


def plan(recipe: Recipe, data: Splits, image_format: str) -> Iterator[Member]:
    """Name every image.

    Raises:
        DataError: a split that has no images of a class, or the name of another.
    """
    classes = folder_names(data.class_names or [str(label) for label in range(data.num_classes)])
    splits = [(recipe.train_split, data.train), (recipe.val_split, data.val)]
    if data.test is not None and recipe.test_split != recipe.val_split:
        splits.append((recipe.test_split or "test", data.test))
    for name, split in splits:
        if safe_name(name) != name or [other for other, _ in splits].count(name) > 1:
            raise DataError(f"split {name!r} needs a name of its own that can be a folder's")
        counts = np.bincount(split.targets, minlength=len(classes))
        if not counts.all():
            # Class folders are all that an archive says about classes.
            empty = ", ".join(classes[label] for label in np.flatnonzero(counts == 0)[:5])
            raise DataError(f"split {name!r} has no images of class {empty}; packed, it would have fewer classes")
        order = np.arange(len(split))
        if split is data.train and recipe.imbalance != "none":
            # The recipe shuffles each class once more, which shall give the order, and so the batches, of these data.
            order = np.argsort(long_tailed_indices(split.targets, counts.tolist(), recipe.subset_seed))
        width = len(str(counts.max() - 1))
        for label, folder in enumerate(classes):
            for number, place in enumerate(order[split.targets[order] == label]):
                yield Member(f"{name}/{folder}/{number:0{width}}.{image_format}", split, int(place))


def folder_names(class_names: Sequence[str]) -> list[str]:
    """Return a folder name for each class, such that their natural order is that of the labels."""
    names = [safe_name(name) for name in class_names]
    if all(names) and all(natural_key(a) < natural_key(b) for a, b in itertools.pairwise(names)):
        return names
    width = len(str(len(names) - 1))
    return [f"{label:0{width}}_{name}" for label, name in enumerate(names)]


def safe_name(name: str) -> str:
    """Return a name without what a file system may refuse, hide or spell otherwise; it may be empty."""
    return re.sub(r"[^\w.-]+", "_", unicodedata.normalize("NFKC", name)).strip(".")


def write_tar(sink: Any, members: Sequence[Member], image_format: str, progress: Progress) -> None:
    """Write the images to an open file, in this order, as of user 0 and time 0."""
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for member in members:
            content = encode(member.split, member.place, image_format)
            header = tarfile.TarInfo(member.name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
            progress.step()


def encode(split: Split, place: int, image_format: str) -> bytes:
    """Encode an image's pixels without loss, and nothing else of it. Raises DataError if it cannot."""
    assert split.reader is not None
    index, content = place if split.indices is None else int(split.indices[place]), io.BytesIO()
    try:
        image = split.reader.read(index)
        pixels = np.asarray(image if image.mode == "L" else image.convert("RGB"))
        Image.fromarray(pixels).save(content, image_format, **ENCODINGS[image_format])
    except Exception as error:  # PIL's decoders raise many kinds, and WebP ends at 16,383 pixels
        raise DataError(f"cannot pack image {split.reader.path(index)}: {first_line(error)}") from None
    return content.getvalue()


if __name__ == "__main__":
    try:
        main()
    except MbibError as error:
        print(f"pack: error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
