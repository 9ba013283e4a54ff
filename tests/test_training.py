"""A real run on the embedded digits: its outputs, its loss curve, and its resumption bit by bit."""

import csv
import json
import math
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
import types
from dataclasses import asdict, replace
from pathlib import Path

import forked
import numpy as np
import pytest
import timm
import torch
from crashes import crash, differing, epochs_of, weights
from made_up_results import ENVIRONMENT
from PIL import Image
from safetensors.torch import load_file

import mbib_timm
from mbib_timm.cli import main
from mbib_timm.data import Batch, DataPool
from mbib_timm.errors import BusyFolderError, CheckpointError, MbibError, NonFiniteLossError
from mbib_timm.files import to_json, write_bytes
from mbib_timm.methods import METHODS, Facts
from mbib_timm.recipe import asks_for_epochs, dump_recipe, find_recipe, load_recipe
from mbib_timm.recipe.keys import SCHEDULES
from mbib_timm.results.record import read_record
from mbib_timm.training import run as run_module
from mbib_timm.training import train
from mbib_timm.training.checkpoint import load_checkpoint, save_checkpoint
from mbib_timm.training.optimization import Precision, create_schedule
from mbib_timm.training.run import TrainState
from mbib_timm.training.run_folder import RunFolder, place_of
from mbib_timm.training.step import training_step

GOLDEN_STEPS = json.loads((Path(__file__).parent / "golden" / "digits_steps.json").read_text())
TOY = str(Path(__file__).parent / "toy_method.py")
DIGITS = find_recipe("mbib_resnet20.digits")
SHORT = dict(epochs=3, warmup_epochs=1, device="cpu", workers=0, checkpoint_seconds=0)
FEW = dict(imbalance_max=48)  # images of the largest class: five steps an epoch instead of fifteen


def digits(tmp_path, **overrides):
    return load_recipe(DIGITS, {**SHORT, "output": str(tmp_path), **overrides})


@pytest.fixture(scope="module")
def finished(tmp_path_factory, figures):
    """An uninterrupted short run: its folder and its record."""
    with figures():
        run = train(digits(tmp_path_factory.mktemp("finished")), "whole")
    return run.folder, run.record


@pytest.mark.slow
def test_a_run_leaves_its_results(finished):
    folder, record = finished
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "recipe.yaml", "environment.json", "summary.csv", "metrics.json", "model.safetensors", "config.json",
        "best.safetensors", "last.ckpt", "previous.ckpt", "figures/training_curves.png",
        "figures/class_accuracy.png", "figures/shot_groups.png", ".lock", "predictions.csv", "confusion.csv",
        "classes.csv", "errors.json",
    }  # fmt: skip
    written = json.loads((folder / "metrics.json").read_text())
    assert written == json.loads(to_json(record))
    assert read_record(folder) == record
    assert written["class_counts"] == [144, 101, 71, 49, 35, 24, 17, 12, 8, 6]
    assert set(written["result"]["heads"]) == {"prediction", "v1", "v2", "v3", "z"}
    assert written["result"]["epoch"] == 3
    assert written["best"]["split"] == "test"
    assert written["raw"] is None, "there is no moving average"
    assert written["environment"]["torch"] == torch.__version__
    with (folder / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3]
    best = max(float(row["val_top1"]) for row in rows)
    assert written["best"]["heads"]["prediction"]["top1"] == pytest.approx(best)


@pytest.mark.slow
def test_the_saved_model_loads_with_timm_and_gives_the_result(finished):
    folder, record = finished
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert model.pretrained_cfg["input_size"] == [3, 16, 16] or tuple(model.pretrained_cfg["input_size"]) == (3, 16, 16)
    assert model.pretrained_cfg["label_names"][3] == "3"
    assert json.loads((folder / "config.json").read_text())["class_counts"] == record.class_counts
    assert not any(key.startswith(("module.", "_orig_mod.")) for key in weights(folder))


class EnoughError(Exception):
    """Ends a run that has shown what it should."""


def step_losses(monkeypatch, recipe, steps=10):
    """Return the losses of a run's first steps, computed in float64.

    In float32 another order of additions, as another processor has it, is worth 1e-6 in the first step and some
    percent in the third; in float64 it is worth 1e-13 in the tenth.
    """
    seen, original = [], run_module.create_step

    def create_step(recipe, method, *args):
        step = original(recipe, method.double(), *args)

        def recorded(batches, *args):
            double = [batch._replace(views=tuple(view.double() for view in batch.views)) for batch in batches]
            parts = step(tuple(double), *args)
            seen.append(parts["loss"].item())
            if len(seen) == steps:
                raise EnoughError
            return parts

        return recorded

    monkeypatch.setattr(run_module, "create_step", create_step)
    with pytest.raises(EnoughError):
        train(recipe, "first_steps")
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("loader", GOLDEN_STEPS["loaders"])
def test_every_step_is_that_before_there_were_methods(tmp_path, monkeypatch, loader):
    """Guards the whole loop over three epochs: data order, augmentation, model, loss, optimizer and schedule."""
    losses = step_losses(monkeypatch, digits(tmp_path, loader=loader, val_interval=3), GOLDEN_STEPS["steps"])
    assert losses == pytest.approx(GOLDEN_STEPS["loaders"][loader], rel=1e-5)
    assert sum(losses[30:]) < sum(losses[:15])


