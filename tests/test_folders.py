"""Image folders, and archives against the same images in folders: what is read, and what is refused."""

import gzip
import io
import multiprocessing
import pickle
import tarfile

import numpy as np
import pytest
import torch
from archive_images import (
    CLASSES,
    SPLITS,
    assert_same,
    contents,
    opened,
    pixels,
    png,
    shuffled,
    tar_bytes,
    unpacked,
    write,
)
from PIL import Image
from small_data import class_folders, picture, save_image
from timm.data import create_reader
from torch.utils.data import DataLoader

from mbib_timm.cli import main
from mbib_timm.data import (
    build_eval_loader,
    open_data,
    open_split,
)
from mbib_timm.data.folders import open_archive
from mbib_timm.data.images import ImageDataset
from mbib_timm.data.loaders import timm_eval_loader
from mbib_timm.environment import World
from mbib_timm.errors import DataError
from mbib_timm.recipe import Recipe

CPU = torch.device("cpu")


# Folders


@pytest.fixture
def folder(tmp_path):
    """Class folders of 12, 5, 3 and 1 images."""
    return class_folders(tmp_path)


def folder_recipe(root, **keys):
    return Recipe(dataset="folder", data_dir=str(root), workers=0, img_size=16, **keys)


def test_a_folder_of_classes_is_split_so_that_every_class_trains(folder):
    data = open_data(Recipe(dataset="folder", data_dir=str(folder), val_fraction=0.2))
    assert data.class_names == ("ant", "bee", "cat", "dog")
    assert data.class_counts.tolist() == [10, 4, 2, 1]
    assert np.bincount(data.val.targets, minlength=4).tolist() == [2, 1, 1, 0]
    assert not set(data.train.indices) & set(data.val.indices)
    again = open_data(Recipe(dataset="folder", data_dir=str(folder), val_fraction=0.2))
    assert (again.val.indices == data.val.indices).all()


