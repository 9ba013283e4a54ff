"""Runs of several stages on the digits: what each starts from, what it leaves alone, and how it resumes."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from time import sleep

import faults
import numpy as np
import pytest
import torch
import yaml
from crashes import crash, differing, epochs_of, weights
from made_up_results import ENVIRONMENT, made_up_record
from safetensors.torch import load_file

from mbib_timm.data import DataPool
from mbib_timm.environment import World
from mbib_timm.errors import BusyFolderError, CheckpointError, MbibError
from mbib_timm.files import to_json
from mbib_timm.methods import METHODS, part_of
from mbib_timm.recipe import Recipe, dump_recipe, load_recipe
from mbib_timm.results.record import Inputs, read_record, write_record
from mbib_timm.training import run as run_module
from mbib_timm.training import train
from mbib_timm.training.checkpoint import load_checkpoint, save_checkpoint
from mbib_timm.training.run import TrainState
from mbib_timm.training.run_folder import RunFolder
from mbib_timm.training.stages import _described, _find_folder, _finished

TOY = str(Path(__file__).parent / "toy_method.py")
KEPT = Path(__file__).parents[1] / "results" / "mbib_resnet32.cifar100_lt_if100-200e-seed0"
# 48 to 2 images of each class, in five steps an epoch.
SHORT = dict(
    base="digits", model="cifar_resnet20", imbalance_max=48, epochs=3, warmup_epochs=1, device="cpu", workers=0,
    checkpoint_seconds=0, val_interval=3,
)  # fmt: skip
CE_CRT = [{"method": "ce"}, {"method": "crt"}]
CE_TAU = [{"method": "ce"}, {"method": "tau_norm", "epochs": 0}]
CLASSIFIER = {"fc.weight", "fc.bias"}


def write(folder, stages, **keys):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump({**SHORT, "stages": stages, **keys}))
    return path


def recipe_of(tmp_path, stages=CE_CRT, **keys):
    return load_recipe(write(tmp_path / "recipes", stages, **keys), {"output": str(tmp_path / "runs")})


def buffers(names):
    return {name for name in names if "running_" in name or name.endswith("num_batches_tracked")}


def trained_epochs(monkeypatch):
    """Return a list that will name the method, stage and number of every epoch that is trained."""
    epochs, original = [], run_module.train_one_epoch

    def recorded(method, loader, step, recipe, log, *args, **kwargs):
        epochs.append((method.name, recipe.stage, log.epoch))
        return original(method, loader, step, recipe, log, *args, **kwargs)

    monkeypatch.setattr(run_module, "train_one_epoch", recorded)
    return epochs


class Started:
    """What a stage starts from, seen before its first step."""

    def __init__(self, monkeypatch):
        self.stages, original = [], run_module.create_step

        def create_step(recipe, method, optimizer, *args):
            state = {key: value.clone() for key, value in method.get_eval_model().state_dict().items()}
            self.stages.append((recipe, method, optimizer, state))
            return original(recipe, method, optimizer, *args)

        monkeypatch.setattr(run_module, "create_step", create_step)


@pytest.fixture(scope="module")
def crt(tmp_path_factory):
    """A whole run of cross-entropy and cRT: the folder above its runs, and the run."""
    path = tmp_path_factory.mktemp("crt")
    return path, train(recipe_of(path), "whole")


# What a run of two stages leaves


@pytest.mark.parametrize(("epochs", "text"), [(1, "ce, 1 epoch"), (2, "ce, 2 epochs")])
def test_a_stage_is_announced_with_its_epochs(epochs, text):
    assert _described(Recipe(method="ce", model="cifar_resnet20", epochs=epochs, warmup_epochs=0)) == text


@pytest.mark.slow
def test_of_two_processes_the_second_waits_for_the_weights_that_the_first_writes(tmp_path, monkeypatch):
    original = RunFolder.write_model

    def slowly(*args, **kwargs):
        sleep(1 if os.environ["RANK"] == "0" else 0)
        original(*args, **kwargs)

    monkeypatch.setattr(RunFolder, "write_model", slowly)
    keys = dict(imbalance_max=24, epochs=1, warmup_epochs=0, val_interval=1)
    argv = ["train", str(write(tmp_path, CE_CRT, **keys)), "--experiment", "run", "--output", str(tmp_path)]
    assert faults.run(argv, tmp_path / "log", ranks=2) == [0, 0], (tmp_path / "log").read_text()


@pytest.mark.slow
def test_the_last_stages_result_is_the_result_and_each_stage_is_a_run(crt):
    path, whole = crt
    folder = path / "runs" / "whole"
    assert whole.folder == folder
    assert whole.record.method == "crt"
    assert whole.record.stages == ["ce", "crt"]
    for run in (folder, folder / "stage1-ce"):
        for name in ("recipe.yaml", "metrics.json", "config.json", "model.safetensors", "last.ckpt", "summary.csv"):
            assert (run / name).is_file()
        assert len(epochs_of(run)) == 3
    first = json.loads((folder / "stage1-ce" / "metrics.json").read_text())
    assert (first["method"], first["stages"]) == ("ce", ["ce"])
    written = load_recipe(folder / "recipe.yaml")
    assert [stage.method["name"] for stage in written.chain()] == ["ce", "crt"]
    assert load_recipe(folder / "stage1-ce" / "recipe.yaml").previous is None
    priors = [json.loads((run / "config.json").read_text())["logit_prior"] for run in (folder / "stage1-ce", folder)]
    assert priors == ["train", "uniform"]


# What is frozen, trained, and started anew


@pytest.mark.slow
def test_crt_leaves_everything_below_the_classifier_but_running_statistics(crt):
    folder = crt[0] / "runs" / "whole"
    changed = differing(folder / "stage1-ce", folder)
    assert changed - buffers(changed) == CLASSIFIER
    assert buffers(changed) == buffers(weights(folder))  # frozen_bn: train


@pytest.mark.slow
def test_a_stage_starts_from_the_weights_before_but_for_what_starts_anew(tmp_path, monkeypatch):
    started = Started(monkeypatch)
    folder = train(recipe_of(tmp_path), "run").folder
    (_, _, _, first), (recipe, method, optimizer, second) = started.stages
    before, after = weights(folder / "stage1-ce"), weights(folder)
    assert recipe.stage == 1
    assert {name for name in before if not torch.equal(before[name], second[name])} == CLASSIFIER
    assert all(not torch.equal(second[name], after[name]) for name in CLASSIFIER)
    assert not torch.equal(first["fc.weight"], second["fc.weight"])  # not the first stage's own start
    # The optimizer holds exactly what trains.
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    network = method.get_eval_model()
    assert held == {id(p) for name, p in network.named_parameters() if name in CLASSIFIER}
    assert {name for name, p in network.named_parameters() if p.requires_grad} == CLASSIFIER
    assert all(p.grad is None for name, p in network.named_parameters() if name not in CLASSIFIER)


@pytest.mark.slow
def test_what_starts_anew_depends_on_the_seed_only(tmp_path, monkeypatch):
    started = Started(monkeypatch)
    for name, keys in {"a": {"lr": 0.05}, "b": {"lr": 0.01}, "c": {"lr": 0.05, "seed": 1}}.items():
        train(recipe_of(tmp_path, [{"method": "ce", "epochs": 2}, {"method": "crt", "epochs": 2}], **keys), name)
    a, b, c = [state for recipe, _, _, state in started.stages if recipe.stage == 1]
    assert torch.equal(a["fc.weight"], b["fc.weight"])
    assert not torch.equal(a["conv1.weight"], b["conv1.weight"])
    assert not torch.equal(a["fc.weight"], c["fc.weight"])


@pytest.mark.slow
def test_any_part_may_start_anew_and_any_part_may_train(tmp_path, monkeypatch):
    started = Started(monkeypatch)
    second = {"method": "bsce", "reset": r"^layer3\.", "train": r"^layer3\.|^fc\.bias", "frozen_bn": "eval"}
    folder = train(recipe_of(tmp_path, [{"method": "ce"}, second]), "run").folder
    before, after, start = weights(folder / "stage1-ce"), weights(folder), started.stages[1][3]
    anew = {name for name in before if not torch.equal(before[name], start[name])}
    layer3 = {name for name in before if name.startswith("layer3.")}
    # Scales and shifts start as they did before; those that training has moved are back.
    assert anew <= layer3
    assert {name for name in layer3 if name.endswith("conv1.weight")} <= anew
    changed = {name for name in after if not torch.equal(start[name], after[name])}
    assert changed == layer3 | {"fc.bias"}


@pytest.mark.slow
def test_without_epochs_and_without_anything_anew_a_stage_predicts_as_the_one_before(tmp_path):
    run = train(recipe_of(tmp_path, [{"method": "ce"}, {"method": "bsce", "epochs": 0}]), "run")
    folder = run.folder
    assert not differing(folder / "stage1-ce", folder)
    first = json.loads((folder / "stage1-ce" / "metrics.json").read_text())
    assert json.loads(to_json(run.record.result))["heads"] == first["result"]["heads"]
    assert run.record.epochs == 0


@pytest.mark.slow
def test_a_stage_has_a_schedule_and_a_sampler_of_its_own(tmp_path, monkeypatch):
    seen, original = [], run_module.train_one_epoch

    def recorded(method, loader, step, recipe, *args, **kwargs):
        targets = torch.cat([batch.targets for (batch,) in loader])
        index = torch.cat([batch.index for (batch,) in loader])
        seen.append((recipe.stage, torch.bincount(targets, minlength=10).tolist(), index.tolist()))
        return original(method, loader, step, recipe, *args, **kwargs)

    monkeypatch.setattr(run_module, "train_one_epoch", recorded)
    stages = [{"method": "ce"}, {"method": "crt", "epochs": 2, "lr": 0.2, "sched": "constant", "warmup_epochs": 0}]
    run = train(recipe_of(tmp_path, stages), "run")
    counts = run.record.class_counts
    for stage, drawn, index in seen:
        assert len(index) == sum(counts)
        if stage == 0:
            assert drawn == counts  # every image once
            assert sorted(index) == list(range(sum(counts)))
        else:  # N draws hit every class within 5 sigma of N/K
            n, k = sum(counts), len(counts)
            assert np.abs(np.array(drawn) - n / k).max() < 5 * np.sqrt(n / k * (1 - 1 / k))
    assert seen[0][2] != seen[1][2]
    rates = [float(row["lr"]) for row in epochs_of(run.folder)]
    assert rates == pytest.approx([0.2, 0.2])
    assert len(epochs_of(run.folder / "stage1-ce")) == 3


# Resumed


def with_stages(folder):
    return [Path(folder), *sorted(Path(folder).glob("stage*-*"))]


def same_runs(first, second):
    for one, other in zip(with_stages(first), with_stages(second), strict=True):
        assert not differing(one, other)
        assert epochs_of(one) == epochs_of(other)
        results = [json.loads((folder / "metrics.json").read_text()) for folder in (one, other)]
        for key in ("result", "best", "chosen", "class_counts"):
            assert results[0][key] == results[1][key]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "epoch", "after"), [(0, 0, True), (1, 0, False), (1, 1, True)])
def test_a_run_that_was_interrupted_in_any_stage_gives_the_same_weights(
    crt, tmp_path, monkeypatch, stage, epoch, after
):
    recipe = recipe_of(tmp_path)
    crash(recipe, "whole", epoch, stage=stage, after=after)
    assert not (tmp_path / "runs" / "whole" / "metrics.json").exists()
    if (stage, epoch) != (0, 0):  # nothing is lost where nothing was kept
        with pytest.raises(MbibError, match=r"already holds a run.*--resume auto"):
            train(recipe, "whole")
    epochs = trained_epochs(monkeypatch)
    resumed = train(recipe.everywhere(resume="auto"), "whole")
    done = epoch  # that epoch is lost, since its checkpoint was not yet written
    rest = [("ce", 0, e) for e in range(done, 3)] if stage == 0 else []
    assert epochs == rest + [("crt", 1, e) for e in range(done if stage == 1 else 0, 3)]
    same_runs(crt[0] / "runs" / "whole", resumed.folder)


def test_a_run_that_fails_before_its_first_update_is_not_in_the_way_of_the_next(tmp_path):
    """In its first stage, and by another recipe than before; one that was killed there is."""
    keys = dict(epochs=1, warmup_epochs=0, val_interval=1)
    crash(recipe_of(tmp_path, lr=9.0, **keys), "whole", 0)
    first = tmp_path / "runs" / "whole" / "stage1-ce"
    assert {file.name for file in first.iterdir()} <= {".lock"}
    save_checkpoint(first, {})
    with pytest.raises(MbibError, match="already holds a run"):
        train(recipe_of(tmp_path, lr=0.1, **keys), "whole")
    (first / "last.ckpt").unlink()
    recipe = recipe_of(tmp_path, lr=0.1, **keys)
    crash(recipe, "whole", 0, stage=1)
    assert load_recipe(first / "recipe.yaml").lr == 0.1
    assert not (first.parent / "recipe.yaml").exists()
    assert load_checkpoint(first / "previous.ckpt")["optimizer"]["param_groups"][0]["lr"] == 0.1
    with pytest.raises(
        MbibError, match=r"already holds a run: resume it with --resume auto, .*, or remove the folder$"
    ):
        train(recipe, "whole")  # whose first stage has trained
    with pytest.raises(
        CheckpointError, match=r"another recipe: lr .*choose another --experiment, or remove the folder$"
    ):
        train(recipe_of(tmp_path, lr=0.2, resume="auto", **keys), "whole")
    resumed = train(recipe.everywhere(resume="auto"), "whole")
    same_runs(resumed.folder, train(recipe_of(tmp_path / "other", lr=0.1, **keys), "whole").folder)


@pytest.mark.slow
def test_a_plugins_state_an_average_and_adam_resume_bit_identically_in_both_stages(tmp_path):
    stages = [{"method": {"name": "toy"}}, {"method": {"name": "toy", "strength": 2.0}, "sampler": "balanced"}]
    keys = dict(plugin=[TOY], model_ema=True, model_ema_decay=0.5, opt="adamw", lr=0.001, loader="timm")
    keys["model_kwargs"] = {"drop_rate": 0.1}
    whole = train(recipe_of(tmp_path / "whole", stages, **keys), "run")
    recipe = recipe_of(tmp_path / "broken", stages, **keys).everywhere(resume="auto")
    for stage in (0, 1):
        crash(recipe, "run", 1, stage=stage, after=True)
    resumed = train(recipe, "run")
    same_runs(whole.folder, resumed.folder)
    last = [torch.load(run.folder / "last.ckpt", weights_only=True) for run in (whole, resumed)]
    own = [state["task_state"]["method"] for state in last]
    assert own[0].keys() == {"offset", "updates", "scale"}
    assert own[0]["updates"].item() == 15  # of this stage; five steps in each of three epochs
    assert own[0]["scale"].item() != 1.0
    # What the start of the last epoch has written.
    torch.testing.assert_close(own[0]["offset"], 2.0 * torch.tensor(whole.record.class_counts).log())
    assert all(torch.equal(own[0][key], own[1][key]) for key in own[0])


@pytest.mark.slow
def test_a_finished_run_of_two_stages_resumes_to_the_same_result(crt, monkeypatch):
    path, run = crt
    epochs = trained_epochs(monkeypatch)
    assert train(recipe_of(path).everywhere(resume="auto"), "whole").record.result == run.record.result
    assert epochs == []
    other = recipe_of(path, [{"method": "ce"}, {"method": "crt", "lr": 0.3}])
    with pytest.raises(CheckpointError, match="holds a run of another recipe"):
        train(other.everywhere(resume="auto"), "whole")


# Shared


@pytest.mark.slow
def test_crt_and_tau_normalisation_share_one_run_of_cross_entropy(tmp_path, monkeypatch):
    epochs = trained_epochs(monkeypatch)
    first = train(recipe_of(tmp_path, CE_CRT), "crt")
    second = train(recipe_of(tmp_path, CE_TAU), "tau")
    assert [epoch for epoch in epochs if epoch[0] == "ce"] == [("ce", 0, e) for e in range(3)]
    assert not list((tmp_path / "runs" / "tau").glob("stage*"))
    start = weights(first.folder / "stage1-ce")
    end = weights(second.folder)
    assert {name for name in end if not torch.equal(start[name], end[name])} <= CLASSIFIER
    assert second.record.stages == ["ce", "tau_norm"]
    # Resumed, it finds the same run again.
    epochs.clear()
    again = train(recipe_of(tmp_path, CE_TAU).everywhere(resume="auto"), "tau")
    assert epochs == []
    assert again.record.result == second.record.result


@pytest.mark.slow
def test_a_run_of_one_stage_beside_is_taken_if_it_is_finished_and_computed_the_same(tmp_path, monkeypatch):
    epochs = trained_epochs(monkeypatch)
    ce = train(recipe_of(tmp_path, [{"method": "ce"}]), "ce")
    epochs.clear()
    train(recipe_of(tmp_path, CE_TAU), "taken")
    assert epochs == []
    train(recipe_of(tmp_path, CE_TAU, seed=1), "other_seed")
    assert [epoch[0] for epoch in epochs] == ["ce"] * 3
    epochs.clear()
    (ce.folder / "metrics.json").unlink()  # as if it had been killed
    train(recipe_of(tmp_path, CE_TAU), "not_taken")
    assert [epoch[0] for epoch in epochs] == ["ce"] * 3


@pytest.mark.slow
def test_a_later_stage_keeps_others_out_while_it_opens_its_data(tmp_path, monkeypatch):
    recipe, create = recipe_of(tmp_path, CE_TAU, epochs=1, warmup_epochs=0), run_module.create_loaders

    def decode(splits, stage, *args, **kwargs):
        if stage.stage == 0:
            return create(splits, stage, *args, **kwargs)
        with pytest.raises(BusyFolderError, match=r"another process is training in .*run; wait for it"):
            train(recipe, "run")
        raise MbibError("the data are gone")

    monkeypatch.setattr(run_module, "create_loaders", decode)
    with pytest.raises(MbibError, match="the data are gone"):
        train(recipe, "run")
    with pytest.raises(MbibError, match="already holds a run"):  # the lock is free
        train(recipe, "run")


def test_all_stages_of_a_run_are_in_its_folder_where_others_find_them(tmp_path, monkeypatch):
    epochs = trained_epochs(monkeypatch)
    ce, bsce = {"method": "ce", "epochs": 1, "warmup_epochs": 0}, {"method": "bsce", "epochs": 0}
    tau = {"method": {"name": "tau_norm", "tau": 1.0}, "epochs": 0}
    run = train(recipe_of(tmp_path, [ce, bsce, tau]), "three")
    assert {path.parent.relative_to(run.folder) for path in run.folder.rglob("metrics.json")} == {
        Path("."), Path("stage1-ce"), Path("stage2-bsce")
    }  # fmt: skip
    assert run.record.stages == ["ce", "bsce", "tau_norm"]
    assert len(epochs) == 1
    train(recipe_of(tmp_path, [ce, tau]), "two")
    assert len(epochs) == 1


@pytest.mark.parametrize(
    ("fields", "is_taken"),
    [
        ({}, True),
        ({"epochs": 2}, False),
        ({"extended_from": [2]}, False),
        ({"inputs": []}, False),
        ({"environment": replace(ENVIRONMENT, processes=2)}, False),
    ],
)
def test_a_finished_run_is_taken_for_a_stage_if_it_is_a_run_of_the_recipe(tmp_path, fields, is_taken):
    kept = read_record(KEPT)
    given = [Inputs("data")]
    record = made_up_record(kept.result.heads, kept.class_counts, **{"inputs": given, **fields})
    wanted, folder = recipe_of(tmp_path, CE_CRT).previous, tmp_path / "runs" / "before"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_bytes(dump_recipe(wanted))
    (folder / "model.safetensors").touch()
    write_record(folder, record)
    found = list(_finished(wanted, given, 1, tmp_path / "runs" / "run", tmp_path / "runs" / "run" / "stage1-ce"))
    assert found == [folder] * is_taken


def test_a_stage_does_not_go_on_in_a_run_that_was_extended(tmp_path):
    wanted = recipe_of(tmp_path).previous.everywhere(resume="auto")
    folder = tmp_path / "runs" / "before"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_bytes(dump_recipe(wanted))
    save_checkpoint(folder, {"progress": asdict(TrainState(3, ends=[2, 3]))})
    world = World(torch.device("cpu"))
    with pytest.raises(CheckpointError, match=r"before holds a run that was extended, .*; remove the folder"):
        _find_folder(wanted, "before", world, extend=False)
    assert _find_folder(wanted, "before", world, extend=True)[1].path == folder


# By hand


@pytest.mark.slow
def test_two_stages_equal_two_runs_by_hand(crt, tmp_path, monkeypatch):
    """But for what the stage's number decides: its random order is another one. Here the second run has number 1."""
    ce = train(recipe_of(tmp_path, [{"method": "ce"}]), "ce")
    by_hand = recipe_of(tmp_path, [{"method": "crt", "initial_checkpoint": str(ce.folder)}])
    monkeypatch.setattr(Recipe, "stage", property(lambda self: 1))
    crt_by_hand = train(by_hand, "crt")
    assert not differing(crt[1].folder, crt_by_hand.folder)
    assert epochs_of(crt[1].folder) == epochs_of(crt_by_hand.folder)