@pytest.mark.slow
@pytest.mark.parametrize("method", GOLDEN_STEPS["methods"])
def test_the_first_steps_of_every_method_are_those_of_the_loss_before(tmp_path, monkeypatch, method):
    model = {"bib": "bib_resnet20", **dict.fromkeys(("ce", "focal", "bsce"), "cifar_resnet20")}.get(method)
    keys = dict(method=method, model=model or "mbib_resnet20", loader="resident")
    losses = step_losses(monkeypatch, digits(tmp_path, **keys))
    assert losses == pytest.approx(GOLDEN_STEPS["methods"][method], rel=1e-5)


@pytest.mark.slow
def test_raw_weights_are_evaluated_beside_their_moving_average(tmp_path, capsys):
    keys = dict(FEW, epochs=2, model_ema=True)
    same = train(digits(tmp_path, **keys, model_ema_decay=0.0), "same")
    assert same.record.raw.heads == same.record.result.heads, "without memory the average is the weights"
    slow = train(digits(tmp_path, **keys, model_ema_decay=0.9999), "slow")
    assert slow.record.raw == same.record.raw, "the average changes nothing of what trains"
    assert slow.record.raw.heads != slow.record.result.heads
    raw = slow.record.raw.prediction
    assert f"Weights without the moving average: {raw.top1:.2f} (medium {raw.medium:.2f}" in capsys.readouterr().out
    with (tmp_path / "slow" / "summary.csv").open() as file:
        *_, last = csv.DictReader(file)
    assert float(last["raw_top1"]) == raw.top1
    assert float(last["val_top1"]) == slow.record.result.prediction.top1


@pytest.mark.parametrize("asked", [True, False])
def test_who_asks_to_resume_is_told_that_there_is_nothing_whatever_runs_share(tmp_path, asked, capsys):
    recipe = digits(tmp_path, resume="auto", model="no_such_model")
    with pytest.raises(MbibError, match="unknown model"):
        train(recipe, "new", DataPool(), resume_asked=asked)
    assert (f"nothing to resume in {tmp_path / 'new'}: starting" in capsys.readouterr().out) == asked


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["resident", "timm"])
def test_resume_gives_bit_identical_weights(tmp_path, loader, capsys):
    """After a crash in the first epoch, and another in the second; tests/test_checkpoint_steps.py has workers too."""
    keys = dict(FEW, loader=loader, model_ema=True, model_kwargs={"drop_rate": 0.1}, opt="adamw", lr=1e-3)
    recipe = digits(tmp_path, **keys)
    whole = train(recipe, "whole")
    place = tmp_path / "broken"
    lines = (f"nothing to resume in {place}: starting\n", f"resumed from {place} before epoch 1 of 3\n")
    for epoch, said in enumerate(lines):
        crash(recipe.replace(resume="auto"), "broken", epoch, after=True)
        assert said in capsys.readouterr().out
    resumed = train(recipe.replace(resume="auto"), "broken")
    assert f"resumed from {place} after epoch 1 of 3\n" in capsys.readouterr().out
    assert not differing(whole.folder, resumed.folder)
    assert whole.record.result == resumed.record.result
    assert whole.record.best == resumed.record.best
    assert whole.record.raw == resumed.record.raw
    assert epochs_of(whole.folder) == epochs_of(resumed.folder)


@pytest.mark.slow
def test_checkpoints_keep_their_distance_in_time(tmp_path, monkeypatch):
    """With epochs shorter than that, only the start and the end are saved; what is resumed is the same."""
    saved = []
    original = run_module.save_checkpoint
    monkeypatch.setattr(
        run_module,
        "save_checkpoint",
        lambda path, state: (saved.append(state["progress"]["epoch"]), original(path, state)),
    )
    rare = train(digits(tmp_path, **FEW, checkpoint_seconds=1e6), "rare")
    assert saved == [0, 3]
    saved.clear()
    often = train(digits(tmp_path, **FEW), "often")
    assert saved == [0, 1, 2, 3]
    assert not differing(rare.folder, often.folder)
    best = [load_file(run.folder / "best.safetensors") for run in (rare, often)]
    assert all(torch.equal(best[0][name], best[1][name]) for name in best[0])


