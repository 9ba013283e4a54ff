"""Sweeps: what is planned, what is shared, what is resumed, and what the summary says."""

import csv
import json
import re
import statistics
from pathlib import Path

import pytest
import torch
from mbib_timm.training.sweep import Sweep, find_sweep, list_sweeps, load_sweep, plan, run_sweep
from mbib_timm.training.sweep_summary import mean_and_deviation

from mbib_timm.cli import main
from mbib_timm.errors import CheckpointError, MbibError, NonFiniteLossError
from mbib_timm.recipe import list_recipes
from mbib_timm.training import run as run_module
from mbib_timm.training import sweep as sweep_module

DIGITS = "digits/mbib_resnet20"
FLAGS = ["--epochs", "1", "--device", "cpu", "--workers", "0", "--batch-size", "64"]
KEYS = dict(epochs=1, device="cpu", workers=0, batch_size=64)


def small(tmp_path, **keys):
    return {**KEYS, "output": str(tmp_path), **keys}


# What is planned


def test_every_recipe_with_every_value_and_seed(tmp_path):
    sweep = Sweep("both", [DIGITS, "digits/ce_resnet20"], {"beta": [0.0, 5.0], "lr": [0.1]}, [0, 3], {"momentum": 0.5})
    runs = plan(sweep, small(tmp_path))
    assert [run.label for run in runs][:4] == [
        "mbib_resnet20.digits-beta=0.0-lr=0.1-seed0",
        "mbib_resnet20.digits-beta=0.0-lr=0.1-seed3",
        "mbib_resnet20.digits-beta=5.0-lr=0.1-seed0",
        "mbib_resnet20.digits-beta=5.0-lr=0.1-seed3",
    ]
    assert len(runs) == 8
    recipe = runs[3].recipe
    assert (recipe.beta, recipe.lr, recipe.momentum, recipe.seed, recipe.batch_size) == (5.0, 0.1, 0.5, 3, 64)
    assert Path(recipe.output) == tmp_path / "both"


def test_other_epochs_move_warm_up_and_milestones_in_proportion(tmp_path):
    sweep = Sweep("short", ["cifar100_lt_if100/mbib_resnet32"])
    own, short, given = (
        plan(sweep, {"output": str(tmp_path), **keys})[0].recipe
        for keys in ({}, {"epochs": 20}, {"epochs": 20, "decay_milestones": [10, 15]})
    )
    assert (own.epochs, own.warmup_epochs, own.decay_milestones) == (200, 4, [161, 181])
    assert (short.epochs, short.warmup_epochs, short.decay_milestones) == (20, 1, [16, 18])
    assert given.decay_milestones == [10, 15]


