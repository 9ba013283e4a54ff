"""Image folders, and archives against the same images in folders: what is read, and what is refused."""

import gzip
import io
import lzma
import multiprocessing
import os
import re
import tarfile
import unicodedata

import numpy as np
import pytest
import torch
from archive_images import (
    CLASSES,
    SPLITS,
    assert_copies_read,
    assert_forks_read,
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
from small_data import class_folders, save_image, settled
from timm.data import create_reader

from mbib_timm.cli import main
from mbib_timm.data import (
    DataPool,
    archives,
    open_data,
    open_split,
)
from mbib_timm.data.folders import open_archive
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
    return settled(**{"dataset": "folder", "data_dir": str(root), "workers": 0, "img_size": 16, **keys})


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
    loader = timm_eval_loader(open_split(settings, "test"), settings, (3, 16, 16), World(CPU))
    batch = next(iter(loader))
    assert batch.images.shape == (4, 3, 16, 16)
    assert batch.targets.tolist() == batch.index.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("num_classes", [3, 5])
def test_another_number_of_classes_than_the_recipes_is_refused(folder, num_classes):
    with pytest.raises(DataError, match=f"the data have 4 classes, recipe key 'num_classes' says {num_classes}"):
        open_data(Recipe(dataset="folder", data_dir=str(folder), num_classes=num_classes))


def opened_both(tmp_path, entries, **tar):
    """What a folder and a tar of the same images give; entries are names, or pairs of a name and bytes."""
    files = dict(entry if isinstance(entry, tuple) else (entry, png(len(entry))) for entry in entries)
    folder, archive = unpacked(tmp_path / "folder", files), write(tmp_path / "x.tar", tar_bytes(files, **tar))
    return [open_split(folder_recipe(place), "all") for place in (folder, archive)]


CAMERA_TRAP = [
    *(f"fox/site {site}/{i}.jpg.png" for site in "AB" for i in range(3)),
    *(f"hare/site A/2024-05-01/{i}.png" for i in range(2)),
    "hare/0.png",
    "Bär/ site  B/1.png",
]


def test_a_class_is_the_first_folder_level(tmp_path):
    for split in opened_both(tmp_path, CAMERA_TRAP):
        assert split.class_names == ("Bär", "fox", "hare")
        assert np.bincount(split.targets).tolist() == [1, 6, 3]
        assert not split.left_out
    one, other = opened_both(tmp_path, CAMERA_TRAP)
    assert_same(one, other)


@pytest.mark.parametrize(
    "name",
    [
        ".ipynb_checkpoints/0-checkpoint.png",
        "fox/.ipynb_checkpoints/0-checkpoint.png",
        "__MACOSX/fox/0.png",
        "fox/._0.png",
        "fox/Thumbs.db",
        "fox/@eaDir/0.png",
        "@eaDir/0.png",
        "$RECYCLE.BIN/0.png",
        "fox/.DS_Store",
        "notes.txt",
        "fox/notes.txt",
    ],
)
def test_hidden_and_system_files_never_count(tmp_path, name):
    expected = opened_both(tmp_path / "without", CAMERA_TRAP)[0]
    for split in opened_both(tmp_path / "with", [*CAMERA_TRAP, name]):
        assert_same(split, expected)
        assert not split.left_out


def test_what_cannot_count_is_named(tmp_path):
    odd = ["stray.png", "fox/1.HEIC", "fox/site A/2.nef", "owl/3.heic", "rest/notes.txt"]
    for split in opened_both(tmp_path, [*CAMERA_TRAP, *odd]):
        assert split.class_names == ("Bär", "fox", "hare")
        assert split.left_out == {
            "images of unsupported kinds": ("fox/1.HEIC", "fox/site A/2.nef", "owl/3.heic"),
            "images outside class folders": ("stray.png",),
            "class folders without images": ("owl", "rest"),
        }


def test_files_of_unknown_kind_are_counted_and_what_lies_beside_images_is_not(tmp_path):
    files = ["fox/2.jpg_large", "fox/IMG_1", "hare/site A/3.img", "hare/clip.MP4", "fox/0.xmp", "labels.csv"]
    for split in opened_both(tmp_path, [*CAMERA_TRAP, *files]):
        assert split.left_out == {"files of unknown kind": ("fox/2.jpg_large", "fox/IMG_1", "hare/site A/3.img")}


def notes_on(split):
    return " ".join(split.notes)


def test_folders_that_may_be_meant_otherwise_are_noted(tmp_path):
    for split in opened_both(tmp_path / "usual", CAMERA_TRAP):
        assert not split.notes
    inside = [f"{label}/{part}/{i}.png" for label in ("ant", "bee") for part in ("train", "Val") for i in range(2)]
    for split in opened_both(tmp_path / "inside", [*inside, "ant/0.png"]):
        assert re.search(
            "class folders contain folders named like splits .*bee/Val.* put the classes inside them", notes_on(split)
        )
    above = [f"{year}/{label}/{i}.png" for year in (2023, 2024) for label in ("ant", "bee") for i in range(2)]
    for split in opened_both(tmp_path / "above", above):
        assert "all lie deeper, such as 2023/ant/0.png; if the second level is the class" in notes_on(split)
    splits = [name.replace("2023", "training_set").replace("2024", "test_set") for name in above]
    for split in opened_both(tmp_path / "splits", splits):
        assert "if these are splits: --train-split training_set --val-split test_set; if" in notes_on(split)
    grouped = open_split(folder_recipe(tmp_path / "above" / "folder", group_by="folder:1"), "all")
    assert not grouped.notes, "who groups by folders knows what they are"


def test_the_folder_of_a_class_is_not_the_data(tmp_path):
    root = unpacked(tmp_path / "data", {name: png(1) for name in ("ant/1.png", "ant/2.png", "bee/1.png")})
    message = rf"class folders under {root}/ant; --data-dir is the folder that .*; perhaps {root}\?; left out: .*: 2"
    with pytest.raises(DataError, match=message):
        open_split(folder_recipe(root / "ant"), "all")


def test_loose_pictures_are_not_said_to_lie_in_a_class_of_the_working_directory(tmp_path, monkeypatch):
    unpacked(tmp_path / "loose", {"1.png": png(1)})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"per class \(unlabelled images: mbib predict RUN loose\); left out"):
        open_split(folder_recipe("loose"), "all")


