"""The packaged sweeps against the issue's list, the paper's text and its tables."""

import json
import re
from functools import cache

import numpy as np
import pytest
import timm
import torch
from headers import header
from tiny import previous_run

import mbib_timm  # noqa: F401 (registers the models)
from mbib_timm.data import Batch
from mbib_timm.methods import METHODS, Facts, head_names, method_title, resolve_method
from mbib_timm.recipe import find_recipe, list_recipes, load_recipe, recipes_folder
from mbib_timm.sweeps.sweep import find_sweep, list_sweeps
from mbib_timm.sweeps.sweep_plan import in_a_path, plan
from mbib_timm.sweeps.sweep_results import read_results
from mbib_timm.training.setup import build_network

SWEEPS = list_sweeps()
CLASSES = 100
# What may differ between runs that compute the same.
PLACES = {"seed", "experiment", "output", "resume"}


@cache
def runs_of(name):
    """The runs of the first seed, by their coordinates."""
    runs = [run for run in plan(find_sweep([name]), {}) if run.recipe.seed == 0]
    return {tuple(run.coordinates.values()): run.recipe for run in runs}


@cache
def on_meta(model, arguments):
    return timm.create_model(model, num_classes=CLASSES, device="meta", **json.loads(arguments))


def heads_of(recipe):
    return head_names(on_meta(recipe.model, json.dumps(recipe.model_kwargs)))


def test_the_issues_sweeps_are_there():
    assert {
        "table1_cifar100_lt", "table4_observations", "figure3_beta", "figure4_weights", "figure6_components",
        "table7_heads", "figure9_structures", "table9_rebalancing", "open_choices", "experts_views_teachers", "methods",
        "frozen_heads", "frozen_imbalance", "strong_recipe", "strong_last_stage",
    } == set(SWEEPS)  # fmt: skip


@pytest.mark.parametrize("name", SWEEPS)
def test_every_sweep_plans_and_says_what_it_yields(name):
    sweep = find_sweep([name])
    runs = plan(sweep, {})
    assert sweep.title
    assert len(runs) == 3 * len(runs_of(name)), "three seeds"
    # 400 are PaCo's; of class means there are none.
    others = {
        "methods": {60},
        "experts_views_teachers": {200, 400},
        "frozen_heads": {0, 20},
        "frozen_imbalance": {20},
        "strong_last_stage": {20},
    }
    assert {run.epochs for run in runs} == others.get(name, {200})
    assert f"sweeps/{name}" not in list_recipes()
    path = recipes_folder() / "sweeps" / f"{name}.yaml"
    assert all(line.startswith("#") for line in path.read_text(encoding="utf-8").split("\n\n")[0].splitlines())
    claims = header(path)
    assert {"Yields", "Hardware", "Time", "Command"} <= claims.keys()
    assert claims["Command"].startswith(f"mbib sweep {name}")


def create_method(recipe):
    """The method of a recipe with its network; as for a first stage, whatever it starts from."""
    kind, settings = resolve_method(recipe.method)
    network = build_network(recipe if recipe.pretrained else recipe.replace(reset="none"), CLASSES)
    facts = Facts(np.arange(CLASSES, 0, -1), 1, previous_run(CLASSES))
    return kind(network, settings, facts, torch.device("cpu"))


def distinct():
    """One recipe for each model, arguments and method that a sweep trains; of numbers the first."""
    recipes = [recipe for name in SWEEPS for recipe in runs_of(name).values() if recipe.epochs]

    def kinds(recipe):
        settings = {key: value for key, value in recipe.method.items() if isinstance(value, bool | str)}
        return json.dumps([recipe.model, recipe.model_kwargs, settings])

    return list({kinds(recipe): recipe for recipe in reversed(recipes)}.items())


DISTINCT = distinct()


