"""Long-tailed subsets and held-out images: golden counts and indices, and no trace in global random state."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mbib_timm.data import DataPool
from mbib_timm.data.long_tail import (
    count_classes,
    exponential_profile,
    hold_out,
    largest_class,
    long_tailed_indices,
    shot_groups,
    step_profile,
)
from mbib_timm.data.overview import held_out_line, summary
from mbib_timm.data.sources import SOURCES, Source, open_digits, without
from mbib_timm.data.splits import open_data
from mbib_timm.errors import DataError
from mbib_timm.recipe import Recipe


@pytest.mark.parametrize(
    ("factor", "total", "groups"),
    [(100, 10_847, (35, 35, 30)), (50, 12_608, (41, 41, 18)), (10, 19_573, (69, 31, 0))],
)
def test_cifar_100_lt(factor, total, groups):
    counts = exponential_profile(100, 500, factor)
    assert sum(counts) == total
    assert counts[0] == 500
    assert counts[-1] == 500 // factor
    assert tuple(len(classes) for classes in shot_groups(np.array(counts)).values()) == groups


def test_cifar_10_lt():
    assert exponential_profile(10, 5000, 100) == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]


@pytest.mark.parametrize("shape", ["exp", "step"])
def test_an_imbalance_that_a_class_cannot_fill_names_the_class(shape):
    sizes = np.array([3, 20, 30])
    with pytest.raises(DataError, match="class ant has 3 images, and imbalance factor 10 asks for 10 or more"):
        largest_class(sizes, shape, 10.0, ("ant", "bee", "cow"))
    with pytest.raises(DataError, match="factor 31 leaves the smallest class no image where the largest has 30"):
        largest_class(sizes, shape, 31.0)
    assert largest_class(sizes, shape, 3.0) == 3
    assert largest_class(np.array([1, 1]), shape, 1.0) == 1


def test_step_shape():
    assert step_profile(5, 40, 8) == [40, 40, 5, 5, 5]


def test_index_stream():
    """The images that a balanced, shuffled data set yields: a change here is another CIFAR-100-LT."""
    targets = np.random.RandomState(7).permutation(np.repeat(np.arange(100), 500))
    indices = long_tailed_indices(targets, exponential_profile(100, 500, 100), seed=0)
    digest = hashlib.sha256(indices.astype("<i8").tobytes()).hexdigest()
    assert digest[:16] == "1fe4a345fdc2fc88"


def test_the_stream_is_that_of_cao_et_al():
    targets = np.random.RandomState(7).permutation(np.repeat(np.arange(10), 50))
    counts = exponential_profile(10, 50, 10)
    generator = np.random.RandomState(3)
    expected = []
    for label, count in enumerate(counts):
        members = np.where(targets == label)[0]
        generator.shuffle(members)
        expected.extend(members[:count])
    assert long_tailed_indices(targets, counts, seed=3).tolist() == expected


def test_the_subset_has_the_profile_without_repeats():
    targets = np.repeat(np.arange(10), 50)
    counts = step_profile(10, 50, 10)
    indices = long_tailed_indices(targets, counts, seed=0)
    assert len(set(indices.tolist())) == len(indices)
    assert np.bincount(targets[indices]).tolist() == counts


def test_global_random_state_is_untouched():
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    long_tailed_indices(np.repeat(np.arange(3), 5), [5, 3, 1], seed=0)
    assert (np.random.get_state()[1] == before).all()


# Images that are never trained on


def digits_recipe(**keys):
    return Recipe(**{"imbalance": "exp", "imbalance_factor": 24.0, "imbalance_max": 144, **keys})


def digits(**keys):
    return open_data(digits_recipe(**keys))


@pytest.mark.slow
def test_a_share_of_each_class_is_held_out_and_not_counted():
    whole, data = digits(), digits(holdout=0.1)
    held_out = np.bincount(data.held_out.targets, minlength=10)
    assert whole.class_counts.tolist() == [144, 101, 71, 49, 35, 24, 17, 12, 8, 6]
    assert held_out.tolist() == [14, 10, 7, 5, 4, 2, 2, 1, 1, 1]
    assert (data.class_counts + held_out == whole.class_counts).all()
    assert (np.bincount(data.train.targets) == data.class_counts).all()
    both = np.concatenate([data.train.indices, data.held_out.indices])
    assert sorted(both) == sorted(whole.train.indices)
    assert data.held_out_from == "10 % of each class's training images, which are not trained on"
    assert (digits(holdout=0.1, seed=5).held_out.indices == data.held_out.indices).all()
    assert set(digits(holdout=0.1, subset_seed=1).held_out.indices) != set(data.held_out.indices)
    digest = hashlib.sha256(data.held_out.indices.astype("<i8").tobytes()).hexdigest()
    assert digest[:16] == "0eedac51e604ac7e"


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9])
def test_every_class_keeps_an_image_and_gives_one_if_it_has_two(share):
    data = digits(imbalance_factor=100.0, holdout=share)
    held_out = np.bincount(data.held_out.targets, minlength=10)
    counts = np.array(exponential_profile(10, 144, 100))
    assert counts[-1] == 1
    assert (data.class_counts >= 1).all()
    assert (held_out[counts > 1] >= 1).all()
    assert held_out[-1] == 0


def test_images_that_the_subset_leaves_out():
    data, source = digits(), open_digits("train")
    assert sorted([*data.train.indices, *data.held_out.indices]) == list(range(len(source)))
    assert data.held_out_from == f"the {len(data.held_out):,} training images that the long-tailed subset leaves out"
    assert (data.held_out.targets == source.targets[data.held_out.indices]).all()
    assert len(data.held_out) == 990


def test_what_no_method_uses_is_not_said_of_the_data():
    """It is said by runs whose method chooses a constant, and of what a recipe keeps back for that."""
    data = digits()
    assert not [line for line in summary(data) if "leaves out" in line or line.startswith("for choosing")]
    where = "the 990 training images that the long-tailed subset leaves out (9 of 10 classes)"
    assert held_out_line(data) == f"for choosing a constant of the method: {where}"
    kept_back = digits_recipe(holdout=0.1)
    (said,) = [line for line in DataPool().introduce(kept_back) if line.startswith("for choosing")]
    where = "10 % of each class's training images, which are not trained on (10 of 10 classes)"
    assert said == f"for choosing a constant of the method: {where}"


def test_settings_can_be_chosen_on_images_that_the_subset_leaves_out():
    """By a loop of its own: of each class those that follow in the shuffle of Cao et al., 50 at most."""
    data, source = digits(val_split="left_out", test_split="test"), open_digits("train")
    generator = np.random.RandomState(0)
    expected = []
    for label, count in enumerate(exponential_profile(10, 144, 24)):
        members = np.where(source.targets == label)[0]
        generator.shuffle(members)
        expected.append(members[count : count + 50])
    assert data.val.indices.tolist() == np.concatenate(expected).tolist()
    assert [len(members) for members in expected] == [0, 47, 50, 50, 50, 50, 50, 50, 50, 50]
    assert (data.val.targets == source.targets[data.val.indices]).all()
    assert data.val.chosen == "up to 50 of each class that the long-tailed subset leaves out of split 'train'"
    assert not set(data.val.indices) & set(data.train.indices)
    assert (data.train.indices == digits().train.indices).all(), "training sees what it saw"
    assert data.test.targets.tolist() == digits().val.targets.tolist()
    assert data.shared == (), "images of one number in two splits are not the same"
    # A method that chooses a constant does so on others.
    assert sorted([*data.train.indices, *data.val.indices, *data.held_out.indices]) == list(range(len(source)))
    assert data.held_out_from.endswith("leaves out beside those evaluated")


def test_images_left_out_of_data_without_splits():
    recipe = digits_recipe(val_split="left_out")
    whole = open_digits("train")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SOURCES._entries, "digits", lambda recipe: whole)
        data = open_data(recipe)
        assert len(data.train) == sum(exponential_profile(10, 144, 24)), "of all of them, none held out beside"
        assert not set(data.val.indices) & set(data.train.indices)
        assert Source(recipe).splits(["left_out"])[0].indices.tolist() == data.val.indices.tolist()
        with_test = open_data(recipe.replace(test_split="test", imbalance_max=None))
        assert not set(with_test.test.indices) & {*with_test.train.indices, *with_test.val.indices}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"imbalance": "none"}, "split 'left_out' is what a long-tailed subset leaves out of training, and the recipe"),
        ({"imbalance": "step", "imbalance_factor": 1.0}, "with imbalance factor 1 every image is trained on"),
    ],
)
def test_where_no_image_is_left_out(changes, said, monkeypatch):
    train = open_digits("train")
    even = train.subset(np.concatenate([np.flatnonzero(train.targets == label)[:100] for label in range(10)]))
    monkeypatch.setitem(SOURCES._entries, "digits", lambda recipe: lambda name: even)
    with pytest.raises(DataError, match=said):
        digits(val_split="left_out", imbalance_max=None, **changes)


def test_the_validation_split_where_there_is_a_test_split(monkeypatch):
    splits = dict(zip(("train", "validation", "test"), np.array_split(np.arange(1457), [800, 1100]), strict=True))
    whole = open_digits("train")
    monkeypatch.setitem(SOURCES._entries, "digits", lambda recipe: lambda name: whole.subset(splits[name]))
    data = digits(imbalance="none", test_split="test")
    assert data.held_out is data.val
    assert data.held_out_from == "the validation split 'validation'"
    data = digits(imbalance="step", imbalance_factor=1.1, imbalance_max=None, test_split="test")
    assert len(data.held_out) < len(data.val), "what the subset leaves out comes first"


def test_classes_without_readable_images_go_by_number_and_not_by_name():
    """Two classes of ImageNet are called crane, and two maillot."""
    split = replace(open_digits("train"), class_names=tuple("abcadefghi"))
    for gone, names in ((0, "bcadefghi"), (3, "abcdefghi")):
        left = without(split, dict.fromkeys(np.flatnonzero(split.targets == gone).tolist(), "damaged"))
        assert left.class_names == tuple(names)
        before = split.targets[split.targets != gone]
        assert left.targets.tolist() == (before - (before > gone)).tolist()
        assert left.targets.dtype == split.targets.dtype


def test_one_split_by_two_names_is_no_test_split():
    """What a method chooses a constant on must not be what its result is measured on."""
    with pytest.raises(DataError, match="'validation' and 'test' are the same 340 images"):
        digits(imbalance="none", test_split="test")
    with pytest.raises(DataError, match="'validation' and 'test' are the same 340 images"):
        digits(test_split="test")


@pytest.mark.parametrize("places", [["train/a", "train/b", "test/a", "test/b"], ["a", "b"]])
def test_nor_is_it_in_folders(tmp_path, places):
    for place in places:
        (tmp_path / place).mkdir(parents=True)
        for number in range(5):
            Image.new("L", (8, 8), number).save(tmp_path / place / f"{number}.png")
    recipe = digits_recipe(
        dataset="folder", data_dir=str(tmp_path), imbalance="none", imbalance_max=None, test_split="test"
    )
    with pytest.raises(DataError, match="'validation' and 'test' are the same"):
        open_data(recipe)
    for label in ("a", "b"):  # one image of its own, the others those of the validation split
        (tmp_path / "lists").mkdir(exist_ok=True)
        for name in ("train", "val", "test"):
            with (tmp_path / "lists" / f"{name}.txt").open("a") as file:
                first = {"train": 0, "val": 2, "test": 3}[name]
                base = f"{'train/' if len(places) > 2 else ''}{label}"
                file.writelines(f"{base}/{number}.png {'ab'.index(label)}\n" for number in range(first, first + 2))
    lists = {f"{name}_list": str(tmp_path / "lists" / f"{name}.txt") for name in ("train", "val", "test")}
    data = open_data(recipe.replace(dataset="list", **lists))
    assert data.held_out is None
    assert data.shared == ("split 'test': 2 of its 4 images are in 'validation' too",)


def test_without_any_of_these_nothing_is_held_out():
    data = digits(imbalance="none")
    assert data.held_out is None
    assert data.held_out_from == "none"


def test_a_subset_of_all_images_leaves_nothing_out(monkeypatch):
    train = open_digits("train")
    even = train.subset(np.concatenate([np.flatnonzero(train.targets == label)[:100] for label in range(10)]))
    test = open_digits("test")
    monkeypatch.setitem(SOURCES._entries, "digits", lambda recipe: lambda name: even if name == "train" else test)
    assert digits(imbalance="step", imbalance_factor=1.0, imbalance_max=None).held_out is None


def test_nothing_can_be_held_out_of_single_images(monkeypatch):
    one = replace(open_digits("train").subset(np.array([0, 1])), class_names=("0", "1"))
    monkeypatch.setitem(SOURCES._entries, "digits", lambda recipe: lambda name: one)
    assert one.targets.tolist() == [0, 1]
    with pytest.raises(DataError, match="recipe key 'holdout': every class has one training image"):
        digits(imbalance="none", holdout=0.5)


# Bad input


@pytest.mark.parametrize("factor", [0, -3, 0.5, float("nan")])
def test_impossible_factors(factor):
    with pytest.raises(DataError, match="imbalance factor must be at least 1"):
        exponential_profile(10, 100, factor)


def test_profiles_that_the_data_cannot_fill():
    with pytest.raises(DataError, match="leaves the smallest class no image where the largest has 50"):
        exponential_profile(10, 50, 100)
    with pytest.raises(DataError, match="class 1 has 2 images, the long-tailed profile asks for 3"):
        long_tailed_indices(np.array([0, 0, 0, 1, 1]), [3, 3], seed=0)


def test_the_largest_profile_that_fits():
    assert largest_class(np.array([60, 55, 50]), "exp", 4) == 60
    assert largest_class(np.array([60, 20, 50]), "exp", 4) == 41
    assert exponential_profile(3, 41, 4)[1] == 20


def test_counting_classes():
    assert count_classes(np.array([0, 2, 1, 2]), 3).tolist() == [1, 1, 2]
    with pytest.raises(DataError, match=r"labels must lie in 0\.\.1 for 2 classes, got 0\.\.2"):
        count_classes(np.array([0, 1, 2]), 2)
    with pytest.raises(DataError, match=r"got -1\.\.1"):
        count_classes(np.array([-1, 1]), 2)
    with pytest.raises(DataError, match="labels must be integers, got float64"):
        count_classes(np.array([0.0, 1.0]), 2)
    with pytest.raises(DataError, match="no training images of class cat, owl"):
        count_classes(np.array([1]), 3, ("cat", "dog", "owl"))
    with pytest.raises(DataError, match="there are no training images"):
        count_classes(np.array([], dtype=int), 3)


def test_a_stray_large_label_costs_no_memory():
    with pytest.raises(DataError, match="no training images of class 1, 3, 4, 5, 6 and 999999999992 more"):
        count_classes(np.array([0, 2, 10**12 - 1]), 10**12)


@pytest.mark.parametrize("profile", [exponential_profile, step_profile])
def test_the_smallest_class_keeps_the_one_image_it_is_due(profile):
    """49 * (1 / 49) is a hair below 1."""
    assert [profile(5, largest, largest)[-1] for largest in range(2, 200)] == [1] * 198


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.9])
def test_holding_out_leaves_each_class_an_image_to_train_on(fraction):
    targets = np.repeat(np.arange(4), [1, 2, 5, 40])
    held_out = hold_out(targets, fraction, np.random.RandomState(0))
    counts = np.bincount(targets[held_out], minlength=4)
    assert (np.bincount(targets[~held_out], minlength=4) >= 1).all()
    assert counts[0] == 0
    assert (counts[1:] >= 1).all()