# tau-normalisation


class Forbidden:
    """A loader that may not be read yet."""

    def __init__(self, loader, state):
        self.loader, self.state = loader, state

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        assert self.state["chosen"], "read images of the split that is reported"
        self.state["reads"] += 1
        return iter(self.loader)

    def broken_images(self):
        return self.loader.broken_images()


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{}, {"holdout": 0.2, "imbalance": "none"}], ids=["left out", "holdout"])
def test_choosing_tau_reads_no_image_that_the_result_is_measured_on(tmp_path, monkeypatch, capsys, keys):
    state = {"chosen": True, "reads": 0}
    original_loaders, original_finish = run_module.create_loaders, METHODS["tau_norm"].finish

    def create_loaders(splits, recipe, *args, **kwargs):
        loaders = original_loaders(splits, recipe, *args, **kwargs)
        if recipe.method["name"] != "tau_norm":
            return loaders
        state["chosen"] = False
        for name in ("val", "test"):
            if getattr(loaders, name) is not None:
                object.__setattr__(loaders, name, Forbidden(getattr(loaders, name), state))
        return loaders

    def finish(self, data):
        seen = [batch.index for batch in data.held_out]
        original_finish(self, data)
        state["chosen"], state["held_out"] = True, torch.cat(seen)

    monkeypatch.setattr(run_module, "create_loaders", create_loaders)
    monkeypatch.setattr(METHODS["tau_norm"], "finish", finish)
    recipe = recipe_of(tmp_path, CE_TAU, **keys)
    run = train(recipe, "tau")
    assert capsys.readouterr().out.count("\nfor choosing a constant of the method: ") == 1
    assert state["reads"] > 0
    assert run.record.chosen.keys() == {"tau"}
    assert run.record.chosen["tau"] in [i / 10 for i in range(21)]
    splits = DataPool().open(recipe)
    assert len(state["held_out"]) == len(splits.held_out)
    rows = weights(run.folder)["fc.weight"].norm(dim=1)
    before = load_file(next(run.folder.glob("stage1-*")) / "model.safetensors")["fc.weight"].norm(dim=1)
    torch.testing.assert_close(rows, before ** (1 - run.record.chosen["tau"]))
    assert not weights(run.folder)["fc.bias"].any()


