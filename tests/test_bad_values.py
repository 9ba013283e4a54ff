"""Values that cannot be: in recipes, flags, sweeps and the files that commands read back. Each ends in one sentence.

`tests/test_bad_input.py` has the files and folders that are no data.
"""

import json
import re

import pytest
from archive_images import write
from made_up_results import made_up_record
from small_data import class_folders, recipe

from mbib_timm.analysis.analysis_record import read_analysis
from mbib_timm.cli import main
from mbib_timm.data.augment import create_operations
from mbib_timm.errors import MbibError
from mbib_timm.evaluation.answer_files import ConfidentError, read_confusion, read_errors
from mbib_timm.files import to_json
from mbib_timm.recipe import load_recipe
from mbib_timm.reporting.sections import Section, render_page
from mbib_timm.results.record import HISTORY, RECORD, HeadMetrics, read_history, read_record

BASE = (
    "dataset: folder\ndata_dir: images\nmodel: cifar_resnet20\nmethod: ce\nepochs: 1\nbatch_size: 8\nworkers: 0\n"
    "device: cpu\nimg_size: 16\nimage_cache: none\ntrain_crop_mode: pad\noutput: runs\n"
)
DEEP = "[" * 5000 + "]" * 5000
LAUGHS = "".join(
    f"  {name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)

# What a recipe's file holds after BASE, and what the message must say; before torch is imported.
RECIPES = {
    "key twice": ("lr: 0.1\nlr: 0.2\n", r"own\.yaml: not a YAML file \(line 14: key 'lr' occurs twice\)"),
    "argument twice": ("opt_kwargs: {a: 1, a: 2}\n", "line 13: key 'a' occurs twice"),
    "NUL": ("val_split: a\0b\n", r"own\.yaml: not a YAML file \(unacceptable character"),
    "NUL as an escape": ('val_split: "a\\0b"\n', r"'val_split': expected text without NUL, got 'a\\x00b'"),
    "empty text": ('output: ""\n', "'output': expected a text, got an empty one"),
    "long text": (f"val_split: {'x' * 100_000}\n", "'val_split': expected at most 4,096 characters, got 100,000"),
    "nested": (f"views: {DEEP}\n", r"own\.yaml: not a YAML file \(line 13: exceeded maximum nesting depth\)"),
    "nested mapping": (
        f"model_kwargs: {'{a: ' * 50}1{'}' * 50}\n",
        "'model_kwargs': expected at most 20",
    ),
    "repeated parts": (
        f"model_kwargs:\n  a: &a [x, x, x, x, x, x, x, x]\n{LAUGHS}",
        "'model_kwargs': .* at most 10,000",
    ),
    "inside itself": ("model_kwargs: &a {a: *a}\n", "'model_kwargs': expected at most 20 nested values"),
    "date": ("model_kwargs: {a: 2024-01-01}\n", r"'model_kwargs': a: expected numbers, texts, .*, got datetime\.date"),
    "tag": ("model_ema: !!bool x\n", r"own\.yaml: not a YAML file \(a value does not fit its tag"),
    "class": ("lr: !!python/object:os.system x\n", "could not determine a constructor"),
    "digits": (f"seed: {'9' * 5000}\n", r"own\.yaml: not a YAML file \(Exceeds the limit"),
    "65 bits": ("seed: 18446744073709551616\n", "'seed': expected a number of at most 64 bits"),
    "many bits": (f"seed: 0x{'f' * 5000}\n", "'seed': .* at most 64 bits, got a number of 20,000 bits"),
    "no float": (f"lr: 1{'0' * 400}\n", "'lr': expected a number of at most 64 bits"),
    "no float32": ("lr: 1.0e-300\n", "'lr': expected a number that float32 holds, got 1e-300"),
    "infinite": ("lr: .inf\n", "'lr': expected a finite number, got inf"),
    "stages": (f"stages: [{', '.join(['{lr: 0.1}'] * 10_000)}]\n", "'stages': expected at most 20 stages, got 10,000"),
    "no base": ("base: [a]\n", r"key 'base': expected the name of another file, got \['a'\]"),
    "list": (f"mean: [{', '.join(['0.5'] * 10_000)}]\n", "'mean': expected at most 1,000 values, got 10,000"),
    "octal": ("epochs: 010\n", r"line 13: 010 is not a plain number; write one without leading zeros"),
    "base 60": ("lr: 1:30\n", "line 13: 1:30 is not a plain number"),
    "base 60 with a fraction": ("lr: 1:30.5\n", "line 13: 1:30.5 is not a plain number"),
    "crop of none": ("crop_pct: 0.875\n", "'crop_pct' has no effect without train_crop_mode: rrc or none"),
    "crop mode of none": ("crop_mode: center\n", "'crop_mode' has no effect without train_crop_mode: rrc or none"),
    "list of none": ("class_map: names.txt\n", "'class_map' has no effect without dataset: list or wds"),
    "seed": ("seed: 4294967296\n", "'seed': expected at most 4,294,967,295, got 4,294,967,296"),
    "subset_seed": ("subset_seed: -1\n", "'subset_seed': expected at least 0, got -1"),
    "img_size": ("img_size: 100000\n", "'img_size': expected at most 8,192, got 100,000"),
    "workers": ("workers: 5000\n", "'workers': expected at most 128, got 5,000"),
    "batch_size": ("batch_size: 1000000000\n", "'batch_size': expected at most 65,536"),
    "batch": ("validation_batch_size: 60000\n", "a batch of 60,000 images of 512 x 512 pixels takes 176 GiB"),
    "epochs": ("epochs: 1000000000\n", "'epochs': expected at most 100,000"),
    "num_classes": ("num_classes: 1000000000\n", "'num_classes': expected at most 1,000,000"),
    "crop_pct": ("crop_pct: 1.0e-5\n", "'crop_pct': expected at least 0.01"),
    "mixup": ("mixup: .nan\n", "'mixup': expected a finite number, got nan"),
    "cutmix": ("cutmix: 1.0e+30\n", "'cutmix': expected at most 1,000"),
    "mean": ("mean: [1.0e+30, 0, 0]\n", "'mean': expected at most 1, got 1e\\+30"),
    "std": ("std: [0.0]\n", "'std': expected at least 0.001, got 0"),
    "two means": ("mean: [0.5, 0.5]\n", "'mean': expected 1 or 3 numbers"),
    "no mean": ("mean: []\n", "'mean': expected 1 or 3 numbers, got \\[\\]"),
    "crop_mode": ("crop_mode: centre\n", "'crop_mode' 'centre': did you mean 'center'"),
    "interpolation": ("interpolation: lanczos\n", "'interpolation' 'lanczos'"),
    "sched": ("sched: cosin\n", "'sched' 'cosin': did you mean 'cosine'"),
    "warmup": ("warmup_epochs: 1\n", "'warmup_epochs': a warm-up of 1 epoch does not fit into a run of 1 epoch"),
    "rsqrt": ("sched: rsqrt\n", "'warmup_epochs': sched: rsqrt is measured in epochs of warm-up; expected 1"),
    "milestones": ("decay_milestones: [0]\n", "'decay_milestones': expected at least 1, got 0"),
    "min_lr": ("min_lr: 1\n", "'min_lr': expected at most lr, 0.1, got 1"),
    "model_ema_decay": ("model_ema_decay: 1\n", "'model_ema_decay': expected less than 1, got 1"),
    "drop_rate": ("model_kwargs: {drop_rate: 5}\n", "'model_kwargs': drop_rate: expected .* below 1, got 5"),
    "drop_path_rate": ("model_kwargs: {drop_path_rate: x}\n", "'model_kwargs': drop_path_rate: expected a number"),
    "pretrained": (
        "model_kwargs: {pretrained: yes}\n",
        "'model_kwargs': it gives no 'pretrained'",
    ),
    "features": ("model_kwargs: {features_only: yes}\n", "'model_kwargs': it gives no 'features_only'"),
    "expression": ("train: (\n", r"'train': '\(' is not a regular expression"),
    "policy": ("aa: rand-m9-foo\n", "'aa': unknown policy 'rand-m9-foo': rand takes no 'foo'; expected m, mmax, n, p"),
    "operations": ("aa: rand-m9-tfoo\n", "'aa': unknown policy .*: rand takes no 'tfoo'.* or t with weights, 3a, 3aw"),
    "part twice": ("aa: rand-m9-m3\n", "'aa': unknown policy .*: rand takes no 'm3'.*once"),
    "magnitude": (
        "aa: rand-m12\n",
        "'aa': unknown policy 'rand-m12': expected m from 0 to 10, got 12",
    ),
    "no layers": ("aa: rand-n0\n", "'aa': unknown policy 'rand-n0': expected n from 1 to 20, got 0"),
    "layers": ("aa: rand-n15-t3aw\n", "'aa': unknown policy .*: expected n from 1 to 14 with t3aw, got 15"),
    "part of none": ("aa: cifar10-m3\n", "'aa': unknown policy 'cifar10-m3': cifar10 takes no 'm3'"),
    "setting": ("method: {name: mbib, beta: .nan}\n", "'method': beta: expected a finite number, got nan"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_with_a_value_that_cannot_be(name, tmp_path):
    text, message = RECIPES[name]
    base = BASE.replace("img_size: 16", "img_size: 512") if name == "batch" else BASE
    write(tmp_path / "own.yaml", (base.replace(f"\n{text.partition(':')[0]}:", "\n#", 1) + text).encode())
    with pytest.raises(MbibError, match=message) as refused:
        load_recipe(tmp_path / "own.yaml")
    assert len(str(refused.value).splitlines()) == 1
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize("content", [b"", b"# to be written\n", b"---\n", b"{}"])
def test_a_recipe_without_a_key_does_not_train_something_else(content, tmp_path):
    write(tmp_path / "own.yaml", content)
    with pytest.raises(MbibError, match=r"own\.yaml: expected 'key: value' lines, got none"):
        load_recipe(tmp_path / "own.yaml")


@pytest.mark.parametrize("content", [BASE.encode("utf-16"), BASE.encode() + b"val_split: \xe4\n"])
def test_a_recipe_in_another_encoding(content, tmp_path):
    write(tmp_path / "own.yaml", content)
    with pytest.raises(MbibError, match=r"cannot read the recipe .*own\.yaml: byte \d+ is not UTF-8"):
        load_recipe(tmp_path / "own.yaml")


def test_a_byte_order_mark_is_no_key(tmp_path):
    write(tmp_path / "own.yaml", b"\xef\xbb\xbf" + BASE.encode())
    assert load_recipe(tmp_path / "own.yaml").dataset == "folder"


def test_milestones_that_the_epochs_do_not_reach_are_said(tmp_path):
    write(tmp_path / "own.yaml", f"{BASE}sched: multistep\n".encode())
    said = []
    load_recipe(tmp_path / "own.yaml", say=said.append)
    assert said == ["1 epoch: training ends before decay_milestones 161, 181"]


# What a model, an optimizer or the machine does not take: after BASE, where the images are read already.
SETUPS = {
    "tag": ("model: cifar_resnet20.nope\n", "model cifar_resnet20 has no tag 'nope'; expected cifar_resnet20 alone"),
    "empty tag": ("model: cifar_resnet20.\n", "model cifar_resnet20 has no tag ''"),
    "other tag": ("model: resnet18.a9_in1k\n", "unknown tag of model resnet18 'a9_in1k': did you mean 'a3_in1k'"),
    "argument": ("model_kwargs: {a: 1}\n", "'model_kwargs': .*unexpected keyword argument 'a'"),
    "pool": ("model_kwargs: {global_pool: nope}\n", "'model_kwargs': Invalid pool type: nope"),
    "configuration": ("model_kwargs: {pretrained_cfg: 3}\n", "'model_kwargs': .*'int' object"),
    "optimizer": ("opt: sgdd\n", "unknown optimizer 'sgdd': did you mean 'sgd"),
    "optimizer's argument": ("opt_kwargs: {a: 1}\n", "'opt_kwargs': optimizer 'sgd' does not take .*argument 'a'"),
    "betas": ("opt: adamw\nopt_kwargs: {betas: [5, 7]}\n", "'opt_kwargs': optimizer 'adamw' .*Invalid beta"),
    "one beta": ("opt: adamw\nopt_kwargs: {betas: [0.9]}\n", "'opt_kwargs': optimizer 'adamw' does not take"),
    "epsilon": ("opt: adamw\nopt_kwargs: {eps: x}\n", "'opt_kwargs': optimizer 'adamw' does not take"),
    "small images": (
        "model: densenet121\nimg_size: 8\n",
        "key 'img_size': so the model takes no images of 3x8x8: .*too small",
    ),
    "home": ("output: ~/runs\n", "cannot make the folder ~/runs: ~ is not expanded here"),
    "tab": ('experiment: "a\\tb"\n', r"'experiment': expected the name of a folder in runs, .*, got 'a\\tb'"),
    "space": ('experiment: " "\n', "'experiment': expected the name of a folder in runs, .*, got ' '"),
    "device": ("device: meta\n", "unknown device 'meta': expected cpu, cuda"),
    "memory": ("img_size: 2000\nvalidation_batch_size: 8\n", "'batch_size' and 'img_size': a step with .* GiB or more"),
    "operations of timm's": (
        "aa: rand-m9-t3a\nloader: resident\n",
        "resident augments images in batches",
    ),
}


@pytest.mark.parametrize("name", SETUPS)
def test_what_a_run_cannot_begin_with(name, tmp_path, monkeypatch, capsys):
    text, message = SETUPS[name]
    monkeypatch.chdir(tmp_path)
    if name == "memory":
        monkeypatch.setattr("mbib_timm.training.setup.free_memory", lambda device: 1 << 28)
    class_folders(tmp_path)
    lines = {line.partition(":")[0]: line for line in (BASE + text).splitlines()}
    write(tmp_path / "own.yaml", "\n".join(lines.values()).encode())
    assert main(["train", "own.yaml"]) == 2
    error = capsys.readouterr().err.rpartition("mbib: error: ")[2]
    assert re.search(message, error)
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.rglob("*.ckpt"))


def test_colour_jitter_follows_a_padded_crop():
    (operation,) = create_operations(recipe(color_jitter=0.4, train_crop_mode="pad"), (3, 16, 16))
    assert type(operation).__name__ == "ColorJitter"


FLAGS = {
    "no value": (["--model-kwargs", "a"], "--model-kwargs: expected name=value, got 'a'"),
    "argument twice": (["--model-kwargs", "a=1", "a=2"], "--model-kwargs: a name occurs twice"),
    "mapping": (["--opt-kwargs", "a={b: 1, b: 2}"], "--opt-kwargs: .*key 'b' occurs twice"),
    "nested": (["--model-kwargs", f"a={DEEP}"], "--model-kwargs: .*exceeded maximum nesting depth"),
    "views": (["--views", "{"], "--views: expected a mapping such as {cutout: 8}, got '{'"),
    "long": (["--lr", "x" * 100_000], "--lr: invalid float value: 'xxx"),
    "dotted": (["--method.beta", "{a: 1, a: 2}"], "flag --method.beta: .*key 'a' occurs twice"),
    "not finite": (["--lr", "nan"], "'lr': expected a finite number, got nan"),
    "stage": (["--stage99999999999999999999.lr", "1"], "unknown recipe key 'stage99999999999999999999'"),
    "element": (["--mean.9", "0.5"], r"mean\.9: there is no element '9' in \["),
}


@pytest.mark.parametrize("name", FLAGS)
def test_flags_that_cannot_be(name, capsys):
    words, message = FLAGS[name]
    assert main(["train", "cifar_resnet20.ce_digits", *words]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert len(error) < 800


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["aggregate", "x", "--seed", "-1"], "--seed: expected a whole number from 0 to 4294967295, got '-1'"),
        (["sweep", "x", "--seeds", "1.5"], "--seeds: expected a whole number from 0 to 4294967295, got '1.5'"),
        (["analyze", "x", "--classes", "-1"], "--classes: expected a whole number of at least 0, got '-1'"),
        (["demo", "x", "--port", "70000"], "--port: expected a whole number from 1 to 65535, got '70000'"),
        (["predict", "x", "y", "--top-k", "9" * 5000], "--top-k: expected a whole number from 1 to 2147483647"),
        (["train", ""], "unknown recipe ''"),
        (["train", "/dev/zero"], "cannot read the recipe /dev/zero: it is not a regular file"),
        (["train", "x" * 300], "File name too long: xxx"),
        (["train", "\udce4.yaml"], r"recipe \\udce4\.yaml: there is no such file; mbib recipes lists those"),
    ],
)
def test_arguments_that_cannot_be(words, message, capsys):
    assert main(words) == 2
    assert re.search(message, capsys.readouterr().err)


