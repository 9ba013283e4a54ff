"""Class weights of a loss, against scikit-learn and torch's own, and what files of them may say."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight
from tiny import EXPERTS, OBSERVATIONS, Tiny

from mbib_timm.cli import main
from mbib_timm.data.class_values import loss_weights
from mbib_timm.errors import MbibError
from mbib_timm.methods import METHODS, Facts
from mbib_timm.methods.functional import class_weights
from mbib_timm.recipe import Recipe, load_recipe
from mbib_timm.recipe.declared import packaged_methods
from mbib_timm.results.redact import redact_recipe

COUNTS = np.array([500, 120, 40, 9, 3])
NAMES = ("red fox", "Wölfe", "no", 'a "cat"', "deer")
CPU = torch.device("cpu")
GIVEN = dict(zip(NAMES, (1, 2.5, 3, 4, 10), strict=True))


# Weights


def test_balanced_weights_are_scikit_learns():
    labels = np.repeat(np.arange(5), COUNTS)
    expected = compute_class_weight("balanced", classes=np.arange(5), y=labels)
    assert loss_weights("balanced", COUNTS, NAMES) == pytest.approx(expected)
    assert loss_weights("power:1", COUNTS, NAMES) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("given", "by_hand"),
    [
        ("power", lambda n: n**-0.5),
        ("power:0.3", lambda n: n**-0.3),
        ("power:0", lambda n: 1.0),
        ("effective", lambda n: (1 - 0.9999) / (1 - 0.9999**n)),
        ("effective:0.99", lambda n: (1 - 0.99) / (1 - 0.99**n)),
        ("effective:0", lambda n: 1.0),
    ],
)
def test_weights_by_hand(given, by_hand):
    weights = loss_weights(given, COUNTS, None)
    expected = np.array([by_hand(float(n)) for n in COUNTS])
    assert weights / weights[0] == pytest.approx(expected / expected[0])
    assert np.repeat(weights, COUNTS).mean() == pytest.approx(1), "over the training images"
    assert loss_weights("none", COUNTS, None) is None


@pytest.mark.parametrize("scale", [1, 1e307, 1e-300])
def test_a_file_gives_weights_by_name(tmp_path, scale):
    file = tmp_path / "weights.json"
    file.write_text(json.dumps({name: scale * weight for name, weight in reversed(GIVEN.items())}), encoding="utf-8")
    weights = loss_weights(str(file), COUNTS, NAMES)
    assert weights / weights[0] == pytest.approx(list(GIVEN.values()))
    assert np.repeat(weights, COUNTS).mean() == pytest.approx(1)


def test_the_largest_exponent_leaves_the_rarest_class():
    assert loss_weights("power:1e300", COUNTS, None).tolist() == [0, 0, 0, 0, COUNTS.sum() / 3]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("balancd", r"unknown value of recipe key 'class_weights' 'balancd': did you mean 'balanced'\?.*\.csv"),
        (
            "weights.txt",
            r"unknown value of recipe key 'class_weights' 'weights\.txt'.*weights of your own in a file: \.csv",
        ),
        ("balanced:2", r"balanced takes no number, got 'balanced:2'"),
        ("effective:1", r"effective takes a beta of at least 0 and below 1, got 'effective:1'"),
        ("effective:x", r"effective takes a beta"),
        ("power:-1", r"power takes an exponent of at least 0, got 'power:-1'"),
        ("power:nan", r"power takes an exponent"),
    ],
)
def test_values_that_are_none_are_refused(given, message):
    with pytest.raises(MbibError, match=message):
        Recipe(class_weights=given)


# Losses


def method_with(name, weights, heads=("logits",), **settings):
    kind = METHODS[name]
    built = kind.Settings(**settings)
    network = kind.build_network(built, lambda **kwargs: Tiny(5, heads, **kwargs))
    return kind(network, built, Facts(COUNTS, 10, class_weights=weights), CPU).double()


def batch(heads=("logits",), soft=False):
    generator = torch.Generator().manual_seed(0)
    logits = {head: torch.randn(16, 5, generator=generator, dtype=torch.float64) for head in heads}
    labels = torch.randint(0, 5, (16,), generator=generator)
    targets = torch.rand(16, 5, generator=generator, dtype=torch.float64).softmax(dim=1) if soft else labels
    return logits, targets


def torchs(logits, targets, weights):
    """torch's weighted cross-entropy, divided by the number of images; of soft targets torch does so itself."""
    return F.cross_entropy(logits, targets, weight=torch.as_tensor(weights), reduction="sum") / len(logits)


