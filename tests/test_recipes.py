"""The packaged recipes against the paper's section 4.2, and the errors of those that cannot be."""

import math
import re

import numpy as np
import pytest
import timm
import torch
import yaml
from headers import header
from timm.optim import get_optimizer_info, list_optimizers
from tiny import previous_run

import mbib_timm  # noqa: F401 (registers the models)
from mbib_timm.errors import ALIASES, MbibError
from mbib_timm.methods import METHODS, Facts, part_of, resolve_method
from mbib_timm.models.zoo import STARTS, is_start_tag
from mbib_timm.recipe import (
    BASE,
    DEFAULT_RECIPE,
    KEYS,
    STAGES,
    Recipe,
    change_recipe,
    check_given,
    dump_recipe,
    find_recipe,
    list_recipes,
    load_recipe,
    recipe_name,
    recipes_folder,
)
from mbib_timm.recipe.checks import WITHOUT_MOMENTUM
from mbib_timm.training.optimization import create_optimizer, create_schedule
from mbib_timm.training.setup import build_network

RECIPES = list_recipes()
BASES = sorted((recipes_folder() / "bases").glob("*.yaml"))
# Written in every recipe or base, the default or not: they say what it is.
IDENTITY = {"dataset", "model", "method", "imbalance_factor", "epochs", "decay_milestones"}
OF_SMALL_NETWORKS = ("ce", "focal", "bsce", "ldam_drw", "crt", "tau_norm")
# Those of the paper's schedule; others have an augmentation or a schedule of their own.
PAPERS = [
    name
    for name in RECIPES
    if (
        name.partition(".")[2].startswith(("cifar100_lt", *(f"{method}_cifar100_lt" for method in OF_SMALL_NETWORKS)))
        and name.startswith(("cifar_", "bib_", "mbib_resnet"))
    )
    or name.endswith(("imagenet_lt", "90e", "200e"))
]
STRONG = [name for name in RECIPES if "strong_" in name]


def load(name, **overrides):
    return load_recipe(find_recipe(name), overrides)


def test_the_issued_recipes_are_there():
    expected = {"mbib_resnet20.digits", "cifar_resnet20.ce_digits", "finetune/mbib_resnet50"}
    for factor in (100, 50, 10):
        expected |= {f"{method}_resnet32.cifar100_lt_if{factor}" for method in ("bib", "mbib")}
        expected |= {f"cifar_resnet32.{method}_cifar100_lt_if{factor}" for method in OF_SMALL_NETWORKS}
        expected |= {
            f"mbib_resnet32.strong_cifar100_lt_if{factor}",
            f"cifar_resnet32.bsce_strong_cifar100_lt_if{factor}",
        }
    expected |= {f"{method}_{net}.imagenet_lt" for net in ("resnet10", "resnext50") for method in ("bib", "mbib")}
    expected |= {f"{method}_resnet50.inat2018_{epochs}e" for epochs in (90, 200) for method in ("bib", "mbib")}
    expected |= {"mbib_resnet32.digits", "bib_resnet32.digits"}
    expected |= {f"cifar_resnet32.{method}_digits" for method in OF_SMALL_NETWORKS}
    assert expected <= set(RECIPES)
    assert DEFAULT_RECIPE in RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_loads_is_read_back_the_same_and_says_what_it_yields(tmp_path, name):
    path = find_recipe(name)
    recipe = load_recipe(path)
    (tmp_path / "recipe.yaml").write_bytes(dump_recipe(recipe))
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    text = path.read_text(encoding="utf-8")
    head = text.split("\n\n")[0].splitlines()
    assert all(line.startswith("#") for line in head)
    claims = header(path)
    assert {"Yields", "Hardware", "Time", "Command"} <= claims.keys()
    assert "Paper" in claims or "Others" in claims, "the paper's number, or who else has measured what"
    assert claims["Command"].startswith(f"mbib train {name}")
    readme = (recipes_folder() / "README.md").read_text(encoding="utf-8")
    assert f"`{name}`" in readme, f"{name} is missing in the table of recipes/README.md"


def test_no_recipe_repeats_what_holds_without_it():
    """Neither a default, nor what its base says, nor in a stage what the recipe says outside."""
    for path in (*map(find_recipe, RECIPES), *BASES):
        require_no_repetition(path)


