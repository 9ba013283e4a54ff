"""What `tools/pack.py` writes against the data it came from."""

import csv
import io
import json
import os
import sys
import tarfile
from pathlib import Path

import numpy as np
import pack
import pytest
from archive_images import CLASSES, SPLITS, assert_same, contents, opened, pixels, png, unpacked, write
from PIL import Image

from mbib_timm.cli import main
from mbib_timm.data import Split, Splits, open_data
from mbib_timm.data.images import ArrayReader
from mbib_timm.errors import DataError, MbibError
from mbib_timm.recipe import Recipe


def packing_recipe(folder, **keys):
    return Recipe(dataset="folder", data_dir=str(folder), **keys)


def splits(names, val=None):
    """Data of which each image is a colour of its own, in mixed order."""
    targets = np.random.RandomState(0).permutation(np.repeat(np.arange(len(names)), 3))
    images = np.stack([np.full((4, 4, 3), (i // 256, i % 256, 9), np.uint8) for i in range(len(targets))])
    split = Split(ArrayReader(images, "arrays"), targets, class_names=tuple(names))
    return Splits(split, split if val is None else val, None, np.bincount(targets), tuple(names))


@pytest.fixture
def packed(tmp_path, monkeypatch):
    """Pack given data instead of a recipe's."""

    def run(data, name="x.tar", **keys):
        monkeypatch.setattr(pack, "open_data", lambda recipe: data)
        pack.pack(Recipe(**keys), tmp_path / name, "png")
        return tmp_path / name

    return run


@pytest.mark.parametrize("image_format", ["png", "webp"])
@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz"])
def test_the_same_images_give_the_same_bytes(tmp_path, monkeypatch, suffix, image_format):
    recipe = packing_recipe(unpacked(tmp_path / "folder", SPLITS))
    first, second = tmp_path / f"first{suffix}", tmp_path / f"second{suffix}"
    assert pack.pack(recipe, first, image_format) == 40
    for file in (tmp_path / "folder").rglob("*.png"):
        os.utime(file, (1, 1))
    monkeypatch.setattr("time.time", lambda: 1e9)
    pack.pack(recipe, second, image_format)
    assert first.read_bytes() == second.read_bytes()
    for asked in ("train", "validation"):
        assert_same(opened(first, asked), opened(tmp_path / "folder", asked))
    with tarfile.open(first, "r:" if suffix == ".tar" else "r:gz") as tar:
        members = tar.getmembers()
    assert [member.name for member in members] == sorted(member.name for member in members)
    assert members[0].name == f"train/Bee/0.{image_format}"
    assert {(member.uid, member.gid, member.mtime, member.uname) for member in members} == {(0, 0, 0, "")}


@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_pixels_are_those_that_training_sees(tmp_path, image_format):
    rgb = Image.open(io.BytesIO(png(0, 24)))
    clear = rgb.copy()
    clear.putalpha(Image.fromarray(np.random.RandomState(1).randint(0, 2, (24, 25), dtype=np.uint8) * 255))
    wide = Image.fromarray(np.random.RandomState(2).randint(0, 1 << 16, (24, 25)).astype(np.uint16))
    sources = [rgb, clear, rgb.quantize(16), rgb.convert("L"), clear.convert("LA"), rgb.convert("1"), wide]
    folder = tmp_path / "folder"
    for split in ("train", "val"):
        for label in ("ant", "bee"):
            (folder / split / label).mkdir(parents=True)
            for i, image in enumerate(sources):
                image.save(folder / split / label / f"{i}.png", **({"transparency": 3} if image.mode == "P" else {}))
            rgb.convert("CMYK").save(folder / split / label / "7.jpg", exif=Image.Exif())
    pack.pack(packing_recipe(folder), tmp_path / "x.tar", image_format)
    original, copy = opened(folder), opened(tmp_path / "x.tar")
    for mode in ("RGB", "L"):
        got, expected = ([split.reader.read(i).convert(mode) for i in range(16)] for split in (copy, original))
        assert pixels(got, mode) == pixels(expected, mode)
    modes = {copy.reader.read(i).mode for i in range(16)}
    assert modes == ({"RGB", "L"} if image_format == "png" else {"RGB"})


@pytest.mark.parametrize(
    "names",
    [
        ("ant", "bee", "cat"),
        ("cat", "bee", "ant"),
        ("10", "9", "8"),
        ("c2", "c10", "c9"),
        ("a b", "a_b", "a/b"),
        ("Cat", "cat", "CAT"),
        ("..", ".hidden", "../../etc"),
        ("", ".", "x\n"),
        ("train", "val", "test"),
        ("é", "e\N{COMBINING ACUTE ACCENT}", "ｅ"),
        ("m²", "m2", "\N{CIRCLED DIGIT TWO}"),
        tuple(f"n{i * 7 % 120:08d}, a\\name" for i in range(120)),
        None,
    ],
)
def test_labels_keep_their_order(packed, names):
    data = splits(names or range(12))
    if names is None:
        data = Splits(Split(data.train.reader, data.train.targets), data.val, None, data.class_counts, None)
    archive = packed(data)
    split = opened(archive)
    assert split.targets.tolist() == sorted(data.train.targets)
    assert contents(split) == pixels(map(data.train.reader.read, np.argsort(data.train.targets, kind="stable")))
    with tarfile.open(archive) as tar:
        assert all(len(name.split("/")) == 3 and "/." not in name for name in tar.getnames())


@pytest.mark.parametrize("imbalance", ["exp", "step"])
def test_a_long_tailed_subset_is_kept_whole_and_in_order(tmp_path, imbalance):
    keys = dict(imbalance=imbalance, imbalance_factor=4, subset_seed=3, img_size=16)
    original = open_data(Recipe(dataset="digits", imbalance_max=12, **keys))
    pack.pack(Recipe(dataset="digits", imbalance_max=12, **keys), tmp_path / "x.tar", "png")
    for largest in (12, None):
        copy = open_data(packing_recipe(tmp_path / "x.tar", imbalance_max=largest, **keys))
        assert copy.class_counts.tolist() == original.class_counts.tolist()
        assert_same(copy.train, original.train)


@pytest.mark.parametrize(
    ("keys", "val", "message"),
    [
        (
            {},
            Split(ArrayReader(np.zeros((2, 4, 4), np.uint8), "x"), np.array([0, 2])),
            "'validation' has .* class bee;",
        ),
        ({"val_split": "train"}, None, "split 'train' needs a name of its own"),
        ({"train_split": "train[:80%]"}, None, "can be a folder's"),
    ],
)
def test_data_that_an_archive_cannot_hold_are_refused(packed, tmp_path, keys, val, message):
    with pytest.raises(DataError, match=message):
        packed(splits(("ant", "bee", "cat"), val=val), **keys)
    assert not list(tmp_path.iterdir())


def test_further_splits_are_packed_once(tmp_path):
    entries = SPLITS | {f"test/{name}": png(5) for name in CLASSES}
    folder = unpacked(tmp_path / "folder", entries)
    assert pack.pack(packing_recipe(folder, test_split="test"), tmp_path / "x.tar", "png") == 60
    with pytest.raises(MbibError, match="'test' and 'test' are the same 20 images"):
        pack.pack(packing_recipe(folder, val_split="test", test_split="test"), tmp_path / "y.tar", "png")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.zip", r"x\.zip: expected a name that ends in \.tar, \.tar\.gz, \.tgz"),
        ("no/x.tar", r"there is no folder \S+no$"),
    ],
)
def test_names_that_cannot_be_written(tmp_path, monkeypatch, name, message):
    monkeypatch.setattr(sys, "argv", ["pack.py", "mbib_resnet20.digits", "-o", str(tmp_path / name)])
    with pytest.raises(MbibError, match=message):
        pack.main()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz"])
@pytest.mark.parametrize("before", [None, b"what was there before"])
@pytest.mark.parametrize(
    ("failure", "expected", "message"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (OSError(28, "No space left on device"), MbibError, "no space left to write"),
        (OSError(5, "Input/output error"), MbibError, r"cannot write \S+: Input/output error"),
        (None, DataError, r"cannot pack image \S+/train/c2/9\.png: cannot identify"),
    ],
)
def test_a_pack_that_fails_leaves_what_was_there(tmp_path, monkeypatch, name, before, failure, expected, message):
    folder = unpacked(tmp_path / "folder", SPLITS if failure else SPLITS | {"train/c2/9.png": b"no image"})
    if before:
        write(tmp_path / name, before)
    encode, done = pack.encode, []

    def failing(*image):
        done.append(image)
        if failure is not None and len(done) == 20:
            raise failure
        return encode(*image)

    monkeypatch.setattr(pack, "encode", failing)
    with pytest.raises(expected, match=message):
        pack.pack(packing_recipe(folder), tmp_path / name, "png")
    assert {path.name for path in tmp_path.iterdir()} == {"folder", *([name] if before else [])}
    assert not before or (tmp_path / name).read_bytes() == before


@pytest.mark.slow
def test_training_on_the_packed_file_is_training_on_the_data(tmp_path, monkeypatch, capsys):
    """From the command line: the same batches, so the same losses to the last bit."""
    data = ["mbib_resnet20.digits", "--imbalance-max", "48"]
    shared = [*data, "--img-size", "16", "--epochs", "1", "--warmup-epochs", "0", "--device", "cpu"]
    shared += ["--loader", "resident"]
    archive = tmp_path / "digits.tar.gz"
    monkeypatch.setattr(sys, "argv", ["pack.py", *data, "-o", str(archive)])
    pack.main()
    assert capsys.readouterr().out.startswith(f"{archive}: ")
    runs = []
    for name, flags in (("data", []), ("file", ["--dataset", "folder", "--data-dir", str(archive)])):
        assert main(["train", *shared, *flags, "--output", str(tmp_path), "--experiment", name]) == 0
        metrics = json.loads((tmp_path / name / "metrics.json").read_text())
        with (tmp_path / name / "summary.csv").open() as file:
            runs.append((metrics, list(csv.DictReader(file))))
    (data, rows), (file, rows_of_file) = runs
    assert file["loader"] == data["loader"] == "resident"
    assert file["class_counts"] == data["class_counts"]
    assert file["result"] == data["result"]
    assert [row["train_loss"] for row in rows_of_file] == [row["train_loss"] for row in rows]
    weights = [Path(tmp_path / name / "model.safetensors").read_bytes() for name in ("data", "file")]
    assert weights[0] == weights[1]
