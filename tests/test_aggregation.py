"""Test-time aggregation of experts: against loops, by what it must not touch, and by hand on a short run."""

import copy
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.models import save_for_hf

from mbib_timm.cli import main
from mbib_timm.data.long_tail import exponential_profile
from mbib_timm.errors import DataError, MbibError
from mbib_timm.evaluation import aggregate as command
from mbib_timm.evaluation.aggregate import (
    DISTRIBUTIONS,
    _called,
    aggregate,
    draw_test_set,
    learn_weights,
    view_consistency,
    view_recipes,
    weighted_logits,
)
from mbib_timm.evaluation.validate import validate
from mbib_timm.models.head_outputs import predicting_parts
from mbib_timm.recipe import find_recipe, load_recipe
from mbib_timm.training import train

COUNTS = np.array([3, 500, 40, 120, 9])


def logits(seed, experts=3, batch=6, classes=5, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(experts, batch, classes, generator=generator)


# Learning


def naive_consistency(first, second, weights):
    """Image by image, class by class."""
    total = 0.0
    for i in range(first.shape[1]):
        predictions = []
        for view in (first, second):
            z = [sum(w * view[e, i, j].item() for e, w in enumerate(weights)) for j in range(view.shape[2])]
            exponentials = [math.exp(value) for value in z]
            predictions.append([value / sum(exponentials) for value in exponentials])
        p, q = predictions
        norms = [math.sqrt(sum(x * x for x in each)) for each in predictions]
        total += sum(a * b for a, b in zip(p, q, strict=True)) / (norms[0] * norms[1])
    return total / first.shape[1]


def naive_softmax(a):
    exponentials = [math.exp(value) for value in a]
    return [value / sum(exponentials) for value in exponentials]


def test_consistency_is_its_equation():
    first, second, weights = logits(0), logits(1), [0.5, 0.2, 0.3]
    found = view_consistency(first, second, torch.tensor(weights)).item()
    assert found == pytest.approx(naive_consistency(first, second, weights), rel=1e-5)
    assert view_consistency(first, first, torch.tensor(weights)).item() == pytest.approx(1)


def test_equal_weights_are_the_mean():
    z = logits(0)
    torch.testing.assert_close(weighted_logits(z, torch.full((3,), 1 / 3)), z.mean(dim=0))
    learnt = learn_weights([], 3)
    assert learnt.epochs == 0
    torch.testing.assert_close(weighted_logits(z, learnt.weights), z.mean(dim=0))
    torch.testing.assert_close(weighted_logits(z, torch.eye(3)[1]), z[1])


def test_learning_is_nesterovs_sgd_on_the_weights_alone():
    """By hand, with gradients by central differences."""
    epochs = [[(logits(i, scale=1.0), logits(10 + i, scale=1.0)) for i in range(4)]] * 2
    a, velocity = [1 / 3] * 3, [0.0] * 3
    for batches in epochs:
        for first, second in batches:
            gradient = []
            for e in range(3):
                moved = [[value + sign * 1e-4 * (k == e) for k, value in enumerate(a)] for sign in (1, -1)]
                up, down = (-naive_consistency(first, second, naive_softmax(each)) for each in moved)
                gradient.append((up - down) / 2e-4 + 5e-4 * a[e])
            velocity = [0.9 * v + g for v, g in zip(velocity, gradient, strict=True)]
            a = [value - 0.1 * (g + 0.9 * v) for value, g, v in zip(a, gradient, velocity, strict=True)]
    learnt = learn_weights(epochs, 3)
    assert learnt.epochs == 2
    assert max(abs(value - 1 / 3) for value in naive_softmax(a)) > 0.001
    assert learnt.weights.tolist() == pytest.approx(naive_softmax(a), abs=1e-5)


def consistent_first(steps):
    """Batches on whose views the first expert agrees with itself and the third does not."""
    for i in range(steps):
        sure, first, second = logits(i, scale=4.0), logits(100 + i, scale=4.0), logits(200 + i, scale=4.0)
        noise = torch.tensor([0.0, 0.5, 1.0])[:, None, None]
        yield sure + noise * (first - sure), sure + noise * (second - sure)


def test_the_consistent_expert_gains():
    learnt = learn_weights([consistent_first(10)], 3)
    first, second, third = learnt.weights.tolist()
    assert first > second > third
    assert learnt.weights.sum().item() == pytest.approx(1)


def test_learning_ends_after_the_epoch_in_which_an_expert_is_all_but_out():
    epochs = [consistent_first(60) for _ in range(5)]
    learnt = learn_weights(epochs, 3)
    assert learnt.weights.min() < 0.05
    assert learnt.epochs < 5
    before = learn_weights([consistent_first(60) for _ in range(learnt.epochs - 1)], 3)
    assert before.weights.min() >= 0.05
    assert len(list(epochs[learnt.epochs])) == 60, "the next epoch's batches were not asked for"


# Test sets


def balanced(images=100):
    return np.random.default_rng(0).permutation(np.repeat(np.arange(len(COUNTS)), images))


@pytest.mark.parametrize("factor", [2, 5, 10, 25, 50])
def test_shifted_test_sets_follow_the_training_frequencies_or_reverse_them(factor):
    targets = balanced()
    profile = exponential_profile(5, 100, factor)
    most_to_fewest = [1, 3, 2, 4, 0]
    for kind, order in (("forward", most_to_fewest), ("backward", most_to_fewest[::-1])):
        places = draw_test_set(f"{kind}{factor}", targets, COUNTS, seed=0)
        assert len(set(places.tolist())) == len(places)
        counted = Counter(targets[places].tolist())
        assert [counted[label] for label in order] == profile
    assert profile[0] == 100
    assert profile[-1] == 100 // factor


def test_test_sets_are_drawn_by_seed():
    targets = balanced()
    first, again, other = (draw_test_set("forward10", targets, COUNTS, seed) for seed in (0, 0, 1))
    assert first.tolist() == again.tolist()
    assert first.tolist() != other.tolist()
    assert draw_test_set("uniform", targets, COUNTS, 0).tolist() == list(range(500))
    assert len(DISTRIBUTIONS) == 11


def test_test_sets_of_uneven_data_are_as_large_as_can_be():
    """With 20 images of the most frequent class, forward2 has 20 of it."""
    kept = balanced()
    places = np.flatnonzero(kept == 1)[20:]
    targets = np.delete(kept, places)
    counted = Counter(targets[draw_test_set("forward2", targets, COUNTS, 0)].tolist())
    assert counted[1] == 20
    assert counted[0] == 10


def test_test_sets_that_cannot_be_are_refused():
    with pytest.raises(MbibError, match=r"unknown test distribution 'forward20': did you mean 'forward2'"):
        aggregate("gone", distributions=["forward20"])
    with pytest.raises(
        DataError, match="imbalance factor 50 leaves the smallest class no image where the largest has 49"
    ):
        draw_test_set("backward50", balanced(49), COUNTS, 0)


def test_all_images_are_uniform_only_where_the_classes_have_the_same_number():
    assert _called("uniform", np.array([0, 1, 1, 0]), 2) == "uniform"
    assert _called("uniform", np.array([0, 1, 1]), 2) == "as it is"
    assert _called("forward2", np.array([0, 1, 1]), 2) == "forward2"


# The command


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    # Long enough that experts differ and answer more than one class, on any processor.
    settings = dict(model="experts_resnet20", epochs=4, warmup_epochs=0, imbalance_max=96, batch_size=32, device="cpu")
    recipe = load_recipe(
        find_recipe("experts_resnet32.sade_digits"), {**settings, "output": str(tmp_path_factory.mktemp("runs"))}
    )
    return train(recipe, "experts").folder


CPU = {"device": "cpu", "workers": 0}


@pytest.mark.slow
def test_the_command_writes_a_table_of_every_distribution(run, capsys):
    assert main(["aggregate", str(run), "--device", "cpu", "--workers", "0", "--targets", "forward5", "uniform"]) == 0
    printed = capsys.readouterr().out
    content = json.loads((run / "aggregation.json").read_text())
    assert [row["test_set"] for row in content["test_sets"]] == ["forward5", "uniform"]
    for row in content["test_sets"]:
        assert list(row["top1"]) == ["expert1", "expert2", "expert3", "mean", "learnt"]
        assert sum(row["weights"].values()) == pytest.approx(1)
        assert all(f"{value:.2f}" in printed for value in row["top1"].values())
    uniform = content["test_sets"][1]
    assert uniform["images"] == 340
    heads = validate(str(run), overrides=CPU).heads
    # As an evaluation sees the images, not as training does.
    expected = {name: heads[name].top1 for name in ("expert1", "expert2", "expert3")}
    assert {name: uniform["top1"][name] for name in expected} == pytest.approx(expected)
    assert uniform["top1"]["mean"] == pytest.approx(heads["prediction"].top1)
    assert str(run / "aggregation.json") in printed


@pytest.mark.slow
def test_weights_do_not_depend_on_labels_and_the_model_stays_as_it_is(run, tmp_path, monkeypatch):
    opened = []
    original_open, original_loader = command.open_target, command.build_views_loader
    monkeypatch.setattr(command, "open_target", lambda *args: opened.append(original_open(*args)) or opened[-1])
    keys = dict(overrides=CPU, distributions=["backward10"], results_file=tmp_path / "out.json")
    first = aggregate(str(run), **keys)
    fresh = timm.create_model(f"local-dir:{run}", pretrained=True)
    state = opened[0].model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in fresh.state_dict().items())
    assert all(p.grad is None for p in opened[0].model.parameters())
    assert not any(module.training for module in opened[0].model.modules())

    def without_labels(recipe, split, views, **kwargs):
        blank = copy.copy(split)
        object.__setattr__(blank, "targets", np.zeros_like(split.targets))
        return original_loader(recipe, blank, views, **kwargs)

    monkeypatch.setattr(command, "build_views_loader", without_labels)
    assert aggregate(str(run), **keys).test_sets == first.test_sets
    assert aggregate(str(run), **keys, seed=1).test_sets != first.test_sets
    assert first.test_sets[0].weights != dict.fromkeys(("expert1", "expert2", "expert3"), 1 / 3)


