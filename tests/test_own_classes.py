"""Evaluation matches classes by name: other orders, subsets, unknown names, other folders."""

import json
import re
import shutil
import unicodedata
from dataclasses import replace

import numpy as np
import pytest
from archive_images import png, tar_bytes, write
from PIL import Image
from small_data import CPU, arrays

from mbib_timm.cli import main
from mbib_timm.data import match_classes, missing_classes, open_data, open_split, summary
from mbib_timm.environment import World
from mbib_timm.errors import DataError
from mbib_timm.evaluation.target import find_target, learnt_by, open_target
from mbib_timm.models.weights import find_source
from mbib_timm.recipe import Recipe

NAMES = ("ant", "bee", "red fox", "Wölfe")
COLORS = {"ant": (250, 30, 30), "bee": (30, 250, 30), "red fox": (30, 30, 250), "Wölfe": (240, 240, 30)}


def split(names, targets):
    return replace(arrays(len(targets))[0], targets=np.array(targets), class_names=None if names is None else names)


# Matching


def test_another_order_and_a_subset_get_the_labels_of_training():
    matched = match_classes("test", split(("Wölfe", "bee"), [0, 1, 1, 0]), NAMES, 4)
    assert matched.targets.tolist() == [3, 1, 1, 3]
    assert matched.class_names == NAMES
    assert missing_classes("test", matched, 4) == (
        "split 'test' has no images of 2 of the 4 classes, which are not measured: ant, red fox"
    )
    whole = match_classes("test", split(NAMES, [0, 1, 2, 3]), NAMES, 4)
    assert whole.targets.tolist() == [0, 1, 2, 3]
    assert missing_classes("test", whole, 4) == ""


def test_against_a_loop_over_shuffled_names():
    rng = np.random.RandomState(0)
    names = tuple(f"class {i}" for i in range(30))
    for _ in range(10):
        own = tuple(rng.permutation(names)[: rng.randint(2, 30)].tolist())
        targets = rng.randint(0, len(own), 50)
        matched = match_classes("test", split(own, targets), names, 30)
        assert [names[label] for label in matched.targets] == [own[label] for label in targets]


def test_an_unknown_name_is_an_error_that_says_which_and_the_nearest():
    with pytest.raises(DataError, match=r"has 2 classes not in training: 'Red Fox' \(did you mean 'red fox'\?\)"):
        match_classes("test", split(("bee", "Red Fox", "zzzz"), [0, 1, 2]), NAMES, 4)


def test_names_of_which_training_has_none():
    learn = "; the model knows other classes"
    with pytest.raises(
        DataError, match=r"not in training: 'antt', 'Bee'; training has .*'Wölfe'; the model knows other"
    ):
        match_classes("test", split(("antt", "Bee"), [0, 1]), NAMES, 4, learn)
    with pytest.raises(
        DataError, match=r"1 class not in training: 'Bee' \(did you mean 'bee'\?\); rename it, or leave it"
    ):
        match_classes("test", split(("ant", "Bee"), [0, 1]), NAMES, 4, learn)


def test_where_most_names_are_foreign_none_is_a_slip():
    learn = "; the model knows other classes"
    with pytest.raises(DataError, match=r"not in training: 'badger', 'antt'; training has .*the model knows other"):
        match_classes("test", split(("badger", "antt", "bee"), [0, 1, 2]), NAMES, 4, learn)
    with pytest.raises(DataError, match=r"1 class not in training: 'badger'; training has"):
        match_classes("test", split(("badger", "bridge"), [0, 1]), ("bridge", "fox"), 2)


DINO = {"backbone": "vit_base_patch14_reg4_dinov2.lvd142m", "classifier": "cosine", "classifier_scale": 25}