@pytest.mark.slow
def test_kill_9_and_resume_auto(finished, tmp_path):
    folder, _ = finished
    command = ["train", "--epochs", "3", "--warmup-epochs", "1", "--device", "cpu", "--workers", "0", "--output",
               str(tmp_path), "--experiment", "killed", "--checkpoint-seconds", "0"]  # fmt: skip
    process = forked.start(lambda: main(command), os.devnull, os.devnull)
    summary = tmp_path / "killed" / "summary.csv"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (summary.exists() and summary.read_text().count("\n") >= 2):
        time.sleep(0.02)
    process.kill()
    process.join()
    assert not (tmp_path / "killed" / "metrics.json").exists(), "the run ended before it was killed"
    done = forked.mbib(*command, "--resume", "auto")
    assert done.returncode == 0, done.stderr
    assert not differing(folder, tmp_path / "killed")


@pytest.mark.parametrize("sched", SCHEDULES)
def test_the_rate_of_an_epoch_depends_on_the_epoch_alone(sched):
    """So a run may go on from anywhere by the schedule of any recipe."""
    recipe = load_recipe(DIGITS, dict(epochs=12, warmup_epochs=3, sched=sched, decay_milestones=[5, 9]))

    def schedule():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=recipe.lr)
        return optimizer, create_schedule(recipe, optimizer)

    optimizer, stepped = schedule()
    for epoch in range(1, 12):
        stepped.step(epoch)
        other, jumped = schedule()
        jumped.step(epoch)
        assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


def test_milestones_act_at_the_same_epochs_where_rates_change_after_updates():
    keys = dict(epochs=8, warmup_epochs=0, sched="multistep", decay_milestones=[3, 6], decay_rate=0.1, lr=1.0)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = create_schedule(load_recipe(DIGITS, {**keys, "sched_on_updates": True}), optimizer, 7)
    rates = []
    for update in range(1, 1 + 8 * 7):
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step_update(update)
    assert rates == pytest.approx(np.repeat([1, 1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01], 7))


@pytest.mark.parametrize("sched", SCHEDULES)
def test_any_schedule_is_one_or_says_how_many_epochs_it_needs(sched):
    recipe = load_recipe(DIGITS, dict(epochs=4, warmup_epochs=1, sched=sched, decay_milestones=[1]))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=recipe.lr)
    untrained = recipe.replace(epochs=0, initial_checkpoint="run")
    for stage in (recipe, recipe.replace(sched_on_updates=True), untrained):
        create_schedule(stage, optimizer, updates=2)
    assert optimizer.param_groups[0]["lr"] == recipe.lr, "of a stage without epochs"
    for short, got in ((recipe.replace(epochs=3), 2), (recipe.replace(epochs=2, sched_on_updates=True), 2)):
        if sched not in ("wsd", "rsqrt"):
            create_schedule(short, optimizer, updates=2)
            continue
        with pytest.raises(MbibError, match=rf"'sched': {sched} falls .* at least 3 (epochs|updates) there, got {got}"):
            create_schedule(short, optimizer, updates=2)


@pytest.mark.slow
def test_a_finished_run_can_be_extended(tmp_path, capsys):
    """Four more epochs, with the rates that the longer recipe has from there on; what was done before stays."""
    keys = dict(FEW, sched="cosine", model_ema=True)
    four = train(digits(tmp_path, **keys, epochs=4), "run")
    start = [asdict(epoch) for epoch in four.history]
    (four.folder / "analysis").mkdir()
    (four.folder / "analysis" / "analysis.json").touch()
    capsys.readouterr()
    eight = train(digits(tmp_path, **keys, epochs=8, resume="auto"), "run")
    printed = capsys.readouterr().out
    assert f"{four.folder}: from 4 to 8 epochs; epoch 5 and later follow the schedule of 8\n" in printed
    whole = train(digits(tmp_path, **keys, epochs=8), "whole")
    assert [asdict(epoch) for epoch in eight.history[:4]] == start
    assert [epoch.lr for epoch in eight.history[4:]] == [epoch.lr for epoch in whole.history[4:]]
    assert read_record(eight.folder) == eight.record
    assert (eight.record.epochs, eight.record.result.epoch) == (8, 8)
    assert eight.record.result.heads != four.record.result.heads
    assert (four.record.extended_from, eight.record.extended_from, whole.record.extended_from) == ([], [4], [])
    assert "\nTrained for 4 epochs, then extended to 8.\n" in printed
    assert not (four.folder / "analysis" / "analysis.json").exists(), "it was of the weights before"
    assert load_recipe(eight.folder / "recipe.yaml").epochs == 8
    with pytest.raises(CheckpointError, match="has begun 8 epochs, more than the 4 asked for: expected at least 8, or"):
        train(digits(tmp_path, **keys, epochs=4, resume="auto"), "run")
    with pytest.raises(CheckpointError, match="another recipe: lr"):
        train(digits(tmp_path, **keys, epochs=9, resume="auto", lr=0.5), "run")
    assert read_record(eight.folder) == eight.record