def test_split_folders_and_tars_are_found_by_synonyms(folder, tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    folder.rename(root / "train")
    with tarfile.open(root / "test.tar", "w") as tar:
        for label in ("ant", "bee", "cat", "dog"):
            tar.add(root / "train" / label / "0.png", f"{label}/0.png")
    data = open_data(Recipe(dataset="folder", data_dir=str(root)))
    assert data.class_counts.tolist() == [12, 5, 3, 1]
    assert np.bincount(data.val.targets).tolist() == [1, 1, 1, 1]
    settings = folder_recipe(root, train_crop_mode="pad")
    loader = build_eval_loader(settings, open_split(settings, "test"), input_size=(3, 16, 16), device=CPU)
    batch = next(iter(loader))
    assert batch.images.shape == (4, 3, 16, 16)
    assert batch.targets.tolist() == batch.index.tolist() == [0, 1, 2, 3]


def test_a_validation_split_with_an_unknown_class_is_refused(folder, tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    folder.rename(root / "train")
    for label in ("ant", "eel"):
        (root / "val" / label).mkdir(parents=True)
        picture(1).save(root / "val" / label / "0.png")
    with pytest.raises(DataError, match=r"split 'validation' has 1 class that training had not: 'eel' \(did you mean"):
        open_data(Recipe(dataset="folder", data_dir=str(root)))


@pytest.mark.parametrize("make", ["missing", "empty", "no images", "one class"])
def test_folders_that_are_none(tmp_path, make):
    root = tmp_path / "data"
    if make != "missing":
        root.mkdir()
    if make == "no images":
        (root / "ant").mkdir()
        (root / "ant" / "notes.txt").write_text("no image")
    if make == "one class":
        (root / "ant").mkdir()
        picture(1).save(root / "ant" / "1.png")
    expected = {"missing": "does not exist", "empty": "is empty", "no images": "no images", "one class": "two or more"}
    with pytest.raises(DataError, match=expected[make]):
        open_data(Recipe(dataset="folder", data_dir=str(root)))


@pytest.mark.parametrize("num_classes", [3, 5])
def test_another_number_of_classes_than_the_recipes_is_refused(folder, num_classes):
    with pytest.raises(DataError, match=f"the data have 4 classes, recipe key 'num_classes' says {num_classes}"):
        open_data(Recipe(dataset="folder", data_dir=str(folder), num_classes=num_classes))


def test_a_class_folder_without_images_is_named(tmp_path):
    for label in ("ant", "cat"):
        save_image(tmp_path / "train" / label / "1.png")
    (tmp_path / "train" / "bee").mkdir()
    (tmp_path / "train" / "bee" / "notes.txt").write_text("no image")
    save_image(tmp_path / "val" / "ant" / "1.png")
    with pytest.raises(DataError, match=r"no images of class bee in .*train"):
        open_data(folder_recipe(tmp_path))


def test_hidden_folders_are_no_classes(tmp_path):
    for label in ("ant", "cat"):
        for i in range(2):
            save_image(tmp_path / label / f"{i}.png")
    (tmp_path / ".cache").mkdir()
    assert open_data(folder_recipe(tmp_path)).class_names == ("ant", "cat")


def test_images_outside_of_class_folders_are_refused(tmp_path):
    for name in ("ant/1.png", "cat/1.png", "stray.png"):
        save_image(tmp_path / name)
    with pytest.raises(DataError, match="holds images outside of class folders"):
        open_data(folder_recipe(tmp_path))


def test_a_damaged_tar_and_a_file_that_is_no_tar(tmp_path):
    (tmp_path / "train.tar").write_bytes(b"x" * 5000)
    with pytest.raises(DataError, match=r"cannot read .*train\.tar"):
        open_data(folder_recipe(tmp_path / "train.tar"))
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(DataError, match=r"no images in class folders under .*notes\.txt"):
        open_data(folder_recipe(tmp_path / "notes.txt"))


def test_a_broken_image_in_a_tar_is_named_with_the_tar(tmp_path):
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        for name in ("ant/1.png", "bee/2.png"):
            info = tarfile.TarInfo(name)
            info.size = 9
            tar.addfile(info, io.BytesIO(b"no image."))
    split = open_split(folder_recipe(tmp_path), "validation")
    with pytest.raises(DataError, match=r"^cannot read image .*val\.tar/ant/1\.png: "):
        list(timm_eval_loader(split, folder_recipe(tmp_path), (3, 16, 16), World(CPU)))


def test_a_folder_without_the_split_says_what_there_is(tmp_path):
    save_image(tmp_path / "train" / "ant" / "1.png")
    with pytest.raises(DataError, match="holds no split 'validation': there is train"):
        open_split(folder_recipe(tmp_path), "validation")


# Archives


@pytest.mark.parametrize(
    ("name", "compress"), [("x.tar", 0), ("x.tar.gz", 1), ("X.TGZ", 1), ("x.tar", 1), ("x.tgz", 0)]
)
@pytest.mark.parametrize("prefix", ["", "./", "data/", "./data/", "/data/"])
def test_splits_read_as_timm_reads_the_folder(tmp_path, name, compress, prefix):
    content = tar_bytes([(prefix + path, image) for path, image in shuffled(SPLITS)])
    archive = write(tmp_path / name, gzip.compress(content, 1) if compress else content)
    reader = create_reader("", root=str(unpacked(tmp_path / "folder", CLASSES)))
    for asked in ("train", "validation"):
        split = opened(archive, asked)
        assert split.class_names == ("ant", "Bee", "c2", "c2_b", "c10") == tuple(reader.class_to_idx)
        assert split.targets.tolist() == [label for _, label in reader.samples]
        assert contents(split) == pixels(Image.open(file) for file, _ in reader.samples)
        inside = f"{prefix.removeprefix('.').strip('/')}/{'train' if asked == 'train' else 'val'}/ant/9.png"
        assert split.reader.path(0) == f"{archive}/{inside.strip('/')}"


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_class_folders_alone_are_split_as_in_a_folder(tmp_path, tar_format):
    # The two younger formats write names that are long or not ASCII in headers of their own.
    entries = {f"{'long' * 22}/{name}.é.png" if tar_format else name: image for name, image in CLASSES.items()}
    archive = write(tmp_path / "x.tar", tar_bytes(shuffled(entries), format=tar_format))
    for asked in ("train", "validation"):
        expected = opened(unpacked(tmp_path / "folder", CLASSES), asked)
        split = opened(archive, asked)
        assert len(split) == (15 if asked == "train" else 5)
        assert split.indices.tolist() == expected.indices.tolist()
        assert_same(split, expected)


@pytest.mark.parametrize("training", ["train", "training"])
@pytest.mark.parametrize("validation", ["validation", "val", "valid", "test", "eval"])
def test_split_folders_have_synonyms(tmp_path, training, validation):
    entries = {f"{training}/{name}": image for name, image in CLASSES.items()}
    entries |= {f"{validation}/{name}": png(len(name)) for name in CLASSES}
    archive = write(tmp_path / "x.tar", tar_bytes(entries))
    folder = unpacked(tmp_path / "folder", entries)
    for asked in ("train", "validation", "val", "test"):
        assert_same(opened(archive, asked), opened(folder, asked))
    with pytest.raises(DataError, match=rf"x\.tar holds no split 'extra': there is {min(training, validation)}, "):
        opened(archive, "extra")


def test_a_split_of_its_own_name_comes_before_its_synonyms(tmp_path):
    entries = SPLITS | {f"test/{name}": png(1) for name in CLASSES}
    archive = write(tmp_path / "x.tar", tar_bytes(entries))
    assert "/test/" in opened(archive, "test").reader.path(0)
    assert "/val/" in opened(archive, "validation").reader.path(0)


@pytest.mark.parametrize("prefix", ["", "data/", "train/", "data/train/"])
def test_a_class_may_be_called_train(tmp_path, prefix):
    entries = {f"{prefix}{label}/{i}.png": png(i) for label in ("train", "bus", "val") for i in range(4)}
    archive = write(tmp_path / "x.tar", tar_bytes(entries))
    folder = unpacked(tmp_path / "folder", entries) / prefix.removesuffix("train/")
    split = opened(archive)
    assert split.class_names == ("bus", "train", "val")
    assert_same(split, opened(folder))


@pytest.mark.parametrize("inner", ["", "./", "folder of the class"])
@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("prefix", ["", "data/"])
def test_a_tar_for_each_class(tmp_path, inner, compress, prefix):
    tars = []
    for split in ("train", "val"):
        for label in ("c10", "c2", "ant"):
            images = {name: png(len(label + split)) for name in ("10.png", "9.png")}
            folder = f"{label}/" if inner.startswith("folder") else inner
            inside = tar_bytes({folder + name: image for name, image in images.items()})
            tars.append((f"{prefix}{split}/{label}.tar", inside))
            unpacked(tmp_path / "folder" / split / label, images)
    content = tar_bytes(tars)
    archive = write(tmp_path / "x.tar", gzip.compress(content) if compress else content)
    for asked in ("train", "validation"):
        assert_same(opened(archive, asked), opened(tmp_path / "folder", asked))
    alone = write(tmp_path / "alone.tar", tar_bytes({name.rpartition("/")[2]: image for name, image in tars[:3]}))
    assert open_archive(alone).read().class_names == ("ant", "c2", "c10")


def test_archives_of_splits_in_a_folder_or_in_an_archive(tmp_path):
    packed = {"train.tar": tar_bytes(CLASSES), "val.tar": tar_bytes(CLASSES)}
    folder = unpacked(tmp_path / "tars", packed)
    (folder / "val.tar").unlink()
    write(folder / "val.tar.gz", gzip.compress(packed["val.tar"]))
    archive = write(tmp_path / "x.tar", tar_bytes(packed))
    expected = opened(unpacked(tmp_path / "folder", SPLITS))
    for asked in ("train", "validation"):
        assert_same(opened(folder, asked), expected)
        assert_same(opened(archive, asked), expected)


def test_webp_is_read_in_archives_and_folders(tmp_path):
    entries = {}
    for name in ("ant/1.webp", "ant/2.png", "bee/3.WebP"):
        content = io.BytesIO()
        Image.open(io.BytesIO(png(len(entries)))).save(content, name.rpartition(".")[2], lossless=True)
        entries[name] = content.getvalue()
    split = open_archive(write(tmp_path / "x.tar", tar_bytes(entries))).read()
    assert split.targets.tolist() == [0, 0, 1]
    assert_same(opened(tmp_path / "x.tar"), opened(unpacked(tmp_path / "folder", entries)))


def entry_of_type(kind, link=""):
    header = tarfile.TarInfo()
    header.type, header.linkname = kind, link
    return header


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train/ant/._A1.png", b"macOS"),
        ("._train", b"macOS"),
        ("train/.hidden/1.png", png(1)),
        (".git/ant/1.png", png(1)),
        ("../train/ant/1.png", png(1)),
        ("train/ant/../../../1.png", png(1)),
        ("train/ant/../eel/1.png", png(1)),
        ("train/ant/0.png", entry_of_type(tarfile.SYMTYPE, "/etc/passwd")),
        ("train/ant/0.png", entry_of_type(tarfile.LNKTYPE, "train/ant/A1.png")),
        ("train/ant/0.png", entry_of_type(tarfile.FIFOTYPE)),
        ("train/ant/0.png", entry_of_type(tarfile.DIRTYPE)),
        ("train/ant/notes.txt", b"no image"),
        ("train/ant/png", b"no image"),
    ],
)
def test_what_is_no_image_of_the_data_is_passed_over(tmp_path, name, content):
    entries = [(name, content), *SPLITS.items()]
    for path, packed in (("x.tar", tar_bytes(entries)), ("x.tgz", gzip.compress(tar_bytes(entries)))):
        split = opened(write(tmp_path / path, packed))
        assert_same(split, opened(unpacked(tmp_path / "folder", SPLITS)))