def require_no_repetition(path):
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    below = {key: value for key, value in Recipe().to_dict().items() if key not in IDENTITY}
    if base := content.pop(BASE, None):
        (file,) = [file for file in BASES if file.stem == base]
        below |= yaml.safe_load(file.read_text(encoding="utf-8"))
    stages = content.pop(STAGES, [])
    repeated = [key for key, value in content.items() if below.get(key) == value]
    assert not repeated, f"{path}: these keys repeat what holds without them: {repeated}"
    for stage in stages:
        own = METHODS[resolve_method(method_of({**content, **stage}))[0].name]
        chosen = {"sampler": own.sampler, "train": own.part, "reset": own.reset, "frozen_bn": own.frozen_bn}
        repeated = [key for key, value in stage.items() if {**below, **content, **chosen}.get(key) == value]
        assert not repeated, f"{path}: a stage repeats {repeated}"


def method_of(content):
    method = content["method"]
    return {"name": method} if isinstance(method, str) else method


def test_settings_of_a_method_are_not_repeated_either():
    for name in RECIPES:
        content = yaml.safe_load(find_recipe(name).read_text(encoding="utf-8"))
        for part in (content, *content.get(STAGES, [])):
            if "method" in part:
                given = method_of(part)
                defaults = vars(resolve_method({"name": given["name"]})[1])
                assert not [key for key, value in given.items() if key != "name" and defaults[key] == value], name


def small_method(recipe, network=None):
    """The method of a recipe around a network of two layers."""
    network = network or torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    return METHODS["ce"](network, None, Facts(np.ones(2, dtype=int), recipe.epochs), torch.device("cpu"))


@pytest.mark.parametrize("name", RECIPES)
def test_model_method_and_optimisation_of_every_stage_fit_together(name):
    for stage in load(name).chain():
        recipe = stage.replace(pretrained=False, feature_passes=None)
        num_classes = recipe.num_classes or 10
        with torch.device("meta"):
            network = build_network(recipe, num_classes)
        kind, settings = resolve_method(recipe.method)
        facts = Facts(1000 * np.arange(num_classes, 0, -1), recipe.epochs, previous_run(num_classes))
        method = kind(network, settings, facts, torch.device("cpu"))
        method.freeze_all_but(recipe.choice("train"), recipe.choice("frozen_bn"))
        optimizer = create_optimizer(recipe, method)
        create_schedule(recipe, optimizer)
        optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
        trained = part_of(network, recipe.choice("train"))
        trained |= {name for name, _ in network.named_parameters() if ".lora_" in name}
        assert optimized == {id(p) for name, p in network.named_parameters() if name in trained}


def test_a_recipe_that_is_named_after_a_model_builds_that_model_by_that_method():
    for name in (name for name in RECIPES if "/" not in name):
        recipe = load(name)
        architecture, _, tag = name.partition(".")
        assert recipe.model == architecture
        assert timm.is_model(architecture)
        method = recipe.method["name"]
        assert tag.startswith(f"{method}_") or architecture.startswith(f"{method}_")
        data = tag.removeprefix(f"{method}_")
        for start in ("strong", "400e", "from_mbib", *STARTS):
            data = data.removeprefix(f"{start}_")
        assert data == "digits" or data.startswith(
            ("cifar100_lt_if", "fashion_mnist_lt_if", "imagenet_lt", "inat2018_")
        )


@pytest.mark.parametrize("factor", [100, 50, 10])
def test_cifar_recipes_differ_in_model_and_method_only(factor):
    names = [f"cifar_resnet32.{method}_cifar100_lt_if{factor}" for method in OF_SMALL_NETWORKS]
    names += [f"{method}_resnet32.cifar100_lt_if{factor}" for method in ("bib", "mbib")]
    recipes = [load(name) for name in names]
    firsts = [recipe.chain()[0].keys() for recipe in recipes]
    differing = {key for keys in firsts for key in keys if keys[key] != firsts[0][key]}
    assert differing == {"model", "method"}
    assert {keys["imbalance_factor"] for keys in firsts} == {factor}
    # What cRT and tau-normalisation start from is one and the same run of cross-entropy.
    by_method = {recipe.method["name"]: recipe for recipe in recipes}
    ce = by_method["ce"].computation()
    assert by_method["crt"].previous.computation() == by_method["tau_norm"].previous.computation() == ce


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("cifar_resnet32.crt_cifar100")])
def test_crts_second_stage_is_the_published_one(name):
    """30 epochs from 0.1, a tenth after 10 and after 20, five of warm-up, weight decay 5e-4, balanced classes."""
    recipe = load(name)
    assert [stage.method["name"] for stage in recipe.chain()] == ["ce", "crt"]
    choices = {key: recipe.choice(key) for key in ("sampler", "train", "reset", "frozen_bn")}
    assert choices == {"sampler": "balanced", "train": "classifier", "reset": "classifier", "frozen_bn": "train"}
    assert (recipe.epochs, recipe.weight_decay, recipe.opt, recipe.momentum) == (30, 5e-4, "momentum", 0.9)
    expected = [0.1 * min((e + 1) / 5, 1) * 0.1 ** sum(e >= m for m in (10, 20)) for e in range(30)]
    assert rates_of(recipe) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", [name for name in RECIPES if ".ldam_drw_cifar100" in name])
