"""The analyses against naive loops, scikit-learn and the modules of the model; their memory in a fresh process."""

import dataclasses
import math
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import timm
import torch
from sklearn import linear_model, metrics
from sklearn.datasets import make_blobs
from sklearn.neighbors import KNeighborsClassifier
from small_data import PEAK_MEMORY, noise_batches
from torch import nn

from mbib_timm.analysis import embedding
from mbib_timm.analysis.analysis_record import six_digits
from mbib_timm.analysis.embedding import choose_images, embed, perplexity_for, spread_classes, tsne
from mbib_timm.analysis.measures import (
    Distances,
    Trend,
    accuracy_trend,
    class_distances,
    distances,
    group_confusion,
    mean_by_shot_group,
    mean_positive_posterior,
    reliability,
)
from mbib_timm.analysis.outputs import collect_outputs
from mbib_timm.errors import DataError, MbibError
from mbib_timm.evaluation import AnswerLog, batch_statistics, evaluate
from mbib_timm.models import MBIB
from mbib_timm.models.complexity import efficiency
from mbib_timm.models.head_outputs import head_logits
from mbib_timm.results.paper import TABLE_6

COUNTS = np.array([500, 101, 100, 60, 20, 19, 3])
GROUP_OF = ["many", "many", "medium", "medium", "medium", "few", "few"]
CPU = torch.device("cpu")


def mbib(**kwargs):
    torch.manual_seed(0)
    model = MBIB("cifar_resnet20", **{"taps": (3, 6, 9), "num_classes": 7, "drop_rate": 0.5, **kwargs})
    for module in model.modules():  # as after training: statistics that are not those of a fresh layer
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2.0)
    return model


# Outputs.


@pytest.mark.parametrize("prediction", ["mean", "v", "z"])
def test_metrics_are_those_of_evaluate(prediction):
    model, (loader, _, y) = mbib(prediction=prediction), noise_batches()
    outputs = collect_outputs(model, loader, COUNTS)
    assert outputs.metrics == evaluate(model, loader, COUNTS, device=CPU, answers=AnswerLog())
    assert list(outputs.metrics) == list(outputs.heads)
    assert torch.equal(outputs.labels, y)


@pytest.mark.parametrize("prediction", ["mean", "v", "z"])
@torch.no_grad()
def test_features_are_those_that_the_modules_give(prediction):
    """Dropout of one half stands between features and classifiers; it must not touch them."""
    model, (loader, x, _) = mbib(prediction=prediction), noise_batches()
    features = collect_outputs(model, loader, COUNTS).features
    model.eval()
    pooled = model.backbone.forward_intermediates(x, indices=model.taps)[0].mean(dim=(2, 3))
    norm = model.observation.norm
    v = (pooled - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(features["v"], v, rtol=1e-4, atol=1e-5)
    if prediction == "v":
        assert list(features) == ["v"]
        return
    bottleneck = model.bottleneck
    z = bottleneck.norm(nn.functional.linear(v, bottleneck.fc.weight, bottleneck.fc.bias)).clamp(min=0)
    torch.testing.assert_close(features["z"], z, rtol=1e-4, atol=1e-5)
    assert not any(module._forward_hooks for module in model.modules())


def test_heads_are_those_of_forward_heads():
    model, (loader, x, y) = mbib(), noise_batches()
    outputs = collect_outputs(model, loader, COUNTS)
    assert list(outputs.heads) == ["prediction", "v1", "v2", "v3", "z"]
    with torch.no_grad():
        logits = {"prediction": model.eval()(x), **dict(zip(model.head_names, model.forward_heads(x), strict=True))}
    for name, head in outputs.heads.items():
        probabilities = logits[name].double().softmax(1)
        for i, label in enumerate(y.tolist()):
            assert head.predicted[i] == int(probabilities[i].argmax())
            assert head.positive_posterior[i] == pytest.approx(float(probabilities[i, label]), rel=1e-4)


def test_equal_logits_are_ranked_as_evaluate_ranks_them():
    model, (loader, _, _) = mbib(taps=(9,)), noise_batches()
    with torch.no_grad():
        for layer in model.get_classifier():
            layer.weight.zero_()
            layer.bias.copy_(torch.tensor([0.0, 1, 1, 1, 1, 1, 1]))
    outputs = collect_outputs(model, loader, COUNTS)
    for name, head in outputs.heads.items():
        correct = 100 * float((head.predicted == outputs.labels).double().mean())
        assert correct == pytest.approx(outputs.metrics[name].top1)


@torch.no_grad()
def test_a_plain_model_gives_its_pooled_features():
    model, (loader, x, _) = timm.create_model("cifar_resnet20", num_classes=7, drop_rate=0.5), noise_batches()
    outputs = collect_outputs(model, loader, COUNTS)
    assert list(outputs.heads) == ["prediction"]
    torch.testing.assert_close(outputs.features["v"], model.forward_features(x).mean(dim=(2, 3)))
    assert torch.equal(outputs.heads["prediction"].predicted, model(x).argmax(1))
    assert outputs.metrics == evaluate(model, loader, COUNTS, device=CPU, answers=AnswerLog())


def test_channels_last_changes_nothing():
    model, (loader, _, _) = mbib(), noise_batches()
    plain = collect_outputs(model, loader, COUNTS)
    seen = []
    model.backbone.conv1.register_forward_pre_hook(
        lambda _, given: seen.append(given[0].is_contiguous(memory_format=torch.channels_last))
    )
    last = collect_outputs(model, loader, COUNTS, channels_last=True)
    assert seen == [True] * 3
    torch.testing.assert_close(last.features, plain.features, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_collected():
    loader, _, _ = noise_batches()
    with pytest.raises(DataError, match="no image"):
        collect_outputs(mbib(), [], COUNTS)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 7))
    with pytest.raises(MbibError, match="Sequential does not give its features"):
        collect_outputs(plain, loader, COUNTS)
    broken = mbib()
    with torch.no_grad():
        broken.bottleneck.classifier.weight[0, 0] = torch.nan
    with pytest.raises(MbibError, match="logits of prediction and 1 more are not finite"):
        collect_outputs(broken, loader, COUNTS)