@pytest.mark.parametrize(("key", "recipe"), DISTINCT, ids=[key for key, _ in DISTINCT])
def test_every_network_and_method_trains(key, recipe):
    torch.manual_seed(0)
    method = create_method(recipe)
    method.start_epoch(0)
    views = tuple(torch.randn(4, 3, 16, 16) for _ in recipe.choice("views"))
    batch = Batch(views, torch.tensor([0, 1, 50, 99]), torch.arange(4))
    parts = method(batch)
    parts["loss"].backward()
    assert all(part.isfinite() for part in parts.values())
    assert not {name for name, p in method.trainable_parameters() if p.grad is None}


# What the paper says of each


def test_table_4_has_two_to_six_observations():
    runs = runs_of("table4_observations")
    observations = {name: heads_of(recipe)[:-1] for (name,), recipe in runs.items()}
    assert {name: len(heads) for name, heads in observations.items()} == {
        "2-MBIB": 2, "3-MBIB": 3, "4-MBIB(x)": 4, "4-MBIB": 4, "5-MBIB": 5, "6-MBIB": 6,
    }  # fmt: skip
    assert [name for name, heads in observations.items() if "x" in heads] == ["4-MBIB(x)"]
    for (name,), recipe in runs.items():
        assert recipe.method["name"] == "mbib"
        assert recipe.method["observation_weights"] == [0.3] * (len(observations[name]) - 1) + [1.0]
    # a = 0 in 2-MBIB: the observation that is left out is the first. The others keep the stages' ends.
    taps = {name: on_meta("mbib_resnet32", json.dumps(recipe.model_kwargs)).taps for (name,), recipe in runs.items()}
    own = tuple(on_meta("mbib_resnet32", "{}").taps)
    assert tuple(taps.pop("2-MBIB")) == own[1:]
    assert all(set(own) <= set(levels) for levels in taps.values())


def test_figure_3_varies_beta_at_the_papers_a_and_b():
    runs = runs_of("figure3_beta")
    assert set(runs) == {(m, str(f), str(b)) for m in ("mbib", "bib") for f in (100, 50, 10) for b in range(6)}
    for (method, factor, beta), recipe in runs.items():
        assert (recipe.method["name"], recipe.method["beta"]) == (method, float(beta))
        assert recipe.imbalance_factor == float(factor)
        assert recipe.method.get("observation_weights", [0.1, 0.3, 1.0]) == [0.1, 0.3, 1.0]
    # Solid lines for MBIB, dashed ones for BIB: the first and the second style.
    assert find_sweep(["figure3_beta"]).axes["method"] == ["mbib", "bib"]


def test_figure_4_varies_a_and_b_at_beta_5():
    runs = runs_of("figure4_weights")
    assert len({a for a, _ in runs}) == len({b for _, b in runs}) == len(runs) ** 0.5
    assert ("0.1", "0.3") in runs
    for (a, b), recipe in runs.items():
        assert recipe.method["observation_weights"] == [float(a), float(b), 1.0]
        assert (recipe.method["beta"], recipe.method["name"], recipe.imbalance_factor) == (5.0, "mbib", 100.0)


def test_figure_6_crosses_plain_losses_with_no_self_distillation():
    own = load_recipe(find_recipe("bib_resnet32.cifar100_lt_if100")).method
    for (losses, beta), recipe in runs_of("figure6_components").items():
        balanced = {"plain": False, "balanced": True}[losses]
        # Cross-entropy for Loss1 and Loss2: neither log n nor class weights.
        assert recipe.method["logit_adjustment"] is balanced
        assert recipe.method["class_weight_power"] == (own["class_weight_power"] if balanced else 0)
        assert (recipe.method["beta"], recipe.method["name"]) == (float(beta), "bib")
    assert set(runs_of("figure6_components")) == {(a, b) for a in ("plain", "balanced") for b in ("0", "5")}


def test_table_7_has_networks_of_one_head_beside_bibs():
    runs = {name: (recipe.method["name"], heads_of(recipe)) for (name,), recipe in runs_of("table7_heads").items()}
    assert runs == {"BSCE": ("bsce", ("v1",)), "BSCE_MLP": ("bsce", ("z",)), "BIB": ("bib", ("v1", "z"))}


