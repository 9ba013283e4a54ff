"""Long-tailed subsets: golden counts, the golden index stream, and no trace in global random state."""

import hashlib

import numpy as np
import pytest

from mbib_timm.data.class_counts import count_classes, read_class_counts, shot_groups
from mbib_timm.data.long_tail import exponential_profile, largest_class, long_tailed_indices, step_profile
from mbib_timm.errors import DataError


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


@pytest.mark.parametrize("factor", [0, -3, 0.5, float("nan")])
def test_impossible_factors(factor):
    with pytest.raises(DataError, match="imbalance factor must be at least 1"):
        exponential_profile(10, 100, factor)


def test_profiles_that_the_data_cannot_fill():
    with pytest.raises(DataError, match="leaves no image of the 50"):
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


@pytest.mark.parametrize("text", ["500\n20\n3\n", "[500, 20, 3]"])
def test_reading_class_counts(tmp_path, text):
    (tmp_path / "counts").write_text(text)
    assert read_class_counts(tmp_path / "counts").tolist() == [500, 20, 3]


@pytest.mark.parametrize("text", ["500\nmany\n", "[500, 0]", "[1.5, 2]", "", "[[1]]"])
def test_class_counts_that_are_none(tmp_path, text):
    (tmp_path / "counts").write_text(text)
    with pytest.raises(DataError, match="expected a positive integer for each class"):
        read_class_counts(tmp_path / "counts")
