"""The packaged recipes against the paper's section 4.2, and the errors of those that cannot be."""

import math

import numpy as np
import pytest
import timm
import torch
import yaml
from mbib_timm.losses import create_loss
from mbib_timm.training.task import head_names

import mbib_timm  # noqa: F401 (registers the models)
from mbib_timm.errors import MbibError
from mbib_timm.recipe import (
    DEFAULT_RECIPE,
    Recipe,
    dump_recipe,
    find_recipe,
    list_recipes,
    load_recipe,
    recipe_claims,
    recipe_name,
    recipes_folder,
)
from mbib_timm.training.optimization import create_optimizer, create_schedule

RECIPES = list_recipes()
# Written in every recipe, the default or not: they say what it is.
IDENTITY = {"dataset", "model", "loss", "imbalance_factor", "epochs", "decay_milestones"}


def load(name, **overrides):
    return load_recipe(find_recipe(name), overrides)


def test_the_issued_recipes_are_there():
    expected = {"digits/mbib_resnet20", "digits/ce_resnet20", "finetune/mbib_resnet50"}
    expected |= {f"cifar100_lt_if{f}/{loss}_resnet32" for f in (100, 50, 10) for loss in ("ce", "bsce", "bib", "mbib")}
    expected |= {f"imagenet_lt/{loss}_{net}" for net in ("resnet10", "resnext50") for loss in ("bib", "mbib")}
    expected |= {f"inat2018_{epochs}e/{loss}_resnet50" for epochs in (90, 200) for loss in ("bib", "mbib")}
    assert expected <= set(RECIPES)
    assert DEFAULT_RECIPE in RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_loads_and_says_what_it_yields(name):
    path = find_recipe(name)
    load_recipe(path)
    text = path.read_text(encoding="utf-8")
    head = text.split("\n\n")[0].splitlines()
    assert all(line.startswith("#") for line in head)
    claims = recipe_claims(path)
    assert {"Yields", "Hardware", "Time", "Command", "Paper"} <= claims.keys()
    assert claims["Command"].startswith(f"mbib train {name}")
    default = Recipe().to_dict()
    repeated = [k for k, v in yaml.safe_load(text).items() if k not in IDENTITY and v == default[k]]
    assert not repeated, f"{path}: these keys repeat their default: {repeated}"
    readme = (recipes_folder() / "README.md").read_text(encoding="utf-8")
    assert f"`{name}`" in readme, f"{name} is missing in the table of recipes/README.md"


@pytest.mark.parametrize("name", RECIPES)
def test_model_loss_and_optimisation_of_every_recipe_fit_together(name):
    recipe = load(name)
    num_classes = recipe.num_classes or 10
    model = timm.create_model(recipe.model, num_classes=num_classes, device="meta", **recipe.model_kwargs)
    create_loss(recipe, np.arange(num_classes, 0, -1), head_names(model))
    optimizer = create_optimizer(recipe, model)
    create_schedule(recipe, optimizer)
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("folder", sorted({name.partition("/")[0] for name in RECIPES if name.startswith("cifar")}))
def test_cifar_recipes_of_a_folder_differ_in_model_and_loss_only(folder):
    recipes = [load(name).to_dict() for name in RECIPES if name.startswith(f"{folder}/")]
    differing = {key for recipe in recipes for key in recipe if recipe[key] != recipes[0][key]}
    assert differing == {"model", "loss"}
    assert {f"cifar100_lt_if{recipe['imbalance_factor']:g}" for recipe in recipes} == {folder}


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
    ("imagenet_lt/bib_resnet10", 90, 128, 5e-4, cosine_rate(0.05, 90)),
    ("imagenet_lt/mbib_resnet10", 90, 128, 5e-4, cosine_rate(0.05, 90)),
    ("imagenet_lt/bib_resnext50", 90, 64, 5e-4, cosine_rate(0.025, 90)),
    ("imagenet_lt/mbib_resnext50", 90, 64, 5e-4, cosine_rate(0.025, 90)),
    ("inat2018_90e/bib_resnet50", 90, 64, 1e-4, cosine_rate(0.025, 90)),
    ("inat2018_90e/mbib_resnet50", 90, 64, 1e-4, cosine_rate(0.025, 90)),
    ("inat2018_200e/bib_resnet50", 200, 64, 1e-4, cosine_rate(0.025, 200)),
    ("inat2018_200e/mbib_resnet50", 200, 64, 1e-4, cosine_rate(0.025, 200)),
]


def test_the_paper_table_covers_every_benchmark_recipe():
    benchmarks = [name for name in RECIPES if not name.startswith(("digits/", "finetune/"))]
    assert [name for name in benchmarks if not any(name.startswith(prefix) for prefix, *_ in PAPER)] == []


