"""The losses' pure functions against sums written out in float64, numbers computed elsewhere, and their invariants.

Where a number comes from: three classes of 500, 50 and 5 training images and two logits rows, for which every method's
loss was computed apart from this package (``LOGITS``, ``TARGETS``, ``FEW``).
"""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from naive import naive_adjusted_cross_entropy, naive_focal, naive_vsd, naive_weights

from mbib_timm.errors import MbibError
from mbib_timm.methods.functional import (
    adjusted_cross_entropy,
    class_temperatures,
    class_weights,
    distillation_divergence,
    effective_number_weights,
    focal_loss,
    ldam_margins,
    self_distillation,
    tempered_log_probabilities,
)
from mbib_timm.methods.tau_norm import normalized_rows

COUNTS = [500, 120, 40, 9, 3]

FEW = [500, 50, 5]
LOGITS = torch.tensor([[2, 1, -1], [1, 0, 0.5]], dtype=torch.float64)
TARGETS = torch.tensor([2, 0])
LOG_FEW = torch.tensor(FEW, dtype=torch.float64).log()
LOG_PI_FEW = LOG_FEW - math.log(sum(FEW))


def random_logits(batch=6, classes=5, scale=2.0, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(batch, classes, generator=generator, dtype=dtype)
    return logits, torch.randint(0, classes, (batch,), generator=generator)


def vector(values):
    return torch.tensor(values, dtype=torch.float64)


def if_counts(imbalance_factor, classes=100):
    """Training images of CIFAR-100-LT."""
    return [int(500 * (1 / imbalance_factor) ** (i / (classes - 1))) for i in range(classes)]


# Numbers


def test_cross_entropy_and_balanced_softmax_on_the_batch():
    each = [adjusted_cross_entropy(LOGITS[i : i + 1], TARGETS[i : i + 1]).item() for i in range(2)]
    assert each == pytest.approx([3.349012, 0.680270], abs=1e-6)
    assert adjusted_cross_entropy(LOGITS, TARGETS).item() == pytest.approx(2.014641, abs=1e-6)
    each = [adjusted_cross_entropy(LOGITS[i : i + 1], TARGETS[i : i + 1], offset=LOG_FEW).item() for i in range(2)]
    assert each == pytest.approx([7.641778, 0.041960], abs=1e-6)
    assert adjusted_cross_entropy(LOGITS, TARGETS, offset=LOG_FEW).item() == pytest.approx(3.841869, abs=1e-6)


def test_logit_adjustment_and_its_mean_over_three_strengths():
    losses = [adjusted_cross_entropy(LOGITS, TARGETS, offset=tau * LOG_PI_FEW).item() for tau in (0, 1, 2)]
    assert losses == pytest.approx([2.014641, 3.841869, 6.108875], abs=1e-6)
    assert sum(losses) / 3 == pytest.approx(3.988462, abs=1e-6)


def test_class_dependent_temperatures():
    divisor = class_temperatures(FEW, 0.2)
    assert divisor.tolist() == pytest.approx([1, 1.584893, 2.511886], abs=1e-6)
    loss = adjusted_cross_entropy(LOGITS, TARGETS, divisor=divisor)
    assert loss.item() == pytest.approx(1.645874, abs=1e-6)


def test_softmax_focal_loss():
    assert focal_loss(LOGITS, TARGETS, 1.0).item() == pytest.approx(1.783562, abs=1e-6)
    assert focal_loss(LOGITS, TARGETS, 2.0).item() == pytest.approx(1.641801, abs=1e-6)


def test_class_balanced_weights_and_loss():
    weights = effective_number_weights(FEW, 0.9999)
    assert weights.tolist() == pytest.approx([0.027690, 0.270763, 2.701547], abs=1e-6)
    assert weights.sum().item() == pytest.approx(3)
    by_weights = adjusted_cross_entropy(LOGITS, TARGETS, weight=weights)
    assert by_weights.item() == pytest.approx(3.321936, abs=1e-6)
    by_images = adjusted_cross_entropy(LOGITS, TARGETS, weight=weights, normalize=False)
    assert by_images.item() == pytest.approx(4.533176, abs=1e-6)


@pytest.mark.parametrize(
    ("beta", "expected"), [(0.9999, [0.044876, 0.457055, 4.378313]), (0.99, [0.196524, 0.510131, 3.983524])]
)
def test_class_balanced_weights_of_cifar100_lt(beta, expected):
    weights = effective_number_weights(if_counts(100), beta)
    assert weights[[0, 50, 99]].tolist() == pytest.approx(expected, abs=1e-6)


def test_class_balanced_weights_at_both_ends():
    assert effective_number_weights(FEW, 0.0).tolist() == [1.0, 1.0, 1.0]
    inverse = [1 / n for n in FEW]
    expected = [3 * w / sum(inverse) for w in inverse]
    assert effective_number_weights(FEW, 1 - 1e-9).tolist() == pytest.approx(expected, rel=1e-5)


def test_ldam_margins_and_loss():
    margins = ldam_margins(FEW, 0.5)
    assert margins.tolist() == pytest.approx([0.158114, 0.281171, 0.5], abs=1e-6)
    largest = [ldam_margins(if_counts(factor), 0.5)[0].item() for factor in (100, 50, 10)]
    assert largest == pytest.approx([0.158114, 0.188030, 0.281171], abs=1e-6)
    cosines = vector([[0.2, 0.1, -0.1], [0, 0.1, 0.3]])
    scaled, s = 30 * cosines, 30 * margins
    each = [adjusted_cross_entropy(scaled[i : i + 1], TARGETS[i : i + 1], margin=s).item() for i in range(2)]
    assert each == pytest.approx([24.048587, 13.745893], abs=1e-5)
    assert adjusted_cross_entropy(scaled, TARGETS, margin=s).item() == pytest.approx(18.897240, abs=1e-5)
    assert adjusted_cross_entropy(scaled, TARGETS, margin=0 * s).item() == pytest.approx(9.025652, abs=1e-6)
    # s (cos - m) and s cos - s m: the factor belongs in one place only.
    shifted = 30 * (cosines - F.one_hot(TARGETS, 3) * margins)
    torch.testing.assert_close(
        adjusted_cross_entropy(scaled, TARGETS, margin=s), F.cross_entropy(shifted, TARGETS), rtol=1e-7, atol=0
    )


def test_label_aware_smoothing():
    smoothing = vector([0.4, 0.142694, 0.1])
    assert adjusted_cross_entropy(LOGITS, TARGETS, smoothing=smoothing).item() == pytest.approx(2.031308, abs=1e-6)


def test_rows_of_length_one_and_in_between():
    row = vector([[3.0, 4.0]])
    assert normalized_rows(row, 0.5).flatten().tolist() == pytest.approx([1.341641, 1.788854], abs=1e-6)
    assert normalized_rows(row, 1.0).flatten().tolist() == pytest.approx([0.6, 0.8])
    weights = torch.randn(7, 5)
    assert torch.equal(normalized_rows(weights, 0.0), weights)
    torch.testing.assert_close(normalized_rows(weights, 1.0).norm(dim=1), torch.ones(7))
    # The argmax of a cosine classifier is that of its rows' directions, which tau leaves.
    features = torch.randn(9, 5)
    cosine = F.linear(features, F.normalize(weights))
    torch.testing.assert_close(F.linear(features, F.normalize(normalized_rows(weights, 1.7))), cosine)


# Against sums written out: every adjustment alone, and each with each


ADJUSTMENTS = {
    "offset": [math.log(n) for n in COUNTS],
    "divisor": [1.0, 1.3, 0.7, 2.0, 2.5],
    "margin": [0.1, 0.2, 0.4, 0.0, 1.5],
    "weight": [0.1, 0.4, 1.0, 1.5, 2.0],
    "smoothing": [0.4, 0.3, 0.2, 0.0, 0.1],
}


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    "names", [names for k in (0, 1, 2, 5) for names in itertools.combinations(ADJUSTMENTS, k)], ids="+".join
)
def test_the_adjusted_cross_entropy_is_its_sum_written_out(names, normalize):
    logits, targets = random_logits(batch=9)
    given = {name: ADJUSTMENTS[name] for name in names}
    tensors = {name: vector(values) for name, values in given.items()}
    loss = adjusted_cross_entropy(logits, targets, **tensors, normalize=normalize)
    assert loss.item() == pytest.approx(naive_adjusted_cross_entropy(logits, targets, **given, normalize=normalize))
    free = logits.clone().requires_grad_()
    function = lambda z: adjusted_cross_entropy(z, targets, **tensors, normalize=normalize)  # noqa: E731
    assert torch.autograd.gradcheck(function, free)