def test_a_run_is_extended_only_to_epochs_that_are_asked_for(finished_run, tmp_path, capsys):
    """After a start with --epochs, the same command without them has the packaged recipe's."""
    shutil.copytree(finished_run, tmp_path / "run")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    flags = ["--device", "cpu", "--workers", "0", "--output", str(tmp_path), "--experiment", "run", "--resume", "auto"]
    epochs = load_recipe(DIGITS).epochs
    assert main(["train", "mbib_resnet20.digits", *flags]) == 2
    said = f"holds a run of 3 epochs, and the recipe has {epochs}: give --epochs {epochs} to train on, or --epochs 3 to"
    assert said in capsys.readouterr().err
    keys = dict(device="cpu", workers=0, output=tmp_path, experiment="run", resume="auto")
    with pytest.raises(CheckpointError, match=said):
        mbib_timm.train("mbib_resnet20.digits", **keys)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_epochs_are_asked_for_by_a_key_or_in_a_file_of_ones_own(tmp_path):
    assert not asks_for_epochs(DIGITS, {"lr": 0.1, "warmup_epochs": 2})
    for address in ("epochs", "stage2.epochs", "stages"):
        assert asks_for_epochs(DIGITS, {address: 4})
    assert asks_for_epochs(tmp_path / "own.yaml", {})


@pytest.mark.slow
def test_an_extension_that_is_interrupted_resumes_bit_identically(tmp_path):
    keys = dict(FEW, epochs=6, resume="auto")
    for name in ("whole", "broken"):
        train(digits(tmp_path, **FEW, epochs=2), name)
    whole = train(digits(tmp_path, **keys), "whole")
    for epoch in (2, 4):  # before the first checkpoint of the extension, and later
        crash(digits(tmp_path, **keys), "broken", epoch)
        left = {file.name for file in (tmp_path / "broken").iterdir()}
        assert not left & {"metrics.json", "predictions.csv", "confusion.csv", "classes.csv"}, "results of before"
    again = train(digits(tmp_path, **keys), "broken")
    assert not differing(whole.folder, again.folder)
    assert whole.record.extended_from == again.record.extended_from == [2]


@pytest.mark.parametrize(
    ("epoch", "ends", "epochs", "then"),
    [
        (0, [2], 4, [4]),  # nothing has followed the other schedule
        (1, [2], 2, [2]),
        (2, [2], 4, [2, 4]),
        (1, [2], 4, [1, 4]),
        (3, [2, 4], 4, [2, 4]),
        (3, [2, 4], 8, [2, 3, 8]),
        (4, [8], 4, [4, 4]),
    ],
)
def test_a_run_knows_after_which_epochs_it_was_extended(epoch, ends, epochs, then):
    assert TrainState(epoch, ends=ends).ends_with(epochs) == then


@pytest.mark.slow
def test_a_resumed_run_keeps_the_loader_that_it_chose(finished, monkeypatch):
    folder, _ = finished
    monkeypatch.setattr("mbib_timm.data.create.fits", lambda needed, device: False)
    assert train(digits(folder.parent, resume="auto"), "whole").record.loader == "resident"
    with pytest.raises(CheckpointError, match=r"another recipe: loader \('resident' there, 'timm' asked for\)"):
        train(digits(folder.parent, resume="auto", loader="timm"), "whole")


@pytest.mark.slow
def test_a_second_process_is_kept_out_of_a_folder(finished, popen):
    folder, record = finished
    command = [sys.executable, "-c", "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); "
               "print('held', flush=True); sys.stdin.read()", str(folder / ".lock")]  # fmt: skip
    other = popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(MbibError, match="another process is training in"):
        train(digits(folder.parent, resume="auto"), "whole")
    other.kill()
    other.wait()
    assert train(digits(folder.parent, resume="auto"), "whole").record.result == record.result


def test_a_run_that_another_process_has_trained_meanwhile_is_not_trained_again(tmp_path):
    recipe = digits(tmp_path, resume="auto")
    looked_at, other = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    other.begin(recipe, {})
    save_checkpoint(other.path, {})
    other.end()
    with pytest.raises(BusyFolderError, match="another process has trained in"):
        looked_at.begin(recipe, {})
    again = RunFolder(tmp_path / "run")  # and leaves the lock free
    again.begin(recipe, {})
    again.end()


