"""The files of single images and classes against scikit-learn and the model called by hand."""

import base64
import csv
import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scipy import stats
from sklearn import metrics as reference
from small_data import arrays, class_folders

from mbib_timm.data import open_split
from mbib_timm.evaluation import Answers, answer_files
from mbib_timm.evaluation.answer_files import read_confusion, read_errors, write_answers, write_errors
from mbib_timm.recipe import Recipe

NAMES = ('a "quoted" name', "Käfer, groß", "new\nline", "=1+1")
# As they stand in files that people open in spreadsheets.
SHOWN = ('a "quoted" name', "Käfer, groß", "new\\nline", "'=1+1")
COUNTS = np.array([200, 40, 7, 1])


def made_up(count=40):
    """A split of images in memory, and answers for all of them but the first."""
    rng = np.random.RandomState(1)
    split = replace(arrays(count)[0], targets=np.arange(count) % 3)
    targets = split.targets[1:]
    predicted = np.where(rng.rand(count - 1) < 0.5, targets, rng.randint(0, 4, count - 1))
    return split, Answers(np.arange(1, count), targets, predicted, rng.rand(count - 1))


def rows_of(file):
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.reader(lines))


def test_predictions_confusion_and_classes(tmp_path):
    split, answers = made_up()
    files = write_answers(tmp_path, answers, split, COUNTS, NAMES, None, prefix="x_")
    assert [file.name for file in files] == ["x_predictions.csv", "x_confusion.csv", "x_classes.csv"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(file.name for file in files)
    header, *rows = rows_of(files[0])
    assert header == ["image", "class", "predicted", "probability"]
    assert [row[0] for row in rows] == [f"arrays[{i}]" for i in range(1, 40)]
    assert [row[1:3] for row in rows] == [
        [SHOWN[y], SHOWN[p]] for y, p in zip(answers.targets, answers.predicted, strict=True)
    ]
    assert [float(row[3]) for row in rows] == pytest.approx(answers.probability.tolist(), abs=1e-6)

    header, *rows = rows_of(files[1])
    expected = reference.confusion_matrix(answers.targets, answers.predicted, labels=range(4))
    assert header[1:] == list(SHOWN)
    assert [row[0] for row in rows] == list(SHOWN)
    assert np.array([row[1:] for row in rows], dtype=int).tolist() == expected.tolist()

    header, *rows = rows_of(files[2])
    assert header == [
        "class", "training_images", "evaluated_images", "accuracy", "accuracy_low", "accuracy_high", "f1"
    ]  # fmt: skip
    f1 = reference.f1_score(answers.targets, answers.predicted, average=None, labels=range(4))
    for label, (name, trained, evaluated, *numbers) in enumerate(rows):
        total, right = expected[label].sum(), expected[label, label]
        assert (name, int(trained), int(evaluated)) == (SHOWN[label], COUNTS[label], total)
        if not total:
            assert numbers == [""] * 4
            continue
        interval = stats.binomtest(int(right), int(total)).proportion_ci(method="wilson")
        by_hand = [100 * right / total, 100 * interval.low, 100 * interval.high, 100 * f1[label]]
        assert [float(number) for number in numbers] == pytest.approx(by_hand, abs=0.006)


@pytest.mark.parametrize("largest", [500, 3])
def test_a_confusion_matrix_is_read_back(tmp_path, largest, monkeypatch):
    """Of more classes than a matrix has room for, as a list of its cells."""
    monkeypatch.setattr(answer_files, "LARGEST_MATRIX", largest)
    split, answers = made_up()
    write_answers(tmp_path, answers, split, COUNTS, NAMES, None)
    found = read_confusion(tmp_path)
    expected = reference.confusion_matrix(answers.targets, answers.predicted, labels=range(4))
    order = [NAMES.index(name.replace("\\n", "\n")) for name in found.names]
    assert found.dense().tolist() == expected[np.ix_(order, order)].tolist()
    assert (len(rows_of(tmp_path / "confusion.csv")) == 5) == (largest == 500)


def test_classes_without_names_are_numbers(tmp_path):
    split, answers = made_up()
    write_answers(tmp_path, answers, split, COUNTS, None, None)
    assert read_confusion(tmp_path).names == ("0", "1", "2", "3")


def test_paths_are_below_the_folder_of_the_data(tmp_path):
    root = class_folders(tmp_path)
    split = open_split(Recipe(dataset="folder", data_dir=str(root)), "train")
    answers = Answers(np.arange(2), split.targets[:2], split.targets[:2], np.ones(2))
    for data_dir in (str(root), f"{root}/", f"{root}/../images"):
        write_answers(tmp_path, answers, split, np.array([12, 5, 3, 1]), split.class_names, data_dir)
        assert all(row[0].startswith("ant/") for row in rows_of(tmp_path / "predictions.csv")[1:])
    write_answers(tmp_path, answers, split, np.array([12, 5, 3, 1]), split.class_names, str(tmp_path / "other"))
    assert rows_of(tmp_path / "predictions.csv")[1][0].startswith(str(root))


@pytest.mark.parametrize("size", [16, 300])
def test_the_most_confident_errors_come_first_with_their_images(tmp_path, size):
    rng = np.random.RandomState(1)
    images, pixels = arrays(100, size=size)
    targets = np.zeros(100, dtype=int)
    answers = Answers(np.arange(100), targets, np.arange(100) % 2, rng.rand(100))
    write_errors(tmp_path, answers, images, NAMES, None)
    errors = read_errors(tmp_path)
    wrong = sorted(range(1, 100, 2), key=lambda i: -answers.probability[i])
    assert [error.image for error in errors] == [f"arrays[{i}]" for i in wrong[:24]]
    assert all((error.label, error.predicted) == NAMES[:2] for error in errors)
    assert [error.probability for error in errors] == pytest.approx(answers.probability[wrong[:24]].tolist(), abs=1e-6)
    kind, _, content = errors[0].thumbnail.partition(";base64,")
    image = Image.open(io.BytesIO(base64.b64decode(content)))
    assert image.size == (min(size, 128),) * 2
    if size == 16:
        assert kind == "data:image/png"
        assert (np.asarray(image) == pixels[wrong[0]]).all()


def test_without_errors_there_are_none(tmp_path):
    assert read_errors(tmp_path) == []
    split, answers = made_up()
    write_errors(tmp_path, replace(answers, predicted=answers.targets), split, NAMES, None)
    assert read_errors(tmp_path) == []