def test_images_beside_the_folders_of_splits_are_named(tmp_path):
    entries = [f"{split}/{name}/1.png" for split in ("train", "val") for name in ("ant", "bee")]
    files = {name: png(1) for name in [*entries, "stray.png", "notes.txt", ".hidden.png"]}
    for place in (unpacked(tmp_path / "folder", files), write(tmp_path / "x.tar", tar_bytes(files))):
        split = open_split(folder_recipe(place), "train")
        assert split.left_out == {"images beside the folders of the splits": ("stray.png",)}


@pytest.mark.parametrize("form", ["gif", "tiff", "bmp", "ppm", "jpg", "webp"])
def test_kinds_that_are_read(tmp_path, form):
    content = io.BytesIO()
    Image.new("RGB", (9, 9), "red").save(content, "jpeg" if form == "jpg" else form)
    entries = [("ant/1." + form.upper(), content.getvalue()), "bee/1.png"]
    for split in opened_both(tmp_path, entries):
        assert split.targets.tolist() == [0, 1]
        assert split.reader.read(0).size == (9, 9)


def test_links_pipes_and_folders_that_cannot_be_opened_are_passed_over_by_name(tmp_path):
    root = unpacked(tmp_path / "data", {name: png(1) for name in CAMERA_TRAP})
    (root / "fox" / "round").symlink_to(root / "fox")
    (root / "fox" / "nowhere.png").symlink_to(root / "gone.png")
    (root / "fox" / "itself.png").symlink_to("itself.png")
    (root / "fox" / "elsewhere").symlink_to(root / "hare")
    os.mkfifo(root / "hare" / "pipe.png")
    split = open_split(folder_recipe(root), "all")
    assert np.bincount(split.targets).tolist() == [1, 9, 3], "a link to another folder is followed"
    assert split.left_out == {
        "circular links": ("fox/round",),
        "links that lead nowhere": ("fox/itself.png", "fox/nowhere.png"),
        "devices, pipes and sockets": ("fox/elsewhere/pipe.png", "hare/pipe.png"),
    }


