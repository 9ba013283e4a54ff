"""Sweeps: what a file may say, what is planned, what is shared, what is resumed."""

import csv
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import forked
import pytest
import torch
from crashes import differing
from made_up_results import made_up_record

from mbib_timm.cli import main
from mbib_timm.data import DataPool
from mbib_timm.errors import BusyFolderError, CheckpointError, MbibError
from mbib_timm.recipe import dump_recipe, find_recipe, in_proportion, load_recipe
from mbib_timm.results.record import read_record, write_record
from mbib_timm.sweeps import sweep_runs
from mbib_timm.sweeps.sweep import Paper, Sweep, find_sweep, load_sweep
from mbib_timm.sweeps.sweep_plan import PlannedRun, on_recipe, plan
from mbib_timm.sweeps.sweep_results import read_results
from mbib_timm.sweeps.sweep_runs import run_sweep
from mbib_timm.training import run as run_module
from mbib_timm.training import setup
from mbib_timm.training.checkpoint import save_checkpoint
from mbib_timm.training.optimization import create_schedule
from mbib_timm.training.run import TrainState

DIGITS = "mbib_resnet20.digits"
KEPT = Path(__file__).parents[1] / "results" / "mbib_resnet32.cifar100_lt_if100-200e-seed0"
# From 102 images of a class to one: of every shot group there is one, and little to train on.
KEYS = dict(epochs=1, device="cpu", workers=0, batch_size=32, imbalance_max=102, imbalance_factor=102)
FLAGS = [word for key, value in KEYS.items() for word in (f"--{key.replace('_', '-')}", str(value))]
CIFAR = "{method}cifar100_lt_if{imbalance_factor}"
METHODS = {"ce": "cifar_resnet32.ce_", "mbib": "mbib_resnet32."}


def small(tmp_path, **keys):
    return {**KEYS, "output": str(tmp_path / "runs"), **keys}


def of_recipe(recipe, **fields):
    """Return a sweep over one axis, which tells nothing."""
    return Sweep("s", recipe, **{"axes": {"lr": [0.05]}, **fields})