def indices(split):
    return range(len(split)) if split.indices is None else split.indices.tolist()


def test_held_out_images_are_neither_trained_nor_tested_on(tmp_path):
    """By their content: no held-out image is among those of training or of the test."""
    for keys in ({}, {"holdout": 0.2}):
        splits = DataPool().open(recipe_of(tmp_path, CE_TAU, **keys))
        content = {}
        for name in ("train", "val", "held_out"):
            split = getattr(splits, name)
            content[name] = {np.asarray(split.reader.read(i)).tobytes() for i in indices(split)}
        assert content["held_out"]
        assert not content["held_out"] & (content["train"] | content["val"])


@pytest.mark.slow
def test_tau_normalisation_of_mbib_and_crt_of_mbib(tmp_path):
    stages = [{"method": "mbib"}, {"method": "crt"}, {"method": {"name": "tau_norm", "tau": 1.0}, "epochs": 0}]
    run = train(recipe_of(tmp_path, stages, model="mbib_resnet20"), "run")
    folder = run.folder
    assert run.record.stages == ["mbib", "crt", "tau_norm"]
    second = next(folder.glob("stage2-*"))
    first = next(folder.glob("stage1-*"))
    changed = differing(first, second)
    import timm

    network = timm.create_model("mbib_resnet20", num_classes=10)
    assert changed - buffers(changed) == part_of(network, "classifier")
    assert differing(second, folder) == part_of(network, "classifier")