RATES = ", ".join(str(1e-5 * rate) for rate in range(1, 1002))
SWEEPS = {
    "value twice": ("axes: {lr: [0.1, 0.1]}", "axis 'lr' has '0.1' twice"),
    "number for a key": ("axes: {1: [1]}", r"s\.yaml: axes: expected names, got 1 for one"),
    "a key twice": ("axes: {}\naxes: {}", "key 'axes' occurs twice"),
    "runs": (f"axes: {{lr: [{RATES}]}}", "sweep s has 1,001 runs; expected at most 1,000"),
    "combinations": (f"axes: {{lr: [1, 2]}}\nseeds: {list(range(600))}", "sweep s has 1,200 runs"),
    "seeds": ("seeds: [[1]]", r"s\.yaml: seeds\[0\]: expected int, got \[1\]"),
    "seed": ("seeds: [-1]", "'seed': expected at least 0, got -1"),
    "no label": ("labels: {lr: 5}\naxes: {lr: [1]}", r"labels\.lr: expected str, got 5"),
    "figure": ("figure: {kind: [1]}", r"figure\.kind: expected str, got \[1\]"),
    "role": ("figure: {kind: lines, x: [1]}", r"figure\.x: expected str, got \[1\]"),
    "paper": ("paper: {}", r"s\.yaml: paper\.source: missing"),
    "paper's numbers": ("paper: {source: x, numbers: [5]}", r"paper\.numbers\[0\]: expected dict, got 5"),
    "paper's number": (
        "paper: {source: x, numbers: [{overall: x}]}",
        "the paper's overall: expected a number",
    ),
    "long name": (f"axes: {{data_dir: [{'x' * 300}]}}", "is too long for a folder's name; give the values"),
}


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_that_cannot_be(name, tmp_path, monkeypatch, capsys):
    text, message = SWEEPS[name]
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "s.yaml", f"recipe: cifar_resnet20.ce_digits\n{text}".encode())
    assert main(["sweep", "s.yaml", "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--name", ".."], r"sweep '\.\.': expected a name that a folder can have"),
        (["--name", "a\x1b[31m"], r"sweep 'a\\x1b\[31m': expected a name that a folder can have"),
        (["--name", "a/b"], "sweep 'a/b': expected a name that a folder can have"),
        (["--name", ""], "sweep '': expected a name that a folder can have"),
        (["--results", "notes.txt"], r"cannot make the folder notes\.txt/sweep: notes\.txt is a file"),
    ],
)
def test_a_sweep_that_has_no_place(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "notes.txt", b"none")
    assert main(["sweep", "cifar_resnet20.ce_digits", *words]) == 2
    assert re.search(message, capsys.readouterr().err)