# The folder


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "../b", "a/../..", "/tmp/x", "a\0b", "x" * 256, "é" * 128, "\ud800", "/"]
)
def test_a_run_stays_in_the_folder_of_all(tmp_path, name):
    with pytest.raises(MbibError, match="recipe key 'experiment': expected the name of a folder"):
        place_of(str(tmp_path), name)
    with pytest.raises(MbibError, match="recipe key 'experiment'"):
        train(digits(tmp_path / "runs", experiment=name), "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["x" * 255, "...", "..a", "a b", "-x", "日本", "$(x)"])
def test_any_name_of_a_folder_will_do(tmp_path, name):
    assert place_of(str(tmp_path), name).parent == tmp_path


def test_an_output_that_is_no_folders_name_is_an_error(tmp_path):
    with pytest.raises(MbibError, match=r"recipe key 'output': '.*' is not the name of a folder"):
        place_of(f"{tmp_path}/a\0b", "run")


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b'"text"', b"null", b'{"torch": 3}', None])
@pytest.mark.parametrize("name", ["environment.json", "recipe.yaml"])
def test_a_run_folder_of_garbage_is_an_error_in_one_sentence(finished, tmp_path, capsys, name, content):
    shutil.copytree(finished[0], tmp_path / "whole")
    file = tmp_path / "whole" / name
    file.unlink()
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    flags = ["--epochs", "3", "--warmup-epochs", "1", "--device", "cpu", "--workers", "0", "--output", str(tmp_path)]
    status = main(["train", *flags, "--experiment", "whole", "--resume", "auto"])
    out, err = capsys.readouterr()
    assert status == 2
    assert re.fullmatch(
        rf"mbib: error: .*(whole/{name}|recipe key|{name}: unknown key|another recipe|no recipe\.yaml).*\n", err
    )
    assert "epoch" not in out


@pytest.mark.slow
def test_a_run_that_goes_on_under_other_conditions_says_which(finished, tmp_path, capsys):
    shutil.copytree(finished[0], tmp_path / "whole")
    file = tmp_path / "whole" / "environment.json"
    there = json.loads(file.read_text())
    train(digits(tmp_path, resume="auto"), "whole")
    assert "other conditions" not in capsys.readouterr().out
    file.write_text(json.dumps({**there, "device": "cuda", "threads": 64, "numpy": None}))
    train(digits(tmp_path, resume="auto"), "whole")
    assert (
        "continues under other conditions, and may not give identical numbers: device ('cuda' there, 'cpu' here), "
        "threads (64 there, 1 here); precision stays as it was (amp: false)\n"
    ) in capsys.readouterr().out
    file.unlink()
    train(digits(tmp_path, resume="auto"), "whole")
    assert "has no environment.json" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match=r"another recipe: amp \(False there, True asked for\)"):
        train(digits(tmp_path, resume="auto", amp=True), "whole")


def test_another_number_of_processes_changes_the_batch_of_an_update(tmp_path):
    write_bytes(tmp_path / "environment.json", to_json(replace(ENVIRONMENT, processes=2)))
    said = RunFolder(tmp_path).changed_conditions(ENVIRONMENT, None)
    assert "processes (2 there, 1 here); an update takes the batches of 1 process, and before took those of 2" in said