# What cannot be, said before the first stage begins


@pytest.mark.parametrize(
    ("stages", "keys", "message"),
    [
        ([{"method": "crt"}], {}, r"method 'crt' starts from a trained model, and this recipe gives none"),
        ([{"method": "ce", "epochs": 0, "warmup_epochs": 0}], {}, r"'epochs': 0 trains nothing, and there are no"),
        ([{"method": "ce"}, {"method": "tau_norm"}], {}, r"stage 2 of own\.yaml: .*'tau_norm' trains nothing"),
        ([{"method": "ce"}, {"method": "crtt"}], {}, r"stage 2 of own\.yaml: unknown method 'crtt': did you"),
        ([{"method": "ce"}, {"method": "crt", "train": "head"}], {}, r"'train': 'head' matches no parameter's name"),
        ([{"method": "ce"}, {"method": "bsce", "train": "classifier"}], {}, r"'frozen_bn': with train: classifier"),
        ([{"method": "ce"}, {"method": "mbib"}], {}, r"method 'mbib' needs a model with observations"),
        ([{"method": "ce"}, {"method": "crt", "opt": "sdg"}], {}, r"unknown optimizer 'sdg': did you mean 'sgd'"),
        ([{"method": "ce"}, {"method": "crt", "opt_kwargs": {"nope": 1}}], {}, r"'opt_kwargs'"),
        ([{"method": "ce"}, {"method": "crt", "model": "cifar_resnet32"}], {}, r"of stage 1 do not fit"),
        ([{"method": "ldam_drw"}, CE_TAU[1]], {}, r"of stage 1 do not fit this stage's model: fc\.bias"),
        ([{"method": "ce"}, {"method": "crt", "initial_checkpoint": "x"}], {}, r"stage 2 starts from the stage before"),
        ([{"method": "ce"}, {"method": "crt", "aa": "v0", "loader": "resident"}], {}, r"'aa'. works on single"),
        (CE_TAU, {"imbalance": "none", "imbalance_max": None}, r"every image is trained or tested on.*holdout: 0\.1"),
        ([{"method": "ce"}, {"method": "ce", "cuda_graph": True}], {}, r"'cuda_graph': a step cannot be captured with"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, list) else None,
)  # fmt: skip
def test_a_later_stage_that_cannot_be_stops_the_run_before_the_first(tmp_path, monkeypatch, stages, keys, message):
    epochs = trained_epochs(monkeypatch)
    with pytest.raises(MbibError, match=message) as caught:
        train(recipe_of(tmp_path, stages, **keys), "run")
    assert "\n" not in str(caught.value)
    assert epochs == []
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("stages", [[{"method": "ce"}], CE_CRT], ids=["one stage", "two"])
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model": "cifar_resnet3"}, "unknown model 'cifar_resnet3': did you mean 'cifar_resnet32'"),
        ({"model": "local-dir:nowhere"}, "nowhere"),
        ({"class_weights": "nothing.csv"}, r"cannot read the class weights nothing\.csv: No such file"),
    ],
)
def test_names_that_lead_nowhere_are_found_before_the_data_are_opened(tmp_path, monkeypatch, stages, keys, message):
    monkeypatch.setattr(DataPool, "open", lambda pool, recipe: pytest.fail("the data were opened"))
    with pytest.raises(MbibError, match=message):
        train(recipe_of(tmp_path, stages, **keys), "run")