# Files that commands read back


CLASSES = {"many": 1, "medium": 0, "few": 1}
METRICS = HeadMetrics(50.0, 90.0, 40.0, 60.0, None, 20.0, 5.0, 1.5, 10, CLASSES, [60.0, 20.0])
RUN = made_up_record({"prediction": METRICS}, [200, 5], class_names=["ant", "bee"])


def changed(place, value):
    """The record of a run with another value at a place."""
    content = json.loads(to_json(RUN))
    inner = content
    *parts, last = place.split(".")
    for part in parts:
        inner = inner[part]
    inner[last] = value
    return json.dumps(content)


RECORDS = {
    "NaN": (changed("training_seconds", float("nan")), "NaN is not a JSON number"),
    "nested": ("[" * 100_000, "it is nested too deep"),
    "key twice": ('{"name": 1, "name": 2}', "key 'name' occurs twice"),
    "cut": (to_json(RUN).decode()[:500], "does not hold the record of a run"),
    "list": ("[]", "expected RunRecord"),
    "percent": (changed("result.heads.prediction.top1", 101), "top1: expected percent, got 101"),
    "bits": (changed("class_counts", [10**30, 1]), r"class_counts\[0\]: expected a number of at most 64 bits"),
    "counts": (changed("class_counts", [-1, 5]), "class_counts: expected a number of at least 0 for each class"),
    "no counts": (changed("class_counts", []), "class_counts: expected a number"),
    "names": (changed("class_names", ["ant"]), "class_names: expected 2 for as many class_counts, got 1"),
    "classes": (changed("result.heads.prediction.per_class", [1.0]), "'prediction': per_class: expected 2 .*, got 1"),
    "prediction": (changed("result.heads", {}), "heads: 'prediction' is missing"),
    "interval": (changed("result.heads.prediction.intervals", {"top1": [1.0]}), "top1: expected 2 values, got 1"),
    "stages": (changed("stages", []), "stages: there are none"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_that_cannot_be(name, tmp_path):
    text, message = RECORDS[name]
    write(tmp_path / RECORD, text.encode())
    with pytest.raises(MbibError, match=message) as refused:
        read_record(tmp_path)
    assert str(tmp_path / RECORD) in str(refused.value)


HEADER = "epoch,lr,train_loss,seconds\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (HEADER + "1,0.1,2.0,nan\n", "column seconds: expected a finite number, got nan"),
        (HEADER + "1e400,0.1,2.0,1\n", "column epoch: expected a finite number"),
        (HEADER + "x,0.1,2.0,1\n", "could not convert"),
        (HEADER + "1,0.1,2.0,1,5\n", "a line has more columns than the first"),
        (HEADER + "1\n", "column lr is empty"),
        ("epoch,lr,train_loss\n0,0.1,5.0\n", "there is no column seconds"),
        (HEADER + '"1,0.1\n', "does not hold the epochs of a run"),
        (HEADER + "9" * 200_000, "field larger than"),
        ("a,b\n1,2\n", "there is no column epoch"),
        (HEADER.encode() + b"\xff", r"summary\.csv: byte \d+ is not UTF-8"),
    ],
)
def test_a_history_that_cannot_be(content, message, tmp_path):
    write(tmp_path / HISTORY, content if isinstance(content, bytes) else content.encode())
    with pytest.raises(MbibError, match=message):
        read_history(tmp_path)


