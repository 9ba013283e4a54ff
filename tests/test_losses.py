"""Losses against naive loops in float64, finite differences, and the paper's own formulas."""

import math

import numpy as np
import pytest
import torch

from mbib_timm.errors import MbibError
from mbib_timm.losses import LOSSES, BottleneckLoss, Edge, create_loss
from mbib_timm.losses.functional import (
    balanced_softmax_cross_entropy,
    class_temperatures,
    class_weights,
    focal_loss,
    self_distillation,
)
from mbib_timm.recipe import Recipe

COUNTS = [500, 120, 40, 9, 3]
HEADS = ("v1", "v2", "v3", "z")


def random_logits(heads=HEADS, batch=6, classes=5, scale=2.0, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = {h: scale * torch.randn(batch, classes, generator=generator, dtype=dtype) for h in heads}
    return logits, torch.randint(0, classes, (batch,), generator=generator)


# Equations 4 to 9, written out sample by sample.


def naive_weights(counts, m):
    total = sum((1 / n) ** m for n in counts)
    return [len(counts) * (1 / n) ** m / total for n in counts]


def naive_bsc(logits, targets, counts, m):
    weights = naive_weights(counts, m)
    numerator = denominator = 0.0
    for row, y in zip(logits.tolist(), targets.tolist(), strict=True):
        exponentials = [n * math.exp(t) for t, n in zip(row, counts, strict=True)]
        numerator += -weights[y] * math.log(exponentials[y] / sum(exponentials))
        denominator += weights[y]
    return numerator / denominator


def naive_vsd(teacher, student, counts, gamma):
    temperatures = [(max(counts) / n) ** gamma for n in counts]
    total = 0.0
    for t_row, s_row in zip(teacher.tolist(), student.tolist(), strict=True):
        p = [math.exp(t / T) for t, T in zip(t_row, temperatures, strict=True)]
        q = [math.exp(s / T) for s, T in zip(s_row, temperatures, strict=True)]
        p_sum, q_sum = sum(p), sum(q)
        total += sum(a / p_sum * math.log(a / p_sum * q_sum / b) for a, b in zip(p, q, strict=True))
    return total / len(teacher)


def naive_bib(teacher, student, targets, counts, beta, gamma, m):
    return (
        naive_bsc(teacher, targets, counts, m)
        + naive_bsc(student, targets, counts, m)
        + beta * naive_vsd(teacher, student, counts, gamma)
    )


STRUCTURES = {
    "bib": {("v3", "z"): 1},
    "mbib": {("v1", "z"): 0.1, ("v2", "z"): 0.3, ("v3", "z"): 1},
    "se_mbib": {("v1", "v2"): 1, ("v2", "v3"): 1, ("v3", "z"): 1},
    "all_mbib": {("v1", "z"): 0.1, ("v2", "z"): 0.3, ("v3", "z"): 1, ("v1", "v2"): 1, ("v2", "v3"): 1},
}


def listing_of_figure_10(labels, v_logits, z_logits, sample_per_class, beta, gamma, power):
    """What the listing in the paper's appendix J computes, step by step and in its order, in numpy."""
    n, rows = np.asarray(sample_per_class, dtype=float), np.arange(len(labels))
    temperature = (1 / (n / n.max())) ** gamma

    def log_softmax(x):
        x = x - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    p_t = np.exp(log_softmax(v_logits / temperature))
    vsd_loss = (p_t * np.log(p_t) - p_t * log_softmax(z_logits / temperature)).sum(-1).mean()
    weights = 1 / n**power
    weights = weights / weights.sum() * len(n)
    # torch's mean of a weighted cross-entropy divides by the sum of the labels' weights.
    w = weights[labels] / weights[labels].sum()
    loss1 = -(w * log_softmax(v_logits + np.log(n))[rows, labels]).sum()
    loss2 = -(w * log_softmax(z_logits + np.log(n))[rows, labels]).sum()
    return loss1 + loss2 + beta * vsd_loss


@pytest.mark.parametrize("power", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("gamma", [0.0, 0.5])
@pytest.mark.parametrize("beta", [0.0, 5.0])
def test_bib_is_what_figure_10_computes(beta, gamma, power):
    logits, targets = random_logits(batch=16)
    recipe = Recipe(loss="bib", beta=beta, gamma=gamma, class_weight_power=power)
    loss = create_loss(recipe, COUNTS, HEADS)(logits, targets)["loss"]
    arrays = [targets.numpy(), logits["v3"].numpy(), logits["z"].numpy()]
    assert loss.item() == pytest.approx(listing_of_figure_10(*arrays, COUNTS, beta, gamma, power), rel=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.5])
@pytest.mark.parametrize("name", STRUCTURES)
def test_every_structure_equals_the_sum_of_its_terms(name, gamma):
    logits, targets = random_logits()
    expected = sum(
        weight * naive_bib(logits[t], logits[s], targets, COUNTS, 5.0, gamma, 0.1)
        for (t, s), weight in STRUCTURES[name].items()
    )
    loss = create_loss(Recipe(loss=name, gamma=gamma), COUNTS, HEADS)
    assert loss(logits, targets)["loss"].item() == pytest.approx(expected, rel=1e-6)


def test_the_parts_are_the_unweighted_terms_and_loss_comes_first():
    logits, targets = random_logits()
    parts = create_loss(Recipe(loss="mbib"), COUNTS, HEADS)(logits, targets)
    assert next(iter(parts)) == "loss"
    assert set(parts) == {"loss", "bsc_v1", "bsc_v2", "bsc_v3", "bsc_z", "vsd_v1_z", "vsd_v2_z", "vsd_v3_z"}
    assert parts["bsc_v2"].item() == pytest.approx(naive_bsc(logits["v2"], targets, COUNTS, 0.1), rel=1e-6)
    assert parts["vsd_v2_z"].item() == pytest.approx(naive_vsd(logits["v2"], logits["z"], COUNTS, 0), rel=1e-6)


def test_mbib_without_a_and_b_is_bib():
    logits, targets = random_logits()
    mbib = create_loss(Recipe(loss="mbib", observation_weights=[0, 0, 1]), COUNTS, HEADS)
    bib = create_loss(Recipe(loss="bib"), COUNTS, HEADS)
    torch.testing.assert_close(mbib(logits, targets)["loss"], bib(logits, targets)["loss"])


def test_the_bottleneck_weighs_a_plus_b_plus_1():
    loss = create_loss(Recipe(loss="mbib"), COUNTS, HEADS)
    assert loss.head_weights == pytest.approx({"v1": 0.1, "v2": 0.3, "v3": 1.0, "z": 1.4})


@pytest.mark.parametrize("observations", [2, 3, 4, 5, 6])
def test_any_number_of_observations(observations):
    heads = (*(f"v{i + 1}" for i in range(observations)), "z")
    logits, targets = random_logits(heads)
    weights = [0.3] * (observations - 1) + [1.0]
    loss = create_loss(Recipe(loss="mbib", observation_weights=weights), COUNTS, heads)
    expected = sum(
        w * naive_bib(logits[h], logits["z"], targets, COUNTS, 5.0, 0, 0.1)
        for h, w in zip(heads, weights, strict=False)
    )
    assert loss(logits, targets)["loss"].item() == pytest.approx(expected, rel=1e-6)


def test_the_teacher_learns_nothing_from_the_student():
    logits, _ = random_logits()
    logits = {head: values.requires_grad_() for head, values in logits.items()}
    self_distillation(logits["v3"], logits["z"]).backward()
    assert logits["v3"].grad is None
    assert logits["z"].grad.abs().sum() > 0


@pytest.mark.parametrize("name", list(LOSSES))
def test_gradients_agree_with_finite_differences(name):
    logits, targets = random_logits(batch=3)
    loss = create_loss(Recipe(loss=name, gamma=0.5), COUNTS, HEADS).double()
    # The teachers are constants: what a finite difference would move in them must not count.
    heads = [values.requires_grad_() for values in logits.values()]
    frozen = {head: values.detach().clone() for head, values in logits.items()}

    def student_only(*values):
        given = dict(zip(HEADS, values, strict=True))
        if not isinstance(loss, BottleneckLoss):
            return loss(given, targets)["loss"]
        total = sum(
            weight * balanced_softmax_cross_entropy(given[head], targets, loss.log_counts, loss.weight)
            for head, weight in loss.head_weights.items()
        )
        return total + Recipe().beta * sum(
            edge.weight * self_distillation(frozen[edge.teacher], given[edge.student], loss.temperatures)
            for edge in loss.edges
        )

    assert torch.autograd.gradcheck(student_only, heads, eps=1e-6, atol=1e-6)
    used = torch.autograd.grad(loss(dict(zip(HEADS, heads, strict=True)), targets)["loss"], heads, allow_unused=True)
    expected = torch.autograd.grad(student_only(*heads), heads, allow_unused=True)
    torch.testing.assert_close(used, expected)


def test_class_weights_of_equation_7():
    torch.testing.assert_close(class_weights(COUNTS, 0.1).tolist(), naive_weights(COUNTS, 0.1), rtol=1e-6, atol=0)
    assert class_weights(COUNTS, 0.1).mean().item() == pytest.approx(1)
    assert class_weights(COUNTS, 0).tolist() == [1.0] * 5


def test_temperatures():
    assert class_temperatures(COUNTS, 0.5).tolist() == pytest.approx([math.sqrt(500 / n) for n in COUNTS])
    assert class_temperatures(COUNTS, 0).tolist() == [1.0] * 5


def test_baselines_against_torch_and_naive_loops():
    logits, targets = random_logits(("logits",))
    t = logits["logits"]
    ce = create_loss(Recipe(loss="ce"), COUNTS, ("logits",))(logits, targets)["loss"]
    torch.testing.assert_close(ce, torch.nn.functional.cross_entropy(t, targets))
    bsce = create_loss(Recipe(loss="bsce"), COUNTS, ("logits",))(logits, targets)["loss"]
    assert bsce.item() == pytest.approx(naive_bsc(t, targets, COUNTS, 0), rel=1e-6)
    probabilities = t.softmax(1)[range(len(t)), targets].tolist()
    expected = sum(-((1 - p) ** 2) * math.log(p) for p in probabilities) / len(t)
    focal = create_loss(Recipe(loss="focal"), COUNTS, ("logits",))(logits, targets)["loss"]
    assert focal.item() == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(focal_loss(t, targets, 0.0), torch.nn.functional.cross_entropy(t, targets))


def test_baselines_on_several_heads_are_the_mean_over_them():
    logits, targets = random_logits()
    loss = create_loss(Recipe(loss="ce"), COUNTS, HEADS)(logits, targets)
    each = [torch.nn.functional.cross_entropy(values, targets).item() for values in logits.values()]
    assert loss["loss"].item() == pytest.approx(sum(each) / 4)
    assert loss["loss_v2"].item() == pytest.approx(each[1])


@pytest.mark.parametrize("name", list(LOSSES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_logits_stay_finite(name, dtype):
    logits, targets = random_logits(batch=4, scale=1.0, dtype=torch.float32)
    logits = {head: (1e4 * values.sign()).to(dtype).requires_grad_() for head, values in logits.items()}
    loss = create_loss(Recipe(loss=name, gamma=0.5, focal_gamma=0.5), COUNTS, HEADS)
    parts = loss(logits, targets)
    assert all(value.isfinite() for value in parts.values())
    parts["loss"].backward()
    assert all(values.grad is None or values.grad.isfinite().all() for values in logits.values())


@pytest.mark.parametrize("name", list(LOSSES))
def test_float32_inside_autocast(name):
    logits, targets = random_logits(dtype=torch.float32)
    loss = create_loss(Recipe(loss=name), COUNTS, HEADS)
    outside = loss(logits, targets)["loss"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(logits, targets)["loss"]
        half = loss({head: values.bfloat16() for head, values in logits.items()}, targets)["loss"]
    assert inside.dtype == half.dtype == torch.float32
    assert torch.equal(inside, outside)
    rounded = {head: values.bfloat16().float() for head, values in logits.items()}
    assert torch.equal(half, loss(rounded, targets)["loss"])


def test_8142_classes():
    counts = np.linspace(1000, 2, 8142).astype(int)
    logits, targets = random_logits(classes=8142, batch=4)
    loss = create_loss(Recipe(loss="mbib", gamma=0.5), counts, HEADS)
    assert loss.weight.sum().item() == pytest.approx(8142, rel=1e-5)
    expected = sum(
        w * naive_bib(logits[h], logits["z"], targets, counts.tolist(), 5.0, 0.5, 0.1)
        for h, w in zip(HEADS, (0.1, 0.3, 1.0), strict=False)
    )
    assert loss(logits, targets)["loss"].item() == pytest.approx(expected, rel=1e-5)


def test_a_constant_added_to_the_logits_changes_nothing():
    logits, targets = random_logits()
    loss = create_loss(Recipe(loss="all_mbib"), COUNTS, HEADS)
    shifted = {head: values + 7 for head, values in logits.items()}
    torch.testing.assert_close(loss(shifted, targets)["loss"], loss(logits, targets)["loss"])


def test_relabelling_the_classes_changes_nothing():
    logits, targets = random_logits()
    order = torch.tensor([3, 0, 4, 1, 2])
    permuted = {head: values[:, order] for head, values in logits.items()}
    moved = torch.tensor([order.tolist().index(y) for y in targets.tolist()])
    recipe = Recipe(loss="mbib", gamma=0.5)
    before = create_loss(recipe, COUNTS, HEADS)(logits, targets)["loss"]
    after = create_loss(recipe, [COUNTS[i] for i in order], HEADS)(permuted, moved)["loss"]
    torch.testing.assert_close(before, after)


def test_the_buffers_stay_out_of_the_state_dict():
    assert create_loss(Recipe(loss="mbib", gamma=0.5), COUNTS, HEADS).state_dict() == {}


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("ce", "focal")])
def test_a_class_without_training_images_is_refused(name):
    with pytest.raises(MbibError, match=r"classes without: \[1\]"):
        create_loss(Recipe(loss=name), [5, 0, 3], HEADS)


@pytest.mark.parametrize(
    ("recipe", "heads", "message"),
    [
        (Recipe(loss="mbib"), ("logits",), "needs a model with observations and a bottleneck"),
        (Recipe(loss="mbib"), ("v1", "z"), "'observation_weights': expected 1 numbers, one for each of v1"),
        (Recipe(loss="mbibb"), HEADS, "did you mean 'mbib'"),
    ],
)
def test_losses_that_do_not_fit_are_refused(recipe, heads, message):
    with pytest.raises(MbibError, match=message):
        create_loss(recipe, COUNTS, heads)


def test_an_own_graph_of_edges():
    logits, targets = random_logits()
    loss = BottleneckLoss([Edge("v1", "v3", 0.5)], COUNTS, beta=2.0)
    expected = 0.5 * naive_bib(logits["v1"], logits["v3"], targets, COUNTS, 2.0, 0, 0.1)
    assert loss(logits, targets)["loss"].item() == pytest.approx(expected, rel=1e-6)


def naive_plain(logits, targets, weights, divisor):
    """Class-weighted cross-entropy of the raw logits, sample by sample."""
    total = 0.0
    for row, y in zip(logits.tolist(), targets.tolist(), strict=True):
        total += -weights[y] * (row[y] - math.log(sum(math.exp(t) for t in row)))
    return total / divisor


@pytest.mark.parametrize("name", STRUCTURES)
def test_without_logit_adjustment_the_terms_are_plain_cross_entropies(name):
    logits, targets = random_logits()
    weights = naive_weights(COUNTS, 0.1)
    divisor = sum(weights[y] for y in targets.tolist())
    terms = {head: naive_plain(values, targets, weights, divisor) for head, values in logits.items()}
    expected = sum(
        w * (terms[t] + terms[s] + 5.0 * naive_vsd(logits[t], logits[s], COUNTS, 0.5))
        for (t, s), w in STRUCTURES[name].items()
    )
    loss = create_loss(Recipe(loss=name, gamma=0.5, logit_adjustment=False), COUNTS, HEADS)
    assert loss(logits, targets)["loss"].item() == pytest.approx(expected, rel=1e-6)
    # Plain logits are for the frequencies of the training images; adjusted ones for uniform frequencies.
    assert loss.logit_prior == "train"
    assert create_loss(Recipe(loss=name), COUNTS, HEADS).logit_prior == "uniform"


def test_plain_losses_without_class_weights_or_distillation_are_cross_entropies():
    logits, targets = random_logits()
    recipe = Recipe(loss="bib", logit_adjustment=False, class_weight_power=0.0, beta=0.0)
    expected = sum(torch.nn.functional.cross_entropy(logits[head], targets) for head in ("v3", "z"))
    torch.testing.assert_close(create_loss(recipe, COUNTS, HEADS)(logits, targets)["loss"], expected)


@pytest.mark.parametrize("power", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("adjusted", [True, False])
def test_class_weights_that_are_not_normalised_divide_by_the_number_of_images(power, adjusted):
    logits, targets = random_logits(batch=7)
    recipe = Recipe(loss="bib", beta=0.0, class_weight_power=power, logit_adjustment=adjusted)
    weights = naive_weights(COUNTS, power)
    shifted = {h: values + torch.tensor(COUNTS).log() if adjusted else values for h, values in logits.items()}
    expected = sum(naive_plain(shifted[head], targets, weights, len(targets)) for head in ("v3", "z"))
    out = create_loss(recipe.replace(normalize_class_weights=False), COUNTS, HEADS)(logits, targets)["loss"].item()
    assert out == pytest.approx(expected, rel=1e-6)
    inside = create_loss(recipe, COUNTS, HEADS)(logits, targets)["loss"].item()
    # Without class weights the sum of the weights is the number of images.
    assert (inside == pytest.approx(out, rel=1e-9)) == (power == 0)
