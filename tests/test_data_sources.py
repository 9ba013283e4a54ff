"""What sources refuse and what they put up with: empty classes, damaged tars, bad lists, both ImageNet layouts."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from mbib_timm.data import build_eval_loader, open_data, open_split
from mbib_timm.data.class_counts import count_classes
from mbib_timm.data.images import ArrayReader, ImageDataset, Split
from mbib_timm.data.lists import open_inaturalist, open_list
from mbib_timm.data.loaders import Place
from mbib_timm.data.long_tail import exponential_profile, hold_out, step_profile
from mbib_timm.data.timm_loader import timm_eval_loader
from mbib_timm.errors import DataError
from mbib_timm.recipe import Recipe

CPU = torch.device("cpu")


def save_image(path, color=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (color, 0, 0)).save(path)


def folder_recipe(root, **keys):
    return Recipe(dataset="folder", data_dir=str(root), workers=0, img_size=16, **keys)


# Folders and tars


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
        list(timm_eval_loader(split, folder_recipe(tmp_path), (3, 16, 16), Place(CPU)))


def test_a_folder_without_the_split_says_what_there_is(tmp_path):
    save_image(tmp_path / "train" / "ant" / "1.png")
    with pytest.raises(DataError, match="holds no split 'validation': there is train"):
        open_split(folder_recipe(tmp_path), "validation")


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.9])
def test_holding_out_leaves_each_class_an_image_to_train_on(fraction):
    targets = np.repeat(np.arange(4), [1, 2, 5, 40])
    held_out = hold_out(targets, fraction, np.random.RandomState(0))
    counts = np.bincount(targets[held_out], minlength=4)
    assert (np.bincount(targets[~held_out], minlength=4) >= 1).all()
    assert counts[0] == 0
    assert (counts[1:] >= 1).all()


def test_evaluation_of_a_model_with_another_number_of_classes_is_refused(tmp_path):
    for label in ("ant", "bee"):
        for i in range(2):
            save_image(tmp_path / label / f"{i}.png")
    with pytest.raises(DataError, match="split 'validation' has 2 classes, the model has 3"):
        build_eval_loader(folder_recipe(tmp_path), "validation", input_size=(3, 16, 16), num_classes=3, device=CPU)


# Lists and json


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
    (tmp_path / "list.txt").write_text("a b.png\t1\r\n\n  é..png   0\n")
    split = open_list("list.txt", str(tmp_path), "train_list", None)
    assert split.targets.tolist() == [1, 0]
    assert [split.reader.name(i) for i in range(2)] == ["a b.png", "é..png"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a.png 0\n\na.png -2\n", r"line 3: label -2 is negative"),
        (b"a.png 99999999999999999999\n", r"line 1: label 9+ is too large"),
        (b"a.png 0x1\n", r"line 1: label '0x1' is not an integer"),
        (b"\\\\host\\a.png 0\n", "line 1: .* must be a path below"),
        (b"\xff\xd8\xff\xe0\n", "is not a text file"),
    ],
)
def test_more_bad_lists(tmp_path, content, message):
    save_image(tmp_path / "a.png")
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_list("list.txt", str(tmp_path), "train_list", None)


def test_one_missing_image_is_a_broken_image_and_no_wrong_folder(tmp_path):
    save_image(tmp_path / "b.png")
    (tmp_path / "list.txt").write_text("a.png 0\nb.png 1\n")
    settings = Recipe(dataset="list", data_dir=str(tmp_path), train_list="list.txt", val_list="list.txt", workers=0)
    with pytest.raises(DataError, match=r"cannot read image .*a\.png"):
        list(timm_eval_loader(open_data(settings).val, settings, (3, 16, 16), Place(CPU)))


def test_a_split_that_no_list_is_for(tmp_path):
    settings = Recipe(dataset="list", data_dir=str(tmp_path), train_list="list.txt", val_list="list.txt")
    with pytest.raises(DataError, match="there is no list of split 'holdout': the recipe names train, validation"):
        open_split(settings, "holdout")
    with pytest.raises(DataError, match="recipe key 'test_list' is needed"):
        open_split(settings, "test")


def test_a_class_map_says_how_many_classes_there_are(tmp_path):
    save_image(tmp_path / "a.png")
    (tmp_path / "list.txt").write_text("a.png 0\na.png 1\n")
    keys = dict(dataset="list", data_dir=str(tmp_path), train_list="list.txt", val_list="list.txt")
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\n")
    with pytest.raises(DataError, match="no training images of class cat"):
        open_data(Recipe(**keys, class_map=str(tmp_path / "names.txt")))
    (tmp_path / "names.txt").write_text("ant\n")
    with pytest.raises(DataError, match="label 1 has no name: the class map names 1 classes"):
        open_data(Recipe(**keys, class_map=str(tmp_path / "names.txt")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["annotations"].pop(), r"image 3 \(b\.jpg\) has no annotation with a known category"),
        (lambda c: c["annotations"][0].update(category_id=5), r"image 7 \(a\.jpg\) has no annotation with a known"),
        (lambda c: c["annotations"][0].update(category_id=0.5), r"image 7 \(a\.jpg\) has no annotation with a known"),
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


# Hugging Face datasets


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


# Counts and images


def test_a_stray_large_label_costs_no_memory():
    with pytest.raises(DataError, match="no training images of class 1, 3, 4, 5, 6 and 999999999992 more"):
        count_classes(np.array([0, 2, 10**12 - 1]), 10**12)


@pytest.mark.parametrize("profile", [exponential_profile, step_profile])
def test_the_smallest_class_keeps_the_one_image_it_is_due(profile):
    """49 * (1 / 49) is a hair below 1."""
    assert [profile(5, largest, largest)[-1] for largest in range(2, 200)] == [1] * 198


def test_images_that_are_all_broken_are_an_error_in_training_too():
    class NoReader:
        def read(self, index):
            raise OSError(f"truncated\nat {index}")

        def path(self, index):
            return f"{index}.png"

    dataset = ImageDataset(Split(NoReader(), np.zeros(3, dtype=int)), "RGB", np.asarray, replace_broken=True)
    with pytest.raises(DataError, match=r"^none of the 3 training images .*cannot read image 0\.png: truncated$"):
        dataset[1]
    assert dataset.broken() == ["0.png", "1.png", "2.png"]


def test_an_error_of_a_transform_is_no_broken_image():
    def fail(image):
        raise ZeroDivisionError

    split = Split(ArrayReader(np.zeros((2, 4, 4, 3), np.uint8), "x"), np.arange(2))
    with pytest.raises(ZeroDivisionError):
        ImageDataset(split, "RGB", fail, replace_broken=True)[0]