def test_ldam_drws_constants_are_the_published_ones(name):
    recipe = load(name)
    published = {"max_margin": 0.5, "scale": 30.0, "effective_beta": 0.9999, "reweight_from": 0.8}
    assert recipe.method == {"name": "ldam_drw", **published}
    assert recipe.method["reweight_from"] * recipe.epochs == 160


@pytest.mark.parametrize("name", [name for name in RECIPES if ".tau_norm_" in name])
def test_tau_normalisation_trains_nothing_and_chooses_tau(name):
    recipe = load(name)
    assert [stage.method["name"] for stage in recipe.chain()] == ["ce", "tau_norm"]
    assert (recipe.epochs, recipe.method["tau"]) == (0, None)


# The paper's section 4.2, computed without timm. Epochs e count from 0.


def cifar_rate(e):
    warm_up = min((e + 1) / 5, 1.0)
    decay = 1.0
    for milestone in (160, 180):
        if e >= milestone:
            decay *= 0.01
    return 0.1 * warm_up * decay


def cosine_rate(start, epochs):
    return lambda e: start * (1 + math.cos(math.pi * e / epochs)) / 2


PAPER = [
    ("cifar100_lt_if100", 200, 128, 3e-4, cifar_rate),
    ("cifar100_lt_if50", 200, 128, 3e-4, cifar_rate),
    ("cifar100_lt_if10", 200, 128, 3e-4, cifar_rate),
    ("bib_resnet10.imagenet_lt", 90, 128, 5e-4, cosine_rate(0.05, 90)),
    ("bib_resnext50.imagenet_lt", 90, 64, 5e-4, cosine_rate(0.025, 90)),
    ("bib_resnet50.inat2018_90e", 90, 64, 1e-4, cosine_rate(0.025, 90)),
    ("bib_resnet50.inat2018_200e", 200, 64, 1e-4, cosine_rate(0.025, 200)),
]


def test_the_paper_table_covers_every_benchmark_recipe():
    assert len(PAPERS) == 3 * 8 + 8
    assert [name for name in PAPERS if sum(name.endswith(suffix) for suffix, *_ in PAPER) != 1] == []


def rates_of(recipe):
    """The learning rates of the epochs of a recipe."""
    optimizer = create_optimizer(recipe, small_method(recipe))
    schedule, rates = create_schedule(recipe, optimizer), []
    for epoch in range(recipe.epochs):
        assert len({group["lr"] for group in optimizer.param_groups}) == 1
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step(epoch + 1)
    return rates


@pytest.mark.parametrize(("suffix", "epochs", "batch_size", "weight_decay", "rate"), PAPER)
def test_optimisation_is_the_papers(suffix, epochs, batch_size, weight_decay, rate):
    """Of the first stage, where there are several."""
    for name in (name for name in PAPERS if name.endswith(suffix)):
        recipe = load(name).chain()[0]
        optimizer = create_optimizer(recipe, small_method(recipe))
        assert rates_of(recipe) == pytest.approx([rate(e) for e in range(epochs)], rel=1e-9, abs=1e-12)
        assert recipe.epochs == epochs
        assert recipe.batch_size * recipe.grad_accum_steps == batch_size
        assert isinstance(optimizer, torch.optim.SGD)
        for group in optimizer.param_groups:
            assert (group["momentum"], group["nesterov"], group["dampening"]) == (0.9, False, 0)
            assert group["weight_decay"] == weight_decay, "biases and batch normalisation decay too"


