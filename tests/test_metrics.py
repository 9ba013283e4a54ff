"""Metrics against scikit-learn and naive loops."""

import numpy as np
import pytest
import torch
from sklearn import metrics as reference

from mbib_timm.data.long_tail import shot_groups
from mbib_timm.evaluation import batch_statistics, summarize
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
    for key in ("top1", "top5", "macro", "many", "medium", "few", "per_class"):
        assert getattr(parts, key) == getattr(whole, key)
    assert parts.nll == pytest.approx(whole.nll)
    assert parts.ece == pytest.approx(whole.ece)


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