@pytest.mark.parametrize(
    ("architecture", "arguments", "side", "recipe"),
    [
        ("mbib_resnet32", {}, 32, "finetune/mbib_resnet32"),
        ("cifar_resnet20", {}, 16, "finetune/mbib_resnet32"),
        ("mbib_efficientnet_lite0", {}, 128, "finetune/mbib_resnet50"),
        ("mbib", DINO, 224, "finetune/mbib_vit_base"),
        ("mbib", {**DINO, "backbone": "resnet18"}, 224, "finetune/mbib_resnet50"),
        ("resnet50", {}, 224, "finetune/mbib_resnet50"),
    ],
)
def test_the_recipe_that_learns_other_classes_fits_the_model(tmp_path, architecture, arguments, side, recipe):
    config = {"architecture": architecture, "model_args": {"num_classes": 4, **arguments}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert learnt_by(find_source(str(tmp_path)), side) == recipe


def test_the_recipe_that_learns_other_classes_keeps_the_parts_of_a_published_model():
    zoo = find_source("mbib_efficientnet_lite0.frozen_cifar100_lt_if100")
    assert learnt_by(zoo, 128) == "frozen/mbib_efficientnet_lite0"
    assert learnt_by(find_source("resnet50.a1_in1k"), 224) == "finetune/mbib_resnet50"


def test_an_unknown_name_without_images_is_none():
    assert match_classes("test", split(("bee", "eel", "ant"), [0, 2]), NAMES, 4).targets.tolist() == [1, 0]


def test_names_that_are_composed_otherwise_are_the_same():
    decomposed = tuple(unicodedata.normalize("NFD", name) for name in NAMES)
    assert decomposed != NAMES
    assert match_classes("test", split(decomposed, [3, 0]), NAMES, 4).targets.tolist() == [3, 0]


def test_names_that_stand_for_two_classes_do_not_match():
    with pytest.raises(DataError, match="training has two classes 'crane'"):
        match_classes("test", split(("crane", "ant"), [0, 1]), ("crane", "ant", "crane"), 3)
    same = ("crane", "ant", "crane")
    assert match_classes("test", split(same, [2, 0]), same, 3).targets.tolist() == [2, 0]


def test_without_names_the_numbers_decide():
    assert match_classes("test", split(None, [3, 0]), NAMES, 4).targets.tolist() == [3, 0]
    assert match_classes("test", split(NAMES, [3, 0]), None, 4).targets.tolist() == [3, 0]
    with pytest.raises(DataError, match=r"labels 0\.\.4, training has 4 classes"):
        match_classes("test", split(None, [4, 0]), NAMES, 4)
    with pytest.raises(DataError, match="has 4 classes, training has 3, without names to match"):
        match_classes("test", split(NAMES, [0]), None, 3)
    with pytest.raises(DataError, match="has no images"):
        match_classes("test", split(NAMES, []), NAMES, 4)


# Folders, and what commands say of them


def colored(folder, counts, seed=0):
    """Class folders of noisy images of a class's colour, 16 x 16."""
    rng = np.random.RandomState(seed)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.clip(np.array(COLORS[name]) + rng.normal(0, 20, (16, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on folders of 40, 20, 10 and 1 images, which no class needs more of."""
    root = tmp_path_factory.mktemp("own")
    images = colored(root / "images", dict(zip(NAMES, (40, 20, 10, 1), strict=True)))
    arguments = ["--dataset", "folder", "--data-dir", str(images), "--epochs", "6", "--warmup-epochs", "0"]
    arguments += ["--batch-size", "16", "--device", "cpu", "--imbalance", "none", "--val-split", "validation"]
    arguments += ["--workers", "0", "--output", str(root), "--experiment", "run", "--image-cache", "none"]
    assert main(["train", "cifar_resnet20.ce_digits", *arguments]) == 0
    return root / "run"


def test_training_says_which_classes_its_evaluation_lacks(tmp_path, capsys):
    images = colored(tmp_path / "images", {"ant": 4, "bee": 4, "Wölfe": 1})
    data = open_data(Recipe(dataset="folder", data_dir=str(images)))
    assert set(data.class_names) == {"Wölfe", "ant", "bee"}
    assert "classes without an evaluation image: 1 (Wölfe)" in summary(data)
    colored(tmp_path / "split" / "train", {"ant": 2, "bee": 2, "Wölfe": 2})
    colored(tmp_path / "split" / "val", {"bee": 2, "Wölfe": 1})
    data = open_data(Recipe(dataset="folder", data_dir=str(tmp_path / "split")))
    assert sorted(data.class_names[label] for label in data.val.targets) == ["Wölfe", "bee", "bee"]
    assert "classes without an evaluation image: 1 (ant)" in summary(data)


def validated(run, capsys, *flags):
    capsys.readouterr()
    status = main(["validate", str(run), "--device", "cpu", "--workers", "0", *flags])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_other_data_in_another_order_are_matched_by_name_and_evaluated_whole(run, tmp_path, capsys):
    """Without the ant, label 0 would be the bee's: by number a good model would be wrong everywhere."""
    other = colored(tmp_path / "other", {"bee": 7, "red fox": 5, "Wölfe": 3}, seed=1)
    file = tmp_path / "metrics.json"
    status, out, _ = validated(run, capsys, "--data-dir", str(other), "--results", str(file))
    assert status == 0
    assert f"evaluating all 15 images of {other}\n" in out
    assert "training would hold out" not in out, "where the model was trained on none of them"
    assert "no images of 1 of the 4 classes, which are not measured: ant" in out
    results = json.loads(file.read_text())
    prediction = results["heads"]["prediction"]
    assert results["split"] == "all"
    assert prediction["images"] == 15
    opened = open_target(find_target(str(run), overrides={"data_dir": str(other), "device": "cpu"}), World(CPU))
    names = [opened.class_names[label] for label in opened.images.targets]
    assert [opened.images.reader.path(i).split("/")[-2] for i in range(15)] == names
    assert prediction["per_class"][opened.class_names.index("ant")] is None
    assert prediction["per_class"][opened.class_names.index("bee")] > 80
    assert prediction["per_class"][opened.class_names.index("red fox")] > 80


def test_a_share_and_the_same_data_are_evaluated_as_in_training(run, tmp_path, capsys):
    other = colored(tmp_path / "other", {"bee": 10, "ant": 5})
    _, out, _ = validated(run, capsys, "--data-dir", str(other), "--split", "validation")
    assert "on validation:" in out
    _, out, _ = validated(run, capsys)
    assert "on validation:" in out
    _, out, _ = validated(run, capsys, "--data-dir", str(run.parent / "run" / ".." / "images"))
    assert "on validation:" in out, "the same folder by another name"


def test_what_is_held_out_for_validation_is_no_test_split(run, capsys):
    assert main(["validate", str(run), "--split", "test"]) == 2
    said = "there is no split 'test': the data have none of their own, and are split into train and validation; all has"
    assert said in capsys.readouterr().err
    said = "the data have no test split of their own, and this is their validation split"
    for split in ((), ("--split", "test")):
        assert main(["validate", str(run), "--val-split", "test", *split]) == 0
        assert re.search(rf"(?m)^split 'test': 2\d % of each class, drawn.* seed 0; {said}$", capsys.readouterr().out)
    assert main(["validate", str(run)]) == 0
    assert said not in capsys.readouterr().out


def test_splits_of_other_data_are_kept(run, tmp_path, capsys):
    colored(tmp_path / "other" / "train", {"bee": 2, "ant": 2})
    colored(tmp_path / "other" / "val", {"bee": 3, "ant": 2})
    _, out, _ = validated(run, capsys, "--data-dir", str(tmp_path / "other"))
    assert "on validation:" in out
    with pytest.raises(DataError, match="has no split 'all'"):
        open_split(Recipe(dataset="folder", data_dir=str(tmp_path / "other")), "all")


def test_other_data_need_no_groups(run, tmp_path, capsys):
    other = colored(tmp_path / "other", {"bee": 1})
    for flags in ([], ["--split", "all"]):
        status, out, err = validated(run, capsys, "--data-dir", str(other), "--group-by", "folder:1", *flags)
        assert (status, err) == (0, "")
        assert "on all:" in out


def test_what_is_not_measured_is_named(run, tmp_path, capsys):
    other = colored(tmp_path / "other", {"bee": 2, "ant": 2})
    (other / "bee" / "broken.png").write_text("no image")
    (other / "bee" / "phone.heic").write_bytes(b"")
    status, out, _ = validated(run, capsys, "--data-dir", str(other), "--results", str(tmp_path / "r.json"))
    assert status == 0
    assert "warning: left out: images of unsupported kinds: 1 (bee/phone.heic)\n" in out
    assert f"warning: left out: images that cannot be read: 1 ({other}/bee/broken.png)\n" in out
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["left_out_images"] == [f"{other}/bee/broken.png"]
    assert results["heads"]["prediction"]["images"] == 4


def test_a_renamed_folder_is_an_error(run, tmp_path, capsys):
    other = colored(tmp_path / "other", {"bee": 2, "ant": 2})
    (other / "bee").rename(other / "Bees")
    status, out, err = validated(run, capsys, "--data-dir", str(other))
    assert status == 2
    assert out == ""
    assert err == (
        "mbib: error: split 'all' has 1 class not in training: 'Bees' (did you mean 'bee'?); rename it, or leave it "
        "out\n"
    )  # fmt: skip


# Runs whose images came from a list, or from shards


def trained_from(run, folder, named, **keys):
    """A copy of a run that says that its images came from elsewhere, with or without the names of their classes."""
    shutil.copytree(run, folder)
    (folder / "recipe.yaml").write_text("\n".join(f"{key}: {value}" for key, value in keys.items()))
    if not named:
        config = json.loads((folder / "config.json").read_text())
        for key in ("label_names", "label_descriptions"):
            config.pop(key, None)
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def of_list(run, place, named=True):
    """A run from a list that lies beside its images."""
    images = colored(place / "listed", {"bee": 2, "ant": 1})
    labels = open_target(find_target(str(run), overrides={"device": "cpu"}), World(CPU)).class_names
    files = sorted(images.glob("*/*.png"))
    lines = [f"{file.parent.name}/{file.name} {labels.index(file.parent.name)}\n" for file in files]
    (images / "val.txt").write_text("".join(lines))
    places = dict(data_dir=images, train_list="val.txt", val_list="val.txt")
    return trained_from(run, place / "of list", named, dataset="list", **places)


def of_shards(run, place, named=True):
    """A run from shards, of one image."""
    write(place / "shards" / "train-0.tar", tar_bytes([("0.png", png(0)), ("0.cls", b"1")]))
    return trained_from(run, place / "of shards", named, dataset="wds", data_dir=place / "shards")


@pytest.fixture
def other(tmp_path):
    """A folder of class folders, whose images no list names."""
    root = colored(tmp_path / "other", {"bee": 7, "red fox": 5, "Wölfe": 3}, seed=1)
    for file in root.glob("*/*.png"):
        file.rename(file.with_name(f"new {file.name}"))
    return root


def test_of_images_that_were_trained_on_it_says_how_to_take_the_others(run, tmp_path, capsys):
    table, images = tmp_path / "ants.csv", run.parent / "images"
    table.write_text("path,label\n" + "".join(f"ant/{i}.png,ant\n" for i in range(40)))
    where = ["--dataset", "table", "--table", str(table), "--data-dir", str(images)]
    _, out, _ = validated(run, capsys, *where)
    hint = "--split validation takes only the images that training would hold out\n"
    assert f"evaluating all 40 images of {table}\n" in out
    assert "warning: 32 of the 40 evaluated images" in out
    assert hint in out
    _, out, _ = validated(run, capsys, *where, "--split", "all")
    assert hint not in out, "who names a split knows it"


def test_a_list_is_evaluated_where_a_folder_has_its_images(run, tmp_path, capsys):
    trained, copy = of_list(run, tmp_path), tmp_path / "copy"
    _, own, _ = validated(trained, capsys)
    shutil.copytree(tmp_path / "listed", copy)
    (copy / "val.txt").unlink()  # images alone: the list is that of before
    shutil.copytree(copy / "ant", copy / "red fox")
    note = f"evaluating the images that the run's list names, under {copy}; --dataset folder takes all that are there"
    status, out, _ = validated(trained, capsys, "--data-dir", str(copy))
    assert status == 0
    assert note in out
    assert note not in own
    assert out.endswith(own[own.index(f"{trained} on validation") :])
    _, out, _ = validated(trained, capsys, "--data-dir", str(copy), "--dataset", "folder")
    assert f"evaluating all 4 images of {copy}\n" in out


@pytest.mark.parametrize("source", [of_list, of_shards])
def test_class_folders_are_evaluated_where_nothing_is_of_a_list_or_of_shards(run, tmp_path, capsys, source, other):
    trained = source(run, tmp_path)
    status, out, err = validated(trained, capsys, "--data-dir", str(other))
    assert (status, err) == (0, "")
    assert f"evaluating all 15 images of {other}\n" in out
    _, expected, _ = validated(run, capsys, "--data-dir", str(other))
    assert out.partition(" on all:")[2] == expected.partition(" on all:")[2]


@pytest.mark.parametrize(("source", "more"), [(of_list, []), (of_shards, ["--dataset", "list"])])
def test_without_class_names_labels_are_asked_for(run, tmp_path, capsys, source, more, other):
    trained = source(run, tmp_path, named=False)
    status, out, err = validated(trained, capsys, "--data-dir", str(other))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert f"--data-dir {other}: the folder has no" in err
    assert f"add {' '.join([*more, '--val-list FILE'])}, with lines '<relative path> <label>'" in err
    (tmp_path / "new.txt").write_text("bee/new 0.png 1\nbee/new 1.png 1\n")
    status, out, _ = validated(
        trained, capsys, "--data-dir", str(other), *more, "--val-list", str(tmp_path / "new.txt")
    )
    assert status == 0
    assert f"{trained} on validation:" in out