WEIGHTS = loss_weights("power:0.8", COUNTS, None)
LOG_COUNTS = torch.as_tensor(COUNTS).double().log()


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("name", ["ce", "crt", "bsce"])
def test_weighted_losses_are_torchs(name, soft):
    logits, targets = batch(soft=soft)
    loss = method_with(name, WEIGHTS).loss(logits, targets)["loss"]
    adjusted = logits["logits"] + (LOG_COUNTS if name == "bsce" else 0)
    assert loss.item() == pytest.approx(torchs(adjusted, targets, WEIGHTS).item(), rel=1e-6)
    assert loss.item() != pytest.approx(method_with(name, None).loss(logits, targets)["loss"].item(), rel=0.01)


@pytest.mark.parametrize("soft", [False, True])
def test_the_weighted_focal_loss_by_hand(soft):
    logits, targets = batch(soft=soft)
    p = logits["logits"].softmax(dim=1)
    shares = targets if soft else F.one_hot(targets, 5)
    expected = (shares * torch.as_tensor(WEIGHTS) * (1 - p) ** 2 * -p.log()).sum() / 16
    assert method_with("focal", WEIGHTS).loss(logits, targets)["loss"].item() == pytest.approx(
        expected.item(), rel=1e-6
    )


def test_every_expert_of_sade_is_weighted():
    logits, targets = batch(EXPERTS)
    method = method_with("sade", WEIGHTS, EXPERTS)
    offsets = method.offsets.double()
    expected = sum(
        torchs(values + offset[0], targets, WEIGHTS) for values, offset in zip(logits.values(), offsets, strict=True)
    )
    assert method.loss(logits, targets)["loss"].item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
