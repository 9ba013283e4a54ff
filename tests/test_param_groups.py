"""Parts with a learning rate and a weight decay of their own, against a loop over named parameters; and dropout."""

import re

import numpy as np
import pytest
import timm
import torch

from mbib_timm.cli import main
from mbib_timm.errors import MbibError
from mbib_timm.methods import METHODS, Facts
from mbib_timm.recipe import Recipe, load_recipe
from mbib_timm.recipe.keys import SCHEDULES
from mbib_timm.training.optimization import create_optimizer, create_schedule, unscaled_rate

CLASSIFIER = re.compile(r"(\.classifier|^fc|^head)\.(weight|bias)$")


def build(model="mbib_resnet20", method="ce", train="all", **keys):
    """Return recipe, network, optimizer and schedule, as a run builds them."""
    recipe = Recipe(model=model, method=method, **{"lr": 0.2, "opt": "momentum", **keys})
    network = timm.create_model(model, num_classes=4)
    kind = METHODS[method]
    task = kind(network, kind.Settings(), Facts(np.array([4, 3, 2, 1]), 3), torch.device("cpu"))
    task.freeze_all_but(train, "eval")
    optimizer = create_optimizer(recipe, task)
    return recipe, network, optimizer, create_schedule(recipe, optimizer)


def settings_by_name(network, optimizer):
    """Learning rate and weight decay of every parameter that trains, by name; each is in one group."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    found = [
        (names[id(parameter)], (group["lr"], group["weight_decay"]))
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]
    assert len(dict(found)) == len(found)
    return dict(found)


@pytest.mark.parametrize("filter_bias_and_bn", [False, True])
@pytest.mark.parametrize("layer_decay", [None, 0.7])
@pytest.mark.parametrize("weight_decay", [0.0, 3e-4])
@pytest.mark.parametrize("model", ["mbib_resnet20", "cifar_resnet20", "vit_tiny_patch16_224"])
def test_every_parameter_has_the_settings_of_its_part(model, weight_decay, layer_decay, filter_bias_and_bn):
    common = dict(weight_decay=weight_decay, layer_decay=layer_decay, filter_bias_and_bn=filter_bias_and_bn, lr=0.2)
    norms = r"(bn1|norm1)\.(weight|bias)$"
    parts = {"classifier": {"lr_scale": 10, "weight_decay": "1e-2"}, norms: {"lr_scale": 0.5}}
    _, network, plain, _ = build(model, **common)
    without = settings_by_name(network, plain)
    _, network, optimizer, schedule = build(model, **common, param_groups=parts)
    found = settings_by_name(network, optimizer)
    unequal = set(network.no_weight_decay()) if model.startswith("vit") else set()
    assert found.keys() == {name for name, _ in network.named_parameters()} == without.keys()
    for name, parameter in network.named_parameters():
        rate, _ = without[name]
        decays = not (filter_bias_and_bn and parameter.ndim <= 1) and name not in unequal
        decay = weight_decay if decays else 0.0
        if CLASSIFIER.search(name):
            rate, decay = 10 * rate, 1e-2 if decays else 0.0
        elif re.search(norms, name):
            rate *= 0.5
        assert found[name] == (pytest.approx(rate, rel=1e-12), pytest.approx(decay)), name
    assert unscaled_rate(optimizer) == pytest.approx(unscaled_rate(plain)) == pytest.approx(0.2)
    assert schedule.optimizer is optimizer


@pytest.mark.parametrize(
    ("sched", "warmup_epochs"),
    [(sched, epochs) for sched in SCHEDULES for epochs in (0, 2) if (sched, epochs) != ("rsqrt", 0)],
)
def test_every_schedule_keeps_the_factors(sched, warmup_epochs):
    parts = {"classifier": {"lr_scale": 10}, r"^backbone\.": {"lr_scale": 0.01}}
    keys = dict(sched=sched, epochs=8, decay_milestones=[3, 6], warmup_epochs=warmup_epochs)
    _, network, plain, expected = build(**keys)
    _, other, optimizer, schedule = build(**keys, param_groups=parts)
    for epoch in range(8):
        rates = settings_by_name(other, optimizer)
        for name, (rate, _) in settings_by_name(network, plain).items():
            factor = 10 if CLASSIFIER.search(name) else 0.01 if name.startswith("backbone.") else 1
            assert rates[name][0] == pytest.approx(factor * rate, rel=1e-12), (epoch, name)
        assert unscaled_rate(optimizer) == unscaled_rate(plain)  # of the parts without a factor
        expected.step(epoch + 1)
        schedule.step(epoch + 1)


@pytest.mark.parametrize("opt", ["adamw", "lamb", "muon"])
def test_every_kind_of_optimizer_takes_them(opt):
    """After a step with a gradient of ones a part at next to no rate is where it was."""
    parts = {r"^backbone\.": {"lr_scale": 1e-9, "weight_decay": 0}}
    _, network, optimizer, _ = build(opt=opt, lr=0.1, param_groups=parts)
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, value in network.named_parameters():
        assert torch.allclose(value, before[name], atol=1e-6) == name.startswith("backbone."), name


def test_parameters_of_the_method_have_the_recipes_settings(monkeypatch):
    monkeypatch.setattr(
        METHODS["ce"], "own_parameters", lambda self: iter([("own", self.__dict__.setdefault("made", parameter))])
    )
    parameter = torch.nn.Parameter(torch.ones(2))
    _, _, optimizer, _ = build(param_groups={"classifier": {"lr_scale": 5, "weight_decay": 0}}, weight_decay=0.01)
    group = optimizer.param_groups[-1]
    assert group["params"] == [parameter]
    assert (group["lr"], group["weight_decay"]) == (0.2, 0.01)


def test_expressions_see_the_names_of_the_methods_parameters_too(monkeypatch):
    own = {"bias_of_mine": torch.nn.Parameter(torch.ones(2)), "backbone_too": torch.nn.Parameter(torch.ones(2, 2))}
    monkeypatch.setattr(METHODS["ce"], "own_parameters", lambda self: iter(own.items()))
    names = {id(parameter): name for name, parameter in own.items()}
    expected = {"bias_of_mine": (0.2, 0.01), "backbone_too": (0.2, 0.01)}
    for parts, changed in (
        ({"bias": {"weight_decay": 0}}, {}),
        ({"of_mine$": {"weight_decay": 0, "lr_scale": 2}}, {"bias_of_mine": (0.4, 0.0)}),
        ({"^backbone": {"lr_scale": 0.5}}, {"backbone_too": (0.1, 0.01)}),
    ):
        _, network, optimizer, _ = build(param_groups=parts, weight_decay=0.01)
        found = {
            names[id(parameter)]: (group["lr"], group["weight_decay"])
            for group in optimizer.param_groups
            for parameter in group["params"]
            if id(parameter) in names
        }
        assert found == expected | changed
        trained = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
        assert sorted(trained) == sorted([*map(id, network.parameters()), *names]), "each is in one group"
    with pytest.raises(MbibError, match=r"'zz' matches no parameter's name; .*, the method has bias_of_mine, backb"):
        build(param_groups={"zz": {"lr_scale": 2}})
    with pytest.raises(MbibError, match="backbone_too is in \\^backbone and in too; expected one part"):
        build(param_groups={"^backbone": {"lr_scale": 2}, "too": {"lr_scale": 3}})
    with pytest.raises(MbibError, match="of_mine: weight_decay has no effect"):
        build(param_groups={"of_mine": {"weight_decay": 2}}, filter_bias_and_bn=True)


@pytest.mark.parametrize(
    ("parts", "keys", "message"),
    [
        (
            {"heads2": {"lr_scale": 2}},
            {},
            "'heads2' matches no parameter's name; did you mean 'heads'",
        ),
        ({"running_mean": {"lr_scale": 2}}, {}, "running_mean has no effect: no parameter of that part trains"),
        ({"^backbone": {"lr_scale": 2}}, {"train": "classifier"}, r"\^backbone has no effect: no parameter of that"),
        ({"classifier": {"lr_scale": 2}, "^obs": {"lr_scale": 3}}, {}, "observation.classifier.bias is in classifier"),
        (
            {"norm": {"weight_decay": 1}},
            {"filter_bias_and_bn": True},
            "norm: weight_decay has no effect: filter_bias_and_",
        ),
    ],
)
def test_parts_that_the_network_does_not_allow(parts, keys, message):
    with pytest.raises(MbibError, match=f"recipe key 'param_groups': {message}"):
        build(param_groups=parts, **keys)


REFUSED = {
    "classifier={lr_scal: 2}": "unknown setting of recipe key 'param_groups': classifier: 'lr_scal': did you mean 'lr",
    "classifier={lr_scale: 0}": "setting 'lr_scale' of recipe key 'param_groups': classifier: expected more than 0",
    "classifier={weight_decay: -1}": "'weight_decay' of recipe key 'param_groups': classifier: expected at least 0",
    "classifier={lr_scale: fast}": "expected float, got 'fast'",
    "classifier={lr_scale: }": "expected float, got None",
    "classifier={}": "'param_groups': classifier: expected a mapping such as {lr_scale: 10, weight_decay: 0}, got {}",
    "classifier=10": "'param_groups': classifier: expected a mapping such as {lr_scale: 10, weight_decay: 0}, got 10",
    "all={lr_scale: 2}": "'param_groups': all is not a part; what all have in common are the keys 'lr' and 'weight_d",
    "({lr_scale: 2}": "expected name=value",
    "(={lr_scale: 2}": "recipe key 'param_groups': '(' is not a regular expression",
    "zz={lr_scale: 2}": "recipe key 'param_groups': 'zz' matches no parameter's name",
}


@pytest.mark.parametrize("given", REFUSED)
def test_a_flag_that_cannot_be_says_so_and_leaves_nothing(tmp_path, capsys, given):
    runs = tmp_path / "runs"
    try:
        status = main(["train", "--device", "cpu", "--output", str(runs), "--param-groups", given])
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert REFUSED[given] in capsys.readouterr().err.strip().splitlines()[-1]
    assert not runs.exists()


def test_a_file_keeps_what_is_given_and_no_more(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("base: digits\nparam_groups: {classifier: {lr_scale: 3e0}, '^backbone': {weight_decay: 1e-5}}\n")
    assert load_recipe(path).param_groups == {"classifier": {"lr_scale": 3.0}, "^backbone": {"weight_decay": 1e-5}}


# Dropout before the classifiers


@pytest.mark.parametrize(
    ("model", "kwargs"),
    [
        ("mbib_resnet20", {}),
        ("mbib_experts_resnet20", {}),
        ("experts_resnet20", {}),
        ("cifar_resnet20", {}),
        ("with_classifier", {"backbone": "levit_128s"}),  # drops nothing before its own classifier's norm
        ("with_classifier", {"backbone": "convnext_atto"}),
        ("mbib", {"backbone": "convnext_atto", "taps": [1, 2, 3]}),
    ],
)
def test_dropout_is_before_every_classifier_in_training_alone(model, kwargs):
    size = 32 if "resnet20" in model else 224
    network = timm.create_model(model, num_classes=4, drop_rate=0.9, **kwargs)
    found = network.get_classifier()
    seen = {}
    for classifier in found if isinstance(found, tuple) else (found,):
        classifier.register_forward_pre_hook(lambda layer, args: seen.update({layer: args[0]}))
    images = torch.randn(4, 3, size, size)
    with torch.no_grad():
        network.train()(images)
        dropped = {layer: (x == 0).float().mean().item() for layer, x in seen.items()}
        network.eval()
        outputs = [network(images) for _ in range(2)]
    assert len(dropped) == (len(found) if isinstance(found, tuple) else 1)
    assert min(dropped.values()) > 0.7
    assert torch.equal(*outputs)