@pytest.mark.parametrize("name", list_sweeps())
def test_packaged_sweeps_can_be_planned_and_are_no_recipes(name):
    runs = plan(find_sweep([name]), {})
    assert len(runs) > 1
    assert f"sweeps/{name}" not in list_recipes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("recipes: [a]\nseed: [1]", "unknown key in x.yaml 'seed': did you mean 'seeds'"),
        ("recipes: [a]\naxes: {bta: [1]}", "unknown axis of sweep x 'bta': did you mean 'beta'"),
        ("recipes: [a]\naxes: {beta: 1}", "axis 'beta' needs a list of values"),
        ("recipes: [a]\nset: {seed: 1}", "recipe key 'seed' is the sweep's own to set; see --seeds"),
        ("recipes: digits", "key 'recipes': expected a list, got 'digits'"),
        ("recipes: []", "sweep x needs a recipe or more"),
        ("recipes: [a]\nseeds: [1, 1]", "a seed or more, each once"),
    ],
)
def test_a_sweep_file_that_cannot_be_is_refused(tmp_path, content, message):
    (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(MbibError, match=re.escape(message)):
        load_sweep(tmp_path / "x.yaml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits/mbib_resnet2"], "unknown recipe 'digits/mbib_resnet2': did you mean"),
        ([DIGITS, "--seed", "1"], "recipe key 'seed' is the sweep's own to set; see --seeds"),
        ([DIGITS, "--only", "resnet50"], "sweep sweep has no run whose name contains 'resnet50'"),
        ([DIGITS, DIGITS], "sweep sweep has two runs of the name mbib_resnet20.digits-seed0"),
        ([DIGITS, "--lr", "-1"], "recipe key 'lr': expected more than 0"),
        ([DIGITS, "--epochs", "0"], "recipe key 'epochs': expected"),
    ],
)
def test_bad_arguments_end_with_one_line(arguments, message, capsys):
    assert main(["sweep", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_sweep_over_several_processes_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["sweep", DIGITS, *FLAGS]) == 2
    assert "a sweep is one process: start one for each device" in capsys.readouterr().err


# What is run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two methods with two seeds each."""
    root = tmp_path_factory.mktemp("sweep")
    arguments = ["sweep", DIGITS, "digits/ce_resnet20", "--seeds", "0", "1", "--output", str(root), *FLAGS]
    assert main(arguments) == 0
    return root / "sweep", arguments


def test_the_summary_is_that_of_the_runs(finished):
    folder, _ = finished
    with (folder / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    expected = [f"{method}_resnet20.digits-seed{seed}" for method in ("mbib", "ce") for seed in (0, 1)]
    assert [row["folder"] for row in rows] == expected
    text = (folder / "summary.md").read_text()
    assert text.startswith("# sweep: 1 epochs (the recipes ask for 60; warm-up and milestones moved in proportion)")
    for configuration in ("mbib_resnet20.digits", "ce_resnet20.digits"):
        runs = [json.loads((folder / f"{configuration}-seed{seed}" / "metrics.json").read_text()) for seed in (0, 1)]
        predictions = [metrics["result"]["heads"]["prediction"] for metrics in runs]
        cells = []
        for metric in ("top1", "many", "medium", "few"):
            values = [prediction[metric] for prediction in predictions]
            cells.append(f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}")
        assert f"| {configuration} | 2 | {' | '.join(cells)} |" in text
        of_this = [row for row in rows if row["configuration"] == configuration]
        assert [float(row["overall"]) for row in of_this] == [prediction["top1"] for prediction in predictions]
    assert {"head_v1", "head_z", "training_seconds"} <= rows[0].keys()


def test_a_sweep_run_is_the_run_that_train_makes(finished, tmp_path):
    folder, _ = finished
    assert main(["train", DIGITS, "--seed", "1", "--output", str(tmp_path), "--warmup-epochs", "0", *FLAGS]) == 0
    alone = json.loads((tmp_path / "mbib_resnet20.digits" / "metrics.json").read_text())
    swept = json.loads((folder / "mbib_resnet20.digits-seed1" / "metrics.json").read_text())
    # The sweep has moved the recipe's warm-up in proportion; everything else is the same.
    assert swept["result"] == alone["result"]


def test_finished_runs_are_not_run_again(finished, monkeypatch, capsys):
    folder, arguments = finished
    before = (folder / "summary.md").read_text()
    monkeypatch.setattr(sweep_module, "train", None)
    assert main(arguments) == 0
    assert (folder / "summary.md").read_text() == before
    assert capsys.readouterr().out.count("(done)") == 4
    assert main([*arguments, "--dry-run"]) == 0
    assert capsys.readouterr().out.split()[::2] == ["done"] * 4


def test_another_recipe_in_a_runs_folder_is_refused_before_anything_runs(finished, monkeypatch, capsys):
    _, arguments = finished
    monkeypatch.setattr(sweep_module, "train", None)
    assert main([*arguments, "--beta", "1"]) == 2
    assert "holds a run of another recipe: beta (5.0 there, 1.0 asked for)" in capsys.readouterr().err


class CrashError(Exception):
    """Stands for a crash."""


def test_an_interrupted_sweep_goes_on_where_it_stopped(finished, tmp_path, monkeypatch):
    whole, _ = finished
    sweep, keys = Sweep("sweep", [DIGITS], seeds=[0, 1]), small(tmp_path, checkpoint_seconds=0)
    original = run_module.train_one_epoch
    calls = []

    def crash(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise CrashError
        return original(*args, **kwargs)

    monkeypatch.setattr(run_module, "train_one_epoch", crash)
    with pytest.raises(CrashError):
        run_sweep(sweep, keys)
    monkeypatch.undo()
    assert [run.status() for run in plan(sweep, keys)] == ["done", "partial"]
    assert run_sweep(sweep, keys)
    for seed in (0, 1):
        mine, theirs = (
            json.loads((folder / f"mbib_resnet20.digits-seed{seed}" / "metrics.json").read_text())["result"]
            for folder in (tmp_path / "sweep", whole)
        )
        assert mine == theirs


def test_runs_share_data_and_images(tmp_path, monkeypatch):
    opened, decoded = [], []
    from mbib_timm.data import create as create_module

    open_data, decode_split = create_module.open_data, create_module.decode_split
    monkeypatch.setattr(create_module, "open_data", lambda recipe: (opened.append(1), open_data(recipe))[1])
    monkeypatch.setattr(create_module, "decode_split", lambda *args: (decoded.append(1), decode_split(*args))[1])
    assert run_sweep(Sweep("s", [DIGITS, "digits/ce_resnet20"], seeds=[0, 1]), small(tmp_path))
    assert (len(opened), len(decoded)) == (1, 2)  # training and evaluation images, once for four runs


def test_a_run_that_diverges_is_named_and_the_others_run(tmp_path, monkeypatch, capsys):
    original = sweep_module.train

    def diverging(recipe, name, pool):
        if recipe.seed == 0:
            raise NonFiniteLossError("loss part 'loss' became nan")
        return original(recipe, name, pool)

    monkeypatch.setattr(sweep_module, "train", diverging)
    assert main(["sweep", DIGITS, "--seeds", "0", "1", "--output", str(tmp_path), "--name", "mine", *FLAGS]) == 1
    out = capsys.readouterr().out
    assert out.rstrip().splitlines()[-1] == "failed: mbib_resnet20.digits-seed0: loss part 'loss' became nan"
    assert "| mbib_resnet20.digits | 1 |" in (tmp_path / "mine" / "summary.md").read_text()


def test_control_c_says_how_to_continue(tmp_path, monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep_module, "train", interrupt)
    assert main(["sweep", DIGITS, "--output", str(tmp_path), *FLAGS]) == 130
    assert f"with: mbib sweep {DIGITS} --output {tmp_path} --epochs 1" in capsys.readouterr().err


def test_means_and_deviations():
    assert mean_and_deviation([40.0, 42.0]) == "41.0 ± 1.4"
    assert mean_and_deviation([40.0]) == "40.0"
    assert mean_and_deviation([None, None]) == "–"
    assert mean_and_deviation([40.0, 42.0, 44.0]) == f"42.0 ± {torch.tensor([40.0, 42.0, 44.0]).std():.1f}"


def test_a_partial_run_of_another_recipe_is_refused(tmp_path):
    sweep = Sweep("s", [DIGITS])
    assert run_sweep(sweep, small(tmp_path))
    with pytest.raises(CheckpointError, match="another recipe: lr"):
        run_sweep(sweep, small(tmp_path, lr=0.01))