def test_mbibs_own_weights_are_multiplied(normalize):
    logits, targets = batch(OBSERVATIONS)
    method = method_with("mbib", WEIGHTS, OBSERVATIONS, normalize_class_weights=normalize, class_weight_power=0.4)
    both = class_weights(COUNTS, 0.4).double() * torch.as_tensor(WEIGHTS)
    parts = method.loss(logits, targets)
    for head, values in logits.items():
        total = F.cross_entropy(values + LOG_COUNTS, targets, weight=both, reduction="sum")
        expected = total / (both[targets].sum() if normalize else 16)
        assert parts[f"bsc_{head}"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_ldam_multiplies_the_weights_that_set_in_late():
    logits, targets = batch()
    method = method_with("ldam_drw", WEIGHTS, max_margin=0.0)
    for epoch, own in ((0, torch.ones(5)), (9, method.deferred_weights)):
        method.start_epoch(epoch)
        expected = F.cross_entropy(logits["logits"], targets, weight=own.double() * torch.as_tensor(WEIGHTS))
        assert method.loss(logits, targets)["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_weights_are_no_part_of_a_checkpoint():
    assert "label_weights" not in method_with("ce", WEIGHTS).state_dict()


@pytest.mark.parametrize(
    ("name", "given", "prior"),
    [
        ("ce", "none", "train"),
        ("ce", "balanced", "uniform"),
        ("focal", "power:1", "uniform"),
        ("ce", "power:0.5", None),
        ("bsce", "balanced", None),
        ("bsce", "power:0.5", None),
        ("bsce", "power:0", "uniform"),  # which are no weights
        ("ce", "power:0", "train"),
        ("bsce", "power:0.1", "uniform"),  # MBIB's own, which count as none
        ("ce", "power:0.1", "train"),
        ("bsce", "power:0.11", None),
    ],
)
def test_weights_change_the_frequencies_that_logits_are_for(name, given, prior):
    assert method_with(name, loss_weights(given, COUNTS, None)).result_prior == prior


@pytest.mark.parametrize(
    ("power", "adjusted", "weights", "prior"),
    [
        (0.1, True, "none", "uniform"),  # the paper's
        (0.1, False, "none", "train"),
        (1.0, False, "none", "uniform"),  # balanced weights of a plain loss
        (1.0, True, "none", None),
        (0.5, False, "power:0.5", "uniform"),  # the two square roots together
        (0.1, True, "power:0.1", None),
    ],
)
def test_mbibs_own_weights_change_the_frequencies_too(power, adjusted, weights, prior):
    settings = dict(class_weight_power=power, logit_adjustment=adjusted)
    assert method_with("mbib", loss_weights(weights, COUNTS, None), OBSERVATIONS, **settings).result_prior == prior


@pytest.mark.parametrize(
    ("name", "sampler", "weights", "prior"),
    [
        ("ce", "instance", "none", "train"),
        ("ce", "balanced", "none", "uniform"),
        ("ce", "class_aware", "none", "uniform"),
        ("ce", "sqrt", "none", None),
        ("ce", "sqrt", "power:0.5", "uniform"),  # the two square roots together
        ("ce", "balanced", "balanced", None),  # twice
        ("ce", "progressive", "none", None),
        ("ce", "instance+reverse", "none", None),
        ("bsce", "instance", "none", "uniform"),
        ("bsce", "balanced", "none", None),
        ("bsce", "reverse", "none", None),
        ("crt", "balanced", "none", "uniform"),
        ("crt", "instance", "none", "train"),
        ("crt", "sqrt", "none", None),
        ("crt", "instance", "balanced", "uniform"),
        ("ncm", "reverse", "none", "uniform"),  # which trains nothing
    ],
)
def test_samplers_change_the_frequencies_that_logits_are_for(name, sampler, weights, prior):
    method = method_with(name, loss_weights(weights, COUNTS, None))
    method.facts = method.facts._replace(sampler=sampler, epochs=10)
    assert method.result_prior == prior


# Recipes and commands


def test_methods_that_do_not_weigh_by_class_refuse_weights(tmp_path):
    with pytest.raises(
        MbibError, match=r"'class_weights': method 'paco' does not weight .* methods that do: .*bsce, ce(, \w+)+$"
    ):
        Recipe(method="paco", model="cifar_resnet20", class_weights="balanced")
    declared = packaged_methods().values()
    assert [each.name for each in declared if not each.takes_class_weights and not each.post_hoc] == ["paco"]
    path = tmp_path / "own.yaml"
    path.write_text("base: digits\nclass_weights: power\nstages: [{method: ce}, {method: tau_norm, epochs: 0}]\n")
    assert [stage.class_weights for stage in load_recipe(path).chain()] == ["power", "power"], "what trains nothing"


def test_a_run_with_a_file_of_weights(tmp_path, capsys):
    file = tmp_path / "weights.csv"
    file.write_text("".join(f"{label},{1 + label}\n" for label in range(10)))
    arguments = ["train", "cifar_resnet20.ce_digits", "--epochs", "1", "--warmup-epochs", "0", "--device", "cpu"]
    arguments += ["--output", str(tmp_path / "runs"), "--class-weights"]
    assert main([*arguments, str(file)]) == 0
    folder = tmp_path / "runs" / "cifar_resnet20.ce_digits"
    assert "logit_prior" not in json.loads((folder / "config.json").read_text())
    published = redact_recipe(load_recipe(folder / "recipe.yaml")).decode()
    assert "class_weights: weights.csv\n" in published
    assert str(tmp_path) not in published
    file.write_text("0,1\n")
    capsys.readouterr()
    assert main([*arguments, str(file), "--experiment", "other"]) == 2
    assert "has no weight for '1', '2', '3', '4', '5' and 4 more" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "other").exists()
    assert main([*arguments, str(tmp_path / "none.csv"), "--experiment", "other"]) == 2
    assert "cannot read the class weights" in capsys.readouterr().err