def test_a_folder_that_cannot_be_opened_is_passed_over(tmp_path, monkeypatch):
    root = unpacked(tmp_path / "data", {name: png(1) for name in CAMERA_TRAP})
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith(("site B", "Bär")):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    split = open_split(folder_recipe(root), "all")
    assert np.bincount(split.targets).tolist() == [3, 3]
    assert split.left_out == {
        "folders that cannot be opened (Permission denied)": ("Bär", "fox/site B"),
        "class folders without images": ("Bär",),
    }


def test_one_class_in_two_spellings_of_unicode_is_one(tmp_path):
    names = [unicodedata.normalize(form, f"Bär/{i}.png") for i, form in enumerate(("NFC", "NFD"))]
    for split in opened_both(tmp_path, [*names, "ant/1.png"]):
        assert split.class_names == ("ant", "Bär")
        assert split.targets.tolist() == [0, 1, 1]


def test_a_split_beside_classes_is_an_error_that_says_what_to_do(tmp_path):
    for i, other in enumerate(("bus", "bus/site A")):
        entries = {name: png(1) for name in ("train/ant/1.png", "train/bee/1.png", f"{other}/1.png")}
        folder = unpacked(tmp_path / f"folder {i}", entries)
        for place in (folder, write(tmp_path / f"{i}.tar", tar_bytes(entries))):
            with pytest.raises(
                DataError, match=r"holds 'train', which contains folders .*beside 'bus': put the splits"
            ):
                open_data(folder_recipe(place))


def test_a_split_whose_name_is_a_slip_is_an_error_that_names_the_split(tmp_path):
    entries = {f"{split}/{name}/1.png": png(1) for split in ("trian", "val") for name in ("ant", "bee")}
    place = unpacked(tmp_path / "folder", entries)
    with pytest.raises(DataError, match=r"holds 'val', .*, beside 'trian' \(did you mean 'train'\?\): put"):
        open_data(folder_recipe(place))


def test_copies_between_splits_of_the_datas_own_are_not_looked_for_and_it_is_said(tmp_path):
    names = [f"{name}/{i}.png" for name in ("ant", "bee") for i in range(5)]
    for beginnings, said in ((("train/", "val/"), 1), (("",), 0)):
        entries = {beginning + name: png(1) for beginning in beginnings for name in names}
        lines = DataPool().introduce(folder_recipe(unpacked(tmp_path / str(said), entries)))
        assert len([line for line in lines if "are not looked for; mbib data lists them" in line]) == said


def test_classes_that_differ_in_case_beside_a_class_named_as_a_split_are_no_splits(tmp_path):
    entries = {name: png(1) for name in ("train/site A/1.png", "Fox/1.png", "fox/2.png")}
    for place in (unpacked(tmp_path / "folder", entries), write(tmp_path / "x.tar", tar_bytes(entries))):
        with pytest.raises(DataError, match=r"holds 'train', which contains folders .*beside 'Fox', 'fox': put"):
            open_data(folder_recipe(place))
    twins = {f"{split}/ant/1.png": png(1) for split in ("train", "Extra", "extra")}
    for place in (unpacked(tmp_path / "twins", twins), write(tmp_path / "y.tar", tar_bytes(twins))):
        with pytest.raises(DataError, match="holds 'Extra', 'extra', whose names all mean split 'extra'"):
            open_split(folder_recipe(place), "extra")