def test_names_never_lead_to_the_disk(tmp_path):
    outside = unpacked(tmp_path / "outside", CLASSES)
    archive = write(tmp_path / "x.tar", tar_bytes({f"{outside}/{name}": png(7) for name in CLASSES}))
    assert set(contents(open_archive(archive).read())) == set(pixels([Image.open(io.BytesIO(png(7)))]))


def test_of_members_with_one_name_the_last_counts(tmp_path):
    entries = [("ant/1.png", png(1)), ("bee/1.png", png(2)), ("./ant/1.png", png(3, 20)), ("ant//1.png", png(4, 5))]
    split = open_archive(write(tmp_path / "x.tar", tar_bytes(entries))).read()
    assert split.targets.tolist() == [0, 1]
    assert contents(split) == pixels(Image.open(io.BytesIO(image)) for image in (png(4, 5), png(2)))


SOUND = tar_bytes(SPLITS)


HEADER = SOUND.index(b"train/c2/9.png")


END = len(SOUND.rstrip(b"\0")) // 512 * 512 + 512


CLASS_TARS = {f"train/{label}.tar": tar_bytes({"1.png": png(1), "2.png": png(2)}) for label in ("ant", "bee")}


def changed(content, place, value):
    """A tar with a header's bytes changed, and its checksum right."""
    damaged = bytearray(content)
    damaged[place : place + len(value)] = value
    begin = place // 512 * 512
    total = sum(damaged[begin : begin + 148]) + 8 * ord(" ") + sum(damaged[begin + 156 : begin + 512])
    damaged[begin + 148 : begin + 156] = b"%06o\0 " % total
    return bytes(damaged)