def test_figure_9_changes_the_structure_alone():
    recipes = list(runs_of("figure9_structures").values())
    assert [recipe.method["name"] for recipe in recipes] == ["mbib", "se_mbib", "all_mbib"]
    assert all(differing(recipe, recipes[0]) <= {"method"} for recipe in recipes)
    shared = [{key: recipe.method[key] for key in recipes[0].method if key != "name"} for recipe in recipes]
    assert shared[0] == shared[1] == shared[2]


def test_table_9_takes_each_rebalancing_away():
    found = {
        name: (recipe.method["logit_adjustment"], recipe.method["class_weight_power"])
        for (name,), recipe in runs_of("table9_rebalancing").items()
    }
    assert found == {
        "none": (False, 0),
        "logit adjustment": (True, 0),
        "class weights": (False, 0.1),
        "both": (True, 0.1),
    }


def differing(recipe, other):
    mine, theirs = recipe.to_dict(), other.to_dict()
    return {key for key in mine if key not in PLACES and mine[key] != theirs[key]}


def test_open_choices_go_on_from_the_kept_results():
    recipe = (recipes_folder() / "sweeps" / "open_choices.yaml").read_text()
    for name, split in {"open_choices": "left_out", "open_choices_on_test": "test"}.items():
        kept = read_results(recipes_folder().parent / "results" / name)
        settings = {**kept.settings, "dataset": "folder", "val_split": split}
        planned = {run.label: run for run in plan(find_sweep(["open_choices"]), settings)}
        assert all(planned[run.label].computed(run) for run in kept.runs)
        assert {run.split for run in kept.runs} == {split}
    assert "Nesterov, weight decay 5e-4 and rotation" in [run.coordinates["departure"] for run in kept.runs]
    _, second = re.findall("#     mbib sweep open_choices (.*)", recipe)
    parts = [in_a_path(part) for part in re.findall('"(.*?)"', second)]
    chosen = [run for run in planned.values() if any(part in run.label for part in parts)]
    assert {run.coordinates["departure"] for run in chosen} == {"none", "Nesterov", "torch's start of linear layers"}


def test_open_choices_depart_from_the_defaults_in_one_thing_at_a_time():
    own = load_recipe(find_recipe("mbib_resnet32.cifar100_lt_if100"))
    departures = {name: differing(recipe, own) for (name,), recipe in runs_of("open_choices").items()}
    for keys in departures.values():
        keys.remove("val_split")  # on images that the subset leaves out, never on the test set
    assert departures.pop("none") == set()
    # As SADE's code trains, in case the paper's did.
    sade = load_recipe(find_recipe("experts_resnet32.sade_cifar100_lt_if100"))
    together = {"opt", "weight_decay", "rotation"}
    assert departures.pop("Nesterov, weight decay 5e-4 and rotation") == together
    assert differing(sade, own) == together | {"model", "method", "decay_rate"}
    assert all(len(keys) == 1 for keys in departures.values()), departures
    recipes = [recipe for (name,), recipe in runs_of("open_choices").items() if name != "none"]
    assert all(len(recipe.model_kwargs) <= 1 for recipe in recipes)
    # Each is a network that has the parameters of Table 6: no other width of z, no observation without normalisation.
    arguments = {key for recipe in recipes for key in recipe.model_kwargs}
    assert arguments == {"raw_observations", "bottleneck_layers", "head_init"}
    for recipe in recipes:
        model = timm.create_model(recipe.model, num_classes=100, **recipe.model_kwargs)
        assert sum(p.numel() for p in model.parameters()) == 486_016
    assert {key for keys in departures.values() for key in keys} == {
        "model_kwargs", "method", "subset_seed", "weight_decay", "opt", "rotation"
    }  # fmt: skip
    methods = [recipe.method for recipe in recipes if recipe.method != own.method]
    changed = [{key for key in method if method[key] != own.method[key]} for method in methods]
    assert changed == [{"normalize_class_weights"}, {"beta"}]