@pytest.mark.parametrize("name", STRONG)
def test_the_strong_recipes_train_as_the_literature_does(name):
    """Crop, flip, AutoAugment, Cutout of half a side; Nesterov, weight decay 5e-4, a tenth at 80 and 90 %."""
    recipe = load(name)
    epochs, warmup = (400, 10) if "_400e_" in name else (200, 5)
    augmented = {key: getattr(recipe, key) for key in ("train_crop_mode", "hflip", "aa", "cutout", "model_ema")}
    assert augmented == {"train_crop_mode": "pad", "hflip": 0.5, "aa": "cifar10", "cutout": 16, "model_ema": True}
    (group,) = create_optimizer(recipe, small_method(recipe)).param_groups
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, True, 5e-4)
    decays = (0.8 * epochs, 0.9 * epochs)
    expected = [0.1 * min((e + 1) / warmup, 1) * 0.1 ** sum(e >= m for m in decays) for e in range(epochs)]
    assert rates_of(recipe) == pytest.approx(expected, rel=1e-9)
    plain = load(name.replace("strong_", "").replace("400e_", ""))
    assert (recipe.method, recipe.model) == (plain.method, plain.model)
    assert recipe.imbalance_factor == plain.imbalance_factor


@pytest.mark.parametrize(
    "name", [name for name in RECIPES if name.startswith(("bib_", "mbib_", "adapt/", "finetune/"))]
)
def test_loss_is_the_papers(name):
    if is_start_tag(name.partition(".")[2]):
        pytest.skip("a model from weights that have seen other data, of which the paper says nothing")
    method = dict(load(name).method)
    on_imagenet_or_inat = "imagenet_lt" in name or "inat2018_" in name
    assert method["gamma"] == (0.5 if on_imagenet_or_inat else 0.0)
    on_features = any(stage.feature_passes for stage in load(name).chain())
    assert (method["beta"], method["class_weight_power"]) == (1.0 if on_features else 5.0, 0.1)
    assert method["logit_adjustment"]
    assert method["normalize_class_weights"]
    assert method.get("observation_weights", [0.1, 0.3, 1.0]) == [0.1, 0.3, 1.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: [0.1]", r"^own\.yaml: recipe key 'lr': expected float, got \[0\.1\]$"),
        ("qqq: 0.1\nmodle: resnet18", r"own\.yaml: unknown key 'qqq': .*; mbib train --help lists"),
        ("modle: resnet18", r"own\.yaml: unknown key 'modle': did you mean 'model'"),
        ("learning_rate: 0.1", r"own\.yaml: unknown key 'learning_rate': did you mean 'lr'\?"),
        ("1: 2", r"own\.yaml: unknown key '1'"),
        ("epochs: many", r"'epochs': expected int, got 'many'"),
        ("epochs: true", r"'epochs': expected int, got True"),
        ("epochs:", r"'epochs': expected int, got None"),
        ("lr: fast", r"'lr': expected float, got 'fast'"),
        ("pretrained: 1", r"'pretrained': expected bool, got 1"),
        ("model: [resnet18]", r"'model': expected str, got \['resnet18'\]"),
        ("mean: 0.5", r"'mean': expected list of float, got 0\.5"),
        ("decay_milestones: [1, two]", r"'decay_milestones': expected int, got 'two'"),
        ("model_kwargs: 3", r"'model_kwargs': expected dict, got 3"),
        ("epochs: -1", r"'epochs': expected at least 0, got -1"),
        ("epochs: 0", r"'epochs': 0 trains nothing, and there are no weights to start from"),
        ("method: {beta: 5.0}", r"'method': expected a name, or a mapping with one, got {'beta': 5.0}"),
        ("method: 5", r"'method': expected dict, got 5"),
        ("method: {name: ce, beta: 5.0}", r"unknown setting 'beta': method 'ce' has none"),
        ("method: {name: mbib, observation_weights: 1}", r"'observation_weights' of .*: expected list of float, got 1"),
        ("beta: 5.0", r"own\.yaml: unknown key 'beta'"),
        ("loss: mbib", r"own\.yaml: unknown key 'loss'"),
        ("holdout: 0.95", r"'holdout': expected at most 0.9, got 0.95"),
        ("base: cifar", r"own\.yaml: unknown base 'cifar': did you mean 'cifar100_lt'"),
        ("stages: {}", r"'stages': expected a list of stages, got {}"),
        ("stages: []", r"'stages': expected a list of stages, got \[\]"),
        ("stages: [ce]", r"stage 1: expected keys and values, got 'ce'"),
        ("stages: [{lr: 0.1}, {modle: x}]", r"stage 2 of own\.yaml: unknown key 'modle': did you mean 'model'"),
        ("stages: [{lr: 0.1}, {stages: []}]", r"stage 2 of own\.yaml: unknown key 'stages'"),
        ("stages: [{lr: 0.1}, {lr: -1}]", r"stage 2 of own\.yaml: recipe key 'lr': expected more than 0, got -1"),
        ("previous: {}", r"own\.yaml: unknown key 'previous'"),
        ("imbalance_factor: -10", r"'imbalance_factor': expected at least 1, got -10"),
        ("lr: 0", r"'lr': expected more than 0, got 0"),
        ("hflip: 1.5", r"'hflip': expected at most 1, got 1\.5"),
        ("amp_dtype: float61", r"'amp_dtype' 'float61': did you mean 'float16'.*\?"),
        ("scale: [1.0, 0.1]", r"'scale': expected two numbers, 0 < low <= high"),
        (
            "epochs: 3\nwarmup_epochs: 3",
            r"^own\.yaml: recipe key 'warmup_epochs': a warm-up of 3 epochs does not fit into a run of 3 epochs$",
        ),
        ("sched: multistep\ndecay_milestones: [20, 10]", r"'decay_milestones': expected ascending epochs"),
        ("- lr: 0.1", r"own\.yaml: expected 'key: value' lines, got a list"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_by_name(tmp_path, text, message):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(MbibError, match=message):
        load_recipe(path)


def test_a_file_is_named_for_what_it_says_alone(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("lr: [0.1]")
    with pytest.raises(MbibError, match=r"^own\.yaml: recipe key 'lr'"):
        load_recipe(path, {"epochs": 2})
    path.write_text("lr: 0.1")
    with pytest.raises(MbibError, match=r"^recipe key 'epochs'"):
        load_recipe(path, {"epochs": -2})
    for name in ("nosuch.yaml", str(tmp_path / "nosuch.yaml")):
        with pytest.raises(MbibError, match=rf"^recipe {name}: there is no such file; mbib recipes lists"):
            find_recipe(name)
    with pytest.raises(MbibError, match=r"no such file; did you mean 'mbib_resnet20\.digits'\?$"):
        find_recipe("mbib_resnet20.digit.yaml")
    with pytest.raises(MbibError, match=r"^unknown recipe 'qqq': there are .*; mbib recipes lists them\.$"):
        find_recipe("qqq")


def test_overrides_replace_the_files_values_and_are_checked_alike():
    recipe = load("mbib_resnet20.digits", epochs=3, lr=1, mean=(0.5,))
    assert (recipe.epochs, recipe.lr, recipe.mean, recipe.model) == (3, 1.0, [0.5], "mbib_resnet20")
    assert isinstance(recipe.lr, float)
    with pytest.raises(MbibError, match="'epochs': expected at least 0, got -1"):
        load("mbib_resnet20.digits", epochs=-1)
    assert recipe.replace(seed=7).seed == 7
    with pytest.raises(MbibError, match="unknown recipe key 'sed': did you mean 'seed'"):
        recipe.replace(sed=7)


@pytest.mark.parametrize("key", ALIASES)
def test_what_other_programs_call_a_key_leads_to_it(key):
    for name in ALIASES[key]:
        with pytest.raises(MbibError, match=f"^unknown recipe key '{name}': did you mean '{key}'\\?$"):
            Recipe().replace(**{name: 1})


def test_numbers_without_a_dot_are_read_as_yaml_leaves_them(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("lr: 3e-4\nweight_decay: 0\n")
    recipe = load_recipe(path)
    assert (recipe.lr, recipe.weight_decay) == (3e-4, 0.0)


def test_recipes_are_found_by_name_and_by_file(tmp_path):
    packaged = find_recipe("mbib_resnet32.cifar100_lt_if100")
    assert packaged == find_recipe("mbib_resnet32.cifar100_lt_if100.yaml") == find_recipe(str(packaged))
    with pytest.raises(MbibError, match=r"unknown recipe 'mbib_resnet23\.cifar100_lt_if100': did you mean '.*resnet32"):
        find_recipe("mbib_resnet23.cifar100_lt_if100")
    tuned = find_recipe("finetune/mbib_resnet50")
    assert tuned == find_recipe("finetune/mbib_resnet50.yaml")
    assert recipe_name(tuned) == "mbib_resnet50.finetune"
    own = tmp_path / "birds" / "mbib_resnet50.yaml"
    own.parent.mkdir()
    own.touch()
    assert find_recipe(str(own)) == own
    assert recipe_name(packaged) == "mbib_resnet32.cifar100_lt_if100"
    assert recipe_name(own) == "mbib_resnet50.birds"
    assert recipe_name(tmp_path / "runs" / "mbib_resnet50.birds" / "recipe.yaml") == "mbib_resnet50.birds"


def test_only_what_is_computed_decides_whether_a_run_may_resume():
    recipe = load(DEFAULT_RECIPE)
    elsewhere = recipe.replace(device="cuda:1", workers=4, output="/elsewhere", data_dir="there", log_interval=1)
    assert elsewhere.computation() == recipe.computation()
    for change in (dict(seed=1), dict(lr=0.2), dict(epochs=61), dict(batch_size=33), dict(subset_seed=1)):
        assert recipe.replace(**change).computation() != recipe.computation()


# A base, stages, and addresses


def test_a_base_holds_where_a_file_says_nothing(tmp_path):
    (tmp_path / "mine.yaml").write_text("lr: 0.3\nepochs: 7\nmethod: {name: focal, gamma: 1.0}\n")
    (tmp_path / "own.yaml").write_text("base: mine\nepochs: 9\n")
    recipe = load_recipe(tmp_path / "own.yaml")
    assert (recipe.lr, recipe.epochs, recipe.method) == (0.3, 9, {"name": "focal", "gamma": 1.0})
    assert BASE not in recipe.to_dict()  # resolved: recipe.yaml needs no other file
    (tmp_path / "own.yaml").write_text("base: digits\nmethod: ce\nmodel: cifar_resnet20\n")
    assert load_recipe(tmp_path / "own.yaml") == load("cifar_resnet20.ce_digits")
    (tmp_path / "mine.yaml").write_text("base: digits\n")
    (tmp_path / "own.yaml").write_text("base: mine\n")
    with pytest.raises(MbibError, match=r"mine\.yaml: a base has no 'base' of its own"):
        load_recipe(tmp_path / "own.yaml")
    (tmp_path / "mine.yaml").write_text("learning_rate: 0.1\n")
    with pytest.raises(MbibError, match=r"mine\.yaml: unknown key 'learning_rate'"):
        load_recipe(tmp_path / "own.yaml")


STAGED = """
lr: 0.3
seed: 5
stages:
  - {method: ce, epochs: 20}
  - {method: {name: focal, gamma: 1.0}, epochs: 10, lr: 0.1, sampler: reverse}
  - {method: tau_norm, epochs: 0}
"""


def test_stages_share_what_stands_outside_and_win_with_what_is_theirs(tmp_path):
    (tmp_path / "own.yaml").write_text(STAGED)
    recipe = load_recipe(tmp_path / "own.yaml")
    stages = recipe.chain()
    assert [stage.stage for stage in stages] == [0, 1, 2]
    assert stages[-1] is recipe
    assert recipe.previous.previous is stages[0]
    assert [stage.lr for stage in stages] == [0.3, 0.1, 0.3]
    assert [stage.seed for stage in stages] == [5, 5, 5]
    assert [stage.choice("sampler") for stage in stages] == ["instance", "reverse", "instance"]
    assert [stage.method["name"] for stage in recipe.everywhere(seed=6).chain()] == ["ce", "focal", "tau_norm"]
    assert [stage.seed for stage in recipe.everywhere(seed=6).chain()] == [6, 6, 6]
    assert [stage.seed for stage in recipe.replace(seed=6).chain()] == [5, 5, 6]
    (tmp_path / "recipe.yaml").write_bytes(dump_recipe(recipe))
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    assert load_recipe(tmp_path / "recipe.yaml").computation() == recipe.computation()


def test_only_the_first_stage_starts_from_what_the_recipe_names(tmp_path):
    (tmp_path / "own.yaml").write_text("initial_checkpoint: there\nstages: [{method: ce}, {method: crt}]\n")
    first, second = load_recipe(tmp_path / "own.yaml").chain()
    assert (first.initial_checkpoint, second.initial_checkpoint) == ("there", None)


def test_addresses_reach_keys_settings_elements_and_stages(tmp_path):
    (tmp_path / "own.yaml").write_text(STAGED)

    def values(key, **overrides):
        given = {address.replace("__", "."): value for address, value in overrides.items()}
        return [getattr(stage, key) for stage in load_recipe(tmp_path / "own.yaml", given).chain()]

    assert values("lr", lr=0.2) == [0.2, 0.1, 0.2]  # as in the file: where a stage does not say otherwise
    assert values("lr", stage1__lr=0.2) == [0.2, 0.1, 0.3]
    assert values("method", stage2__method__gamma=3)[1] == {"name": "focal", "gamma": 3.0}
    assert values("method", stage3__method__tau=0.5)[2] == {"name": "tau_norm", "tau": 0.5}
    assert values("model_kwargs", model_kwargs__drop_rate=0.1) == [{"drop_rate": 0.1}] * 3
    changed = load(DEFAULT_RECIPE, **{"method.observation_weights.0": 0.7, "method.beta": 1})
    assert changed.method["observation_weights"] == [0.7, 0.3, 1.0]
    assert changed.method["beta"] == 1.0
    # Another method and a setting of it, in whatever order they are given.
    assert load(DEFAULT_RECIPE, **{"method.gamma": 1, "method": "focal"}).method == {"name": "focal", "gamma": 1.0}
    for address, message in {
        "stage4.lr": r"stage4\.lr: own\.yaml has 3 stages",
        "stage2.lrr": r"unknown recipe key 'lrr': did you mean 'lr'",
        "epochs": r"every stage of own\.yaml sets 'epochs' itself; say which: --stage1\.epochs N or --stage2\.epochs N",
        "method.gamma": r"every stage of own\.yaml sets 'method' itself; say which: --stage1\.method\.gamma VALUE or",
        "stage1.method.gamma": r"stage 1 of own\.yaml: unknown setting 'gamma': method 'ce' has none",
        "lr.0": r"lr\.0: there is no element '0' in 0\.3",
    }.items():
        with pytest.raises(MbibError, match=message):
            load_recipe(tmp_path / "own.yaml", {address: 1})
    with pytest.raises(MbibError, match=r"stage1\.lr: .* has no stages"):
        load(DEFAULT_RECIPE, **{"stage1.lr": 1})
    with pytest.raises(MbibError, match=r"method\.observation_weights\.7: there is no element '7'"):
        load(DEFAULT_RECIPE, **{"method.observation_weights.7": 1})


def test_a_method_is_resolved_to_all_of_its_settings():
    assert Recipe(method="mbib", model="x") == Recipe(method={"name": "mbib"}, model="x")
    assert Recipe(method="focal", model="x").method == {"name": "focal", "gamma": 2.0}
    assert Recipe(method={"name": "ldam_drw", "scale": "2e1"}, model="x").method["scale"] == 20.0


@pytest.mark.parametrize("kind", METHODS)
def test_what_a_recipe_leaves_open_is_the_methods(kind):
    start = {"initial_checkpoint": "somewhere"} if METHODS[kind].needs_start else {}
    recipe = Recipe(method=kind, epochs=0 if METHODS[kind].post_hoc else 3, **start)
    own = METHODS[kind]
    chosen = [recipe.choice(key) for key in ("sampler", "train", "reset", "classifier_start", "frozen_bn")]
    assert chosen == [own.sampler, own.part, own.reset, own.classifier_start, own.frozen_bn]
    assert recipe.replace(sampler="sqrt", train="all").choice("sampler") == "sqrt"


def test_every_key_is_documented_and_belongs_to_a_group():
    groups = ("data", "input", "augmentation", "mixing", "model", "method", "optimisation", "machine", "output")
    found = [item.metadata["group"] for item in KEYS.values()]
    assert list(dict.fromkeys(found)) == list(groups)  # in one piece each
    assert all(item.metadata["help"] for item in KEYS.values())


@pytest.mark.parametrize(
    ("file", "overrides", "expected", "said"),
    [
        (
            "epochs: 60\nwarmup_epochs: 4\n",
            {"epochs": 1},
            [(1, 0, 0)],
            ["1 epoch: warmup_epochs shortened from 4 to 0"],
        ),
        (
            "epochs: 60\nwarmup_epochs: 4\n",
            {"epochs": 4},
            [(4, 3, 0)],
            ["4 epochs: warmup_epochs shortened from 4 to 3"],
        ),
        ("epochs: 60\nwarmup_epochs: 4\n", {"epochs": 5}, [(5, 4, 0)], []),
        (
            "epochs: 60\nwarmup_epochs: 4\nmixup: 1.0\nmixup_off_epochs: 3\n",
            {"epochs": 4},
            [(4, 3, 1)],
            ["4 epochs: warmup_epochs shortened from 4 to 3, mixup_off_epochs shortened from 3 to 1"],
        ),
        (
            "warmup_epochs: 4\nstages: [{method: ce, epochs: 9}, {method: crt, epochs: 8}]\n",
            {"stage2.epochs": 2},
            [(9, 4, 0), (2, 1, 0)],
            ["stage 2, 2 epochs: warmup_epochs shortened from 4 to 1"],
        ),
        (
            "warmup_epochs: 4\nepochs: 9\nstages: [{method: ce}, {method: crt, epochs: 8, warmup_epochs: 0}]\n",
            {"epochs": 2},
            [(2, 1, 0), (8, 0, 0)],
            [
                "stage 1, 2 epochs: warmup_epochs shortened from 4 to 1",
                "stage 2 keeps its 8 epochs; --stage2.epochs N changes them",
            ],
        ),
    ],
)
def test_fewer_epochs_shorten_what_counts_in_epochs(tmp_path, file, overrides, expected, said):
    (tmp_path / "short.yaml").write_text(f"model: cifar_resnet20\nmethod: ce\n{file}")
    lines = []
    short = load_recipe(tmp_path / "short.yaml", overrides, lines.append)
    assert [(stage.epochs, stage.warmup_epochs, stage.mixup_off_epochs) for stage in short.chain()] == expected
    assert lines == said
    if "stages" not in file or "epochs" not in overrides:  # resolved, every stage has epochs of its own
        assert change_recipe(load_recipe(tmp_path / "short.yaml"), overrides) == short
    (tmp_path / "again.yaml").write_bytes(dump_recipe(short))
    assert load_recipe(tmp_path / "again.yaml") == short, "recipe.yaml records what was used"


@pytest.mark.parametrize("given", [{"epochs": 3, "warmup_epochs": 3}, {"warmup_epochs": 60}])
def test_what_is_given_itself_is_not_shortened(given):
    with pytest.raises(MbibError, match=r"'warmup_epochs': a warm-up of .* does not fit into"):
        load_recipe(find_recipe("mbib_resnet20.digits"), given)


# Keys that nothing reads

DIGITS, TAU_NORM = "mbib_resnet20.digits", "cifar_resnet32.tau_norm_digits"
UNREAD = {
    "factor": ("finetune/mbib_resnet32", {"imbalance_factor": 50.0}, "imbalance: exp or step"),
    "largest class": ("finetune/mbib_resnet32", {"imbalance_max": 50}, "imbalance: exp or step"),
    "subset": ("finetune/mbib_resnet32", {"subset_seed": 3}, "imbalance: exp or step"),
    "average": (DIGITS, {"model_ema_decay": 0.99}, "model_ema"),
    "clipping": (DIGITS, {"clip_mode": "norm"}, "clip_grad"),
    "milestones": (DIGITS, {"decay_milestones": [10]}, "sched: multistep"),
    "decay": (DIGITS, {"decay_rate": 0.1}, "sched: multistep or poly"),
    "lowest rate": (
        "cifar_resnet32.crt_cifar100_lt_if100",
        {"min_lr": 1e-3},
        "sched: cosine, tanh, poly, wsd or rsqrt",
    ),
    "momentum": (DIGITS, {"opt": "adamw", "momentum": 0.9}, "an optimizer that has one, unlike adamw"),
    "precision": (DIGITS, {"amp": False, "amp_dtype": "float16"}, "mixed precision, and amp is false"),
    "post-hoc stage": (TAU_NORM, {"stage2.lr": 0.3}, "epochs, and method 'tau_norm' trains for none"),
    "its sampler": (TAU_NORM, {"stage2.sampler": "balanced"}, "epochs, and method 'tau_norm' trains for none"),
    "its method's": (TAU_NORM, {"stage2.clip_mode": "agc"}, "epochs, and method 'tau_norm' trains for none"),
}


@pytest.mark.parametrize("kind", UNREAD)
def test_what_is_given_must_be_read(kind):
    name, given, needed = UNREAD[kind]
    recipe = load_recipe(find_recipe(name), given)
    address = list(given)[-1]
    with pytest.raises(MbibError, match=re.escape(f"recipe key {address!r} has no effect without {needed}")):
        check_given([recipe], given)


def test_what_one_stage_reads_may_be_given_for_all():
    given = {"lr": 0.2, "mixup": 0.2, "stage2.epochs": 0, "stage2.warmup_epochs": 0, "stage2.method.tau": 1.0}
    check_given([load_recipe(find_recipe(TAU_NORM), given)], given)


def test_momentum_is_for_optimizers_that_have_one():
    for name in set(WITHOUT_MOMENTUM) & set(list_optimizers()):
        assert not get_optimizer_info(name).has_momentum