# Posterior.


def test_mean_positive_posterior():
    posterior, labels = np.array([0.5, 0.25, 1.0, 0.0], dtype=np.float32), np.array([2, 2, 0, 2])
    mean = mean_positive_posterior(posterior, labels, 4)
    assert mean[[0, 2]].tolist() == [1.0, 0.25]
    assert np.isnan(mean[[1, 3]]).all()


def test_means_by_shot_group_leave_out_what_was_not_measured():
    values = np.array([0.5, np.nan, 0.25, np.nan])
    groups = mean_by_shot_group(values, np.array([300, 200, 150, 5]))
    assert groups == {"all": 0.375, "many": 0.375, "medium": None, "few": None}


# Distances.


def naive_distances(features, labels, num_classes, others=lambda c: range(1000)):
    """Equations 15 and 16 by class, term by term; the distances from the centre; `others` of a class are compared."""
    points = {c: [r for r, y in zip(features, labels, strict=True) if y == c] for c in range(num_classes)}
    points = {c: rs for c, rs in points.items() if rs}
    centre = {c: [sum(column) / len(rs) for column in zip(*rs, strict=True)] for c, rs in points.items()}
    intra = {c: sum(math.dist(a, b) for a in rs for b in rs) / len(rs) ** 2 for c, rs in points.items()}
    from_centre = {c: sum(math.dist(r, centre[c]) for r in rs) / len(rs) for c, rs in points.items()}
    near = {c: [centre[j] for j in points if j != c and j in others(c)] for c in points}
    inter = {c: sum(math.dist(centre[c], j) for j in near[c]) / len(near[c]) for c in points if near[c]}
    return intra, from_centre, inter


