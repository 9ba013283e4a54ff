"""Sources: what they give, on small data that the tests make and on the real files where they are; what they refuse."""

import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from small_data import PEAK_MEMORY, picture, save_image
from small_data import normalized_recipe as recipe

from mbib_timm.cli import main
from mbib_timm.data import SOURCES, create_loaders, lists, open_data, open_split, summary
from mbib_timm.data.lists import open_inaturalist, open_list
from mbib_timm.data.loaders import timm_eval_loader
from mbib_timm.data.sources import open_digits
from mbib_timm.environment import World
from mbib_timm.errors import DataError, MbibError
from mbib_timm.models.zoo import DATASETS
from mbib_timm.recipe import Recipe, list_recipes

CPU = torch.device("cpu")
SIZE = (3, 16, 16)


@pytest.mark.parametrize("dataset", ["cifar100", "hfd/x", "folders"])
def test_unknown_sources_are_refused(dataset):
    with pytest.raises(MbibError, match="unknown data source"):
        open_split(Recipe(dataset=dataset), "train")


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_says_in_one_line_that_a_split_is_not_there(name, tmp_path):
    name = name.replace("NAME", str(tmp_path / "nowhere"))
    if name.startswith("hfds/"):
        pytest.importorskip("datasets")
    table = "nowhere.csv" if name == "table" else None
    with pytest.raises(DataError) as caught:
        open_split(Recipe(dataset=name, data_dir=str(tmp_path / "nowhere"), table=table), "dev")
    assert "\n" not in str(caught.value)


def test_digits():
    train, test = open_digits("train"), open_digits("test")
    assert (len(train), len(test)) == (1457, 340)
    assert np.bincount(test.targets).tolist() == [34] * 10
    data = open_data(recipe(imbalance="exp", imbalance_factor=24, imbalance_max=144))
    assert data.class_counts.tolist() == [144, 101, 71, 49, 35, 24, 17, 12, 8, 6]
    assert train.reader.read(0).size == (16, 16)
    from sklearn.datasets import load_digits

    shown = np.concatenate([np.stack([np.asarray(s.reader.read(i)) for i in range(len(s))]) for s in (train, test)])
    assert shown.shape == (1797, 16, 16)
    # Enlarging keeps the brightness of the original.
    assert shown.mean() == pytest.approx(load_digits().images.mean() * 255 / 16, rel=0.02)