def test_what_killed_processes_left_goes_with_the_next_start(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    dead = subprocess.Popen(["true"])
    dead.wait()
    kept = [f".a.{os.getppid()}.tmp", ".b.tmp", "c.tmp", ".d.1x.tmp"]
    gone = [f".last.ckpt.{dead.pid}.tmp", f".a.b.{os.getpid()}.tmp", f".e.{2**80}.tmp"]
    (folder / "figures").mkdir()
    for name in (*kept, *gone):
        (folder / name).touch()
        (folder / "figures" / name).touch()
    run = RunFolder(folder)
    run.begin(digits(tmp_path), {})
    run.end()
    assert {file.name for file in folder.iterdir()} == {*kept, "figures", "recipe.yaml", "environment.json", ".lock"}
    assert {file.name for file in (folder / "figures").iterdir()} == {*kept}


def test_a_run_that_ends_as_it_begins_to_train_on_has_no_result_of_another_recipe(tmp_path, monkeypatch):
    run, killed = RunFolder(tmp_path / "run"), []
    run.begin(digits(tmp_path), {})

    def kill(path, content):
        killed.append((path.name, (run.path / "metrics.json").exists()))
        raise KeyboardInterrupt

    monkeypatch.setattr("mbib_timm.training.run_folder.write_bytes", kill)
    for trains in (False, True):
        (run.path / "metrics.json").touch()
        with pytest.raises(KeyboardInterrupt):
            run.begin(digits(tmp_path, epochs=4), {}, trains)
    assert killed == [("recipe.yaml", True), ("recipe.yaml", False)]
    run.end()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys):
    with pytest.raises(NonFiniteLossError, match=r"loss part '\w+' became (nan|inf|-inf) at epoch 1, step \d+"):
        train(digits(tmp_path, lr=1e12, warmup_epochs=0), "diverged")
    assert (tmp_path / "diverged" / "last.ckpt").exists()
    assert not (tmp_path / "diverged" / "metrics.json").exists()


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    """Those of an epoch's last update, whose loss was finite; what is there before is there after."""
    forward, calls = METHODS["mbib"].forward, []

    def spoilt(self, *batches):
        calls.append(len(batches))
        parts = forward(self, *batches)
        if len(calls) == 4:
            parts["loss"] = parts["loss"] + next(self.trainable_module.parameters()).sum().mul(0).square().sqrt()
        return parts

    monkeypatch.setattr(METHODS["mbib"], "forward", spoilt)
    with pytest.raises(
        NonFiniteLossError, match=r"weights became infinite or nan in epoch 2: \S.*last good checkpoint"
    ):
        train(digits(tmp_path, batch_size=128, imbalance_max=48, val_interval=3), "run")
    state = load_checkpoint(tmp_path / "run" / "last.ckpt")
    assert len(calls) == 4
    assert TrainState.of(state).epoch == 1
    assert all(value.isfinite().all() for value in state["state_dict"].values())


def test_the_time_beside_the_epochs_is_recorded_of_every_process(tmp_path, monkeypatch):
    create, original_epoch, pause = run_module.create_loaders, run_module.train_one_epoch, 0.4

    def slow(*args, **kwargs):
        time.sleep(pause)
        return create(*args, **kwargs)

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    recipe = digits(tmp_path, model="cifar_resnet20", method="ce", epochs=1, warmup_epochs=0, imbalance_max=24)
    monkeypatch.setattr(run_module, "create_loaders", slow)
    monkeypatch.setattr(run_module, "train_one_epoch", killed)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, "run")
    monkeypatch.setattr(run_module, "train_one_epoch", original_epoch)
    run = train(recipe.replace(resume="auto"), "run")
    assert run.record.other_seconds > 2 * pause, "of the process that was killed, too"
    (row,) = csv.DictReader((run.folder / "summary.csv").open())
    assert run.record.training_seconds == float(row["seconds"])


def test_methods_that_differ_are_named(tmp_path):
    recipe = digits(tmp_path, method="ce")
    (tmp_path / "recipe.yaml").write_bytes(dump_recipe(recipe))
    with pytest.raises(CheckpointError, match=r"another recipe: method \(ce there, bsce asked for\)"):
        RunFolder(tmp_path).agree(recipe.replace(method={"name": "bsce"}))


def test_control_c_says_how_to_resume(tmp_path, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "train_one_epoch", interrupt)
    status = main(["train", "--epochs", "3", "--warmup-epochs", "1", "--output", str(tmp_path), "--device", "cpu"])
    assert status == 130
    assert "Continue from the last checkpoint, if there is one, with: mbib train --epochs 3" in capsys.readouterr().err
    assert (tmp_path / "mbib_resnet20.digits" / "last.ckpt").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        dict(method={"name": "all_mbib", "sequential_weights": "observation"}),
        dict(method="ldam_drw"),
        dict(method="ce", model="cifar_resnet20", sampler="progressive"),
        dict(method="ce", model="cifar_resnet20", sampler="class_aware:4", loader="timm"),
        dict(method="toy", model="cifar_resnet20", plugin=[TOY], model_ema=True, clip_grad=1.0),
        dict(grad_accum_steps=3, clip_grad=1.0),
        dict(clip_grad=0.1, clip_mode="agc", layer_decay=0.8),
        dict(amp=True, model_ema=True, model_ema_decay=0.9),
        dict(method="ce", model="cifar_resnet20", amp=True, amp_dtype="float16", clip_grad=1.0),
        dict(opt="adamw", lr=1e-3, filter_bias_and_bn=True, sched="multistep", decay_milestones=[1]),
        dict(model="mbib", model_kwargs={"backbone": "convnext_atto", "taps": [1, 2, 3]}, img_size=32, lr=0.01),
    ],
    ids=lambda overrides: "-".join(map(str, overrides.values()))[:40],
)
def test_every_way_to_train_runs_and_learns_something(tmp_path, overrides):
    """Every method's first losses are above, or with its run in tests/test_methods.py."""
    run = train(digits(tmp_path, epochs=2, val_interval=2, **FEW, **overrides), "run")
    assert all(math.isfinite(head.nll) for head in run.heads.values())
    assert run.heads["prediction"].top1 > 0
    first, last = run.history
    assert last.losses["loss"] < first.losses["loss"]


