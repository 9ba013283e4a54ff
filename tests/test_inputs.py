"""A run is the same as another only where its images, the weights that it starts from and its plugins are too."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from mbib_timm.analysis import analyze
from mbib_timm.analysis.analysis_record import read_analysis
from mbib_timm.cli import main
from mbib_timm.data import DataPool, open_data
from mbib_timm.data.sources import Source
from mbib_timm.errors import CheckpointError, MbibError
from mbib_timm.recipe import load_recipe
from mbib_timm.recipe.plugins import code_of
from mbib_timm.reporting.sections import Section, run_section
from mbib_timm.results.record import Inputs, read_record
from mbib_timm.results.runs import group_runs, read_run, read_seeds
from mbib_timm.sweeps.sweep_results import read_results
from mbib_timm.training import train
from mbib_timm.training.provenance import changed_inputs, continued, inputs_of
from mbib_timm.training.run_folder import RunFolder

PLUGIN = """
from torch.nn.functional import cross_entropy
from mbib_timm.methods import Method, register

@register("{name}")
class Own(Method):
    title = "Own"

    def head_loss(self, logits, targets):
        return {factor} * cross_entropy(logits, targets)  # {comment}
"""
TWO_STAGES = {"stages": [{"method": "ce"}, {"method": {"name": "tau_norm", "tau": 0.5}, "epochs": 0}]}


def images(root, seed=0, names="image", classes=("ant", "bee")):
    """Twelve images a class for training, and four for the evaluation."""
    rng = np.random.RandomState(seed)
    for split, number in (("train", 12), ("val", 4)):
        for label in classes:
            folder = root / split / label
            folder.mkdir(parents=True)
            for i in range(number):
                Image.fromarray(rng.randint(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{names}{i}.png")
    return root


def keys(tmp_path, data, **more):
    return {
        "model": "cifar_resnet20", "method": "ce", "dataset": "folder", "data_dir": str(data), "val_split": "val",
        "img_size": 16, "imbalance": "none", "epochs": 1, "batch_size": 8, "train_crop_mode": "pad", "device": "cpu",
        "workers": 0, "image_cache": "none", "output": str(tmp_path / "runs"), **more,
    }  # fmt: skip


def recipe_file(tmp_path, data, **more):
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(keys(tmp_path, data, **more)))
    return file


def recipe(tmp_path, data, **more):
    return load_recipe(recipe_file(tmp_path, data, **more))


def digest(tmp_path, data, **more):
    return open_data(recipe(tmp_path, data, **more)).digest


def test_the_digest_is_that_of_the_images_and_not_of_their_place(tmp_path, monkeypatch):
    first = images(tmp_path / "first")
    own = digest(tmp_path, first)
    shutil.copytree(first, tmp_path / "deep" / "down" / "moved")
    assert digest(tmp_path, tmp_path / "deep" / "down" / "moved") == own
    for folder, named in ((tmp_path, "first"), (tmp_path, "./first/"), (tmp_path / "deep", "../first"), (first, ".")):
        monkeypatch.chdir(folder)
        assert digest(tmp_path, named) == own, named
    others = {
        "names": images(tmp_path / "names", names="other"),
        "classes": images(tmp_path / "classes", classes=("ant", "cat")),
        "relabelled": shutil.copytree(first, tmp_path / "relabelled"),
        "fewer": shutil.copytree(first, tmp_path / "fewer"),
    }
    (others["relabelled"] / "train/ant/image3.png").rename(others["relabelled"] / "train/bee/image12.png")
    (others["fewer"] / "val/ant/image3.png").unlink()
    found = {name: digest(tmp_path, folder) for name, folder in others.items()}
    assert len({own, *found.values()}) == 5
    assert digest(tmp_path, first, imbalance="exp", imbalance_factor=2.0) != own


def test_a_stage_of_other_images_is_not_taken(tmp_path, capsys):
    """Of as many images of the same classes: their names alone say that they are others."""
    first, second = images(tmp_path / "first"), images(tmp_path / "second", seed=1, names="other")
    train(recipe(tmp_path, first, **TWO_STAGES), "first")
    capsys.readouterr()
    train(recipe(tmp_path, second, **TWO_STAGES), "second")
    assert "done, in" not in capsys.readouterr().out
    assert (tmp_path / "runs/second/stage1-ce/model.safetensors").is_file()
    shutil.copytree(first, tmp_path / "moved")
    train(recipe(tmp_path, tmp_path / "moved", **TWO_STAGES), "moved")
    assert f"done, in {tmp_path / 'runs/first/stage1-ce'}" in capsys.readouterr().out


def test_a_stage_of_other_weights_is_not_taken(tmp_path, capsys):
    data = images(tmp_path / "data")
    starts = [train(recipe(tmp_path, data, seed=seed), f"start{seed}").folder for seed in (0, 1)]
    for number, start in enumerate(starts):
        train(recipe(tmp_path, data, initial_checkpoint=str(start), **TWO_STAGES), f"from{number}")
    assert "done, in" not in capsys.readouterr().out
    given = [read_record(tmp_path / f"runs/from{number}").inputs[0] for number in (0, 1)]
    assert given[0].data == given[1].data
    assert given[0].start != given[1].start


def test_a_run_goes_on_with_its_own_images_alone(tmp_path):
    data = images(tmp_path / "data")
    train(recipe(tmp_path, data), "run")
    for label in ("ant", "bee"):
        (data / f"train/{label}/image0.png").rename(data / f"train/{label}/new.png")
    with pytest.raises(CheckpointError, match="was trained on different data: it had other images"):
        train(recipe(tmp_path, data, epochs=2, resume="auto"), "run")


def test_a_changed_plugin_is_said_where_a_run_goes_on(tmp_path, capsys):
    data, plugin = images(tmp_path / "data"), tmp_path / "one.py"
    plugin.write_text(PLUGIN.format(name="inputs_one", factor=1, comment="as it was"))
    more = dict(plugin=[str(plugin)], method="inputs_one")
    before = train(recipe(tmp_path, data, **more), "run").record.inputs
    plugin.write_text(PLUGIN.format(name="inputs_one", factor=1, comment="with another comment"))
    train(recipe(tmp_path, data, epochs=2, resume="auto", **more), "run")
    assert "warning" not in capsys.readouterr().out
    plugin.write_text(PLUGIN.format(name="inputs_one", factor=2, comment="as it was"))
    record = train(recipe(tmp_path, data, epochs=3, resume="auto", **more), "run").record
    assert f"warning: one.py has changed since {tmp_path / 'runs/run'} began" in capsys.readouterr().out
    (given,), (began,) = record.inputs, before
    assert given.plugins["one.py"].split() == [began.plugins["one.py"], code_of(str(plugin))]
    assert replace(given, plugins=began.plugins) == began
    record = train(recipe(tmp_path, data, epochs=4, resume="auto", **more), "run").record
    assert "warning" not in capsys.readouterr().out
    assert record.inputs == [given]


def test_what_goes_on_says_which_code_it_has_had():
    a, b, c = ([Inputs("data", plugins={"x.py": code})] for code in "abc")
    known, changed = continued(a, b)
    assert (known[0].plugins, changed) == ({"x.py": "a b"}, ["x.py"])
    assert continued(known, b) == (known, [])
    assert continued(known, c)[0][0].plugins == {"x.py": "a b c"}
    renamed = [Inputs("data", plugins={"y.py": "a"})]
    assert continued(a, renamed) == (a, []), "the same code under another name"
    renamed[0].plugins["y.py"] = "b"
    assert continued(a, renamed) == ([Inputs("data", plugins={"x.py": "a", "y.py": "b"})], ["y.py"])
    # A stage before says itself what it has had.
    stages = [*continued(a, b)[0], *b]
    assert continued([*a, *a], stages)[0] == [*stages[:1], *continued(a, b)[0]]
    assert continued(stages, stages) == (stages, [])


def test_all_stages_train_with_the_code_that_a_run_began_with(tmp_path):
    data, plugin = images(tmp_path / "data"), tmp_path / "three.py"
    text = PLUGIN.format(name="inputs_three", factor=1, comment="")
    plugin.write_text(
        text
        + f"""
    def start_epoch(self, epoch):
        open({str(plugin)!r}, "a").write("    x = 1\\n")