# What a file may say


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("recipe: a\nseed: [1]", "x.yaml: unknown key of a sweep 'seed': did you mean 'seeds'"),
        ("recipe: a\naxes: {bach_size: [1]}", "unknown axis of sweep x 'bach_size': did you mean 'batch_size'"),
        ("recipe: a\naxes: {model_kwrgs.taps: [1]}", "unknown axis of sweep x 'model_kwrgs.taps'"),
        ("recipe: a\naxes: {lr: 1}", "axis 'lr' needs a list of values"),
        ("recipe: a\naxes: {lr: []}", "axis 'lr' needs a list of values"),
        ("recipe: a\naxes: {m: {x: {stage2.opoch: 1}}}", "unknown key in axis m of sweep x 'stage2.opoch'"),
        ("recipe: a\naxes: {m: {x: 3}}", "axis 'm': 'x' needs recipe keys and their values, got 3"),
        (
            "recipe: a\naxes: {method: {CE: ce}}",
            "axis 'method': 'CE' needs recipe keys and their values, got 'ce'; such as CE: {method: 'ce'}, or a list",
        ),
        ("recipe: '{m}a'\naxes: {m: {x: 3}}", "axis 'm': 'x' needs a part of the recipe's name, got 3"),
        ("recipe: a\naxes: {stage2.seed: [1]}", "recipe key 'stage2.seed' is set by the sweep itself"),
        ("recipe: a\naxes: {seed: [1]}", "recipe key 'seed' is set by the sweep itself; see --seeds"),
        ("recipe: a\naxes: {m: {x: {seed: 1}}}", "recipe key 'seed' is set by the sweep itself"),
        ("recipe: a\nset: {experiment: b}", "recipe key 'experiment' is set by the sweep itself"),
        ("recipe: if{factor}/a\naxes: {lr: [1]}", "unknown axis in the recipe of sweep x 'factor'"),
        ("recipe: [a]", "key 'recipe': expected a str, got ['a']"),
        ("axes: {lr: [1]}", "a sweep needs the key 'recipe'"),
        ("recipe: a\nseeds: []", "at least one seed"),
        ("recipe: a\nseeds: [1, 1]", "at least one seed, each once"),
        ("recipe: a\nlabels: {bta: b}", "unknown axis in the labels of sweep x 'bta'"),
        ("recipe: a\naxes: {lr: [1]}\nfigure: {kind: pie}", "sweep x: unknown kind of figure 'pie'"),
        ("recipe: a\naxes: {lr: [1]}\nfigure: {kind: bars, y: lr}", "sweep x: unknown role in the figure 'y'"),
        ("recipe: a\naxes: {lr: [1]}\nfigure: {kind: bars, x: momentum}", "sweep x: unknown axis in the figure"),
        ("recipe: a\naxes: {lr: [1]}\nfigure: {kind: lines}", "a figure of kind 'lines' needs the role 'x'"),
        ("recipe: a\naxes: {lr: [1]}\nfigure: {kind: heatmap, x: lr}", "kind 'heatmap' needs the role 'y'"),
        ("recipe: a\naxes: {method: [ce]}\nfigure: {kind: lines, x: method}", "lines need numbers along x, got 'ce'"),
        (
            "recipe: a\naxes: {lr: [1], momentum: [0.0, 0.5]}\nfigure: {kind: lines, x: lr}",
            "a figure of kind 'lines' does not show momentum",
        ),
        (
            "recipe: a\naxes: {lr: [1]}\nheads: {z: z}\nfigure: {kind: lines, x: lr}",
            "a figure of kind 'lines' does not show heads",
        ),
        ("recipe: a\naxes: {lr: [1]}\nfigure: {kind: lines, x: group}", "sweep x: unknown axis in the figure"),
        ("recipe: a\naxes: {lr: [1]}\nfigure: {kind: bars, x: head}", "sweep x: unknown axis in the figure 'head'"),
        ("recipe: a\npaper: {source: T, numbers: [{bta: 1}]}", "unknown axis in the paper's numbers of sweep x 'bta'"),
        ("recipe: a\npaper: {sorce: T}", "x.yaml: unknown key of a sweep 'sorce': did you mean 'source'"),
        ("- 1", "expected 'key: value' lines, got a list"),
        ("recipe: [", "not a YAML file"),
    ],
)
def test_a_sweep_file_that_cannot_be_is_refused(tmp_path, content, message):
    (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(MbibError, match=re.escape(message)):
        load_sweep(tmp_path / "x.yaml")


def test_sweeps_are_found_by_name_by_file_and_as_a_list_of_recipes(tmp_path):
    own = tmp_path / "mine.yaml"
    own.write_text("recipe: cifar_resnet20.ce_digits\naxes: {lr: [0.1, 0.2]}\nseeds: [4]\n")
    assert (find_sweep([str(own)]).name, len(plan(find_sweep([str(own)]), {}))) == ("mine", 2)
    assert find_sweep(["figure9_structures"]).recipe == "mbib_resnet32.cifar100_lt_if100"
    of_recipes = plan(find_sweep([DIGITS, "cifar_resnet20.ce_digits"]), {})
    assert [run.label for run in of_recipes] == ["mbib_resnet20.digits-seed0", "cifar_resnet20.ce_digits-seed0"]
    file = str(find_recipe("cifar_resnet20.ce_digits"))
    assert [run.label for run in plan(find_sweep([file]), {})] == ["cifar_resnet20.ce_digits-seed0"]


# What is planned


def test_every_combination_and_the_seeds_outermost(tmp_path):
    axes = {"method.beta": [0.0, 5.0], "lr": [0.1, 0.2]}
    runs = plan(Sweep("both", DIGITS, axes, [0, 3], {"momentum": 0.5}), small(tmp_path, epochs=60))
    assert [run.label for run in runs] == [
        f"mbib_resnet20.digits-method.beta={beta}-lr={lr}-seed{seed}"
        for seed in (0, 3)
        for beta in (0.0, 5.0)
        for lr in (0.1, 0.2)
    ]
    recipe = runs[-1].recipe
    assert (recipe.method["beta"], recipe.lr, recipe.momentum, recipe.seed, recipe.batch_size) == (5.0, 0.2, 0.5, 3, 32)
    assert runs[-1].coordinates == {"method.beta": "5.0", "lr": "0.2"}
    assert {run.recipe.output for run in runs} == {str(tmp_path / "runs" / "both")}
    assert {run.recipe.experiment for run in runs} == {run.label for run in runs}


def test_axes_in_braces_are_parts_of_the_recipes_name():
    """By a text for the value's name, or as they are."""
    runs = plan(Sweep("s", CIFAR, {"method": METHODS, "lr": [2.0], "imbalance_factor": [50, 10]}), {})
    assert [(run.label, run.recipe.method["name"], run.recipe.imbalance_factor, run.recipe.lr) for run in runs] == [
        ("cifar_resnet32.ce_cifar100_lt_if50-lr=2.0-seed0", "ce", 50, 2.0),
        ("cifar_resnet32.ce_cifar100_lt_if10-lr=2.0-seed0", "ce", 10, 2.0),
        ("mbib_resnet32.cifar100_lt_if50-lr=2.0-seed0", "mbib", 50, 2.0),
        ("mbib_resnet32.cifar100_lt_if10-lr=2.0-seed0", "mbib", 10, 2.0),
    ]
    assert [run.recipe.model for run in runs][::2] == ["cifar_resnet32", "mbib_resnet32"]
    assert runs[0].coordinates == {"method": "ce", "lr": "2.0", "imbalance_factor": "50"}
    with pytest.raises(MbibError, match=r"unknown recipe 'cifar_resnet32\.ce_cifar100_lt_if20'"):
        plan(Sweep("s", CIFAR, {"method": METHODS, "imbalance_factor": [20]}), {})


def test_elements_of_keys_leave_the_others_and_combine():
    axes = {
        "method.observation_weights.1": [0.7],
        "method.observation_weights.0": [0.0, 0.5],
        "model_kwargs.bottleneck_features": [32],
        "model_kwargs.taps": [[3, 6, 9]],
    }
    runs = plan(Sweep("s", "mbib_resnet32.cifar100_lt_if100", axes), {})
    assert [run.recipe.method["observation_weights"] for run in runs] == [[0.0, 0.7, 1.0], [0.5, 0.7, 1.0]]
    assert runs[0].recipe.model_kwargs == {"bottleneck_features": 32, "taps": [3, 6, 9]}
    assert runs[0].configuration.endswith(
        "-method.observation_weights.1=0.7-method.observation_weights.0=0.0"
        "-model_kwargs.bottleneck_features=32-model_kwargs.taps=3,6,9"
    )
    own = load_recipe(find_recipe("mbib_resnet32.cifar100_lt_if100"))
    assert (own.method["observation_weights"], own.model_kwargs) == ([0.1, 0.3, 1.0], {})


@pytest.mark.parametrize("axis", ["method.observation_weights.3", "method.observation_weights.a", "lr.0"])
def test_elements_that_a_key_has_not_are_refused(axis):
    with pytest.raises(MbibError, match=rf"{axis}: there is no element '{axis[-1]}' in "):
        plan(Sweep("s", DIGITS, {axis: [1.0]}), {})


def test_named_settings_set_several_keys_and_meet_flags():
    axes = {
        "size": {"wide one": {"model_kwargs.bottleneck_features": 128, "lr": 0.2}, "plain": None},
        "val_interval": [1, 2],
    }
    sweep = Sweep("s", DIGITS, axes)
    runs = plan(sweep, {"model_kwargs": {"drop_rate": 0.1}, "lr": 0.3})
    assert [run.configuration for run in runs] == [
        f"mbib_resnet20.digits-size={size}-val_interval={n}" for size in ("wide_one", "plain") for n in (1, 2)
    ]
    assert runs[0].coordinates == {"size": "wide one", "val_interval": "1"}
    assert runs[0].recipe.model_kwargs == {"drop_rate": 0.1, "bottleneck_features": 128}
    assert runs[2].recipe.model_kwargs == {"drop_rate": 0.1}
    with pytest.raises(MbibError, match=r"'val_interval' has no effect: every value of axis 'val_interval' of sweep s"):
        plan(sweep, {"val_interval": 3})
    assert [run.recipe.lr for run in runs] == [0.2, 0.2, 0.3, 0.3], "an axis is what the sweep is about"


def test_a_fraction_of_the_epochs_moves_warm_up_and_milestones_and_names_the_folder(tmp_path):
    sweep = Sweep("short", "mbib_resnet32.cifar100_lt_if100")
    full, short, given, minute = (
        plan(sweep, {"output": str(tmp_path), **keys})[0]
        for keys in ({}, {"epochs": 20}, {"epochs": 20, "decay_milestones": [10, 15]}, {"epochs": 1})
    )
    assert (full.recipe.epochs, full.recipe.warmup_epochs, full.recipe.decay_milestones) == (200, 4, [161, 181])
    # A tenth of each, to the nearest epoch; a warm-up stays one, and a milestone follows the epochs that it ends.
    assert (short.recipe.epochs, short.recipe.warmup_epochs, short.recipe.decay_milestones) == (20, 1, [17, 19])
    assert short.recipe_epochs == 200
    assert given.recipe.decay_milestones == [10, 15]
    assert minute.recipe.warmup_epochs == 0
    assert [Path(run.recipe.output).name for run in (full, short, minute)] == ["short", "short-20e", "short-1e"]
    assert Path(plan(sweep, {"epochs": 200})[0].recipe.output).name == "short"
    hundred = plan(sweep, {"epochs": 100})[0].recipe
    assert (hundred.warmup_epochs, hundred.decay_milestones) == (2, [81, 91])


def test_epochs_that_a_sweep_sets_are_its_schedule_and_others_shorten_it():
    sweep = Sweep("heads", "mbib_resnet32.cifar100_lt_if100", set={"epochs": 20})
    own, short = (plan(sweep, keys)[0] for keys in ({}, {"epochs": 5}))
    assert (own.epochs, own.recipe_epochs, Path(own.recipe.output).name) == (20, 20, "heads")
    assert (short.epochs, short.recipe_epochs, Path(short.recipe.output).name) == (5, 20, "heads-5e")


@pytest.mark.parametrize("epochs", [10, 20, 40, 100, 200, 400])
def test_the_learning_rate_falls_after_the_same_shares_of_any_number_of_epochs(epochs):
    recipe = load_recipe(find_recipe("cifar_resnet32.ce_cifar100_lt_if100"))
    recipe = recipe.replace(**in_proportion(recipe, epochs))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=recipe.lr)
    schedule = create_schedule(recipe, optimizer, 1)
    rates = []
    for epoch in range(epochs):
        rates.append(round(optimizer.param_groups[0]["lr"], 9))
        schedule.step(epoch + 1)
    decays = [recipe.lr * recipe.decay_rate, recipe.lr * recipe.decay_rate**2]
    assert [rates.index(round(rate, 9)) for rate in decays] == [0.8 * epochs, 0.9 * epochs]