@pytest.mark.slow
def test_both_loaders_serve(run, tmp_path, monkeypatch):
    monkeypatch.setattr("mbib_timm.data.create.fits", lambda *args: False)
    keys = dict(overrides=CPU, distributions=["forward5"], results_file=tmp_path / "new" / "out.json")
    (row,) = aggregate(str(run), **keys).test_sets
    assert row.images > 100
    assert row.epochs == 5
    assert keys["results_file"].is_file()


@pytest.mark.slow
def test_test_sets_for_which_there_are_too_few_images_are_left_out_or_refused(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "learn_weights", lambda epochs, experts, device: learn_weights([], experts, device))
    content = aggregate(str(run), overrides=CPU, results_file=tmp_path / "out.json")
    names = [row.test_set for row in content.test_sets]
    assert names == [name for name in DISTRIBUTIONS if not name.endswith("50")]
    assert "left out: forward50: imbalance factor 50 leaves the smallest class no image" in capsys.readouterr().out
    with pytest.raises(DataError, match="imbalance factor 50"):
        aggregate(str(run), overrides=CPU, distributions=["forward50"])


def test_views_change_colours_where_there_are_any():
    recipe = load_recipe(find_recipe("experts_resnet32.sade_cifar100_lt_if100"))
    first, second = view_recipes(recipe, 3)
    assert first == second
    assert (first.color_jitter, first.hue, first.color_jitter_prob) == (0.4, 0.1, 0.8)
    assert (first.grayscale_prob, first.gaussian_blur_prob, first.hflip) == (0.2, 0.2, 0.5)
    assert (first.train_crop_mode, first.rotation, first.aa, first.cutout) == ("pad", 0, None, 0)
    grey = view_recipes(recipe, 1)[0]
    assert (grey.hue, grey.grayscale_prob, grey.color_jitter) == (0, 0, 0.4)


def test_a_model_of_one_head_is_refused(tmp_path, capsys):
    folder = tmp_path / "plain"
    save_for_hf(timm.create_model("cifar_resnet20", num_classes=10), folder, safe_serialization=True)
    arguments = ["aggregate", str(folder), "--recipe", "cifar_resnet20.ce_digits", "--device", "cpu"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "CifarResNet has one head, so there is nothing to weight" in error
    assert error.count("\n") == 1


def test_parts_of_a_prediction():
    parts = {name: predicting_parts(timm.create_model(name, device="meta")) for name in (
        "cifar_resnet20", "mbib_resnet20", "experts_resnet20", "mbib_experts_resnet20"
    )}  # fmt: skip
    experts = ("expert1", "expert2", "expert3")
    assert list(parts.values()) == [(), ("v3", "z"), experts, experts]
