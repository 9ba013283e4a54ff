"""Sources, transforms and loaders, on small data that the tests make and on the real files where they are."""

import itertools
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mbib_timm.data import build_eval_loader, create_loaders, open_data, open_split
from mbib_timm.data.digits import open_digits
from mbib_timm.data.images import ArrayReader, Split
from mbib_timm.data.lists import open_inaturalist, open_list
from mbib_timm.data.loaders import Place, ShardSampler, training_sampler
from mbib_timm.data.resident import decode_split, resident_loader
from mbib_timm.data.timm_loader import timm_eval_loader, timm_train_loader
from mbib_timm.data.transforms import eval_transform, train_transform
from mbib_timm.errors import DataError, MbibError
from mbib_timm.recipe import Recipe

CPU = Place(torch.device("cpu"))
SIZE = (3, 16, 16)


def picture(color, size=(20, 20), mode="RGB"):
    rng = np.random.RandomState(color)
    return Image.fromarray(rng.randint(0, 256, (*size, 3), dtype=np.uint8)).convert(mode)


@pytest.fixture
def folder(tmp_path):
    """Class folders of 12, 5, 3 and 1 images."""
    for label, count in {"ant": 12, "bee": 5, "cat": 3, "dog": 1}.items():
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(count):
            picture(i).save(tmp_path / "images" / label / f"{i}.png")
    return tmp_path / "images"


def arrays(count=40, classes=4, size=16):
    rng = np.random.RandomState(0)
    images = rng.randint(0, 256, (count, size, size, 3), dtype=np.uint8)
    return Split(ArrayReader(images, "arrays"), np.arange(count) % classes), images


def recipe(**keys):
    return Recipe(**{"workers": 0, "train_crop_mode": "pad", "img_size": 16, "mean": [0.5], "std": [0.25], **keys})


# Sources


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
    settings = recipe(dataset="folder", data_dir=str(root))
    loader = build_eval_loader(settings, "test", input_size=SIZE, num_classes=4, device=CPU.device)
    batch = next(iter(loader))
    assert batch.images.shape == (4, 3, 16, 16)
    assert batch.targets.tolist() == batch.index.tolist() == [0, 1, 2, 3]


def test_a_test_split_with_other_classes_is_refused(folder, tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    folder.rename(root / "train")
    for label in ("ant", "eel"):
        (root / "val" / label).mkdir(parents=True)
        picture(1).save(root / "val" / label / "0.png")
    with pytest.raises(DataError, match="other classes than training: bee, cat, dog, eel"):
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
    loaders = create_loaders(data, settings, SIZE, CPU.device)
    assert sum(len(batch.targets) for batch in loaders.test) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train/n01/a.JPEG", "line 2: expected '<relative path> <label>'"),
        ("train/n01/a.JPEG one", "line 2: label 'one' is not an integer"),
        ("train/n01/a.JPEG 1.5", r"line 2: label '1\.5' is not an integer"),
        ("train/n01/a.JPEG -1", "line 2: label -1 is negative"),
        ("/etc/passwd 1", "line 2: '/etc/passwd' must be a path below"),
        ("../secret.JPEG 1", r"line 2: '\.\./secret.JPEG' must be a path below"),
        ("train/../../x.JPEG 1", "line 2: .* must be a path below"),
        ("C:\\x.JPEG 1", "line 2: .* must be a path below"),
    ],
)
def test_bad_lines_are_refused_with_their_number(image_list, line, message):
    (image_list / "bad.txt").write_text(f"train/n01/a.JPEG 0\n{line}\n")
    with pytest.raises(DataError, match=message):
        open_list("bad.txt", str(image_list), "train_list", None)


def test_lists_that_fit_nothing(image_list):
    with pytest.raises(DataError, match=r"'train_list': no file nope\.txt"):
        open_list("nope.txt", str(image_list), "train_list", None)
    (image_list / "empty.txt").write_text("")
    with pytest.raises(DataError, match="lists no images"):
        open_list("empty.txt", str(image_list), "train_list", None)
    (image_list / "away.txt").write_text("elsewhere/a.JPEG 0\n")
    with pytest.raises(DataError, match=r"lists elsewhere/a\.JPEG, which is not under data_dir"):
        open_list("away.txt", str(image_list), "train_list", None)
    (image_list / "gap.txt").write_text("train/n01/a.JPEG 0\ntrain/n02/b.JPEG 2\n")
    with pytest.raises(DataError, match="no training images of class 1"):
        open_data(Recipe(dataset="list", data_dir=str(image_list), train_list="gap.txt", val_list="train.txt"))