def test_another_recipe_gives_another_name_and_drops_the_papers_numbers():
    table = find_sweep(["table1_cifar100_lt"])
    moved = on_recipe(table, "{method}digits")
    assert (moved.name, moved.paper) == ("table1_cifar100_lt-digits", None)
    runs = plan(replace(moved, seeds=[0]), {})
    assert len(runs) == 24, "the imbalance factor is a recipe key now"
    assert [run.recipe.imbalance_factor for run in runs[:3]] == [100.0, 50.0, 10.0]
    assert {run.recipe.dataset for run in runs} == {"digits"}
    assert runs[1].label == "cifar_resnet32.ce_digits-imbalance_factor=50-seed0"
    with pytest.raises(MbibError, match=r"varies the method by the recipe's name: .* as in '{method}cifar100_lt_if"):
        on_recipe(table, "mbib_resnet32.digits")


def test_the_papers_numbers_stay_on_the_papers_recipe():
    table = find_sweep(["table7_heads"])
    assert table.recipe != table.paper.recipe == "bib_resnet10.imagenet_lt"
    assert on_recipe(table, "bib_resnet10.imagenet_lt").paper == table.paper
    assert on_recipe(table, "bib_resnext50.imagenet_lt").paper is None
    assert on_recipe(table, table.recipe) is table
    numbers = Paper("Table 0", numbers=[{"overall": 1.0}])
    assert on_recipe(of_recipe(DIGITS, paper=numbers), "cifar_resnet20.ce_digits").paper is None