@pytest.mark.parametrize("arguments", [["train", "--data-dir", "my photos"], ["train", "my photos"]])
def test_the_command_for_images_of_ones_own_can_be_followed(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    save_image(tmp_path / "my photos" / "fox" / "0.png")
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "mbib train finetune/mbib_resnet32 --data-dir 'my photos' (which is for small images; for " in said
    assert re.search(r"for photographs take (\S+)\)", said)[1] in list_recipes()


# Lists and json


@pytest.fixture
def image_list(tmp_path):
    root = tmp_path / "imagenet"
    for path in ("train/n01/a.JPEG", "train/n02/b.JPEG", "val/n01/c.JPEG", "val/d.JPEG"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        picture(3).save(root / path)
    (root / "train.txt").write_text("train/n01/a.JPEG 0\ntrain/n02/b.JPEG 1\n\n")
    return root


def test_lists_and_both_layouts_of_imagenets_validation_images(image_list):
    (image_list / "test.txt").write_text("val/n01/c.JPEG 0\nval/n02/d.JPEG 1\n")
    settings = recipe(
        dataset="list", data_dir=str(image_list), train_list="train.txt", val_list="train.txt", test_list="test.txt"
    )
    data = open_data(settings)
    assert data.class_counts.tolist() == [1, 1]
    assert data.test.reader.path(0).endswith("val/n01/c.JPEG")
    assert data.test.reader.path(1).endswith("val/d.JPEG")
    loaders = create_loaders(data, settings, SIZE, CPU)
    assert sum(len(batch.targets) for batch in loaders.test) == 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_list_of_437_513_lines(tmp_path):
    """In a fresh process, whose peak memory is its own."""
    lines = "".join(f"train_val2018/Plantae/{i % 8142}/{i:032x}.jpg {i % 8142}\n" for i in range(437_513))
    (tmp_path / "train.txt").write_text(lines)
    script = PEAK_MEMORY + (
        "import sys, time\n"
        "from mbib_timm.data import lists\n"
        "from mbib_timm.data.lists import open_list\n"
        "lists.look_for_images = lambda *arguments, **options: ''\n"
        "from mbib_timm.data.long_tail import count_classes\n"
        "base = peak()\n"
        "start = time.process_time()\n"
        "split = open_list('train.txt', sys.argv[1], 'train_list', None)\n"
        "counts = count_classes(split.targets, 8142)\n"
        "seconds = time.process_time() - start\n"
        "assert split.reader.name(437512).endswith(f'{437512:032x}.jpg')\n"
        "print(len(split), seconds, (peak() - base) / 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    length, seconds, megabytes = map(float, done.stdout.split())
    assert length == 437_513
    assert seconds < 3
    assert megabytes < 400


def test_real_lists(shared, tmp_path, monkeypatch):
    monkeypatch.setattr(lists, "look_for_images", lambda reader, file, confined: "")
    for name, images, classes in [("ImageNet_LT_test.txt", 50_000, 1000), ("iNaturalist18_val.txt", 24_426, 8142)]:
        file = shared / "data" / "lists" / name
        split = open_list(str(file), str(tmp_path), "val_list", None)
        assert len(split) == images
        assert len(np.unique(split.targets)) == classes


def test_inaturalists_json(tmp_path):
    (tmp_path / "train_val2018").mkdir()
    picture(0).save(tmp_path / "train_val2018" / "a.jpg")
    content = {
        "images": [{"id": 7, "file_name": "train_val2018/a.jpg"}, {"id": 3, "file_name": "train_val2018/b.jpg"}],
        "annotations": [{"image_id": 3, "category_id": 0}, {"image_id": 7, "category_id": 1}],
        "categories": [{"id": 0, "name": "Aves"}, {"id": 1, "name": "Fungi"}],
    }
    (tmp_path / "train2018.json").write_text(json.dumps(content))
    split = open_inaturalist("train2018.json", str(tmp_path), "train_list")
    assert split.targets.tolist() == [1, 0]
    assert split.class_names == ("Aves", "Fungi")


@pytest.mark.parametrize(
    ("listed", "there"),
    [
        ("val/n01440764/X.JPEG", "val/n01440764/X.JPEG"),
        ("val/n01440764/X.JPEG", "val/X.JPEG"),
        ("val/X.JPEG", "val/X.JPEG"),
        ("val/X.JPEG", "val/n01440764/X.JPEG"),
    ],
)
def test_both_layouts_of_lists_and_of_folders(tmp_path, listed, there):
    save_image(tmp_path / there)
    (tmp_path / "test.txt").write_text(f"{listed} 0\n")
    split = open_list("test.txt", str(tmp_path), "test_list", None)
    assert split.reader.path(0) == str(tmp_path / there)
    assert split.reader.read(0).size == (16, 16)


def test_lists_are_read_whatever_separates_and_with_spaces_in_names(tmp_path):
    save_image(tmp_path / "a b.png")
    (tmp_path / "list.txt").write_bytes("\ufeffa b.png\t1\r\n\n  é..png   0\n".encode())
    split = open_list("list.txt", str(tmp_path), "train_list", None)
    assert split.targets.tolist() == [1, 0]
    assert [split.reader.name(i) for i in range(2)] == ["a b.png", "é..png"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a.png\n", "line 1: expected '<relative path> <label>'"),
        (b"a.png 1.5\n", r"line 1: label '1\.5' is not an integer"),
        (b"a.png 0\n\na.png -2\n", r"line 3: label -2 is negative"),
        (b"a.png 99999999999999999999\n", r"line 1: label 9+ is too large"),
        (b"a.png 0x1\n", r"line 1: label '0x1' is not an integer"),
        (b"a/../../x.png 0\n", "line 1: .* must be a path below"),
        (b"C:\\x.png 0\n", "line 1: .* must be a path below"),
        (b"\\\\host\\a.png 0\n", "line 1: .* must be a path below"),
        (b"\xff\xd8\xff\xe0\n", r"list\.txt, line 1 is not UTF-8; save"),
        ("a.png 0\nä.png 1\n".encode("latin-1"), r"list\.txt, line 2 is not UTF-8; save"),
        (b"a.png 0\ra.png 1\r", r"line 1: .* holds the control character '\\r'"),
        (b"a.png 0\n\x1b[2Ja.png 1\n", r"line 2: .* holds the control character '\\x1b'"),
        ("a.png ١\n".encode(), r"line 1: label '١' is not an integer"),
        (b"a.png 1_0\n", r"line 1: label '1_0' is not an integer"),
        (b"x" * 5000 + b".png 0\n", r"of its 1 image, 1 cannot be found under"),
    ],
)
def test_bad_lines_are_refused_with_their_number(tmp_path, content, message):
    save_image(tmp_path / "a.png")
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_list("list.txt", str(tmp_path), "train_list", None)


def test_one_missing_image_is_a_broken_image_and_no_wrong_folder(tmp_path):
    save_image(tmp_path / "b.png")
    (tmp_path / "list.txt").write_text("a.png 0\nb.png 1\n")
    lists = dict(dataset="list", data_dir=str(tmp_path), train_list="list.txt", val_list="list.txt")
    settings = recipe(**lists)
    loader = timm_eval_loader(open_data(settings).val, settings, (3, 16, 16), World(CPU))
    assert [batch.targets.tolist() for batch in loader] == [[1]]
    assert loader.broken_images() == [str(tmp_path / "a.png")]


def listed(root, there, missing, **keys):
    """A recipe of a list of images, of which some are there."""
    names = [*(f"n{i % 2}/{i}.png" for i in range(there)), *(f"n{i % 2}/gone {i}.png" for i in range(missing))]
    for name in names[:there]:
        save_image(root / name)
    (root / "list.txt").write_text("".join(f"{name} {name[1]}\n" for name in names))
    lists = {"train_list": "list.txt", "val_list": "list.txt", "workers": 0}
    return Recipe(dataset="list", data_dir=str(root), **lists, **keys)


@pytest.mark.parametrize("broken", ["replace", "skip", "stop"])
def test_a_few_missing_images_are_said_and_counted_as_broken_ones(tmp_path, broken):
    settings = listed(tmp_path, 10, 4, broken=broken)
    if broken == "stop":
        with pytest.raises(DataError, match="images that cannot be read: 8"):
            open_data(settings)
        return
    data = open_data(settings)
    trained_on, *lines = [line for line in summary(data) if line.startswith("warning")]
    assert re.fullmatch(r"warning: split 'validation': (\d+) of its \1 images are trained on; .*", trained_on)
    if broken == "replace":
        assert data.class_counts.tolist() == [7, 7]
        assert lines == [
            f"warning: {tmp_path}/list.txt: of its 14 images, 4 cannot be found: n0/gone 0.png, n1/gone 1.png, "
            "n0/gone 2.png, ...; training replaces them, an evaluation leaves them out; --broken skip takes them out "
            "of the class counts too"
        ]
    else:
        assert data.class_counts.tolist() == [5, 5]
        assert len(lines) == 1
        assert "left out: images that cannot be read: 4 (" in lines[0]


def test_a_class_that_is_lost_with_its_unreadable_images_is_said(tmp_path):
    names = [f"{label}/{i}.png" for label in (0, 1, 2) for i in range(3)]
    for name in names:
        save_image(tmp_path / "lists" / name)
        for split in ("train", "val"):
            save_image(tmp_path / "folders" / split / name)
    for root in (tmp_path / "lists", tmp_path / "folders" / "train"):
        for i in range(3):
            (root / "1" / f"{i}.png").write_bytes(b"broken")
    (tmp_path / "lists" / "train.txt").write_text("".join(f"{name} {name[0]}\n" for name in names))
    (tmp_path / "lists" / "val.txt").write_text("0/0.png 0\n2/0.png 2\n")
    lists = dict(dataset="list", train_list="train.txt", val_list="val.txt", data_dir=str(tmp_path / "lists"))
    why = r"; left out of training: images that cannot be read: 3 \(.*1/0\.png: "
    with pytest.raises(DataError, match=f"no training images of class 1; labels count from 0 without gaps{why}"):
        open_data(Recipe(**lists, broken="skip", workers=0))
    folders = Recipe(dataset="folder", data_dir=str(tmp_path / "folders"), broken="skip", workers=0)
    with pytest.raises(DataError, match=f"split 'val' has 1 class not in training: '1'.*{why}.*; classes without"):
        open_data(folders)


@pytest.mark.parametrize("broken", ["replace", "skip", "stop"])
def test_more_than_half_missing_is_another_folder(tmp_path, broken):
    assert open_data(listed(tmp_path / "half", 6, 6)).class_counts.tolist() == [6, 6]
    with pytest.raises(DataError, match=r"list\.txt: of its 10 images, 6 cannot be .*: n0/gone 0\.png, n1/gone 1"):
        open_data(listed(tmp_path, 4, 6, broken=broken))


def test_of_many_images_a_sample_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("mbib_timm.data.paths.MOST_LOOKED_FOR", 5)
    monkeypatch.setattr("mbib_timm.data.paths.LOOKED_FOR", 5)
    (line,) = summary(open_data(listed(tmp_path, 12, 4)))[-1:]
    assert "list.txt: of its 5 images that were looked for, 1 cannot be found: " in line


def test_links_out_of_a_lists_root_are_refused_and_those_within_it_are_not(tmp_path):
    root = tmp_path / "root"
    settings = listed(root, 4, 0)
    save_image(tmp_path / "secret" / "x.png")
    (root / "n0" / "within.png").symlink_to(root / "n1" / "1.png")
    (root / "twin").symlink_to(root / "n0")
    (tmp_path / "alias").symlink_to(root)
    lines = (root / "list.txt").read_text()
    (root / "list.txt").write_text(f"{lines}n0/within.png 0\ntwin/0.png 0\n")
    assert len(open_data(settings.replace(data_dir=str(tmp_path / "alias"))).train) == 6
    (root / "n0" / "out.png").symlink_to(tmp_path / "secret" / "x.png")
    (root / "away").symlink_to(tmp_path / "secret")
    for name in ("n0/out.png", "away/x.png"):
        (root / "list.txt").write_text(f"{lines}{name} 0\n")
        with pytest.raises(DataError, match=f"{name} is a link, or below one, that leads out of data_dir"):
            open_data(settings)


def test_a_pipe_in_a_list_is_no_image(tmp_path):
    settings = listed(tmp_path, 4, 0)
    os.mkfifo(tmp_path / "n0" / "pipe.png")
    with (tmp_path / "list.txt").open("a") as file:
        file.write("n0/pipe.png 0\n")
    data = open_data(settings)
    assert "of its 5 images, 1 cannot be found: " in data.train.missing
    with pytest.raises(OSError, match="no regular file"):
        data.train.reader.read(4)


def test_a_split_that_no_list_is_for(tmp_path):
    settings = Recipe(dataset="list", data_dir=str(tmp_path), train_list="list.txt", val_list="list.txt")
    with pytest.raises(DataError, match="there is no list of split 'holdout': the recipe names train, validation"):
        open_split(settings, "holdout")
    with pytest.raises(DataError, match="recipe key 'test_list' is needed"):
        open_split(settings, "test")


def test_a_class_map_says_how_many_classes_there_are(tmp_path):
    images_in(tmp_path, "a.png", "b.png")
    (tmp_path / "list.txt").write_text("a.png 0\nb.png 1\n")
    keys = dict(dataset="list", data_dir=str(tmp_path), train_list="list.txt", val_list="list.txt")
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\n")
    with pytest.raises(DataError, match="no training images of class cat"):
        open_data(Recipe(**keys, class_map=str(tmp_path / "names.txt")))
    (tmp_path / "names.txt").write_bytes("\ufeffant\r\nbee\r\n\r\n".encode())
    assert open_data(Recipe(**keys, class_map=str(tmp_path / "names.txt"))).class_names == ("ant", "bee")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["annotations"].pop(), r"image 3 \(b\.jpg\) has no annotation with a known category"),
        (lambda c: c["annotations"][0].update(category_id=5), r"image 7 \(a\.jpg\) has no annotation with a known"),
        (
            lambda c: c["annotations"][0].update(category_id=0.5),
            r"json .*: annotations\[0\]: expected image_id \(int\) and cat",
        ),
        (lambda c: c["annotations"].append({"image_id": 7, "category_id": 0}), "image 7 has annotations with several"),
        (lambda c: c["images"].append({"id": 7, "file_name": "a.jpg"}), "two images have the id 7"),
        (lambda c: c["images"][0].update(id=[7]), r"images\[0\]: expected id \(int\) and file_name \(str\)"),
        (lambda c: c["images"].append("a.jpg"), r"images\[2\]: expected id \(int\) and file_name \(str\)"),
        (lambda c: c["images"][0].update(file_name="\ud800.jpg"), "must be a path below"),
        (lambda c: c["images"][0].update(file_name="a\0.jpg"), "must be a path below"),
        (lambda c: c["categories"].append({"id": 0, "name": "Fungi"}), r"category ids must be 0\.\.2, each once"),
        (lambda c: c.update(images={"a": 1}), "it has no list 'images'"),
        (lambda c: c["categories"].pop(0), r"category ids must be 0\.\.0"),
        (lambda c: c["images"].clear(), "lists no images"),
        (lambda c: c["images"][0].update(file_name="/a.jpg"), "must be a path below"),
        (lambda c: c.pop("annotations"), "is not iNaturalist's json"),
    ],
)
def test_bad_inaturalist_json(tmp_path, change, message):
    save_image(tmp_path / "a.jpg")
    content = {
        "images": [{"id": 7, "file_name": "a.jpg"}, {"id": 3, "file_name": "b.jpg"}],
        "annotations": [{"image_id": 7, "category_id": 1}, {"image_id": 3, "category_id": 0}],
        "categories": [{"id": 0, "name": "Aves"}, {"id": 1, "name": "Fungi"}],
    }
    change(content)
    (tmp_path / "train2018.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        open_inaturalist("train2018.json", str(tmp_path), "train_list")


# CIFAR


def test_cifar_from_tars(shared):
    """Folder order is label order, and the subset has the benchmark's counts."""
    settings = Recipe(
        dataset="folder", data_dir=str(shared / "data" / "cifar100"), val_split="test", imbalance="exp", num_classes=100
    )
    data = open_data(settings)
    assert data.class_counts.sum() == 10_847
    assert data.class_names[0] == "apple"
    assert data.class_names[99] == "worm"
    assert len(data.val) == 10_000
    settings = recipe(img_size=32, batch_size=128, loader="timm")
    assert len(create_loaders(data, settings, (3, 32, 32), CPU).train) == 85


def test_torchvisions_cifar(tmp_path):
    """A tiny CIFAR-10 in torchvision's own format."""
    from torchvision.datasets import CIFAR10

    root = tmp_path / CIFAR10.base_folder
    root.mkdir()
    sums = {}
    for name in [entry[0] for entry in CIFAR10.train_list + CIFAR10.test_list] + [CIFAR10.meta["filename"]]:
        data = np.random.RandomState(0).randint(0, 256, (20, 3072), dtype=np.uint8)
        names = [f"class {i}" for i in range(10)]
        content = pickle.dumps({"data": data, "labels": list(range(10)) * 2, "label_names": names})
        (root / name).write_bytes(content)
        sums[name] = hashlib.md5(content).hexdigest()
    patch = pytest.MonkeyPatch()
    for attribute in ("train_list", "test_list"):
        patch.setattr(CIFAR10, attribute, [[name, sums[name]] for name, _ in getattr(CIFAR10, attribute)])
    patch.setitem(CIFAR10.meta, "md5", sums[CIFAR10.meta["filename"]])
    try:
        data = open_data(Recipe(dataset="torch/cifar10", data_dir=str(tmp_path), imbalance="step", imbalance_factor=5))
        assert data.class_counts.tolist() == [10] * 5 + [2] * 5
        assert data.class_names[1] == "class 1"
        assert len(data.val) == 20
    finally:
        patch.undo()
    with pytest.raises(DataError, match=r"cannot open CIFAR100 .*--dataset-download fetches it"):
        open_split(Recipe(dataset="torch/cifar100", data_dir=str(tmp_path / "no")), "train")


@pytest.mark.parametrize(
    "error", [URLError(OSError(-2, "Name or service not known")), RuntimeError("Error downloading x:\n")]
)
def test_data_that_cannot_be_downloaded(error, tmp_path, monkeypatch):
    def download(*args, **kwargs):
        raise error

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", download)
    with pytest.raises(
        DataError,
        match=rf"^CIFAR100 cannot be downloaded .*network.*into {tmp_path}; images of .* --data-dir FOLDER \(",
    ):
        open_split(Recipe(dataset="torch/cifar100", data_dir=str(tmp_path), dataset_download=True), "train")


def test_a_folder_of_listed_images_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"^data_dir \S+/none does not exist$"):
        open_list("train.txt", str(tmp_path / "none"), "train_list", None)