def test_a_list_of_437_513_lines(tmp_path):
    """In a fresh process, whose peak memory is its own."""
    import subprocess

    lines = "".join(f"train_val2018/Plantae/{i % 8142}/{i:032x}.jpg {i % 8142}\n" for i in range(437_513))
    (tmp_path / "train.txt").write_text(lines)
    first = tmp_path / "train_val2018" / "Plantae" / "0"
    first.mkdir(parents=True)
    picture(0).save(first / f"{0:032x}.jpg")
    script = (
        "import resource, sys, time\n"
        "from mbib_timm.data.lists import open_list\n"
        "from mbib_timm.data.class_counts import count_classes\n"
        "base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "start = time.process_time()\n"
        "split = open_list('train.txt', sys.argv[1], 'train_list', None)\n"
        "counts = count_classes(split.targets, 8142)\n"
        "seconds = time.process_time() - start\n"
        "assert split.reader.name(437512).endswith(f'{437512:032x}.jpg')\n"
        "print(len(split), seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    length, seconds, megabytes = map(float, done.stdout.split())
    assert length == 437_513
    assert seconds < 3
    assert megabytes < 400


def test_real_lists(shared, tmp_path):
    for name, images, classes in [("ImageNet_LT_test.txt", 50_000, 1000), ("iNaturalist18_val.txt", 24_426, 8142)]:
        file = shared / "data" / "lists" / name
        first = tmp_path / file.open().readline().split()[0]
        first.parent.mkdir(parents=True)
        picture(0).save(first)
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
    content["images"][1]["file_name"] = "../b.jpg"
    (tmp_path / "train2018.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="must be a path below"):
        open_inaturalist("train2018.json", str(tmp_path), "train_list")
    (tmp_path / "train2018.json").write_text("{}")
    with pytest.raises(DataError, match="is not iNaturalist's json"):
        open_inaturalist("train2018.json", str(tmp_path), "train_list")


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
    assert len(create_loaders(data, settings, (3, 32, 32), CPU.device).train) == 85


def test_torchvisions_cifar(tmp_path):
    """A tiny CIFAR-10 in torchvision's own format."""
    import hashlib
    import pickle

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
        batches = list(create_loaders(data, settings, SIZE, CPU.device).val)
        assert sum(len(batch.targets) for batch in batches) == 2
    finally:
        patch.undo()


@pytest.mark.parametrize("dataset", ["cifar100", "hfd/x", "folders"])
def test_unknown_sources_are_refused(dataset):
    with pytest.raises(MbibError, match="unknown data source"):
        open_split(Recipe(dataset=dataset), "train")


# Transforms


def test_pad_crop_is_a_window_of_the_padded_image_or_its_mirror():
    _, images = arrays(1)
    image = images[0]
    transform = train_transform(recipe(), (3, 16, 16))
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    windows = {}
    for y in range(5):
        for x in range(5):
            window = padded[y : y + 16, x : x + 16]
            windows[window.tobytes()] = (y, x, False)
            windows[window[:, ::-1].tobytes()] = (y, x, True)
    torch.manual_seed(0)
    seen = [windows[transform(Image.fromarray(image)).permute(1, 2, 0).numpy().tobytes()] for _ in range(1500)]
    assert len(set(seen)) == 50, "every offset and both mirror images occur"
    counts = np.array([seen.count(place) for place in set(seen)])
    assert ((counts - 30) ** 2 / 30).sum() < 95, "about equally often (chi-square, 49 degrees of freedom)"


def test_evaluation_leaves_an_image_of_the_right_size_alone():
    _, images = arrays(1)
    result = eval_transform(recipe(), 16, 16)(Image.fromarray(images[0]))
    assert (result.permute(1, 2, 0).numpy() == images[0]).all()


def test_evaluation_resizes_and_crops_the_centre():
    settings = Recipe(crop_pct=0.5, interpolation="bilinear")
    image = picture(0, (64, 64))
    expected = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR).crop((8, 8, 24, 24)))
    result = eval_transform(settings, 16, 16)(image).permute(1, 2, 0).numpy()
    assert np.abs(result.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("mode", ["rrc", "none", "pad"])
def test_every_crop_mode_gives_uint8_of_the_size(mode):
    keys = {"color_jitter": 0.4, "aa": "rand-m9-mstd0.5"}
    result = train_transform(recipe(train_crop_mode=mode, **keys), (3, 16, 24))(picture(0, (50, 40)))
    assert result.shape == (3, 16, 24)
    assert result.dtype == torch.uint8


# Loaders: every test of this section holds for both.


@pytest.fixture(params=["timm", "resident"])
def build(request):
    """Build a loader for training or for evaluation."""

    def sampler(split, settings, place, training):
        classes = int(split.targets.max()) + 1
        return training_sampler(split.targets, classes, settings, place) if training else None

    def resident(split, settings, size, place, training):
        images = decode_split(split, settings, size, place.device, training, replace_broken=training)
        return resident_loader(images, settings, size, place, sampler(split, settings, place, training))

    def timm(split, settings, size, place, training):
        if not training:
            return timm_eval_loader(split, settings, size, place)
        return timm_train_loader(split, settings, size, place, sampler(split, settings, place, training))

    return {"timm": timm, "resident": resident}[request.param]


def order(loader, epoch):
    loader.set_epoch(epoch)
    return torch.cat([batch.index for batch in loader]).tolist()


def numbered(count):
    images = np.zeros((count, 16, 16, 3), dtype=np.uint8)
    return Split(ArrayReader(images, "numbered"), np.arange(count))


def test_the_order_is_a_function_of_seed_and_epoch(build):
    first = build(numbered(50), recipe(batch_size=8), SIZE, CPU, training=True)
    second = build(numbered(50), recipe(batch_size=8), SIZE, CPU, training=True)
    assert order(first, 3) == order(second, 3)
    assert order(first, 3) != order(first, 4)
    assert order(first, 3) == order(second, 3)
    assert order(first, 3) != order(build(numbered(50), recipe(batch_size=8, seed=1), SIZE, CPU, training=True), 3)
    assert sorted(order(first, 0)) == list(range(50))


@pytest.mark.parametrize(("images", "batches"), [(16, [8, 8]), (20, [8, 8, 4]), (17, [8, 8]), (18, [8, 8, 2])])
def test_the_last_short_batch_is_kept_unless_it_is_a_single_image(build, images, batches):
    loader = build(numbered(images), recipe(batch_size=8), SIZE, CPU, training=True)
    assert [len(batch.targets) for batch in loader] == batches
    assert len(loader) == len(batches)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("images", [1, 10, 20, 41])
def test_evaluation_sees_every_image_exactly_once(build, images, world_size):
    seen = []
    for rank in range(world_size):
        seen += list(ShardSampler(images, rank, world_size))
    assert sorted(seen) == list(range(images))
    loaders = [
        build(numbered(images), recipe(), SIZE, Place(CPU.device, r, world_size), training=False)
        for r in range(world_size)
    ]
    assert sorted(i for loader in loaders for batch in loader for i in batch.index.tolist()) == list(range(images))


def test_training_shards_cover_the_data(build):
    loaders = [
        build(numbered(40), recipe(batch_size=8), SIZE, Place(CPU.device, rank, 2), training=True) for rank in (0, 1)
    ]
    assert sorted(order(loaders[0], 1) + order(loaders[1], 1)) == list(range(40))


def test_normalisation(build):
    split, images = arrays(4)
    settings = recipe(mean=[0.1, 0.2, 0.3], std=[0.5, 0.25, 0.2])
    batch = next(iter(build(split, settings, SIZE, CPU, training=False))).images
    expected = (images / 255 - np.array([0.1, 0.2, 0.3])) / np.array([0.5, 0.25, 0.2])
    np.testing.assert_allclose(batch.permute(0, 2, 3, 1).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA"])
def test_other_colour_modes_become_rgb_or_grey(tmp_path, mode):
    for label in "ab":
        (tmp_path / label).mkdir()
        for i in range(2):
            picture(i).convert(mode if mode != "LA" else "L").convert(mode).save(tmp_path / label / f"{i}.png")
    settings = recipe(dataset="folder", data_dir=str(tmp_path), val_fraction=0.5)
    for channels, loader in itertools.product((3, 1), ("timm", "resident")):
        settings = settings.replace(loader=loader, image_cache="none")
        loaders = create_loaders(open_data(settings), settings, (channels, 16, 16), CPU.device)
        for loader in (*loaders.train.streams, loaders.val):
            assert next(iter(loader)).images.shape == (2, channels, 16, 16)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image(build, folder, workers):
    (folder / "bee" / "1.png").write_bytes(b"not an image")
    (folder / "ant" / "3.png").write_bytes((folder / "ant" / "3.png").read_bytes()[:200])
    settings = recipe(dataset="folder", data_dir=str(folder), workers=workers, batch_size=4, image_cache="none")
    whole = open_split(settings.replace(val_fraction=0.01), "train")
    loader = build(whole, settings, SIZE, CPU, training=True)
    assert sum(len(batch.targets) for batch in loader) >= len(whole) - 1
    broken = {Path(path).relative_to(folder).as_posix() for path in loader.broken_images()}
    in_training = {Path(whole.reader.path(i)).relative_to(folder).as_posix() for i in whole.indices}
    assert broken == {"ant/3.png", "bee/1.png"} & in_training
    assert broken
    with pytest.raises(DataError, match=r"^cannot read image .*(bee/1|ant/3)\.png: .*$") as caught:
        list(build(whole, settings, SIZE, CPU, training=False))
    assert "\n" not in str(caught.value)


def test_timms_augmentation_differs_between_workers_and_epochs():
    split, _ = arrays(8)
    same = Split(split.reader, split.targets, np.zeros(8, dtype=int))
    settings = recipe(batch_size=4, workers=2)
    loader = timm_train_loader(same, settings, SIZE, CPU, training_sampler(same.targets, 4, settings, CPU))
    torch.manual_seed(0)
    batches = [batch.images for epoch in range(2) for batch in loader]
    assert len({image.numpy().tobytes() for images in batches for image in images}) > 8