def test_a_split_of_any_name_that_is_asked_for(tmp_path):
    entries = {f"{split}/{label}/1.png": png(1) for split in ("train", "2024", "2025") for label in ("ant", "bee")}
    for place in (unpacked(tmp_path / "folder", entries), write(tmp_path / "x.tar", tar_bytes(entries))):
        settings = folder_recipe(place, train_split="2024", val_split="2025")
        assert open_split(settings, "2024").path(0).endswith("2024/ant/1.png")
        with pytest.raises(DataError, match="beside '2025'"):
            open_split(folder_recipe(place), "2024")


def test_the_split_all_has_every_image_of_data_without_splits(folder, tmp_path):
    assert np.bincount(open_split(folder_recipe(folder), "all").targets).tolist() == [12, 5, 3, 1]
    with pytest.raises(DataError, match="there is no split 'dev': the data have none of their own"):
        open_split(folder_recipe(folder), "dev")
    (tmp_path / "data").mkdir()
    folder.rename(tmp_path / "data" / "train")
    with pytest.raises(DataError, match="has no split 'all'; it has train"):
        open_split(folder_recipe(tmp_path / "data"), "all")


def test_an_evaluation_may_be_of_one_class(tmp_path):
    save_image(tmp_path / "ant" / "1.png")
    assert open_split(folder_recipe(tmp_path), "all").class_names == ("ant",)


def test_a_broken_image_in_a_tar_is_named_with_the_tar(tmp_path):
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        for name in ("ant/1.png", "bee/2.png"):
            info = tarfile.TarInfo(name)
            info.size = 9
            tar.addfile(info, io.BytesIO(b"no image."))
    split = open_split(folder_recipe(tmp_path), "validation")
    with pytest.raises(
        DataError,
        match=r"^none of the 2 images of split 'val' can .*val\.tar/bee/2\.png: .*; mbib data FOLDER lists them",
    ):
        list(timm_eval_loader(split, folder_recipe(tmp_path), (3, 16, 16), World(CPU)))


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
    for asked in ("train", "validation", "val", *(["test"] if validation == "test" else [])):
        assert_same(opened(archive, asked), opened(folder, asked))
    with pytest.raises(DataError, match=rf"x\.tar has no split 'extra'; it has {min(training, validation)}, "):
        opened(archive, "extra")


@pytest.mark.parametrize("twins", [("Train", "train"), ("train", "training"), ("eval", "val"), ("valid", "validation")])
def test_folders_of_one_split_by_their_names_are_refused(tmp_path, twins):
    entries = SPLITS | {f"{twin}/{name}": image for twin in twins for name, image in CLASSES.items()}
    if twins[1] == "validation":
        entries = {name: image for name, image in entries.items() if not name.startswith("val/")}
    folder = unpacked(tmp_path / "folder", entries)
    for place in (folder, write(tmp_path / "x.tar", tar_bytes(entries))):
        with pytest.raises(
            DataError, match=f"holds '{twins[0]}', '{twins[1]}', whose names all mean split '(train|validation)'"
        ):
            opened(place)
    if twins[0] == "eval":
        recipe = Recipe(dataset="folder", data_dir=str(folder), val_split="val", test_split="Eval")
        assert "/eval/" in open_split(recipe, "eval").path(0)


def test_a_validation_split_is_no_test_split(tmp_path):
    folder = unpacked(tmp_path / "folder", SPLITS)
    archive = write(tmp_path / "x.tar", tar_bytes(SPLITS))
    rows = [f"{name},{name.split('/')[1]},{name.split('/')[0]}" for name in SPLITS]
    table = write(folder / "t.csv", "\n".join(["path,label,split", *rows]).encode())
    said = "no split 'test'; it has train, val; for its validation split, give --split validation, in training --val-"
    for place in (folder, archive):
        with pytest.raises(DataError, match=said):
            opened(place, "test")
    with pytest.raises(DataError, match=said):
        open_split(Recipe(dataset="table", table=str(table)), "test")


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


