"""The figures can be drawn from every shape that results take. How they look is for a person to judge."""

import sys

import numpy as np
import pytest
from PIL import Image

from mbib_timm.errors import MbibError
from mbib_timm.evaluation import figures


def result(classes, few=None):
    rng = np.random.RandomState(0)
    return {
        "top1": 50.0, "many": 70.0, "medium": 40.0, "few": few,
        "classes": {"many": classes, "medium": 0, "few": 0},
        "per_class": [None, *rng.uniform(0, 100, classes - 1).tolist()],
    }  # fmt: skip


def drawn(path):
    """Return the figure's pixels; it must hold more than paper."""
    pixels = np.asarray(Image.open(path).convert("L"))
    assert (pixels < 128).mean() > 0.002
    return pixels


@pytest.mark.parametrize("classes", [2, 10, 30, 400])
@pytest.mark.parametrize("named", [True, False])
def test_class_accuracy(tmp_path, classes, named):
    names = [f"class {i}" for i in range(classes)] if named else None
    counts = np.linspace(500, 1, classes).astype(int)
    figures.class_accuracy({"prediction": result(classes)}, counts, tmp_path / "figure.png", names)
    drawn(tmp_path / "figure.png")


@pytest.mark.parametrize("heads", [[], ["v3", "z"], ["x", "v1", "v2", "v3", "v4", "v5", "v6", "z"]])
def test_shot_groups(tmp_path, heads):
    results = {"prediction": result(5)} | {head: result(5, few=10.0) for head in heads}
    figures.shot_groups_figure(results, tmp_path / "figure.png")
    drawn(tmp_path / "figure.png")


def test_training_curves_show_the_loss(tmp_path):
    rows = [{"epoch": e, "lr": 0.1, "train_loss": 5.0 - e, "seconds": 1.0} for e in range(4)]
    figures.training_curves(rows, tmp_path / "without.png")
    for row in rows[1::2]:
        row.update(val_top1=20.0 * row["epoch"], val_many=30.0, val_medium=None, val_few=5.0)
    figures.training_curves(rows, tmp_path / "with.png")
    with_accuracy, without = drawn(tmp_path / "with.png"), drawn(tmp_path / "without.png")
    assert with_accuracy.shape != without.shape or (with_accuracy != without).any()


@pytest.mark.parametrize("rates", [[0.1, 0.05, 0.0], [0.1, 0.1, 0.1], [0.0, 0.0, 0.0], [0.1, 0.001, 0.00001]])
def test_learning_rates_of_any_schedule(tmp_path, rates):
    rows = [{"epoch": e, "lr": lr, "train_loss": 1.0, "seconds": 1.0} for e, lr in enumerate(rates)]
    figures.training_curves(rows, tmp_path / "figure.png")
    drawn(tmp_path / "figure.png")


def test_balanced_training_counts(tmp_path):
    figures.class_accuracy({"prediction": result(10)}, np.full(10, 500), tmp_path / "figure.png")
    drawn(tmp_path / "figure.png")


def test_drawing_leaves_matplotlibs_settings_alone(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    figures.shot_groups_figure({"prediction": result(5)}, tmp_path / "figure.png")
    assert dict(matplotlib.rcParams) == before


def test_one_epoch_can_be_drawn(tmp_path):
    row = {
        "epoch": 0,
        "lr": 0.1,
        "train_loss": 5.0,
        "val_top1": 1.0,
        "val_many": 1.0,
        "val_medium": 0.0,
        "val_few": None,
    }
    figures.training_curves([row], tmp_path / "figure.png")
    drawn(tmp_path / "figure.png")


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MbibError, match=r"pip install 'mbib-timm\[train\]'"):
        figures.shot_groups_figure({"prediction": result(5)}, tmp_path / "figure.png")