@pytest.mark.parametrize("block", [2**22, 40, 1])
@pytest.mark.parametrize("absent", [(), (3,), (5, 6)])
def test_distances_against_naive_loops(absent, block, monkeypatch):
    monkeypatch.setattr("mbib_timm.analysis.measures.BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 7, (80,), generator=generator)
    labels = labels[~torch.isin(labels, torch.tensor(absent, dtype=torch.long))]
    features = torch.randn(len(labels), 5, generator=generator) + 3 * labels[:, None]
    features[:3] = features[0]  # duplicates
    labels[labels == 4] = 1  # but for one image, which has no distance to others of its class
    labels[0] = 4
    given = features.double().tolist(), labels.tolist(), 7
    intra, from_centre, inter = naive_distances(*given)
    _, _, inside = naive_distances(*given, others=lambda c: [j for j in range(7) if GROUP_OF[j] == GROUP_OF[c]])
    result = distances(features, labels, COUNTS)
    assert list(result) == ["all", "many", "medium", "few"]
    for group, values in result.items():
        classes = [c for c in intra if group in ("all", GROUP_OF[c]) and c != 4]
        if not classes:
            assert values == Distances(None, None, None, None)
            continue
        expected = [
            sum(by[c] for c in classes if c in by) / max(1, sum(c in by for c in classes)) or None
            for by in (intra, from_centre, inter, inside)
        ]
        assert dataclasses.astuple(values) == pytest.approx(tuple(expected), rel=1e-9)
        pairs, centre, between, beside = expected
        assert values.rho() == pytest.approx(pairs / between, rel=1e-9)
        assert values.rho("centre") == pytest.approx(centre / between, rel=1e-9)
        for name, within in (("pairs", pairs), ("centre", centre)):
            assert values.rho(name, "inter_within") == (pytest.approx(within / beside, rel=1e-9) if beside else None)
    assert ("few" in [g for g, v in result.items() if v.rho() is None]) == (absent == (5, 6))


def test_classes_of_single_images_have_no_distance():
    features, counts = torch.tensor([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]]), np.array([200, 3])
    result = distances(features[:2], torch.tensor([1, 0]), counts)
    assert set(result.values()) == {Distances(None, None, None, None)}, "and not a perfect 0"
    result = distances(features, torch.tensor([0, 0, 1]), counts)
    two = Distances(pairs=2.5, centre=2.5, inter=7.5, inter_within=None)
    nothing = Distances(None, None, None, None)
    assert result == {"all": two, "many": two, "medium": nothing, "few": nothing}


def test_one_class_alone_has_no_distance_to_others():
    result = distances(torch.tensor([[0.0], [4.0]]), torch.tensor([1, 1]), np.array([200, 3]))
    assert result["few"] == Distances(pairs=2.0, centre=2.0, inter=None, inter_within=None)
    assert result["few"].rho() is None
    assert result["many"] == Distances(None, None, None, None)


@pytest.mark.parametrize("gap", [0.0, 1e-3])
def test_near_points_far_from_the_origin_keep_their_distance(gap):
    """A matrix product in single precision sees none here."""
    features = torch.full((64, 128), 1000.0)
    features[32:, 0] += gap
    gap = float(features[-1, 0]) - 1000.0
    intra = class_distances(features, torch.zeros(64, dtype=torch.long), np.ones(1)).pairs
    assert float(intra[0]) == pytest.approx(gap / 2, rel=1e-9, abs=0)
    inter = class_distances(features, torch.arange(64), np.ones(64)).inter  # half the others at the gap
    assert inter.tolist() == pytest.approx([gap * 32 / 63] * 64, rel=1e-9, abs=0)


def test_near_centres_beside_far_ones_keep_their_distance():
    features = torch.zeros(4, 3, dtype=torch.float64)
    features[0], features[1], features[2, 0] = 1e6, 1e6, -1e6
    features[1, 0] += 1e-4
    intra, centre, inter, inside = class_distances(features, torch.arange(4), np.array([200, 200, 200, 3]))
    _, _, expected = naive_distances(features.tolist(), range(4), 4)
    _, _, three = naive_distances(features.tolist(), range(4), 4, others=lambda c: range(3))
    assert inside[:3].tolist() == pytest.approx([three[c] for c in range(3)], rel=1e-12)
    assert inside[3].isnan()
    assert centre.tolist() == [0.0] * 4
    assert inter.tolist() == pytest.approx([expected[c] for c in range(4)], rel=1e-12)
    pair = class_distances(features[:2], torch.zeros(2, dtype=torch.long), np.ones(1)).pairs
    assert float(pair) == pytest.approx(float(features[1, 0] - 1e6) / 2, rel=1e-12)
    assert intra.tolist() == [0.0] * 4


# Embedding.