def test_names_that_lead_out_links_and_devices_are_named(tmp_path):
    odd = [("../ant/1.png", png(1)), ("ant/../../1.png", png(1))]
    odd += [("ant/l.png", entry_of_type(tarfile.SYMTYPE, "/etc/x"))]
    odd += [("ant/h.png", entry_of_type(tarfile.LNKTYPE, "../x")), ("ant/d.png", entry_of_type(tarfile.CHRTYPE))]
    archive = write(tmp_path / "x.tar", tar_bytes([*CLASSES.items(), *odd]))
    split = open_archive(archive).read()
    assert split.left_out == {
        "names that lead out of the archive": ("../ant/1.png", "ant/../../1.png"),
        "links in the archive, which are not followed": ("ant/l.png", "ant/h.png"),
        "devices, pipes and sockets": ("ant/d.png",),
    }


def test_a_compressed_archive_has_bounds_of_its_own_size_and_of_the_memory(tmp_path, monkeypatch):
    archive = write(tmp_path / "x.tgz", gzip.compress(SOUND + bytes(len(SOUND) * 100)))
    open_archive(archive)  # little all the same
    monkeypatch.setattr(archives, "SMALL", len(SOUND))
    with pytest.raises(DataError, match=r"x\.tgz has 0\.0 MB and unpacks to more than \d+, which are not held"):
        open_archive(archive)
    write(archive, gzip.compress(SOUND))
    open_archive(archive)
    monkeypatch.setattr(archives, "MOST", len(SOUND) - 1)
    with pytest.raises(DataError, match="which are not held in memory; unpack it"):
        open_archive(archive)


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
        (changed(SOUND, HEADER + 124, b"\xff" * 10 + b"\xfe\0"), r"damaged header of train/c2/9\.png"),  # -512
        (changed(SOUND, HEADER + 124, b"\x80" + b"\x7f" * 11), None),
        (changed(SOUND, HEADER + 156, b"L")[: HEADER + 512], None),
        (changed(SOUND, HEADER + 156, b"S")[: HEADER + 512], None),
        (b"".join(changed(SOUND[HEADER : HEADER + 512], 156, b"L") for _ in range(3000)), None),
        (b"PK\x03\x04" + bytes(600), r"another kind \(zip\) than its name says; unpack it$"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(600), r"another kind \(7z\) than its name says; unpack it$"),
        (lzma.compress(SOUND), r"another kind \(xz\) than its name says; unpack it$"),
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
        (tar_bytes({"ant/notes.txt": b"no image"}), r"looked for \.bmp, .*\.webp\)"),
        (tar_bytes({}), r"no images in class folders under \S+x\.tar "),
        (tar_bytes({"ant/1.png": png(1)}), r"holds 1 class \(ant\)"),
        (tar_bytes({f"train/{name}": image for name, image in CLASSES.items()}), "no split 'validation'; it has tr"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(tmp_path, capsys, content, message):
    archive = write(tmp_path / "x.tar", content)
    with pytest.raises(DataError, match=message) as raised:
        open_data(Recipe(dataset="folder", data_dir=str(archive)))
    assert str(archive) in str(raised.value)
    data = ["--dataset", "folder", "--data-dir", str(archive), "--val-split", "validation"]
    assert main(["train", "mbib_resnet20.digits", *data, "--output", str(tmp_path / "runs")]) == 2
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
    assert_forks_read(large, 31)


def test_a_pickled_reader_opens_the_file_anew(large):
    assert_copies_read(large)


def test_spawned_workers_read(tmp_path):
    splits = []
    for name, content in (("x.tar", SOUND), ("x.tgz", gzip.compress(SOUND))):
        splits.append(opened(write(tmp_path / name, content)))
        splits[-1].reader.read(3)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(read_all, splits) == [contents(split) for split in splits]