def test_gradient_accumulation_equals_the_larger_batch():
    """Two halves of a batch, accumulated, give the gradient of the whole for a loss that is a plain mean."""
    torch.manual_seed(0)
    images, targets = torch.randn(8, 5), torch.randint(0, 3, (8,))
    results = []
    for pieces in (1, 2):
        torch.manual_seed(1)
        model = torch.nn.Linear(5, 3)
        method = METHODS["ce"](model, None, Facts(np.ones(3), 1), torch.device("cpu"))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for i, (x, y) in enumerate(zip(images.chunk(pieces), targets.chunk(pieces), strict=True)):
            batch = Batch((x,), y, torch.arange(len(y)))
            training_step(method, optimizer, Precision(None, None), (batch,), pieces, i + 1 == pieces)
        results.append(model.weight.detach().clone())
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.slow
def test_validate_reproduces_the_result_to_the_last_digit(finished, tmp_path, capsys):
    folder, record = finished
    assert main(["validate", str(folder), "--device", "cpu", "--results", str(tmp_path / "results.json")]) == 0
    heads = json.loads((tmp_path / "results.json").read_text())["heads"]
    assert heads == json.loads(to_json(record.result))["heads"]
    assert "prediction" in capsys.readouterr().out


@pytest.mark.slow
def test_tensorboard_on_request(tmp_path):
    pytest.importorskip("tensorboard")
    folder = train(digits(tmp_path, **FEW, epochs=2, log_tensorboard=True), "run").folder
    assert list((folder / "tensorboard").glob("events.*"))


@pytest.mark.slow
def test_weights_and_biases_on_request(tmp_path, monkeypatch):
    """Against a stand-in for the package: what is logged, under which name."""
    rows, started = [], {}

    class Run:
        def log(self, row, step):
            rows.append((step, row))

        def finish(self):
            started["finished"] = True

    module = types.ModuleType("wandb")
    module.init = lambda **kwargs: started.update(kwargs) or Run()
    monkeypatch.setitem(sys.modules, "wandb", module)
    train(digits(tmp_path, **FEW, epochs=2, log_wandb=True), "run")
    assert started["name"] == "run"
    assert started["config"]["model"] == "mbib_resnet20"
    assert started["finished"]
    assert [step for step, _ in rows] == [1, 2]
    assert all("val_top1" in row and "train_loss" in row for _, row in rows)


def test_no_tracker_begins_where_another_process_trains(tmp_path, monkeypatch):
    module = types.ModuleType("wandb")
    module.init = lambda **kwargs: pytest.fail("begun")
    monkeypatch.setitem(sys.modules, "wandb", module)
    busy = RunFolder(tmp_path / "run")
    busy.occupy()
    with pytest.raises(BusyFolderError, match="another process is training in"):
        train(digits(tmp_path, **FEW, epochs=2, log_wandb=True), "run")
    busy.end()


def test_who_finds_another_process_training_is_not_told_to_remove_its_folder(tmp_path, capsys):
    busy = RunFolder(tmp_path / "run")
    busy.begin(digits(tmp_path), {})
    with pytest.raises(BusyFolderError, match=r"another process is training in .*run; wait for it, or choose another"):
        train(digits(tmp_path), "run")
    with pytest.raises(BusyFolderError, match="another process is training in"):
        train(digits(tmp_path, resume="auto"), "run")
    assert "nothing to resume" not in capsys.readouterr().out, "it has no checkpoint yet"
    (busy.path / "last.ckpt").touch()
    with pytest.raises(BusyFolderError, match="another process is training in"):
        train(digits(tmp_path, resume="auto"), "run")
    assert "resumed" not in capsys.readouterr().out
    with pytest.raises(BusyFolderError, match="another process is training in"):
        RunFolder(busy.path).agree(digits(tmp_path, lr=0.7))
    busy.end()
    with pytest.raises(CheckpointError, match=r"lr .*, or remove the folder"):
        RunFolder(busy.path).agree(digits(tmp_path, lr=0.7))
    with pytest.raises(MbibError, match="already holds a run"):
        train(digits(tmp_path), "run")


def test_a_run_that_goes_on_keeps_others_out_while_it_opens_its_data(tmp_path, monkeypatch):
    recipe = digits(tmp_path, model="cifar_resnet20", method="ce", epochs=1, warmup_epochs=0, **FEW)
    refused = []

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    def decode(*args, **kwargs):
        with pytest.raises(BusyFolderError, match="another process is training in"):
            train(recipe, "run")
        refused.append(1)
        raise MbibError("the data are gone")

    monkeypatch.setattr(run_module, "train_one_epoch", killed)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, "run")
    monkeypatch.setattr(run_module, "create_loaders", decode)
    with pytest.raises(MbibError, match="the data are gone"):
        train(recipe.replace(resume="auto"), "run")
    assert refused
    left = RunFolder(tmp_path / "run")
    left.occupy()  # the lock is free
    left.end()