def test_classes_from_the_head_to_the_tail(monkeypatch):
    counts = np.array([5, 400, 30, 7, 90, 200, 1, 60, 15, 10, 300, 20])
    labels = np.repeat(np.arange(12), 2)
    ten = spread_classes(labels, counts)
    assert len(set(ten)) == 10
    assert [int(counts[c]) for c in ten] == sorted((int(counts[c]) for c in ten), reverse=True)
    assert (ten[0], ten[-1]) == (1, 6)
    assert spread_classes(labels[labels != 6], counts)[-1] == 0, "the tail's last class with images"
    assert spread_classes(np.array([3, 3, 0]), counts) == [3, 0]
    # By images: 400 300 200 90 60 30 20 15 10 7 5 1; of places 0, 5.5 and 11 the middle one rounds to the even 6.
    monkeypatch.setattr(embedding, "CLASSES", 3)
    assert spread_classes(labels, counts) == [1, 11, 6]


def test_images_are_chosen_alike_for_the_same_seed():
    labels = np.random.default_rng(0).integers(0, 5, 200)
    places = choose_images(labels, [4, 1], 10, seed=0)
    assert labels[places].tolist() == [4] * 10 + [1] * 10
    assert len(set(places.tolist())) == 20
    assert choose_images(labels, [4, 1], 10, seed=0).tolist() == places.tolist()
    assert choose_images(labels, [4, 1], 10, seed=1).tolist() != places.tolist()
    assert choose_images(labels, [2], 1000, seed=0).tolist() == np.flatnonzero(labels == 2).tolist()
    with pytest.raises(MbibError, match="class 7 has no image to show; classes with images: 0, 1, 2, 3, 4"):
        choose_images(labels, [7], 10, seed=0)


def test_tsne_keeps_clusters_and_repeats_itself():
    features, labels = make_blobs(120, n_features=20, centers=4, cluster_std=0.5, random_state=0)
    points = tsne(features, seed=0)
    assert points.shape == (120, 2)
    neighbours = KNeighborsClassifier(5).fit(points[::2], labels[::2])
    assert neighbours.score(points[1::2], labels[1::2]) == 1.0
    assert np.array_equal(tsne(features, seed=0), points)


@pytest.mark.parametrize(
    "features",
    [np.eye(4), np.zeros((12, 5)), np.arange(10.0)[:, None], np.repeat(np.eye(3), 5, axis=0)],
    ids=["four points", "all the same", "one feature", "duplicates"],
)
def test_tsne_of_little(features):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # a division by zero, say
        points = tsne(features, seed=0)
    assert points.shape == (len(features), 2)
    assert np.isfinite(points).all()


def test_perplexity_is_below_the_number_of_points():
    assert perplexity_for(1000) == 30
    assert perplexity_for(91) == 30
    assert perplexity_for(31) == 10
    assert perplexity_for(4) == 1
    with pytest.raises(MbibError, match="at least 4 images, got 3"):
        tsne(np.eye(3), seed=0)


def test_every_kind_of_features_shows_the_same_images():
    labels, counts = np.repeat(np.arange(5), 8), np.array([50, 40, 30, 20, 10])
    features = {name: torch.randn(40, 6, generator=torch.Generator().manual_seed(i)) for i, name in enumerate("vz")}
    shown = embed(features, labels, counts, classes=[3, 1, 3], images_per_class=6)
    assert (shown.classes, shown.labels) == ([3, 1], [3] * 6 + [1] * 6)
    places = choose_images(labels, [3, 1], 6, shown.seed)
    for name, values in features.items():
        np.testing.assert_allclose(shown.points[name], tsne(values[places].numpy(), shown.seed), atol=0.005001)
    assert shown.perplexity == perplexity_for(12)
    assert embed(features, labels, counts).classes == spread_classes(labels, counts)


# Calibration.


def test_reliability_against_a_naive_loop_and_the_metrics():
    model, (loader, x, y) = mbib(), noise_batches(images=200, batch=50)
    outputs = collect_outputs(model, loader, COUNTS)
    with torch.no_grad():
        logits = head_logits(model.eval(), x)
    for name, bins in outputs.bins.items():
        confidence, predicted = (values.tolist() for values in logits[name].double().softmax(1).max(1))
        result, gaps = reliability(bins), 0.0
        for b in range(15):
            inside = [i for i, c in enumerate(confidence) if b / 15 < c <= (b + 1) / 15]
            assert result.images[b] == len(inside)
            if not inside:
                assert result.confidence[b] is result.accuracy[b] is None
                continue
            right = sum(predicted[i] == int(y[i]) for i in inside)
            sure = sum(confidence[i] for i in inside)
            assert result.accuracy[b] == pytest.approx(100 * right / len(inside))
            assert result.confidence[b] == pytest.approx(100 * sure / len(inside), rel=1e-4)
            gaps += abs(right - sure)
        assert result.ece == pytest.approx(100 * gaps / len(y), rel=1e-3)
        assert result.ece == outputs.metrics[name].ece