def test_only_takes_values_as_tables_have_them(capsys, tmp_path):
    for text in ("departure=beta 1-", "departure=beta_1-"):
        assert main(["sweep", "open_choices", "--only", text, "--dry-run", "--output", str(tmp_path)]) == 0
        labels = [line.split()[-1] for line in capsys.readouterr().out.splitlines()]
        assert labels == [f"mbib_resnet32.cifar100_lt_if100-departure=beta_1-seed{seed}" for seed in (0, 1, 2)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["open_choices", "figure3_beta"], "open_choices is a sweep, which has to run alone: mbib sweep open_choices"),
        (
            ["digits/nothing.yaml"],
            "there is no file digits/nothing.yaml: expected the name or the file of a sweep or a recipe",
        ),
        ([DIGITS, "--stage2.seed", "1"], "recipe key 'stage2.seed' is set by the sweep itself; see --seeds"),
        (
            [DIGITS, "--only", "resnet50", "--seeds", "0"],
            "sweep sweep has no run whose name contains 'resnet50'; its runs: mbib_resnet20.digits-seed0",
        ),
        ([DIGITS, "--only", "resnet20", "resnet50"], "sweep sweep has no run whose name contains 'resnet50'"),
        ([DIGITS, DIGITS], "sweep sweep: axis 'recipe' has 'mbib_resnet20.digits' twice"),
        ([DIGITS, "--epochs", "0"], "recipe key 'epochs': 0 trains nothing"),
        ([DIGITS, "--jobs", "0"], "argument --jobs: expected a whole number of at least 1, got '0'"),
        (["open_choices", "--recipe", "digits/nothing"], "unknown recipe 'digits/nothing'"),
    ],
)
def test_bad_arguments_end_with_one_line(arguments, message, capsys):
    assert main(["sweep", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_sweep_over_several_processes_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["sweep", DIGITS, *FLAGS]) == 2
    assert "a sweep runs in one process: start one per device" in capsys.readouterr().err


# What is run


@pytest.fixture(scope="module")
def finished(tmp_path_factory, figures):
    """Two methods with two seeds each: the folder of the runs, that of the results, the command."""
    root = tmp_path_factory.mktemp("sweep")
    places = ["--output", str(root / "runs"), "--results", str(root / "results")]
    arguments = ["sweep", DIGITS, "cifar_resnet20.ce_digits", "--seeds", "0", "1", *places, *FLAGS]
    with figures():
        assert main(arguments) == 0
    return root / "runs" / "sweep-1e", root / "results" / "sweep-1e", arguments


def result(folder, label):
    return json.loads((folder / label / "metrics.json").read_text())["result"]


@pytest.mark.slow
def test_the_results_are_those_of_the_runs(finished):
    folder, results, _ = finished
    assert {file.name for file in results.iterdir()} == {
        "sweep.json", "runs.csv", "table.md", "figure.png", "figure.pdf"
    }  # fmt: skip
    assert (results / "figure.pdf").read_bytes().startswith(b"%PDF")
    labels = [f"{name}-seed{seed}" for seed in (0, 1) for name in ("mbib_resnet20.digits", "cifar_resnet20.ce_digits")]
    with (results / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == labels
    table = (results / "table.md").read_text()
    assert table.startswith("# sweep-1e: 1 epoch of 60, n = 2\n")
    assert "4 of 4 runs" in table
    assert "on 340 images (split test)" in table
    for label, row in zip(labels, rows, strict=True):
        heads = result(folder, label)["heads"]
        for column, metric in {"overall": "top1", "many": "many", "medium": "medium", "few": "few"}.items():
            assert float(row[column]) == heads["prediction"][metric]
        assert [row[f"head_{head}"] for head in ("v1", "v2", "v3", "z")] == [
            str(heads[head]["top1"]) if head in heads else "" for head in ("v1", "v2", "v3", "z")
        ]
    for name, first in (("mbib_resnet20.digits", 0), ("cifar_resnet20.ce_digits", 1)):
        found = [float(row["overall"]) for row in rows[first::2]]
        assert f"| {name} | 2 | {statistics.mean(found):.1f} ± {statistics.stdev(found):.1f} |" in table


@pytest.mark.slow
def test_what_a_sweep_keeps_says_nothing_of_the_machines_folders(finished):
    _, results, _ = finished
    assert str(results.parents[1]) not in "".join(
        (results / name).read_text() for name in ("sweep.json", "runs.csv", "table.md")
    )


@pytest.mark.slow
def test_a_sweep_run_is_the_run_that_train_makes(finished, tmp_path):
    folder, _, _ = finished
    assert main(["train", DIGITS, "--seed", "1", "--output", str(tmp_path), "--warmup-epochs", "0", *FLAGS]) == 0
    # The sweep has moved the recipe's warm-up in proportion; everything else is the same.
    assert result(folder, "mbib_resnet20.digits-seed1") == result(tmp_path, "mbib_resnet20.digits")


@pytest.mark.slow
def test_finished_runs_are_not_run_again(finished, monkeypatch, capsys):
    _, results, arguments = finished
    before = {file.name: file.read_bytes() for file in results.iterdir()}
    monkeypatch.setattr(sweep_runs, "train", None)
    assert main(arguments) == 0
    assert {file.name: file.read_bytes() for file in results.iterdir()} == before
    assert capsys.readouterr().out.count("(done)") == 4
    assert main([*arguments, "--dry-run"]) == 0
    assert capsys.readouterr().out.split()[::2] == ["done"] * 4


@pytest.mark.slow
def test_another_recipe_in_a_runs_folder_is_refused_before_anything_runs(finished, monkeypatch, capsys):
    *_, arguments = finished
    monkeypatch.setattr(sweep_runs, "train", None)
    assert main([*arguments, "--lr", "1"]) == 2
    said = capsys.readouterr().err
    assert "mbib_resnet20.digits-seed0 holds a run of another recipe: lr (0.05 there, 1.0 asked for)" in said
    others = ["cifar_resnet20.ce_digits-seed0", "mbib_resnet20.digits-seed1", "cifar_resnet20.ce_digits-seed1"]
    assert f"; 3 more runs cannot go on either: {', '.join(others)}\n" in said


def test_a_sweep_with_other_settings_names_the_process_that_trains_and_not_its_folder_to_remove(tmp_path):
    (run,), (other,) = (plan(of_recipe(DIGITS), small(tmp_path, **keys)) for keys in ({}, {"momentum": 0.5}))
    busy = run.folder()
    busy.begin(run.recipe, {})
    save_checkpoint(busy.path, {})
    with pytest.raises(BusyFolderError, match=r"another process is training in .*; wait for it"):
        other.status(DataPool())
    busy.end()
    with pytest.raises(CheckpointError, match=r"momentum .*, or remove the folder"):
        other.status(DataPool())


def test_an_extended_run_in_a_runs_folder_is_refused(tmp_path):
    (run,) = plan(of_recipe("cifar_resnet20.ce_digits"), small(tmp_path, epochs=4))
    folder, kept = run.folder().path, read_record(KEPT)
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_bytes(dump_recipe(run.recipe))
    for state, is_whole in ((TrainState(2, ends=[4]), True), (TrainState(2, ends=[2]), False)):
        save_checkpoint(folder, {"progress": asdict(state)})
        if is_whole:
            assert run.status(DataPool()) == "partial"
    with pytest.raises(CheckpointError, match=r"holds a run that was extended, .*choose another --name"):
        run.status(DataPool())
    record = made_up_record(kept.result.heads, kept.class_counts, epochs=4)
    write_record(folder, record)
    assert run.status(DataPool()) == "done"
    write_record(folder, replace(record, extended_from=[2]))
    with pytest.raises(CheckpointError, match=r"holds a run that was extended, .*choose another --name"):
        run.status(DataPool())


class CrashError(BaseException):
    """Stands for a kill: an error of a method would fail its own run alone."""


@pytest.mark.slow
def test_an_interrupted_sweep_goes_on_where_it_stopped(finished, tmp_path, monkeypatch):
    whole, _, _ = finished
    sweep, keys = replace(find_sweep([DIGITS]), seeds=[0, 1]), small(tmp_path, checkpoint_seconds=0)
    original = run_module.train_one_epoch
    calls = []

    def crash(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise CrashError
        return original(*args, **kwargs)

    monkeypatch.setattr(run_module, "train_one_epoch", crash)
    with pytest.raises(CrashError):
        run_sweep(sweep, keys, tmp_path)
    monkeypatch.undo()
    assert [run.status(DataPool()) for run in plan(sweep, keys)] == ["done", "partial"]
    assert "1 of 2 runs" in (tmp_path / "sweep-1e" / "table.md").read_text(), "what was found is written at once"
    assert run_sweep(sweep, keys, tmp_path)
    assert "2 of 2 runs" in (tmp_path / "sweep-1e" / "table.md").read_text()
    for seed in (0, 1):
        label = f"mbib_resnet20.digits-seed{seed}"
        assert result(tmp_path / "runs" / "sweep-1e", label) == result(whole, label)


@pytest.fixture
def untrained(monkeypatch):
    """Runs that take no time: each leaves its recipe, and what another one has found."""
    kept = read_record(KEPT)

    def leave(recipe, name, *args, **kwargs):
        folder = Path(recipe.output, recipe.experiment)
        folder.mkdir(parents=True)
        (folder / "recipe.yaml").write_bytes(dump_recipe(recipe))
        shutil.copy(KEPT / "summary.csv", folder)
        record = made_up_record(kept.result.heads, kept.class_counts, epochs=recipe.epochs)
        write_record(folder, replace(record, name=name, seed=recipe.seed))

    monkeypatch.setattr(sweep_runs, "train", leave)


@pytest.mark.usefixtures("untrained")
def test_seeds_that_are_run_one_after_another_are_in_one_table(tmp_path):
    sweep = Sweep("s", DIGITS, seeds=[0, 1, 2])
    for seed in (2, 0):
        assert run_sweep(sweep, small(tmp_path), tmp_path / "results", seeds=[seed])
    results = read_results(tmp_path / "results" / "s-1e")
    assert (results.seeds, results.planned) == ([0, 2], 3)
    assert run_sweep(sweep, small(tmp_path), tmp_path / "results", seeds=[7])
    results = read_results(tmp_path / "results" / "s-1e")
    assert (results.seeds, results.planned) == ([0, 2, 7], 4)


@pytest.mark.slow
def test_runs_say_whether_their_accuracies_are_of_averaged_weights(tmp_path):
    sweep = Sweep("s", DIGITS, {"model_ema": [False, True]})
    assert run_sweep(sweep, small(tmp_path), tmp_path / "results")
    assert [run.averaged for run in read_results(tmp_path / "results" / "s-1e").runs] == [False, True]


@pytest.mark.usefixtures("untrained")
def test_a_sweep_over_named_recipes_has_the_seeds_that_it_is_given(tmp_path):
    sweep = find_sweep([DIGITS, "cifar_resnet20.ce_digits"])
    assert run_sweep(sweep, small(tmp_path), tmp_path / "results", seeds=[1, 2])
    results = read_results(tmp_path / "results" / "sweep-1e")
    assert (results.seeds, results.planned, len(results.runs)) == ([1, 2], 4, 4)
    assert "4 of 4 runs of these recipes" in (tmp_path / "results" / "sweep-1e" / "table.md").read_text()
    assert run_sweep(sweep, small(tmp_path), tmp_path / "results", seeds=[3], only=["mbib"])
    results = read_results(tmp_path / "results" / "sweep-1e")
    assert ([run.seed for run in results.runs], results.planned) == ([3, 1, 1, 2, 2], 6)


@pytest.mark.usefixtures("untrained")
def test_rows_stay_where_the_folders_of_their_runs_are_gone(tmp_path, capsys):
    """As in a clone that has the results of a sweep, but not its runs."""
    sweep = Sweep("s", DIGITS, {"lr": [0.05, 0.1]})
    assert run_sweep(sweep, small(tmp_path), tmp_path / "results", only=["lr=0.05"])
    (before,) = read_results(tmp_path / "results" / "s-1e").runs
    shutil.rmtree(tmp_path / "runs")
    assert run_sweep(sweep, small(tmp_path), tmp_path / "results", only=["lr=0.1"])
    results = read_results(tmp_path / "results" / "s-1e")
    assert [run.coordinates["lr"] for run in results.runs] == ["0.05", "0.1"]
    assert results.runs[0] == before
    # What is asked for is trained, whatever is there of it.
    capsys.readouterr()
    assert run_sweep(sweep, small(tmp_path), tmp_path / "results", only=["lr=0.05"])
    assert "(done)" not in capsys.readouterr().out
    assert [run.coordinates["lr"] for run in read_results(tmp_path / "results" / "s-1e").runs] == ["0.05", "0.1"]


@pytest.mark.usefixtures("untrained")
def test_a_sweep_does_not_replace_the_results_of_another(tmp_path):
    results = tmp_path / "results"
    assert run_sweep(Sweep("s", DIGITS, {"lr": [0.05]}), small(tmp_path), results)
    before = (results / "s-1e" / "sweep.json").read_bytes()
    others = (
        (Sweep("s", DIGITS, {"lr": [0.1]}), {}),  # its row would go
        (Sweep("s", DIGITS, {"lr": [0.05]}), {"val_split": "left_out"}),  # or become another
    )
    for sweep, keys in others:
        with pytest.raises(MbibError, match=r"s-1e holds results of another sweep, .*lr=0.05-seed0.*; choose"):
            run_sweep(sweep, small(tmp_path, output=str(tmp_path / "elsewhere"), **keys), results)
    assert (results / "s-1e" / "sweep.json").read_bytes() == before
    # More of the same sweep is not another.
    assert run_sweep(Sweep("s", DIGITS, {"lr": [0.05, 0.1]}), small(tmp_path), results)


@pytest.mark.slow
def test_runs_share_data_and_images(tmp_path, monkeypatch):
    from mbib_timm.data import create as create_module

    opened, decoded = [], []
    open_data, decode_split = create_module.open_data, create_module.decode_split
    monkeypatch.setattr(create_module, "open_data", lambda *args: (opened.append(1), open_data(*args))[1])
    monkeypatch.setattr(create_module, "decode_split", lambda *args: (decoded.append(1), decode_split(*args))[1])
    assert run_sweep(find_sweep([DIGITS, "cifar_resnet20.ce_digits"]), small(tmp_path), tmp_path / "results")
    assert (len(opened), len(decoded)) == (1, 2)  # training and evaluation images, once for both runs


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.all_faults)])
def test_runs_side_by_side_are_those_of_one_process_interrupted_or_not(finished, tmp_path, number):
    whole, results, _ = finished
    places = ["--output", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    command = ["sweep", DIGITS, "cifar_resnet20.ce_digits", "--seeds", "0", "1", *places, *FLAGS]
    log = tmp_path / "log"
    process = forked.start(lambda: main([*command, "--jobs", "2"]), log, log)
    folder = tmp_path / "runs" / "sweep-1e"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list(folder.glob("*/metrics.json")):
        time.sleep(0.02)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 128 + number, log.read_text()
    assert "Traceback" not in log.read_text()
    assert not list(folder.glob("*seed1/metrics.json")), "it ended before it was interrupted"
    done = forked.mbib(*command)  # at once: no lock is left; one after another, as processes start for seconds
    assert done.returncode == 0, done.stderr
    labels = [run.name for run in whole.iterdir()]
    assert {run.name for run in folder.iterdir()} == set(labels)
    assert not [label for label in labels if differing(folder / label, whole / label)]
    own, theirs = (list(csv.DictReader((of / "runs.csv").open())) for of in (tmp_path / "results/sweep-1e", results))
    for row in (*own, *theirs):
        del row["training_seconds"]
    assert own == theirs


@pytest.mark.slow
def test_of_runs_side_by_side_one_that_fails_is_named_and_a_plugins_method_is_known(tmp_path, capsys):
    file = tmp_path / "two.yaml"
    file.write_text("recipe: cifar_resnet20.ce_digits\naxes: {opt_kwargs: {right: {}, wrong: {opt_kwargs.damp: 1}}}\n")
    places = ["--output", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    toy = ["--plugin", str(Path(__file__).parent / "toy_method.py"), "--method", "toy"]
    assert main(["sweep", str(file), "--jobs", "2", *places, *toy, *FLAGS]) == 1
    out = capsys.readouterr().out
    assert "failed: cifar_resnet20.ce_digits-opt_kwargs=wrong-seed0: recipe key 'opt_kwargs'" in out
    assert "1 of 2 runs" in (tmp_path / "results" / "two-1e" / "table.md").read_text()


def test_a_method_with_a_bug_fails_its_own_runs_alone(tmp_path, capfd):
    """In this process; that an error of any kind crosses from another, with its traceback: test_side_by_side.py."""
    plugin = tmp_path / "buggy.py"
    plugin.write_text(
        "from mbib_timm.methods import METHODS, register\n\n\n@register('buggy')\nclass Buggy(METHODS['ce']):\n"
        "    def head_loss(self, logits, targets):\n        raise IndexError('target 8 is out of bounds')\n"
    )
    places = ["--output", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    file = tmp_path / "three.yaml"
    file.write_text("recipe: cifar_resnet20.ce_digits\naxes: {method: [ce, buggy, bsce]}\n")
    assert main(["sweep", str(file), "--plugin", str(plugin), *places, *FLAGS]) == 1
    said = capfd.readouterr()
    label = "cifar_resnet20.ce_digits-method=buggy-seed0"
    assert f"failed: {label}: IndexError: target 8 is out of bounds" in said.out
    assert "nothing to resume" not in said.out
    assert "buggy.py" in said.err, "the traceback"
    results = read_results(tmp_path / "results" / "three-1e")
    assert [run.method for run in results.runs] == ["ce", "bsce"]
    assert results.failed == {label: "IndexError: target 8 is out of bounds"}
    table = (tmp_path / "results" / "three-1e" / "table.md").read_text()
    assert "2 of 3 runs" in table
    assert f"Failed: {label}: IndexError: target 8 is out of bounds" in table


@pytest.mark.parametrize(
    ("base", "axis", "at_fault"),
    [
        ("cifar_resnet20.ce_digits", "method: [ce, mbib]", "method=mbib: method 'mbib' needs a model with"),
        ("mbib_resnet20.digits", "method: [mbib, sade]", "method=sade: method 'sade' needs a model of exactly three"),
        ("mbib_resnet20.digits", "method: [mbib, paco]", "method=paco: method 'paco' compares images and classes on"),
        ("mbib_resnet20.digits", "model_kwargs.taps: [[3, 6, 9], [6, 9]]", "taps=6,9: setting 'observation_weights'"),
        ("cifar_resnet20.ce_digits", "model_kwargs: {a: {}, b: {model_kwargs.tap: 1}}", "b: recipe key 'model_kwargs'"),
        ("cifar_resnet32.crt_digits", "stage2.method: [crt, bib]", "stage2.method=bib: method 'bib' needs a model"),
    ],
)
def test_a_method_that_does_not_fit_its_network_is_found_before_the_first_run(base, axis, at_fault, tmp_path, capsys):
    file = tmp_path / "two.yaml"
    file.write_text(f"recipe: {base}\naxes: {{{axis}}}\n")
    places = ["--output", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    assert main(["sweep", str(file), *places]) == 2
    assert at_fault in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [file]


def test_a_network_that_cannot_be_built_of_shapes_alone_is_built_of_values(tmp_path, monkeypatch):
    (run,) = plan(of_recipe("cifar_resnet20.ce_digits"), small(tmp_path))
    built, original = [], setup._create_model

    def with_values(*args):
        built.append(float(torch.ones(1)))
        return original(*args)

    monkeypatch.setattr(setup, "_create_model", with_values)
    setup.require_fit(run.recipe)
    assert built == [1.0]


def test_stages_that_are_set_for_all_runs(tmp_path):
    stages = [{"method": "ce", "epochs": 8}, {"method": {"name": "tau_norm", "tau": 0.5}, "epochs": 0}]
    sweep = Sweep("s", DIGITS, {"lr": [0.05, 0.1]}, set={"stages": stages, "model": "cifar_resnet20"})
    for run in plan(sweep, {"output": str(tmp_path), "epochs": 4}):
        assert [(stage.method["name"], stage.epochs) for stage in run.recipe.chain()] == [("ce", 4), ("tau_norm", 0)]
        assert run.recipe_epochs == 8
        assert run.settings == {"stages": stages, "model": "cifar_resnet20"}


@pytest.mark.usefixtures("untrained")
def test_a_run_that_another_process_ends_while_this_one_draws_is_in_the_table(tmp_path, monkeypatch):
    sweep, keys = replace(find_sweep([DIGITS]), seeds=[0, 1]), small(tmp_path)
    theirs = plan(sweep, keys)[1]
    original = sweep_runs.write_results
    written = []

    def write(folder, results):
        if not written:
            sweep_runs.train(theirs.recipe, theirs.name)
        written.append(len(results.runs))
        return original(folder, results)

    monkeypatch.setattr(sweep_runs, "write_results", write)
    assert run_sweep(sweep, keys, tmp_path, only=["seed0"])
    assert written == [1, 2]


HOLD = """
import sys
from pathlib import Path
from filelock import FileLock
lock = Path(sys.argv[1]) / ".lock"
lock.parent.mkdir(parents=True)
with FileLock(lock):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
def test_a_run_of_another_process_is_left_to_it(tmp_path, capsys, popen):
    sweep, keys = replace(find_sweep([DIGITS]), seeds=[0, 1]), small(tmp_path)
    theirs = plan(sweep, keys)[0]
    other = popen(
        [sys.executable, "-c", HOLD, theirs.folder().path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "held\n"
        assert not run_sweep(sweep, keys, tmp_path), "the sweep is not complete"
    finally:
        other.communicate()
    out = capsys.readouterr().out
    assert f"left to another process: {theirs.label}" in out
    assert "failed" not in out.lower()
    assert [run.status(DataPool()) for run in plan(sweep, keys)] == ["missing", "done"]
    assert run_sweep(sweep, keys, tmp_path), "it is run once the other process has gone"
    assert "2 of 2 runs" in (tmp_path / "sweep-1e" / "table.md").read_text()


@pytest.mark.usefixtures("untrained")
def test_a_row_stays_until_its_run_has_been_trained_again(tmp_path, monkeypatch):
    """As in a clone: the results are there, the folders of the runs are not."""
    sweep, keys = find_sweep([DIGITS, "cifar_resnet20.ce_digits"]), small(tmp_path)
    assert run_sweep(sweep, keys, tmp_path)
    before = read_results(tmp_path / "sweep-1e").runs
    shutil.rmtree(tmp_path / "runs")
    trained = sweep_runs.train

    def first_alone(recipe, name, *args, **kwargs):
        if "ce_digits" in name:
            raise MbibError("out of memory")
        return trained(recipe, name, *args, **kwargs)

    monkeypatch.setattr(sweep_runs, "train", first_alone)
    assert not run_sweep(sweep, keys, tmp_path)
    after = read_results(tmp_path / "sweep-1e")
    assert [run.label for run in after.runs] == [run.label for run in before]
    assert [label for label in after.failed if "ce_digits" in label] == list(after.failed)


def test_control_c_says_how_to_continue(tmp_path, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep_runs, "train", interrupt)
    assert main(["sweep", DIGITS, "--output", str(tmp_path), *FLAGS]) == 130
    assert f"with: mbib sweep {DIGITS} --output {tmp_path} --epochs 1" in capsys.readouterr().err


@pytest.mark.slow
def test_only_and_seeds_choose_runs(finished, tmp_path, capsys):
    *_, arguments = finished
    # Seed 2 of one method is new; what is done of the others stays in the table.
    arguments = [*arguments, "--seeds", "0", "2", "--dry-run"]
    assert main([*arguments, "--only", "mbib_resnet20"]) == 0
    assert capsys.readouterr().out.split() == [
        "done",
        "mbib_resnet20.digits-seed0",
        "missing",
        "mbib_resnet20.digits-seed2",
    ]
    assert main([*arguments, "--only", "seed2"]) == 0
    assert capsys.readouterr().out.split()[1::2] == ["mbib_resnet20.digits-seed2", "cifar_resnet20.ce_digits-seed2"]
    assert main([*arguments, "--only", "mbib_resnet20.digits-seed0", "ce_digits-seed2"]) == 0
    assert capsys.readouterr().out.split()[1::2] == ["mbib_resnet20.digits-seed0", "cifar_resnet20.ce_digits-seed2"]


# Stages


STAGED = [f"cifar_resnet32.{method}_digits" for method in ("ce", "crt", "tau_norm")]


def test_epochs_of_stages_move_in_proportion_and_the_longest_names_the_folder():
    ce, crt, tau_norm = (run for run in plan(find_sweep(STAGED), {"epochs": 30}))
    assert [[stage.epochs for stage in run.recipe.chain()] for run in (ce, crt, tau_norm)] == [[30], [30, 5], [30, 0]]
    assert {run.epochs for run in (ce, crt, tau_norm)} == {30}
    assert {run.recipe_epochs for run in (ce, crt, tau_norm)} == {60}
    assert {Path(run.recipe.output).name for run in (ce, crt, tau_norm)} == {"sweep-30e"}
    whole = plan(find_sweep(STAGED), {"epochs": 60})
    assert {Path(run.recipe.output).name for run in whole} == {"sweep"}
    # What is set for all stages holds for those that do not set it themselves, as in a recipe.
    given = plan(find_sweep(STAGED), {"epochs": 30, "warmup_epochs": 3})
    assert [[stage.warmup_epochs for stage in run.recipe.chain()] for run in given] == [[3], [3, 1], [3, 3]]


def test_axes_and_flags_reach_a_stage():
    sweep = Sweep("s", "cifar_resnet32.tau_norm_digits", {"stage2.method.tau": [0.5, 1.0]}, [3])
    runs = plan(sweep, {"stage1.lr": 0.2, "batch_size": 32})
    assert [run.recipe.method for run in runs] == [{"name": "tau_norm", "tau": tau} for tau in (0.5, 1.0)]
    for run in runs:
        assert [stage.seed for stage in run.recipe.chain()] == [3, 3]
        assert [stage.resume for stage in run.recipe.chain()] == ["auto", "auto"]
        assert run.recipe.previous.lr == 0.2
        assert run.settings == {"stage1.lr": 0.2}, "the batches are the recipe's own"
    assert runs[0].label == "cifar_resnet32.tau_norm_digits-stage2.method.tau=0.5-seed3"
    with pytest.raises(MbibError, match=r"recipe key 'stage2\.seed' is set by the sweep itself"):
        plan(sweep, {"stage2.seed": 1})


@pytest.mark.slow
def test_stages_start_from_the_run_of_the_same_seed(tmp_path, capsys):
    sweep, keys = replace(find_sweep(STAGED), seeds=[0, 1]), small(tmp_path)
    assert run_sweep(sweep, keys, tmp_path)
    out = capsys.readouterr().out
    folder = tmp_path / "runs" / "sweep-1e"
    for seed in (0, 1):
        # cRT and tau-norm, each in its first stage.
        assert out.count(f"done, in {folder / f'cifar_resnet32.ce_digits-seed{seed}'}") == 2
        assert "tau" in json.loads((folder / f"{STAGED[2]}-seed{seed}" / "metrics.json").read_text())["chosen"]
    assert not list(folder.glob("*/stage1-*"))
    assert [run.status(DataPool()) for run in plan(sweep, keys)] == ["done"] * 6
    with (tmp_path / "sweep-1e" / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epochs"] for row in rows] == ["1"] * 6
    assert [bool(row["chosen_tau"]) for row in rows] == [False, False, True] * 2
    table = (tmp_path / "sweep-1e" / "table.md").read_text()
    assert table.startswith("# sweep-1e: 1 epoch of 60, n = 2\n")
    assert all(f"| {name} | 2 |" in table for name in STAGED)


def test_a_run_that_has_its_first_stage_alone_is_partial(tmp_path):
    (run,) = plan(replace(find_sweep(STAGED[1:2]), seeds=[0]), small(tmp_path))
    assert run.status(DataPool()) == "missing"
    (run.folder().path / "stage1-ce").mkdir(parents=True)
    assert run.status(DataPool()) == "partial"


@pytest.mark.parametrize(("images", "kept"), [(500, {}), (499, {"dataset": "folder"})])
def test_the_same_images_in_a_folder_are_the_same_data_and_others_are_not(tmp_path, images, kept):
    label = "cifar_resnet32.ce_cifar100_lt_if100-200e-seed0-bfloat16"
    shutil.copytree(Path(__file__).parents[1] / "results" / label, tmp_path / label)
    record = json.loads((tmp_path / label / "metrics.json").read_text())
    assert max(record["class_counts"]) == 500
    record["class_counts"][record["class_counts"].index(500)] = images
    (tmp_path / label / "metrics.json").write_text(json.dumps(record))
    recipe = load_recipe(find_recipe("cifar_resnet32.ce_cifar100_lt_if100")).replace(output=str(tmp_path))
    settings = {"dataset": "folder"}
    planned = PlannedRun(label, "ce", {}, label.rpartition("-200e")[0], recipe, 200, settings)
    assert sweep_runs._sweep_run(planned).settings == kept


def test_an_axis_may_bring_stages(tmp_path):
    """A row of a table whose method starts from another's weights, in the place of the recipe's one stage."""
    stages = [{"method": "ce"}, {"method": {"name": "tau_norm", "tau": 1.5}, "epochs": 0}]
    axes = {"head": {"plain": {}, "two": {"stages": stages, "lr": 0.3}}}
    sweep = Sweep("s", "cifar_resnet20.ce_digits", axes)
    plain, two = plan(sweep, {"epochs": 3, "data_dir": str(tmp_path)})
    assert [len(run.recipe.chain()) for run in (plain, two)] == [1, 2]
    first, last = two.recipe.chain()
    assert (first.method, first.epochs, first.lr) == ({"name": "ce"}, 3, 0.3)
    assert (last.method, last.epochs) == ({"name": "tau_norm", "tau": 1.5}, 0)


@pytest.mark.parametrize("stages", [[], 3, ["ce"], [{"metod": "ce"}], [{"stages": []}]])
def test_stages_of_an_axis_that_are_none(stages):
    with pytest.raises(MbibError, match="stage"):
        plan(Sweep("s", "cifar_resnet20.ce_digits", {"head": {"two": {"stages": stages}}}), {})


@pytest.mark.usefixtures("untrained")
def test_the_rows_of_an_unnamed_sweep_give_way_to_those_of_the_next(tmp_path):
    for other in ("cifar_resnet20.ce_digits", "cifar_resnet32.bsce_digits"):
        assert run_sweep(find_sweep([DIGITS, other]), small(tmp_path), tmp_path / "results")
        runs = read_results(tmp_path / "results" / "sweep-1e").runs
        assert [run.coordinates["recipe"] for run in runs] == [DIGITS, other]
    named = replace(find_sweep(["cifar_resnet20.ce_digits", DIGITS]), name="mine")
    assert run_sweep(named, small(tmp_path), tmp_path / "results")
    with pytest.raises(MbibError, match="holds results of another sweep"):
        run_sweep(replace(find_sweep([DIGITS]), name="mine"), small(tmp_path), tmp_path / "results")