def test_several_heads_at_once_are_each_on_its_own():
    logits = torch.stack([random_logits(seed=seed)[0] for seed in range(3)])
    targets = random_logits()[1]
    tensors = {name: vector(values) for name, values in ADJUSTMENTS.items()}
    together = adjusted_cross_entropy(logits, targets, **tensors)
    assert together.shape == (3,)
    for head, loss in zip(logits, together, strict=True):
        torch.testing.assert_close(adjusted_cross_entropy(head, targets, **tensors), loss)


def random_soft_targets(batch=9, classes=5, seed=5, dtype=torch.float64):
    """Rows that sum to 1: one with two classes, as mixing makes them, one with one, the others with all."""
    soft = torch.rand(batch, classes, generator=torch.Generator().manual_seed(seed), dtype=dtype) ** 3
    soft[0], soft[1] = torch.tensor([0.3, 0, 0, 0.7, 0]), torch.tensor([0, 0, 0, 0, 1.0])
    return soft / soft.sum(dim=1, keepdim=True)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    "names", [names for k in range(6) for names in itertools.combinations(ADJUSTMENTS, k)], ids="+".join
)
def test_the_loss_of_soft_targets_is_the_sum_over_labels_written_out(names, normalize):
    """In every combination of adjustments: sum_ij t_ij L(z_i, j), by sum_ij t_ij w_j or by the number of images."""
    (logits, _), targets = random_logits(batch=9), random_soft_targets()
    given = {name: ADJUSTMENTS[name] for name in names}
    tensors = {name: vector(values) for name, values in given.items()}
    numerator = denominator = 0.0
    for i in range(9):
        for j in range(5):
            share, image = targets[i, j].item(), logits[i : i + 1]
            numerator += share * naive_adjusted_cross_entropy(image, torch.tensor([j]), **given, normalize=False)
            denominator += share * (given["weight"][j] if normalize and "weight" in given else 1)
    loss = adjusted_cross_entropy(logits, targets, **tensors, normalize=normalize)
    assert loss.item() == pytest.approx(numerator / denominator, rel=1e-12)
    function = lambda z: adjusted_cross_entropy(z, targets, **tensors, normalize=normalize)  # noqa: E731
    assert torch.autograd.gradcheck(function, logits.clone().requires_grad_())