@pytest.mark.parametrize(("prefix", "epochs", "batch_size", "weight_decay", "rate"), PAPER)
def test_optimisation_is_the_papers(prefix, epochs, batch_size, weight_decay, rate):
    for name in (name for name in RECIPES if name.startswith(prefix)):
        recipe = load(name)
        optimizer = create_optimizer(recipe, torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)))
        schedule = create_schedule(recipe, optimizer)
        rates = []
        for epoch in range(recipe.epochs):
            assert len({group["lr"] for group in optimizer.param_groups}) == 1
            rates.append(optimizer.param_groups[0]["lr"])
            schedule.step(epoch + 1)
        assert rates == pytest.approx([rate(e) for e in range(epochs)], rel=1e-9, abs=1e-12)
        assert recipe.batch_size * recipe.grad_accum_steps == batch_size
        assert isinstance(optimizer, torch.optim.SGD)
        for group in optimizer.param_groups:
            assert (group["momentum"], group["nesterov"], group["dampening"]) == (0.9, False, 0)
            assert group["weight_decay"] == weight_decay, "biases and batch normalisation decay too"


@pytest.mark.parametrize("name", [name for name in RECIPES if "/bib" in name or "/mbib" in name])
def test_loss_is_the_papers(name):
    recipe = load(name)
    on_imagenet_or_inat = name.startswith(("imagenet_lt/", "inat2018_"))
    assert recipe.gamma == (0.5 if on_imagenet_or_inat else 0.0)
    assert (recipe.beta, recipe.class_weight_power, recipe.observation_weights) == (5.0, 0.1, [0.1, 0.3, 1.0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: 0.1\nmodle: resnet18", r"unknown key in own\.yaml 'learning_rate': did you mean .*"),
        ("modle: resnet18", r"unknown key in own\.yaml 'modle': did you mean 'model'"),
        ("1: 2", r"unknown key in own\.yaml '1'"),
        ("epochs: many", r"'epochs': expected int, got 'many'"),
        ("epochs: 1.5", r"'epochs': expected int, got 1\.5"),
        ("epochs: true", r"'epochs': expected int, got True"),
        ("epochs:", r"'epochs': expected int, got None"),
        ("lr: fast", r"'lr': expected float, got 'fast'"),
        ("pretrained: 1", r"'pretrained': expected bool, got 1"),
        ("model: [resnet18]", r"'model': expected str, got \['resnet18'\]"),
        ("mean: 0.5", r"'mean': expected list of float, got 0\.5"),
        ("decay_milestones: [1, two]", r"'decay_milestones': expected int, got 'two'"),
        ("model_kwargs: 3", r"'model_kwargs': expected dict, got 3"),
        ("epochs: 0", r"'epochs': expected at least 1, got 0"),
        ("imbalance_factor: -10", r"'imbalance_factor': expected at least 1, got -10"),
        ("lr: 0", r"'lr': expected more than 0, got 0"),
        ("lr: .nan", r"'lr': expected a finite number, got nan"),
        ("hflip: 1.5", r"'hflip': expected at most 1, got 1\.5"),
        ("imbalance: expo", r"'imbalance' 'expo': did you mean 'exp'"),
        ("amp_dtype: float61", r"'amp_dtype' 'float61': did you mean 'float16'.*\?"),
        ("scale: [1.0, 0.1]", r"'scale': expected two numbers, 0 < low <= high"),
        ("std: [0.2, 0.2]", r"'std': expected 1 or 3 numbers"),
        ("epochs: 3\nwarmup_epochs: 3", r"'warmup_epochs': 3 leaves none of the 3 epochs"),
        ("sched: multistep\ndecay_milestones: [20, 10]", r"'decay_milestones': expected ascending epochs"),
        ("- lr: 0.1", r"own\.yaml: expected 'key: value' lines, got a list"),
        ("lr: [0.1", r"own\.yaml: not a YAML file"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_by_name(tmp_path, text, message):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(MbibError, match=message):
        load_recipe(path)


def test_overrides_replace_the_files_values_and_are_checked_alike():
    recipe = load("digits/mbib_resnet20", epochs=3, lr=1, mean=(0.5,))
    assert (recipe.epochs, recipe.lr, recipe.mean, recipe.model) == (3, 1.0, [0.5], "mbib_resnet20")
    assert isinstance(recipe.lr, float)
    with pytest.raises(MbibError, match="'epochs': expected at least 1, got 0"):
        load("digits/mbib_resnet20", epochs=0)
    assert recipe.replace(seed=7).seed == 7
    with pytest.raises(MbibError, match="unknown recipe key 'sed': did you mean 'seed'"):
        recipe.replace(sed=7)


def test_numbers_without_a_dot_are_read_as_yaml_leaves_them(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("lr: 3e-4\nweight_decay: 0\n")
    recipe = load_recipe(path)
    assert (recipe.lr, recipe.weight_decay) == (3e-4, 0.0)


def test_an_empty_file_is_the_defaults(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("# nothing\n")
    assert load_recipe(path) == Recipe()


@pytest.mark.parametrize("name", RECIPES)
def test_a_saved_recipe_is_read_back_the_same(tmp_path, name):
    recipe = load(name)
    (tmp_path / "recipe.yaml").write_bytes(dump_recipe(recipe))
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


def test_recipes_are_found_by_name_and_by_file(tmp_path):
    packaged = find_recipe("cifar100_lt_if100/mbib_resnet32")
    assert packaged == find_recipe("cifar100_lt_if100/mbib_resnet32.yaml") == find_recipe(str(packaged))
    with pytest.raises(MbibError, match=r"unknown recipe 'cifar100_lt_if100/mbib_resnet23': did you mean '.*resnet32'"):
        find_recipe("cifar100_lt_if100/mbib_resnet23")
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