MATRICES = ["", "a,b\n1\n", "class \\ predicted,a\na,x\n", "class \\ predicted,a,b\na,1,2\n"]
CELLS = ["class,predicted,images\na,b,x\n", f"class,predicted,images\na,b,{10**30}\n"]


@pytest.mark.parametrize("text", [*MATRICES, *CELLS])
def test_a_confusion_matrix_that_cannot_be(text, tmp_path):
    assert read_confusion(tmp_path) is None
    write(tmp_path / "confusion.csv", text.encode())
    with pytest.raises(MbibError, match=r"confusion\.csv does not hold a confusion matrix"):
        read_confusion(tmp_path)


@pytest.mark.parametrize("text", ["[]", "{", '{"errors": [5]}', "NaN", "[" * 100_000])
@pytest.mark.parametrize(("file", "read"), [("errors.json", read_errors), ("analysis.json", read_analysis)])
def test_other_results_that_cannot_be(file, read, text, tmp_path):
    write(tmp_path / file, text.encode())
    with pytest.raises(MbibError, match=re.escape(f"{tmp_path / file} does not hold")):
        read(tmp_path)


# Names that somebody else has given

NAME = "\x1b[31m$$<script>|\udce4"


def test_names_are_escaped_on_a_page():
    section = Section(NAME)
    section.gallery([ConfidentError(NAME, NAME, NAME, 0.5, "data:image/png;base64,AA==")])
    section.command(NAME)
    section.facts([(NAME, NAME)])
    section.heading(NAME)
    page = render_page(NAME, NAME, [section])
    assert "\x1b" not in page
    assert "<script>" not in page
    assert "\\x1b[31m$$&lt;script&gt;|\\udce4" in page
    page.encode()