def test_borders_of_the_bins():
    borders = torch.arange(1, 15) / 15
    confidence = torch.cat([borders - 1e-4, borders + 1e-4])[:, None]
    logits = torch.cat([confidence, ((1 - confidence) / 19).expand(-1, 19)], dim=1).log()
    bins = batch_statistics(logits, torch.zeros(28, dtype=torch.long)).bins.numpy()
    assert reliability(bins).images == [1, *[2] * 13, 1]
    # A border is in the bin below it: of 15 classes, the least confidence that there is, 1/15, and the most, 1.
    exact = torch.zeros(2, 15)
    exact[1, 0] = 100
    bins = batch_statistics(exact, torch.zeros(2, dtype=torch.long)).bins.numpy()
    assert reliability(bins).images == [1, *[0] * 13, 1]
    assert reliability(bins).confidence[-1] == 100


# Confusion.


def test_group_confusion_against_scikit_learn():
    generator = np.random.default_rng(0)
    labels, predicted = generator.integers(0, 7, 300), generator.integers(0, 7, 300)
    labels[:60] = predicted[:60]
    result = group_confusion(labels, predicted, COUNTS)
    names = ["many", "medium", "few"]
    expected = metrics.confusion_matrix([GROUP_OF[i] for i in labels], [GROUP_OF[i] for i in predicted], labels=names)
    for i, true in enumerate(names):
        assert list(result.images[true].values()) == expected[i].tolist()
        right = sum(1 for y, p in zip(labels, predicted, strict=True) if y == p and GROUP_OF[y] == true)
        assert result.correct[true] == right
        classes = [c for c in range(7) if GROUP_OF[c] == true]
        recall = metrics.recall_score(labels, predicted, labels=classes, average="macro")
        assert result.shares[true]["correct"] == pytest.approx(100 * recall), "the group's accuracy"
        for group in names:
            wrong = [np.mean([GROUP_OF[p] == group and p != c for p in predicted[labels == c]]) for c in classes]
            assert result.shares[true][f"wrong_to_{group}"] == pytest.approx(100 * np.mean(wrong))
        assert sum(result.shares[true].values()) == pytest.approx(100)
        assert sum(result.even[true].values()) == pytest.approx(100)


def test_errors_spread_evenly_are_the_baseline():
    """Every image of class i is once taken for each other class: shares are then exactly those of even errors."""
    pairs = [(y, p) for y in range(7) for p in range(7)]
    labels, predicted = np.array(pairs).T
    result = group_confusion(labels, predicted, COUNTS)
    for group in ("many", "medium", "few"):
        assert result.even[group] == pytest.approx(result.shares[group])
    drawn = group_confusion(labels, np.where(labels == predicted, predicted, (labels == 0).astype(int)), COUNTS)
    assert drawn.shares["few"]["wrong_to_many"] == pytest.approx(100 * 6 / 7)
    assert drawn.even["few"]["wrong_to_many"] == pytest.approx(100 * 6 / 7 * 2 / 6)
    assert drawn.even["few"]["wrong_to_few"] == pytest.approx(100 * 6 / 7 * 1 / 6)


def test_confusion_of_groups_without_images_and_of_two_classes():
    result = group_confusion(np.array([0, 0, 0]), np.array([0, 1, 1]), np.array([200, 3]))
    assert result.images["many"] == {"many": 1, "medium": 0, "few": 2}
    assert result.shares["many"] == pytest.approx(
        {"correct": 100 / 3, "wrong_to_many": 0, "wrong_to_medium": 0, "wrong_to_few": 200 / 3}
    )
    assert result.even["many"] == pytest.approx(result.shares["many"]), "there is only one other class"
    assert result.shares["few"] is result.even["few"] is result.shares["medium"] is None


# Trend.


def test_trend_against_scikit_learn():
    accuracy = [90.0, 70.0, None, 65.0, 30.0, 35.0, 5.0]
    kept = [i for i, value in enumerate(accuracy) if value is not None]
    x, y = np.log10(COUNTS[kept])[:, None], np.array([accuracy[i] for i in kept])
    line = linear_model.LinearRegression().fit(x, y)
    result = accuracy_trend(accuracy, COUNTS)
    assert result.slope == pytest.approx(line.coef_[0])
    assert result.intercept == pytest.approx(line.intercept_)
    assert result.r2 == pytest.approx(line.score(x, y))