def test_torchvisions_fashion_mnist(tmp_path):
    """Grey images, and classes with a slash in their name, from files in the format of LeCun's MNIST."""
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    images = np.random.RandomState(0).randint(0, 256, (30, 28, 28), dtype=np.uint8)
    labels = np.repeat(np.arange(10, dtype=np.uint8), 3)
    for part in ("train", "t10k"):
        header = (0x803).to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for n in images.shape)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(
            (0x801).to_bytes(4, "big") + (30).to_bytes(4, "big") + labels.tobytes()
        )
    settings = recipe(dataset="torch/fashion_mnist", data_dir=str(tmp_path), val_split="test")
    data = open_data(settings)
    assert data.class_counts.tolist() == [3] * 10
    assert set(data.class_names) == DATASETS["fashion_mnist_lt_if100"].class_names
    assert np.array_equal(np.asarray(data.train.reader.read(4)), images[4])
    assert next(iter(create_loaders(data, settings, SIZE, CPU).val)).images.shape[1:] == SIZE


# Hugging Face datasets


def test_hugging_face_datasets_through_timm(tmp_path):
    datasets = pytest.importorskip("datasets")
    for split, labels in {"train": [0, 0, 1], "validation": [0, 1]}.items():
        for i, label in enumerate(labels):
            path = tmp_path / "pictures" / split / f"{'ab'[label]}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(i).save(path)
    assert datasets.__version__
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    try:
        settings = recipe(dataset=f"hfds/{tmp_path / 'pictures'}")
        data = open_data(settings)
        assert data.class_counts.tolist() == [2, 1]
        assert data.class_names == ("a", "b")
        batches = list(create_loaders(data, settings, SIZE, CPU).val)
        assert sum(len(batch.targets) for batch in batches) == 2
    finally:
        patch.undo()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 5], "no training images of class 2, 3, 4"),
        (["a", "b", "c"], "labels must be integers"),
        ([0, -1, 1], "-1"),
    ],
)
def test_bad_hugging_face_labels(tmp_path, monkeypatch, labels, message):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    images = [Image.new("RGB", (4, 4))] * 3
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("string" if "a" in labels else "int64"))
    table = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
    for split in ("train", "validation"):
        (tmp_path / "set").mkdir(exist_ok=True)
        table.to_parquet(tmp_path / "set" / f"{split}.parquet")
    with pytest.raises(DataError, match=message):
        open_data(Recipe(dataset=f"hfds/{tmp_path / 'set'}", data_dir=str(tmp_path / "cache")))