def sparse():
    header = tarfile.TarInfo("ant/1.png")
    header.size, header.pax_headers = 512, {"GNU.sparse.map": "0,512", "GNU.sparse.size": "1024"}
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(header, io.BytesIO(bytes(512)))
    return out.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"no tar" * 1000, None),
        (SOUND[:300], "truncated"),
        (SOUND[:HEADER], "truncated or damaged after 5 members"),
        (SOUND[: HEADER + 100], "truncated or damaged after 5 members"),
        (SOUND[: HEADER + 600], "unexpected end of data"),
        (SOUND[:END], "truncated or damaged after 40 members"),
        (SOUND[:HEADER] + b"?" + SOUND[HEADER + 1 :], "truncated or damaged after 5 members"),
        (SOUND[:HEADER] + bytes(100) + SOUND[HEADER + 100 :], "truncated or damaged after 5 members"),
        (changed(SOUND, HEADER + 124, b"\x80" + b"\xff" * 11), None),
        (changed(SOUND, HEADER + 124, b"77777777777\0"), "unexpected end of data"),
        (sparse(), r"ant/1\.png is a sparse member"),
        (sparse().replace(b"=0,512", b"=0,5x2"), None),
        (gzip.compress(SOUND)[:-9], None),
        (gzip.compress(SOUND)[:-4], None),
        (gzip.compress(SOUND)[:1000], None),
        (gzip.compress(SOUND) + b"more", "Not a gzipped file"),
        (gzip.compress(SOUND[:HEADER]), "truncated or damaged after 5 members"),
        (changed(gzip.compress(SOUND), 1024, b"??????"), None),
        (tar_bytes(CLASS_TARS | {"train/bee.tar": b""}), "of train/bee.tar"),
        (tar_bytes(CLASS_TARS | {"train/bee.tar": b"?" * 512}), "damaged after 0 members of train/bee.tar"),
        (tar_bytes(CLASS_TARS | {"train/bee.tar": CLASS_TARS["train/bee.tar"][:700]}), "1 members of train/bee.tar"),
        (tar_bytes({"ant/notes.txt": b"no image"}), r"looked for \.jpeg, \.jpg, \.png, \.webp"),
        (tar_bytes({}), r"no images in class folders under \S+x\.tar "),
        (tar_bytes({"ant/1.png": png(1)}), r"holds 1 class folder \(ant\)"),
        (tar_bytes(CLASSES | {"1.png": png(1)}), "holds images outside of class folders"),
        (tar_bytes({f"train/{name}": image for name, image in CLASSES.items()}), "no split 'validation': there is tr"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(tmp_path, capsys, content, message):
    archive = write(tmp_path / "x.tar", content)
    with pytest.raises(DataError, match=message) as raised:
        open_data(Recipe(dataset="folder", data_dir=str(archive)))
    assert str(archive) in str(raised.value)
    flags = [
        "--val-split",
        "validation",
        "--dataset",
        "folder",
        "--data-dir",
        str(archive),
        "--output",
        str(tmp_path / "runs"),
    ]
    assert main(["train", "mbib_resnet20.digits", *flags]) == 2
    assert capsys.readouterr().err == f"mbib: error: {raised.value}\n"


@pytest.mark.parametrize("cut", range(100, END, 2311))
def test_no_truncated_tar_passes_for_a_whole_one(tmp_path, cut):
    for name, content in (("x.tar", SOUND[:cut]), ("x.tgz", gzip.compress(SOUND[:cut], 1))):
        with pytest.raises(DataError, match=r"^cannot read "):
            open_archive(write(tmp_path / name, content))


def read_all(split):
    return contents(split)


@pytest.fixture(params=["x.tar", "x.tgz"])
def large(request, tmp_path):
    """The split of an archive, of which this process has read already."""
    content = tar_bytes({f"{i % 3}/{i}.png": png(i, 40) for i in range(60)})
    archive = write(tmp_path / request.param, content if request.param == "x.tar" else gzip.compress(content, 1))
    split = open_archive(archive).read()
    split.reader.read(59)
    return split


def test_forked_workers_and_their_parent_read_at_once(large):
    expected = contents(large)
    dataset = ImageDataset(large, "RGB", lambda image: (image.size, image.tobytes()), replace_broken=False)
    loader = DataLoader(dataset, 3, num_workers=2, multiprocessing_context="fork", collate_fn=list)
    seen = []
    for batch in loader:
        seen += [image for image, _ in batch]
        assert pixels([large.reader.read(31)]) == expected[31:32]
    assert seen == expected


def test_a_pickled_reader_opens_the_file_anew(large):
    copy = pickle.loads(pickle.dumps(large))
    assert copy.reader._opened is None
    assert_same(copy, large)


def test_spawned_workers_read(tmp_path):
    splits = []
    for name, content in (("x.tar", SOUND), ("x.tgz", gzip.compress(SOUND))):
        splits.append(opened(write(tmp_path / name, content)))
        splits[-1].reader.read(3)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(read_all, splits) == [contents(split) for split in splits]