def test_all_methods_of_the_package_are_in_the_sweep_over_them():
    runs = runs_of("methods")
    assert [recipe.method["name"] for recipe in runs.values()] == [name for (name,) in runs]
    assert {name for (name,) in runs} == {name for name in METHODS if METHODS[name].__module__.startswith("mbib_timm.")}
    assert all(method_title(name) != name for (name,) in runs)


# The paper's numbers, out of its text


def rows_beside(text, caption, step):
    """Return the cells of the table that ends above a caption (step -1) or begins below it (step 1)."""
    lines = text.splitlines()
    (at,) = [i for i, line in enumerate(lines) if line.startswith(caption)]
    at += step
    while not lines[at].strip():
        at += step
    rows = []
    while "\t" in lines[at] or (step < 0 and lines[at].strip()):
        cells = [re.sub(r"<[^>]*>|[$\\{}]", "", cell).strip() for cell in lines[at].split("\t")]
        rows.append(cells)
        at += step
    return rows[::step]


@pytest.fixture(scope="module")
def paper(shared):
    files = sorted((shared / "paper").glob("*.txt"))
    if not files:
        pytest.skip(f"no text of the paper at {shared / 'paper'}")
    return files[0].read_text(encoding="utf-8")


def numbers(name, *axes):
    """The sweep's numbers of the paper, by the values of axes."""
    found = {}
    for number in find_sweep([name]).paper.numbers:
        values = {key: value for key, value in number.items() if key in ("overall", "many", "medium", "few")}
        assert set(number) <= {*axes, *values}
        found[tuple(str(number.get(axis, "")) for axis in axes)] = values
    return found


def test_numbers_of_table_1(paper):
    # Two of them as the text has them.
    names = {
        "CE": "ce", "Focal Loss": "focal", "BSCE": "bsce", "LDAM-DRW": "ldam_drw", "m cRT": "crt",
        "au-norm": "tau_norm", "BIB(Ours)": "bib", "MBIB(Ours)": "mbib",
    }  # fmt: skip
    rows = rows_beside(paper, "Table 1:", -1)
    assert ["Method", "100", "50", "10"] in rows
    expected = {
        (names[row[0]], factor): {"overall": float(cell)}
        for row in rows
        if row[0] in names
        for factor, cell in zip(("100", "50", "10"), row[1:], strict=True)
    }
    assert len(expected) == 24
    assert numbers("table1_cifar100_lt", "method", "imbalance_factor") == expected


def test_numbers_of_table_4(paper):
    header, accuracies = rows_beside(paper, "Table 4:", 1)
    expected = {(name,): {"overall": float(cell)} for name, cell in zip(header[1:], accuracies[1:], strict=True)}
    assert len(expected) == 6
    assert numbers("table4_observations", "observations") == expected


def by_group(header, row):
    columns = {"All": "overall", "Many": "many", "Medium": "medium", "Few": "few"}
    return {columns[title]: float(cell) for title, cell in zip(header[1:], row[1:], strict=True)}


def test_numbers_of_table_7(paper):
    names = {
        "BSCE": ("BSCE", ""), "BSCE_MLP": ("BSCE_MLP", ""),
        "BIB_v": ("BIB", "v"), "BIB_z": ("BIB", "z"), "BIB_ensemble": ("BIB", "ensemble"),
    }  # fmt: skip
    header, *rows = rows_beside(paper, "Table 7:", -1)
    expected = {names[row[0]]: by_group(header, row) for row in rows}
    assert len(expected) == 5
    assert numbers("table7_heads", "method", "head") == expected
    assert find_sweep(["table7_heads"]).paper.recipe == "bib_resnet10.imagenet_lt"


def test_numbers_of_table_9(paper):
    names = {
        "MBIB w/o re-balancing": "none",
        "MBIB w/o class re-balancing": "logit adjustment",
        "MBIB w/o logits adjustment": "class weights",
        "MBIB": "both",
    }
    header, *rows = rows_beside(paper, "Table 9:", -1)
    expected = {(names[row[0]],): by_group(header, row) for row in rows}
    assert len(expected) == 4
    assert numbers("table9_rebalancing", "rebalancing") == expected