def test_trend_of_little():
    nothing = Trend(None, None, None)
    assert accuracy_trend([10.0, 20.0, 30.0], np.array([50, 50, 50])) == nothing
    assert accuracy_trend([10.0, None, 30.0], np.array([50, 500, 50])) == nothing
    assert accuracy_trend([None, None], np.array([50, 500])) == nothing
    line = accuracy_trend([10.0, 20.0], np.array([10, 100]))
    assert (line.slope, line.intercept, line.r2) == pytest.approx((10, 0, 1))
    assert accuracy_trend([33.3, 33.3], np.array([10, 100])) == Trend(slope=0.0, intercept=33.3, r2=None)


# Efficiency.


def test_efficiency_of_table_6():
    model = timm.create_model("mbib_resnet32", num_classes=100)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = efficiency(model, (3, 640, 640))
    assert result.input_size == [3, 640, 640]
    assert result.all_heads.parameters == 486_016
    assert result.all_heads.macs == pytest.approx(TABLE_6["MBIB"]["macs"], rel=5e-4)
    assert result.inference.parameters == 486_016 - 1_700 - 3_300 - 2 * (16 + 32)
    assert result.inference.macs < result.all_heads.macs
    assert model.training
    assert len(model.training_heads) == 2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(value.is_meta for value in model.state_dict().values())


def test_a_plain_model_costs_the_same_with_all_its_heads():
    result = efficiency(timm.create_model("resnet18", num_classes=5), (3, 224, 224))
    assert result.inference == result.all_heads


def test_models_of_a_fixed_size_and_of_grey_images():
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=5)
    assert efficiency(vit, (3, 224, 224)).input_size == [3, 224, 224]
    grey = timm.create_model("mbib_resnet20", num_classes=5, in_chans=1)
    assert efficiency(grey, (1, 16, 16)).input_size == [1, 16, 16]


# All of it.


def test_rounding():
    value = {"a": [1.23456789, np.float64("nan"), 12345678.9, 7], "b": (None, "x", True)}
    assert six_digits(value) == {"a": [1.23457, None, 12345700.0, 7], "b": [None, "x", True]}


INATURALIST = (
    PEAK_MEMORY
    + """
import numpy as np, torch
from torch import nn
from mbib_timm.analysis.measures import distances
from mbib_timm.analysis.outputs import collect_outputs
from mbib_timm.data import Batch

torch.set_num_threads(1)
imported = peak()
N, K, C = 24_426, 8_142, 2_048

class Wide(nn.Module):
    # 2,048 features of every image and a logit of every class, at no cost
    def forward_features(self, x):
        return x.flatten(1).repeat(1, C // 64)
    def forward_head(self, x, pre_logits=False):
        return x if pre_logits else x[:, :1] + self.bias
    bias = torch.linspace(0, 1, K)

def loader(images):
    generator = torch.Generator().manual_seed(0)
    for start in range(0, images, 128):
        size = min(128, images - start)
        labels = torch.arange(start, start + size) % K
        yield Batch((torch.randn(size, 1, 8, 8, generator=generator),), labels, torch.arange(start, start + size))

counts = np.linspace(1000, 2, K).astype(int)
outputs = collect_outputs(Wide(), loader(N), counts)
assert outputs.metrics["prediction"].images == N
features = {"v": outputs.features["v"], "z": torch.randn(N, C)}
rho = distances(features["v"], torch.arange(N) % K, counts)  # as much for those of z, one after the other
# Three standard normal images a class: 2/3 of the pairs are d apart, centres d / sqrt(3).
assert abs(rho["all"].rho() - 2 / 3 * 3**0.5) < 0.01, rho
print((peak() - imported) * 1024)
"""
)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_inaturalist_takes_little_more_than_its_features():
    """24,426 images, 8,142 classes, 2,048 features of v and of z: 0.2 GB each, twice while distances are taken.

    All logits would take 0.8 GB more. What the libraries take by themselves depends on their versions.
    """
    # What is freed goes back at once: glibc would keep up to 0.7 GB, now more and now less.
    memory = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run([sys.executable, "-c", INATURALIST], capture_output=True, text=True, timeout=300, env=memory)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) < 1.5e9