@pytest.mark.parametrize("confidence", [0.0, 5.0, 20.0, 60.0])
def test_a_margin_on_a_sure_prediction_loses_no_digits(confidence):
    """Where p is 1 to the last bit, 1 - p is nothing: LDAM's s m of up to 15 must not drown in that."""
    logits = torch.tensor([[confidence, 0, -1], [0, confidence, confidence], [-1, 0, -confidence]])
    targets = torch.tensor([[0.9, 0.1, 0], [0.2, 0.5, 0.3], [0, 1, 0]])
    margin = torch.tensor([4.7, 8.4, 15.0])
    found = []
    for dtype in (torch.float32, torch.float64):
        free = logits.to(dtype).requires_grad_()
        loss = adjusted_cross_entropy(free, targets, margin=margin)
        found += [loss.detach().double(), torch.autograd.grad(loss, free)[0].double()]
    torch.testing.assert_close(found[0], found[2], rtol=1e-5, atol=0)
    torch.testing.assert_close(found[1], found[3], rtol=1e-4, atol=1e-7)
    expected = sum(
        share.item() * naive_adjusted_cross_entropy(logits[i : i + 1], torch.tensor([j]), margin=margin.tolist())
        for i, row in enumerate(targets)
        for j, share in enumerate(row)
    )
    assert found[2].item() == pytest.approx(expected / 3, rel=1e-7)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_the_focal_loss_of_soft_targets_is_the_sum_over_labels(gamma):
    (logits, labels), targets = random_logits(batch=9), random_soft_targets()
    expected = sum(
        targets[i, j].item() * naive_focal(logits[i : i + 1], torch.tensor([j]), gamma)
        for i in range(9)
        for j in range(5)
    )
    assert focal_loss(logits, targets, gamma).item() == pytest.approx(expected / 9, rel=1e-9)
    hard = F.one_hot(labels, 5).double()
    torch.testing.assert_close(focal_loss(logits, hard, gamma), focal_loss(logits, labels, gamma))
    assert torch.autograd.gradcheck(lambda z: focal_loss(z, targets, gamma), logits.clone().requires_grad_())


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_self_distillation_is_its_sum_written_out(gamma):
    teacher, student = random_logits()[0], random_logits(seed=1)[0]
    temperatures = class_temperatures(COUNTS, gamma)
    loss = self_distillation(teacher, student, temperatures)
    assert loss.item() == pytest.approx(naive_vsd(teacher, student, COUNTS, gamma), rel=1e-6)
    assert self_distillation(teacher, teacher, temperatures).item() == pytest.approx(0, abs=1e-12)


