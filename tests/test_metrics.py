"""Metrics against scikit-learn and naive loops."""

import time

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics as reference

from mbib_timm.data.long_tail import shot_groups
from mbib_timm.evaluation import Statistics, batch_statistics, summarize, with_intervals
from mbib_timm.evaluation.metrics import _draws, wilson_interval
from mbib_timm.files import to_json

COUNTS = np.array([500, 101, 100, 60, 20, 19, 3])


def predictions(images=211, classes=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(images, classes, generator=generator)
    targets = torch.randint(0, classes, (images,), generator=generator)
    logits[torch.arange(images), targets] += 1.0
    return logits, targets


def test_against_scikit_learn():
    logits, targets = predictions()
    result = summarize(batch_statistics(logits, targets), COUNTS)
    y, p = targets.numpy(), logits.argmax(1).numpy()
    probabilities = logits.double().softmax(1).numpy()
    assert result.top1 == pytest.approx(100 * reference.accuracy_score(y, p))
    assert result.top5 == pytest.approx(100 * reference.top_k_accuracy_score(y, probabilities, k=5))
    assert result.macro == pytest.approx(100 * reference.balanced_accuracy_score(y, p))
    assert result.nll == pytest.approx(reference.log_loss(y, probabilities), rel=1e-6)
    assert result.per_class == pytest.approx(100 * reference.recall_score(y, p, average=None))
    for name, classes in shot_groups(COUNTS).items():
        expected = 100 * reference.recall_score(y, p, average="macro", labels=classes)
        assert getattr(result, name) == pytest.approx(expected)
    assert result.macro_f1 == pytest.approx(100 * reference.f1_score(y, p, average="macro"))
    assert result.measured["overall"] == (211, 7)
    for name, classes in shot_groups(COUNTS).items():
        assert result.measured[name] == (np.isin(y, classes).sum(), len(classes))
    assert result.images == 211
    assert result.classes == {"many": 2, "medium": 3, "few": 2}


def test_ece_against_a_naive_loop():
    logits, targets = predictions()
    probabilities = logits.double().softmax(1)
    confidence, predicted = probabilities.max(1)
    error = 0.0
    for b in range(15):
        inside = [i for i, c in enumerate(confidence.tolist()) if b / 15 < c <= (b + 1) / 15]
        if inside:
            accuracy = sum(predicted[i] == targets[i] for i in inside) / len(inside)
            mean = sum(confidence[i] for i in inside) / len(inside)
            error += len(inside) / len(targets) * abs(accuracy - mean)
    result = summarize(batch_statistics(logits, targets), COUNTS)
    assert result.ece == pytest.approx(100 * float(error), abs=1e-4)


@pytest.mark.parametrize("batch", [1, 7, 64, 211])
def test_batches_add_up(batch):
    logits, targets = predictions()
    pieces = [batch_statistics(x, y) for x, y in zip(logits.split(batch), targets.split(batch), strict=True)]
    total = pieces[0]
    for piece in pieces[1:]:
        total = total + piece
    whole = summarize(batch_statistics(logits, targets), COUNTS)
    parts = summarize(total, COUNTS)
    for key in ("top1", "top5", "macro", "macro_f1", "many", "medium", "few", "per_class"):
        assert getattr(parts, key) == getattr(whole, key)
    assert parts.nll == pytest.approx(whole.nll)
    assert parts.ece == pytest.approx(whole.ece)


def test_classes_without_images_are_no_part_of_a_mean():
    """A guess at such a class still costs the class that the image is of."""
    logits, targets = predictions()
    kept = (targets != 0) & (targets != 6)
    logits, targets = logits[kept], targets[kept]
    result = summarize(batch_statistics(logits, targets), COUNTS)
    y, p = targets.numpy(), logits.argmax(1).numpy()
    labels = np.unique(y)
    assert result.macro_f1 == pytest.approx(100 * reference.f1_score(y, p, average="macro", labels=labels))
    assert result.macro == pytest.approx(100 * reference.recall_score(y, p, average="macro", labels=labels))
    assert result.measured["overall"] == (len(y), 5)
    assert result.measured["many"][1] == 1
    assert result.classes["many"] == 2


# Intervals


@pytest.mark.parametrize(("correct", "images"), [(0, 1), (1, 1), (0, 30), (30, 30), (1, 3), (17, 211), (9_500, 10_000)])
def test_wilson_against_scipy(correct, images):
    expected = stats.binomtest(correct, images).proportion_ci(0.95, method="wilson")
    low, high = wilson_interval(correct, images)
    assert (low, high) == pytest.approx((100 * expected.low, 100 * expected.high), abs=1e-9)
    assert 0 <= low <= 100 * correct / images <= high <= 100


def naive_bootstrap(y, p, metric, draws=1000):
    rng = np.random.RandomState(7)
    values = []
    for _ in range(draws):
        chosen = rng.randint(0, len(y), len(y))
        values.append(metric(y[chosen], p[chosen]))
    return np.nanpercentile(values, [2.5, 97.5])


@pytest.mark.parametrize(("images", "faster"), [(211, "places"), (211, "cells")])
def test_bootstrap_against_a_naive_loop(images, faster, monkeypatch):
    monkeypatch.setattr("mbib_timm.evaluation.metrics.SLOWER", {"places": 1e9, "cells": 0}[faster])
    monkeypatch.setattr("mbib_timm.evaluation.metrics.BLOCK", 40 * 70)  # in pieces
    logits, targets = predictions(images)
    y, p = targets.numpy(), logits.argmax(1).numpy()
    metrics = summarize(batch_statistics(logits, targets), COUNTS)
    assert set(metrics.intervals) == {"top1"}
    found = with_intervals(metrics, y, p, COUNTS).intervals
    assert found["top1"] == metrics.intervals["top1"]

    def recall(labels):
        def of(y, p):
            present = [label for label in labels if (y == label).any()]
            return 100 * np.mean([(p[y == label] == label).mean() for label in present]) if present else np.nan

        return of

    def f1(y, p):
        return 100 * np.mean(
            [2 * ((y == c) & (p == c)).sum() / ((y == c).sum() + (p == c).sum()) for c in np.unique(y)]
        )

    expected = {"macro": recall(range(7)), "macro_f1": f1}
    expected |= {name: recall(classes) for name, classes in shot_groups(COUNTS).items()}
    assert found.keys() == {"top1", *expected}
    for name, metric in expected.items():
        # Two sets of 1,000 draws agree to a fraction of the interval's width.
        assert found[name] == pytest.approx(naive_bootstrap(y, p, metric), abs=1.5), name
        assert found[name][0] < getattr(metrics, name) < found[name][1]


def test_draws_are_samples_of_as_many_images_and_repeat():
    y, p = np.array([0, 0, 1, 1, 1, 3]), np.array([0, 1, 1, 1, 0, 3])
    pieces = list(_draws(y, p, 4))
    total, correct, taken = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
    assert total.shape == (1000, 4)
    assert (total.sum(axis=1) == 6).all()
    assert (taken.sum(axis=1) == 6).all()
    assert (correct <= np.minimum(total, taken)).all()
    assert not total[:, 2].any()
    assert total.mean(axis=0) == pytest.approx([2, 3, 0, 1], abs=0.15)
    assert correct.mean(axis=0) == pytest.approx([1, 2, 0, 1], abs=0.15)
    assert all((one[0] == other[0]).all() for one, other in zip(pieces, _draws(y, p, 4), strict=True))


def intervals_of(y, p, counts, groups=None):
    logits = torch.nn.functional.one_hot(torch.as_tensor(p), len(counts)).float()
    metrics = summarize(batch_statistics(logits, torch.as_tensor(y)), counts)
    return metrics, with_intervals(metrics, y, p, counts, groups).intervals


def test_three_images_that_are_all_right_do_not_prove_that_all_are():
    y = np.array([0] * 50 + [1] * 3)
    p = np.where(np.arange(53) < 10, 1, y)
    _, found = intervals_of(y, p, np.array([500, 3]))
    assert found["few"] == pytest.approx(wilson_interval(3, 3))
    assert found["few"][0] < 50
    assert found["many"][0] < 80 < found["many"][1]
    assert "medium" not in found
    assert "macro_f1" not in found, "draws of three images that are all right are all alike"


def test_the_mean_of_classes_with_few_images_is_worth_as_many_images_as_vary_like_it():
    y = np.array([0] * 15 + [1] * 5)
    metrics, found = intervals_of(y, np.zeros(20, int), np.array([500, 300]))
    assert metrics.macro == 50
    assert found["macro"] == found["many"] == pytest.approx(wilson_interval(7.5, 15))  # 4 / (1 / 15 + 1 / 5)
    # No draw differs where a class is right and another wrong, however many images they have.
    y = np.array([0] * 60 + [1] * 20)
    assert intervals_of(y, np.zeros(80, int), np.array([500, 300]))[1]["macro"] == pytest.approx(
        wilson_interval(30, 60)
    )


@pytest.mark.parametrize(
    ("images", "low", "high"),
    [
        ([40, 15, 2, 2, 1, 1, 1], 0.8, 0.9),
        ([40, 15, *[2] * 10, *[1] * 10], 0.6, 0.9),
        ([30, 10, 3, 2, 2, 1, 1, 1], 0.7, 0.7),
        ([1, 1, 1], 0.5, 0.9),
        ([1000, 3], 0.5, 0.9),
        ([5] * 30, 0.1, 0.6),
        ([60, 25, 12], 0.4, 0.9),
    ],
)
def test_nineteen_of_twenty_intervals_hold_the_true_mean(images, low, high):
    """Of classes whose true accuracies are known, as images are drawn again and again; 94 % of 500 are four too few."""
    rng = np.random.RandomState(0)
    labels, counts, held = np.repeat(np.arange(len(images)), images), np.full(len(images), 5), 0
    for _ in range(500):
        true = rng.uniform(low, high, len(images))
        guess = np.where(rng.rand(len(labels)) < true[labels], labels, (labels + 1) % len(images))
        below, above = intervals_of(labels, guess, counts)[1]["few"]
        held += below <= 100 * true.mean() <= above
    assert held >= 0.93 * 500


def test_images_of_a_group_count_as_one():
    groups = np.array(["a"] * 20 + ["b"] * 20 + ["c"] * 10 + [""] * 2)
    y = np.array([0] * 40 + [1] * 12)
    p = np.where((groups == "b") | (groups == ""), 1 - y, y)
    metrics, found = intervals_of(y, p, np.array([500, 5]), groups)
    assert found["top1"] == pytest.approx(wilson_interval(5 * 30 / 52, 5))  # a, b, c, and two alone
    assert found["many"] == pytest.approx(wilson_interval(1, 2))
    assert found["few"] == pytest.approx(wilson_interval(3 * 10 / 12, 3))
    assert found["macro"] == pytest.approx(wilson_interval(metrics.macro / 100 * 4.8, 4.8))  # 4 / (1 / 2 + 1 / 3)
    alone = intervals_of(y, p, np.array([500, 5]), np.full(52, ""))[1]
    assert alone["top1"] == pytest.approx(intervals_of(y, p, np.array([500, 5]))[1]["top1"])


@pytest.mark.parametrize("seed", range(40))
def test_every_interval_holds_its_number(seed):
    rng = np.random.RandomState(seed)
    classes, images = rng.randint(2, 8), rng.randint(1, 40)
    y = np.minimum(rng.geometric(0.4, images) - 1, classes - 1)
    p = np.where(rng.rand(images) < rng.rand(classes)[y].round(), y, rng.randint(0, classes, images))
    metrics, found = intervals_of(y, p, rng.choice([5, 50, 200], classes))
    for name, (low, high) in found.items():
        assert 0 <= low <= getattr(metrics, name) <= high <= 100, name
        assert low < high, name


def test_inaturalists_classes_take_seconds():
    rng = np.random.RandomState(0)
    y = rng.randint(0, 8142, 24_426)
    p = np.where(rng.rand(len(y)) < 0.6, y, rng.randint(0, 8142, len(y)))
    counts = rng.randint(1, 500, 8142)
    right = np.bincount(y[y == p], minlength=8142)
    sums = [torch.as_tensor(each) for each in (np.bincount(y, minlength=8142), right, np.bincount(p, minlength=8142))]
    metrics = summarize(Statistics(*sums, sums[1], torch.tensor(1.0), torch.ones(15, 3)), counts)
    start = time.process_time()
    found = with_intervals(metrics, y, p, counts).intervals
    assert time.process_time() - start < 10
    assert all(low < getattr(metrics, name) < high for name, (low, high) in found.items())


def test_what_cannot_be_measured_is_none():
    logits, targets = predictions(classes=4)
    result = summarize(batch_statistics(logits, targets), np.array([300, 200, 150, 120]))
    assert result.medium is None
    assert result.few is None
    assert result.classes == {"many": 4, "medium": 0, "few": 0}
    only_first = summarize(batch_statistics(logits[targets == 0], targets[targets == 0]), np.array([300, 5, 50, 50]))
    assert only_first.few is None
    assert only_first.classes["few"] == 1
    assert only_first.per_class[1:] == [None] * 3
    assert only_first.macro == only_first.top1
    to_json(only_first)  # refuses what is not finite


@pytest.mark.parametrize(
    ("count", "group"), [(1, "few"), (19, "few"), (20, "medium"), (100, "medium"), (101, "many"), (1280, "many")]
)
def test_borders_of_the_shot_groups(count, group):
    assert [name for name, classes in shot_groups(np.array([count])).items() if len(classes)] == [group]


def test_one_confident_and_right_image_is_in_the_last_bin():
    statistics = batch_statistics(torch.tensor([[1e4, 0.0]]), torch.tensor([0]))
    assert statistics.bins[-1].tolist() == [1, 1, 1]


def test_half_precision_logits():
    logits, targets = predictions()
    half = summarize(batch_statistics(logits.bfloat16(), targets), COUNTS)
    exact = summarize(batch_statistics(logits.bfloat16().float(), targets), COUNTS)
    assert half == exact


def test_heads_counted_together_are_counted_as_alone():
    targets = predictions()[1]
    heads = torch.stack([predictions(seed=seed)[0] for seed in range(3)])
    together = batch_statistics(heads, targets)
    for head in range(3):
        assert summarize(together[head], COUNTS) == summarize(batch_statistics(heads[head], targets), COUNTS)