def test_stages_that_keep_their_epochs_are_said(tmp_path):
    stages = [{"method": "ce"}, {"method": "crt", "epochs": 10}, {"method": "crt", "epochs": 5}]
    path, said = write(tmp_path, [*stages, {"method": "tau_norm", "epochs": 0}]), []
    load_recipe(path, {"epochs": 2, "stage3.epochs": 4}, said.append)
    assert said == ["stage 2 keeps its 10 epochs; --stage2.epochs N changes them"]
    load_recipe(path, {"stage1.epochs": 2}, said.append)
    load_recipe(path, {"lr": 0.1}, said.append)
    assert len(said) == 1


def test_a_changed_key_of_a_stage_alone_and_of_all(tmp_path):
    path = write(tmp_path, CE_CRT)
    both = load_recipe(path, {"lr": 0.3, "stage2.epochs": 7, "stage1.method.name": "bsce"})
    assert [stage.lr for stage in both.chain()] == [0.3, 0.3]
    assert [stage.epochs for stage in both.chain()] == [3, 7]
    assert [stage.method["name"] for stage in both.chain()] == ["bsce", "crt"]
    with pytest.raises(
        MbibError, match=r"every stage of own.yaml sets 'method' itself; say which: --stage1\.method VALUE or"
    ):
        load_recipe(path, {"method": "ce"})
    with pytest.raises(MbibError, match=r"stage3\.lr: own\.yaml has 2 stages"):
        load_recipe(path, {"stage3.lr": 0.1})