def test_hugging_face_set_that_is_not_there(tmp_path):
    pytest.importorskip("datasets")
    with pytest.raises(DataError, match="cannot open hfds/"):
        open_split(Recipe(dataset=f"hfds/{tmp_path / 'nowhere'}", data_dir=str(tmp_path / "cache")), "train")


def images_in(root, *names):
    for color, name in enumerate(names):
        save_image(root / name, color)
    return str(root)


def list_of_one_twice(root):
    (root / "a.txt").write_text("a/0.png 0\nb/0.png 1\n")
    (root / "b.txt").write_text("./a/0.png 0\nb/1.png 1\n")
    return {"dataset": "list", "train_list": "a.txt", "val_list": "b.txt"}


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (
            lambda root: {"dataset": "digits", "data_dir": None, "val_split": "train"},
            "split 'train': 1,457 of its 1,457 images are",
        ),
        (lambda root: {"dataset": "digits", "data_dir": None}, None),
        (lambda root: {"dataset": "folder", "val_split": "train"}, "split 'train': 2 of its 2 images are trained on"),
        (lambda root: {"dataset": "folder", "val_split": "validation"}, None),
        (list_of_one_twice, "split 'validation': 1 of its 2 images are trained on"),
    ],
)
def test_evaluated_images_that_are_trained_on_are_said(keys, line, tmp_path):
    folder = images_in(tmp_path, "a/0.png", "a/1.png", "b/0.png", "b/1.png")
    data = open_data(Recipe(**{"data_dir": folder, "imbalance": "none", "workers": 0, **keys(tmp_path)}))
    said = [text for text in summary(data) if "trained on" in text]
    assert len(said) == (line is not None)
    assert all(text.startswith(f"warning: {line}") for text in said)


def test_a_download_does_not_go_into_a_folder_of_somebodys_own_images(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "torchvision.datasets.cifar.download_and_extract_archive", lambda *a, **k: pytest.fail("downloaded")
    )
    (tmp_path / "fox").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "fox" / "1.png")
    with pytest.raises(DataError, match=rf"no CIFAR100.*own train with: mbib train finetune/.* --data-dir {tmp_path} "):
        open_split(Recipe(dataset="torch/cifar100", data_dir=str(tmp_path), dataset_download=True), "train")