# Self-distillation, class weights and temperatures


def test_the_teacher_learns_nothing_from_the_student():
    teacher, student = (random_logits(seed=seed)[0].requires_grad_() for seed in range(2))
    self_distillation(teacher, student).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0
    pairs = torch.stack([teacher, student])
    distillation_divergence(*(tempered_log_probabilities(values) for values in (pairs, pairs.flip(0)))).sum().backward()
    assert torch.isfinite(teacher.grad).all()


def test_class_weights_of_equation_7():
    torch.testing.assert_close(class_weights(COUNTS, 0.1).tolist(), naive_weights(COUNTS, 0.1), rtol=1e-6, atol=0)
    assert class_weights(COUNTS, 0.1).mean().item() == pytest.approx(1)
    assert class_weights(COUNTS, 0).tolist() == [1.0] * 5


def test_temperatures():
    assert class_temperatures(COUNTS, 0.5).tolist() == pytest.approx([math.sqrt(500 / n) for n in COUNTS])
    assert class_temperatures(COUNTS, 0).tolist() == [1.0] * 5


# Precision


CASES = {
    "plain": {},
    "all": {name: torch.tensor(values) for name, values in ADJUSTMENTS.items()},
    "balanced softmax": {"offset": torch.tensor(COUNTS).log()},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_logits_stay_finite(case, dtype):
    values, targets = random_logits(batch=4, scale=1.0, dtype=torch.float32)
    logits = (1e4 * values.sign()).to(dtype).requires_grad_()
    both = (targets, random_soft_targets(batch=4, dtype=torch.float32))
    losses = [adjusted_cross_entropy(logits, each, **CASES[case]) for each in both]
    for loss in (*losses, *(focal_loss(logits, each, 0.5) for each in both)):
        assert loss.isfinite()
        (gradient,) = torch.autograd.grad(loss, logits)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_float32_inside_autocast(case, soft):
    logits, targets = random_logits(dtype=torch.float32)
    targets = random_soft_targets(len(targets)) if soft else targets
    outside = adjusted_cross_entropy(logits, targets, **CASES[case])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = adjusted_cross_entropy(logits, targets, **CASES[case])
        half = adjusted_cross_entropy(logits.bfloat16(), targets, **CASES[case])
    assert inside.dtype == half.dtype == torch.float32
    assert torch.equal(inside, outside)
    assert torch.equal(half, adjusted_cross_entropy(logits.bfloat16().float(), targets, **CASES[case]))


@pytest.mark.parametrize(
    "constants",
    [
        lambda counts: class_weights(counts, 0.1),
        lambda counts: class_temperatures(counts, 0.5),
        lambda counts: effective_number_weights(counts, 0.9999),
        lambda counts: ldam_margins(counts, 0.5),
    ],
)
def test_a_class_without_training_images_is_refused(constants):
    with pytest.raises(MbibError, match=r"classes without: \[1\]"):
        constants([5, 0, 3])


def test_counts_come_as_lists_arrays_and_tensors():
    given = (COUNTS, np.array(COUNTS), torch.tensor(COUNTS))
    first, *others = [effective_number_weights(counts, 0.9999) for counts in given]
    assert all(torch.equal(first, other) for other in others)
    assert first.dtype == torch.float32