def test_who_only_looks_whether_a_folder_is_free_does_not_keep_its_process_out(tmp_path):
    held = threading.Event()

    def look():
        looking = RunFolder(tmp_path)
        looking.occupy()
        held.set()
        time.sleep(0.1)
        looking.end()

    thread = threading.Thread(target=look)
    thread.start()
    assert held.wait(10)
    folder = RunFolder(tmp_path)
    folder.occupy()
    folder.end()
    thread.join()


def test_of_another_recipe_model_and_method_are_named_first(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.begin(digits(tmp_path), {})
    folder.end()
    other = digits(tmp_path, model="cifar_resnet20", lr=0.7, epochs=9, batch_size=7, momentum=0.1, weight_decay=0.3)
    other = other.replace(method={"name": "ce"})
    with pytest.raises(CheckpointError, match=r"another recipe: (model|method) .*, (model|method) .* and \d+ more;"):
        RunFolder(folder.path).agree(other)


@pytest.mark.slow
def test_trackio_on_request_goes_on_in_its_run(tmp_path, monkeypatch):
    """Against the package itself, read back from its database."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    folder = tmp_path / "runs"
    for epochs in (1, 3):

        def work(epochs=epochs):
            import trackio

            place = dict(experiment="mine", resume="auto", output=str(folder))
            mbib_timm.train("mbib_resnet20.digits", **FEW, epochs=epochs, log_trackio=True, **place)
            runs = list(trackio.Api().runs("mbib_timm"))
            assert [run.name for run in runs] == ["mine"], runs

        done = forked.run(work)
        assert done.returncode == 0, done.stderr
    [database] = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select step, metrics from metrics order by step").fetchall()
    assert [step for step, _ in rows] == [1, 2, 3]
    kept = list(csv.DictReader((folder / "mine" / "summary.csv").open()))
    logged = [json.loads(metrics) for _, metrics in rows]
    assert [each["train_loss"] for each in logged] == [float(row["train_loss"]) for row in kept]


@pytest.mark.parametrize("key", ["log_wandb", "log_tensorboard", "log_trackio"])
def test_a_tracker_that_is_not_installed_is_named_before_anything_is_written(tmp_path, monkeypatch, key):
    for module in ("wandb", "torch.utils.tensorboard", "trackio"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MbibError, match=f"{key} needs .*pip install"):
        train(digits(tmp_path, **{key: True}), "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_validate_an_exported_folder_with_a_recipe(finished, tmp_path):
    folder, record = finished
    exported = tmp_path / "exported"
    exported.mkdir()
    for name in ("config.json", "model.safetensors"):
        (exported / name).write_bytes((folder / name).read_bytes())
    arguments = ["--recipe", "mbib_resnet20.digits", "--device", "cpu"]
    assert main(["validate", f"local-dir:{exported}", *arguments, "--results", str(tmp_path / "results.json")]) == 0
    assert json.loads((tmp_path / "results.json").read_text())["heads"] == json.loads(to_json(record.result))["heads"]


@pytest.mark.slow
def test_fine_tuning_starts_from_a_run_of_other_classes(finished, tmp_path):
    """Heads are replaced, the rest is kept; the images are in class folders without splits, three in some."""
    folder, _ = finished
    images = tmp_path / "images"
    rng = np.random.RandomState(0)
    for label, count in {"ant": 9, "bee": 3, "cat": 3}.items():
        (images / label).mkdir(parents=True)
        for i in range(count):
            pixels = rng.randint(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(images / label / f"{i}.png")
    keys = dict(dataset="folder", data_dir=str(images), imbalance="none", batch_size=4, val_split="validation")
    recipe = digits(tmp_path, **keys, initial_checkpoint=str(folder), lr=1e-12, epochs=2, warmup_epochs=0)
    run = train(recipe, "tuned")
    tuned, before = weights(run.folder), weights(folder)
    assert run.record.class_counts == [7, 2, 2]
    assert tuned["bottleneck.classifier.weight"].shape[0] == 3
    torch.testing.assert_close(tuned["bottleneck.fc.weight"], before["bottleneck.fc.weight"])
    torch.testing.assert_close(tuned["backbone.conv1.weight"], before["backbone.conv1.weight"])
    assert json.loads((run.folder / "config.json").read_text())["label_names"] == ["ant", "bee", "cat"]
