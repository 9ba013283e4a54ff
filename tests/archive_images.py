"""The same small images as bytes of files, of tars and in folders, for the tests of archives and of packing."""

import io
import pickle
import random
import tarfile

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader

from mbib_timm.data import open_split
from mbib_timm.data.images import ImageDataset
from mbib_timm.recipe import Recipe


def png(seed, size=9):
    content = io.BytesIO()
    pixels = np.random.RandomState(seed).randint(0, 256, (size, size + 1, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content, "png")
    return content.getvalue()


# Names whose natural order is not that of their characters.
CLASSES = {f"{folder}/{name}.png": png(i * 10 + j)
           for i, folder in enumerate(("c10", "c2", "Bee", "ant", "c2_b"))
           for j, name in enumerate(("10", "9", "b", "A1"))}  # fmt: skip
SPLITS = {f"{split}/{name}": content for split in ("train", "val") for name, content in CLASSES.items()}


def tar_bytes(entries, mtime=0, **options):
    """A tar of (name, content) pairs or dict items; a content may be a TarInfo for what is no file. For times to
    fractions of a second an extended header goes before each member."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", **options) as tar:
        for name, content in entries.items() if isinstance(entries, dict) else entries:
            if isinstance(content, tarfile.TarInfo):
                content.name, content.mtime = name, mtime
                tar.addfile(content)
                continue
            header = tarfile.TarInfo(name)
            header.size, header.mtime = len(content), mtime
            tar.addfile(header, io.BytesIO(content))
    return out.getvalue()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def shuffled(entries):
    return random.Random(0).sample(sorted(entries.items()), len(entries))


def unpacked(folder, entries):
    for name, content in entries.items():
        write(folder / name, content)
    return folder


def pixels(reader, mode="RGB"):
    """Every image of a reader, as bytes with its size."""
    return [(image.size, image.convert(mode).tobytes()) for image in reader]


def contents(split):
    indices = range(len(split)) if split.indices is None else split.indices.tolist()
    return pixels(split.reader.read(i) for i in indices)


def assert_forks_read(split, place):
    """Forked workers read while their parent, which has read already, reads the image at a place."""
    expected = contents(split)
    dataset = ImageDataset(split, "RGB", lambda image: (image.size, image.tobytes()), replace_broken=False)
    loader = DataLoader(dataset, 3, num_workers=2, multiprocessing_context="fork", collate_fn=list)
    seen = []
    for batch in loader:
        seen += [image for image, _ in batch]
        assert pixels([split.reader.read(place)]) == expected[place : place + 1]
    assert seen == expected


def assert_copies_read(split):
    """A pickled reader opens its files anew."""
    copy = pickle.loads(pickle.dumps(split))
    assert copy.reader._opened == {}
    assert_same(copy, split)


def assert_same(split, expected):
    assert split.class_names == expected.class_names
    assert split.targets.tolist() == expected.targets.tolist()
    assert contents(split) == contents(expected)


def opened(place, split="train"):
    return open_split(Recipe(dataset="folder", data_dir=str(place), val_fraction=0.25), split)