"""
    )
    began = code_of(str(plugin))
    stages = [{"method": "inputs_three"}, {"method": "inputs_three"}]
    record = train(recipe(tmp_path, data, plugin=[str(plugin)], stages=stages), "run").record
    assert code_of(str(plugin)) != began
    assert [given.plugins for given in record.inputs] == [{"three.py": began}] * 2


def test_a_sweep_does_not_go_on_with_other_code(tmp_path, capsys):
    data, plugin = images(tmp_path / "data"), tmp_path / "two.py"
    text = PLUGIN.format(name="inputs_begun", factor=1, comment="as it was")
    plugin.write_text(
        text + "\n    def start_epoch(self, epoch):\n        if epoch:\n            raise RuntimeError('stop')\n"
    )
    file = recipe_file(tmp_path, data, plugin=[str(plugin)], method="inputs_begun", epochs=2, checkpoint_seconds=0)
    status, said = sweep(capsys, file)
    assert status
    assert "stop" in said.out + said.err
    plugin.write_text(text.replace("1 *", "3 *"))
    status, said = sweep(capsys, file)
    assert status == 2
    assert "holds a run from before two.py changed" in said.err
    (begun,) = tmp_path.glob("**/last.ckpt")
    busy = RunFolder(begun.parent)
    busy.occupy()
    status, said = sweep(capsys, file)
    busy.end()
    assert status == 2
    assert f"another process is training in {begun.parent}; wait for it" in said.err
    assert "remove the folder" not in said.err


def test_class_weights_and_teachers_are_inputs(tmp_path, capsys):
    data, weights = images(tmp_path / "data"), tmp_path / "weights.csv"
    weights.write_text("ant,1\nbee,1\n")
    file = recipe_file(tmp_path, data, class_weights=str(weights))
    assert sweep(capsys, file)[0] == 0
    assert "(done)" in sweep(capsys, file)[1].out
    weights.write_text("ant,1\nbee,9\n")
    status, said = sweep(capsys, file, "--seeds", 0, 1)
    assert status == 2
    assert "holds a run from before its class weights changed" in said.err
    train(recipe(tmp_path, data, class_weights=str(weights)), "run")
    weights.write_text("ant,9\nbee,1\n")
    with pytest.raises(CheckpointError, match="was trained with other class weights: the file has changed"):
        train(recipe(tmp_path, data, class_weights=str(weights), epochs=2, resume="auto"), "run")

    (tmp_path / "teacher").mkdir()
    for place in (str(tmp_path / "teacher"), f"local-dir:{tmp_path / 'teacher'}"):
        method = {"name": "dive", "teacher": [place, "mbib_resnet32.cifar100_lt_if100"]}
        taught = recipe(tmp_path, data, method=method)
        found = []
        for content in (b"one", b"two"):
            (tmp_path / "teacher" / "model.safetensors").write_bytes(content)
            found.append(inputs_of(taught, DataPool()))
        assert changed_inputs(*found) == ["its teachers"]
        assert len(found[0][0].teachers) == 1, "what comes with the package has a version"


def test_code_that_cannot_be_read_is_an_error(tmp_path):
    (tmp_path / "broken.py").write_text("def (")
    for name in ("broken.py", "nowhere.py"):
        with pytest.raises(MbibError, match=rf"plugin .*{name} cannot be read: "):
            code_of(str(tmp_path / name))
    assert len({code_of(__file__), code_of("mbib_timm.errors"), code_of("mbib_timm.cli")}) == 3


def sweep(capsys, file, *flags):
    status = main(["sweep", str(file), "--name", "s", "--results", str(file.parent / "results"), *map(str, flags)])
    return status, capsys.readouterr()


def test_a_sweep_does_not_take_a_run_of_other_images_for_its_own(tmp_path, capsys):
    first, second = images(tmp_path / "first"), images(tmp_path / "second", seed=1, names="other")
    file = recipe_file(tmp_path, first)
    assert sweep(capsys, file)[0] == 0
    shutil.copytree(first, tmp_path / "moved")
    status, said = sweep(capsys, file, "--data-dir", tmp_path / "moved")
    assert (status, said.out.count("(done)")) == (0, 1)
    status, said = sweep(capsys, file, "--data-dir", second)
    assert status == 2
    assert "holds a run from before its images or their labels changed; choose another --name" in said.err
    assert "Traceback" not in said.err


def test_a_sweep_does_not_take_a_run_of_an_earlier_plugin_for_its_own(tmp_path, capsys):
    data, plugin = images(tmp_path / "data"), tmp_path / "two.py"
    plugin.write_text(PLUGIN.format(name="inputs_two", factor=1, comment=""))
    file = recipe_file(tmp_path, data, plugin=[str(plugin)], method="inputs_two")
    assert sweep(capsys, file)[0] == 0
    assert "(done)" in sweep(capsys, file)[1].out
    plugin.write_text(PLUGIN.format(name="inputs_two", factor=0, comment=""))
    status, said = sweep(capsys, file, "--seeds", 0, 1)
    assert status == 2
    assert "holds a run from before two.py changed" in said.err
    assert [run.seed for run in read_results(tmp_path / "results/s").runs] == [0]


def test_runs_of_other_images_are_no_seeds_of_one_configuration(tmp_path):
    places = [images(tmp_path / name, seed, name) for seed, name in enumerate(("high", "low"))]
    runs = [recipe(tmp_path, place, seed=seed, experiment=place.name) for seed, place in enumerate(places)]
    folders = [train(run, "own.run").folder for run in runs]
    groups = group_runs([read_run(folder) for folder in folders])
    assert [len(group.runs) for group in groups] == [1, 1]
    assert [group.title for group in groups] == ["own.run (data high)", "own.run (data low)"]
    with pytest.raises(MbibError, match="had other data, other code"):
        read_seeds(folders[0], folders[1:])


# Images that were trained on


def one_folder(root):
    """Sixteen images a class that no split parts."""
    folder = images(root)
    for label in ("ant", "bee"):
        for i, file in enumerate(sorted((folder / "val" / label).iterdir())):
            target = folder / label
            target.mkdir(exist_ok=True)
            file.rename(target / f"val{i}.png")
        for file in (folder / "train" / label).iterdir():
            file.rename(folder / label / file.name)
    shutil.rmtree(folder / "train")
    shutil.rmtree(folder / "val")
    return folder


def test_predicted_images_that_were_trained_on_are_counted(tmp_path, capsys):
    data = one_folder(tmp_path / "data")
    run = train(recipe(tmp_path, data, val_split="validation"), "run").folder
    number = 32 - read_record(run).result.prediction.images
    output = str(tmp_path / "p.csv")
    assert main(["predict", str(run), str(data), "--output", output, "--workers", "0"]) == 0
    said = capsys.readouterr().out
    assert (
        f"warning: {number} of these 32 images were trained on; their accuracy says nothing about other images" in said
    )
    shutil.copytree(data, tmp_path / "others")
    assert main(["predict", str(run), str(tmp_path / "others"), "--output", output, "--workers", "0"]) == 0
    assert "trained on" not in capsys.readouterr().out
    # Whatever has been evaluated was not; of what is new nobody knows.
    shutil.copy(data / "ant" / "val0.png", data / "ant" / "new.png")
    assert main(["predict", str(run), str(data), "--output", output, "--workers", "0"]) == 0
    assert f"{number + 1} of these 33 images may have been trained on" in capsys.readouterr().out


def test_the_images_that_were_trained_on_are_counted_among_those_of_the_accuracy(tmp_path, capsys):
    data = one_folder(tmp_path / "data")
    run = train(recipe(tmp_path, data, val_split="validation"), "run").folder
    number = 32 - read_record(run).result.prediction.images
    for label in ("ant", "wasp"):  # of which the model knows one
        shutil.copytree(data / "ant", tmp_path / "others" / label)
    (tmp_path / "others" / "ant" / "val0.png").write_bytes(b"no image")
    output = tmp_path / "p.csv"
    command = ["predict", str(run), str(data), str(tmp_path / "others"), "--output", str(output), "--workers", "0"]
    assert main(command) == 1
    said = f"warning: {number} of these 47 images were trained on; "
    assert said in capsys.readouterr().out
    rows = output.read_text().splitlines(keepends=True)
    for kept in (20, 40, 65):
        output.write_text("".join(rows[:kept]))
        assert main([*command, "--resume"]) == 1
        assert said in capsys.readouterr().out


def test_images_of_a_table_and_of_a_relative_folder_are_those_that_were_trained_on(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one_folder(tmp_path / "data")
    relative = recipe(tmp_path, "data", val_split="validation", output="runs")
    number = 32 - read_record(train(relative, "run").folder).result.prediction.images
    (tmp_path / "tables").mkdir()
    table = tmp_path / "tables" / "split.csv"
    assert main(["data", "data", "--write-split", str(table), "--workers", "0"]) == 0
    assert main(["predict", "runs/run", str(table), "--data-dir", "data", "--output", "p.csv", "--workers", "0"]) == 0
    said = f"warning: {number} of these 32 images were trained on; "
    assert said in capsys.readouterr().out
    monkeypatch.chdir(tmp_path / "tables")
    for run in ("../runs/run", str(tmp_path / "runs" / "run")):
        assert main(["predict", run, "../data", "--output", "p.csv", "--workers", "0"]) == 0
        assert said in capsys.readouterr().out
    # The run's folder alone does not say where it was trained.
    shutil.copytree(tmp_path / "runs" / "run", tmp_path / "moved")
    assert main(["predict", "../moved", "../data", "--output", "p.csv", "--workers", "0"]) == 0
    assert "trained on" not in capsys.readouterr().out


def test_an_evaluation_counts_images_that_were_trained_on(tmp_path, capsys, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(analyze, "_draw", lambda folder, illustrations: None)
    monkeypatch.setattr(Section, "figure", lambda section, illustration: None)
    data = one_folder(tmp_path / "data")
    first = recipe(tmp_path, data, val_split="validation")
    run, results = train(first, "run").folder, tmp_path / "validated.json"
    trained = {*open_data(first).train.files()}

    def validated(*more):
        assert main(["validate", str(run), "--results", str(results), *more]) == 0
        return capsys.readouterr().out, json.loads(results.read_text())["trained_on"]

    said, kept = validated()
    assert "trained on" not in said
    assert kept is None
    evaluated = [*open_data(first.replace(val_fraction=0.5)).val.files()]
    number, images = len(trained & {*evaluated}), len(evaluated)
    assert number > 0
    line = f"{number} of the {images} evaluated images were trained on; their accuracy says nothing about other images"
    said, kept = validated("--val-fraction", "0.5")
    assert f"warning: {line}\n" in said
    assert kept == line
    assert main(["analyze", str(run), "--val-fraction", "0.5"]) == 0
    assert f"warning: {line}\n" in capsys.readouterr().out
    analysis = read_analysis(run)
    assert analysis is not None
    assert analysis.trained_on == line
    section = run_section(group_runs([read_run(run)])[0])
    assert f"In the analysis, {line}." in [block.content for block in section.blocks]
    # A larger folder is split in another way.
    before = {*open_data(first).val.files()}
    for i in range(9):
        shutil.copy(data / "ant" / "val0.png", data / "ant" / f"new{i}.png")
    now = {*open_data(first).val.files()}
    said, kept = validated()
    perhaps = f"{len(now - before)} of the {len(now)} evaluated images may have been trained on: they lie in the folder"
    assert f"warning: {perhaps} that run was trained from" in said


def test_a_split_beside_that_of_the_training_has_been_trained_on_by_nobody(tmp_path, capsys):
    """Whatever has been added to it since; what is in the training split by now may have been trained on."""
    data = images(tmp_path / "data")
    run = train(recipe(tmp_path, data), "run").folder
    for split, said in (("val", False), ("train", True)):
        shutil.copy(data / split / "ant/image0.png", data / split / "ant/new.png")
        capsys.readouterr()
        assert main(["validate", str(run), "--split", split]) == 0
        perhaps = "25 of the 25 evaluated images may have been trained on: they are in its training split, whose images"
        assert (perhaps in capsys.readouterr().out) == said
        assert main(["validate", str(run), "--split", "val"]) == 0
        assert "trained on" not in capsys.readouterr().out


def test_a_split_of_its_own_is_evaluated_without_opening_that_of_the_training(tmp_path, monkeypatch):
    data = images(tmp_path / "data")
    run = train(recipe(tmp_path, data), "run").folder
    opened = []
    splits = Source.splits
    monkeypatch.setattr(Source, "splits", lambda source, names: opened.extend(names) or splits(source, names))
    assert main(["validate", str(run)]) == 0
    assert opened == ["val"]


def test_images_that_a_table_names_are_trained_on_wherever_they_lie(tmp_path, capsys):
    data, table = one_folder(tmp_path / "data"), tmp_path / "tables" / "all.csv"
    table.parent.mkdir()
    rows = [f"{file},{file.parent.name}" for file in sorted(data.rglob("*.png"))]
    table.write_text("\n".join(["path,label", *rows]))
    keys = dict(dataset="table", data_dir=None, table=str(table), val_split="validation")
    run = train(recipe(tmp_path, data, **keys), "run").folder
    number = 32 - read_record(run).result.prediction.images
    assert main(["predict", str(run), str(data), "--output", str(tmp_path / "p.csv"), "--workers", "0"]) == 0
    assert f"warning: {number} of these 32 images were trained on; " in capsys.readouterr().out
    for file in ("new1.png", "new2.png"):  # which nobody has trained on
        shutil.copy(data / "ant" / "val0.png", data / "ant" / file)
    assert main(["predict", str(run), str(data), "--output", str(tmp_path / "p.csv"), "--workers", "0"]) == 0
    assert f"warning: {number} of these 34 images were trained on; " in capsys.readouterr().out


def test_data_of_which_a_run_skipped_images_have_not_changed(tmp_path, capsys):
    data = one_folder(tmp_path / "data")
    (data / "ant" / "broken.png").write_bytes(b"no image")
    run = train(recipe(tmp_path, data, val_split="validation", broken="skip"), "run").folder
    main(["predict", str(run), str(data), "--output", str(tmp_path / "p.csv"), "--workers", "0"])
    said = capsys.readouterr().out
    assert "images may have been trained on: they lie in the folder that run was trained from; their accuracy" in said
    assert "changed since" not in said


@pytest.mark.parametrize("broken", ["replace", "skip"])
def test_images_that_a_run_could_not_read_were_not_trained_on(tmp_path, capsys, broken, monkeypatch):
    """Whichever split they were for; they are readable by now, and a run of a table of the same images is evaluated."""
    monkeypatch.chdir(tmp_path)
    data, table = one_folder(tmp_path / "data"), Path("tables") / "split.csv"
    table.parent.mkdir()
    files = sorted(data.rglob("*.png"))
    whole = {file: file.read_bytes() for file in files if file.name in ("val0.png", "image0.png", "image1.png")}
    for file in whole:
        file.write_bytes(b"no image")
    run = train(recipe(tmp_path, "data", val_split="validation", broken=broken, output="runs"), "traps").folder
    for file, content in whole.items():
        file.write_bytes(content)
    kept = read_predictions_of(run)
    others = [file for file in files if file in whole or file.relative_to(data).as_posix() in kept]
    new = data / "ant" / "new.png"
    shutil.copy(data / "ant" / "val1.png", new)
    keys = dict(dataset="table", data_dir=None, table=str(table), model="runs/traps", val_split="val", output="runs")
    train_on = [f"{file},{file.parent.name},train" for file in files if file not in others]
    for evaluated, said in ((others, None), ([*others, new], f"1 of the {len(others) + 1} evaluated images may have ")):
        rows = [*train_on, *(f"{file},{file.parent.name},val" for file in evaluated)]
        table.write_text("\n".join(["path,label,split", *rows]))
        line = read_record(train(recipe(tmp_path, data, **keys), f"of {len(evaluated)}").folder).trained_before
        since = "" if broken == "skip" else ", whose images have changed since"
        by = "been trained on by the run that this one starts from: it lies in the folder that traps was trained from"
        assert line == (said and f"{said}{by}{since}; its accuracy says nothing about other images")


def read_predictions_of(run):
    return {row.split(",")[0] for row in (Path(run) / "predictions.csv").read_text().splitlines()[1:]}


def test_a_run_from_another_says_which_evaluated_images_that_was_trained_on(tmp_path, capsys):
    data = one_folder(tmp_path / "data")
    first = train(recipe(tmp_path, data, val_split="validation"), "first").folder
    assert read_record(first).trained_before is None
    model = f"local-dir:{first}"
    same = train(recipe(tmp_path, data, val_split="validation", model=model, method="ce"), "same").record
    assert same.trained_before is None, "the same images are held out"
    capsys.readouterr()
    other = recipe(tmp_path, data, val_split="validation", model=model, subset_seed=1, holdout=0.0)
    evaluated = {str(split) for split in open_data(other).val.files()}
    trained = {str(split) for split in open_data(recipe(tmp_path, data, val_split="validation")).train.files()}
    folder = train(other, "other").folder
    number = len(evaluated & trained)
    assert number > 0
    line = f"{number} of the {len(evaluated)} evaluated images were trained on by the run that this one starts from; "
    line += "their accuracy says nothing about other images"
    assert f"warning: {line}" in capsys.readouterr().out
    assert read_record(folder).trained_before == line


def test_a_copy_of_the_images_is_known_by_names_and_labels(tmp_path, capsys):
    data = one_folder(tmp_path / "data")
    run = train(recipe(tmp_path, data, val_split="validation"), "first").folder
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    trained = {*open_data(recipe(tmp_path, copy, val_split="validation")).train.files()}
    other = recipe(tmp_path, copy, val_split="validation", model=f"local-dir:{run}", subset_seed=1)
    evaluated = {*open_data(other).val.files()}
    number = len(evaluated & trained)
    assert number > 0
    perhaps = "their folder has images of the same names and labels as its own; their accuracy says nothing "
    perhaps += "about other images"
    line = f"{number} of the {len(evaluated)} evaluated images may have been trained on by the run that this one "
    assert read_record(train(other, "other").folder).trained_before == f"{line}starts from: {perhaps}"
    capsys.readouterr()
    assert main(["validate", str(run), "--data-dir", str(copy)]) == 0
    said = f"warning: {len(trained)} of the 32 evaluated images may have been trained on: {perhaps}\n"
    assert said in capsys.readouterr().out
    (copy / "bee" / "image0.png").rename(copy / "bee" / "another.png")
    assert main(["validate", str(run), "--data-dir", str(copy)]) == 0
    assert "warning" not in capsys.readouterr().out, "other images, as far as names tell"


def test_what_a_source_has_left_out_is_in_the_record_and_on_the_card(tmp_path, capsys):
    data = one_folder(tmp_path / "data")
    (data / "ant" / "broken.png").write_bytes(b"no image")
    (data / "ant" / "kind.heic").write_bytes(b"")
    folder = train(recipe(tmp_path, data, val_split="validation", broken="skip"), "run").folder
    left_out = read_record(folder).left_out
    assert [len(names) for names in left_out.values()] == [1, 1]
    assert {name.rpartition("/")[2].partition(":")[0] for names in left_out.values() for name in names} == {
        "broken.png", "kind.heic",
    }  # fmt: skip
    capsys.readouterr()
    assert main(["publish", str(folder), "--repo-id", "me/run", "--dry-run"]) == 0
    card = capsys.readouterr().out
    assert "Left out of the data: 1 (images of unsupported kinds), 1 (images that cannot be read)." in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize("loader", ["resident", "timm"])
def test_classes_whose_images_are_all_broken_are_named(tmp_path, capsys, loader):
    data = images(tmp_path / "data", classes=("ant", "bee", "cow"))
    for file in (*(data / "train" / "cow").iterdir(), *(data / "val" / "bee").iterdir(), data / "val/ant/image0.png"):
        file.write_bytes(b"no image")
    run = train(recipe(tmp_path, data, loader=loader), "run")
    said = capsys.readouterr().out
    assert len(run.record.replaced_images) == 12
    assert (run.record.unread_classes, run.record.unmeasured_classes) == (["cow"], ["bee"])
    lines = [
        "broken training images that were replaced: 12",
        "classes whose training images are all broken, so that the model has seen none of them: 1 (cow)",
        "broken images that were left out of the evaluation: 5",
        "classes that are not measured, for their evaluated images are all broken: 1 (bee)",
    ]
    assert all(f"warning: {line}; see metrics.json" in said for line in lines)
    assert main(["publish", str(run.folder), "--repo-id", "me/run", "--dry-run"]) == 0
    assert f"Images that could not be read: {'; '.join(lines)}." in capsys.readouterr().out
    assert main(["report", str(run.folder), "-o", str(tmp_path / "report.html")]) == 0
    assert "; ".join(lines) in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert main(["validate", str(run.folder), "--workers", "0"]) == 0
    said = capsys.readouterr().out
    assert f"warning: {lines[3]}" in said
    assert main(["data", str(data), "--workers", "0"]) == 0
    said = capsys.readouterr().out
    assert "  classes without an image that can be read (train): 1 (cow)\n" in said
    assert "  classes without an image that can be read (validation): 1 (bee)\n" in said


def test_a_tables_paths_may_be_below_another_folder(tmp_path, capsys):
    data = one_folder(tmp_path / "data")
    run = train(recipe(tmp_path, data, val_split="validation"), "run").folder
    table = tmp_path / "tables" / "split.csv"
    table.parent.mkdir()
    table.write_text("path,label\nant/val0.png,ant\nbee/val0.png,bee\n")
    flags = ["--output", str(tmp_path / "p.csv"), "--workers", "0"]
    assert main(["predict", str(run), str(table), *flags]) == 2
    assert f"whose paths are taken below {table.parent}, names 2 images, and none is there" in capsys.readouterr().err
    assert main(["predict", str(run), str(table), "--data-dir", str(data), *flags]) == 0
    assert "evaluated images" in capsys.readouterr().out
