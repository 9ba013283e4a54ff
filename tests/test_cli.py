"""Bad input: one clear line, exit status 2, no traceback, nothing half-written."""

import contextlib
import dataclasses
import errno
import io
import json
import os
import subprocess
import sys
from functools import cache

import pytest

from mbib_timm.cli import COMMANDS, main, parse
from mbib_timm.flags import flag, recipe_overrides
from mbib_timm.methods import METHODS
from mbib_timm.recipe import KEYS, TYPES, list_recipes, load_recipe, packaged_recipes
from mbib_timm.recipe.declared import packaged_methods


@pytest.fixture
def fails(tmp_path, capsys):
    """Run a command that must fail, and return its message."""

    def run(*arguments, status=2):
        before = sorted(tmp_path.rglob("*"))
        command = list(arguments)
        if arguments[:1] == ("train",):
            command += ["--output", str(tmp_path / "runs")]
            command += ["--device", "cpu"] if "--device" not in arguments else []
        assert main(command) == status
        message = capsys.readouterr().err
        assert message.startswith("mbib: error: ")
        assert message.count("\n") == 1
        assert "Traceback" not in message
        assert sorted(tmp_path.rglob("*")) == before
        return message

    return run


# Errors that the command line, the recipe or a method's settings tell, without torch and timm.
BAD_FLAGS = [
    (["train", "mbib_resnet20.digts"], "did you mean 'mbib_resnet20.digits'"),
    (["train", "--learning-rate", "1"], "unknown flag of mbib train '--learning-rate': did you mean '--lr'?"),
    (["train", "--data=x"], "unknown flag of mbib train '--data': did you mean '--data-dir'?"),
    (["predict", "runs/x", "image.png", "--bs", "1"], "unknown flag of mbib predict '--bs': did you mean '--batch-"),
    (["data", "x", "--near"], "valid names, e.g. --broken, --class-map, --csv; mbib data --help lists them."),
    (["train", "--lrr", "1"], "did you mean '--lr'"),
    (["train", "--resume"], "--resume: expected one argument: what to resume: auto, a run's folder, or a checkpoint"),
    (["train", "--opt"], "argument --opt: expected one argument: timm optimizer"),
    (["report", "x", "-o"], "argument -o/--output: expected one argument: file to write (report.html)"),
    (["sweep", "figure3_beta", "--seeds"], "expected at least one argument: seeds to use instead of the sweep's"),
    (["train", "--epochs", "many"], "--epochs: invalid int value: 'many'"),
    (["train", "--epochs", "-1"], "recipe key 'epochs': expected at least 0, got -1"),
    (["train", "--epochs", "0"], "recipe key 'epochs': 0 trains nothing"),
    (["train", "--imbalance", "expo"], "unknown value of recipe key 'imbalance' 'expo': did you mean 'exp'"),
    (["train", "--model-kwargs", "taps"], "expected name=value"),
    (["train", "--model-kwargs", "taps=[1"], "'[1' is not a valid value"),
    (["train", "--loss", "mbib"], "unknown flag of mbib train '--loss'"),
    (["train", "--beta", "3"], "unknown flag of mbib train '--beta'"),
    (["train", "--method.betta", "1"], "unknown setting of method 'mbib': 'betta': did you mean 'beta'"),
    (["train", "--method.beta", "much"], "setting 'beta' of method 'mbib': expected float, got 'much'"),
    (["train", "--method.beta", "-1"], "setting 'beta' of method 'mbib': expected at least 0, got -1"),
    (["train", "--method.beta"], "flag --method.beta needs a value"),
    (["train", "--method.beta", "--method.gamma", "1"], "flag --method.beta needs a value"),
    (["train", "--method.beta", "[1"], "flag --method.beta: '[1' is not a valid value"),
    (["train", "--method.observation-weights.5", "1"], "there is no element '5'"),
    (["train", "--methd.beta", "1"], "unknown recipe key 'methd': did you mean 'method'"),
    (["train", "--clip-mode", "agc"], "recipe key 'clip_mode' has no effect without clip_grad"),
    (["train", "--stage2.lr", "1"], "mbib_resnet20.digits.yaml has no stages"),
    (["train", "--method", "crt"], "method 'crt' starts from a trained model"),
    (["train", "--method", "tau_norm", "--epochs", "0"], "method 'tau_norm' starts from a trained model"),
    (
        ["train", "cifar_resnet32.crt_digits", "--method", "ce"],
        "say which: --stage1.method VALUE or --stage2.method VALUE",
    ),
    (["train", "cifar_resnet32.crt_digits", "--stage2.methd", "ce"], "unknown recipe key 'methd'"),
    (["train", "cifar_resnet32.crt_digits", "--stage2.method.tau", "1"], "unknown setting 'tau': method 'crt' has"),
    (["train", "--sampler", "instance+reverse"], "method 'mbib' takes one stream of images"),
    (["train", "--frozen-bn", "evil"], "did you mean 'eval'"),
    (["train", "--aa", "cifar"], "recipe key 'aa': unknown policy 'cifar'"),
    (["train", "--views", "8"], "argument --views: expected a mapping such as {cutout: 8}, got '8'"),
    (["train", "--views", "{cutout: [}"], "argument --views: expected a mapping"),
    (["train", "--views", "{cutot: 8}"], "unknown key of view 1 'cutot'"),
    (["train", "--plugin", "no/such/plugin.py"], "plugin no/such/plugin.py: there is no such file"),
    (["train", "--plugin", "no_such_module"], "plugin no_such_module cannot be imported"),
    (["train", "--task", "classification"], "unknown flag of mbib train '--task'"),
    (["train", "extra", "words"], "words"),
    (["trian"], "invalid choice: 'trian'"),
    ([], "the following arguments are required: COMMAND"),
    (["sweep", "figure3_bta"], "unknown sweep or recipe 'figure3_bta': did you mean 'figure3_beta'"),
    (["sweep", "figure3_beta", "--lr", "-1"], "recipe key 'lr': expected more than 0, got -1"),
    (["sweep", "figure3_beta", "--seed", "1"], "unknown flag of mbib sweep '--seed'"),
    (["validate", "runs/x", "--img-size", "0"], "recipe key 'img_size': expected at least 1, got 0"),
    (["analyze", "runs/x", "--images-per-class", "0"], "expected a whole number of at least 1, got '0'"),
    (["aggregate", "runs/x", "--lr", "0.1"], "unknown flag of mbib aggregate '--lr'"),
    (["predict", "runs/x", "image.png", "--format", "xml"], "argument --format: invalid choice: 'xml'"),
    (["export", "runs/x"], "the following arguments are required: --format"),
]
# Errors that data, model, timm or the machine tell.
BAD_RUNS = [
    (["train", "--model", "mbib_resnet33"], "did you mean 'mbib_resnet3"),
    (["train", "--model-kwargs", "taps=[1,99]"], "unknown tap 99"),
    (["train", "--model-kwargs", "num_classes=5"], "the number of classes is that of the data"),
    (["train", "--method.observation-weights", "[1, 2]"], "expected 3 numbers, one for each of v1, v2, v3"),
    (["train", "--method", "bib", "--model", "cifar_resnet20"], "observations and a bottleneck, such as bib_resnet20;"),
    (["train", "--method", "mbib", "--model", "cifar_resnet20"], "and a bottleneck, such as mbib_resnet20; this one"),
    (
        ["train", "--model", "mbib_resnet32.cifar100_lt_if100", "--pretrained", "--epochs", "0"],
        "recipe key 'epochs': 0 trains nothing, and classifiers start anew: expected 1 or more, or",
    ),
    (["train", "--sampler", "class_aware:x"], "class_aware:x"),
    (["train", "--dataset", "cifar100"], "did you mean 'torch/cifar100'"),
    (["train", "--dataset", "folder"], "data_dir"),
    (["train", "--num-classes", "11"], "11"),
    (["train", "--num-classes", "9"], "9"),
    (["train", "--device", "cuda:99"], "CUDA"),
    (["train", "--device", "tpu9"], "tpu9"),
    (["train", "--initial-checkpoint", "no/weights.safetensors"], "no weights at no/weights.safetensors"),
    (["sweep", "mbib_resnet20.digits", "--clip-mode", "agc"], "recipe key 'clip_mode' has no effect without clip_grad"),
    (["data", "mbib_resnet20.digits", "--imbalance", "none", "--subset-seed", "1"], "without imbalance: exp or step"),
    (
        ["sweep", "figure3_beta", "--method.betta", "1"],
        "unknown setting of method 'mbib': 'betta': did you mean 'beta'",
    ),
    (["validate", "mbib_resnet20"], "does not say which data to use"),
]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    BAD_RUNS,
    ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else None,
)
def test_bad_input(fails, arguments, expected):
    assert expected in fails(*arguments)


# Help, lists and errors about flags import neither torch nor timm, which take seconds

ANSWERS = """
import contextlib, io, json, sys

class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "timm", "numpy", "PIL", "huggingface_hub"):
            raise AssertionError(f"{name} is imported")

sys.meta_path.insert(0, Refusing())
from mbib_timm.cli import main

answers = []
for words in json.load(sys.stdin):
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            status = main(words)
        except SystemExit as end:
            status = end.code
        except AssertionError as heavy:
            status = str(heavy)
    answers.append([status, out.getvalue(), error.getvalue()])
print(json.dumps(answers))
"""


def answers_of(commands, folder):
    """Exit status, output and error of commands, in one process that cannot import what is heavy."""
    done = subprocess.run(
        [sys.executable, "-c", ANSWERS],
        input=json.dumps(commands),
        cwd=folder,
        env=environment_here(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def environment_here():
    """The environment in which a process finds this package from any folder."""
    root = os.path.join(os.path.dirname(__file__), "..")
    paths = [os.path.abspath(root), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def test_errors_about_flags_are_told_without_torch_and_timm(tmp_path):
    answers = answers_of([arguments for arguments, _ in BAD_FLAGS], tmp_path)
    for (arguments, expected), (status, _, error) in zip(BAD_FLAGS, answers, strict=True):
        assert status == 2, (arguments, status, error)
        assert error.startswith("mbib: error: "), arguments
        assert expected in error
        assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_help_and_lists_are_given_without_torch_and_timm(tmp_path):
    settings = {name: [f"--method={name}"] for name in packaged_methods()}
    for name, method in packaged_methods().items():
        settings[name] += ["--initial-checkpoint=x"] if method.needs_start else []
        settings[name] += ["--epochs=0", "--warmup-epochs=0"] if method.post_hoc else []
    commands = [
        ["--help"],
        ["--version"],
        ["recipes"],
        ["methods"],
        *([name, "--help"] for name in COMMANDS),
        *(["train", name, "--help"] for name in list_recipes()),
        *(["train", "mbib_resnet20.digits", *flags, "--help"] for flags in settings.values()),
    ]
    for words, (status, out, error) in zip(commands, answers_of(commands, tmp_path), strict=True):
        assert (status, error) == (0, ""), words
        assert out


@pytest.mark.parametrize(("words", "status"), [(["train", "--help"], 0), (["train", "--lrr", "1"], 2)])
def test_nor_does_the_command_itself_import_them(tmp_path, words, status):
    command = [sys.executable, "-X", "importtime", "-m", "mbib_timm", *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment_here(), capture_output=True, text=True)
    assert done.returncode == status
    assert ("--imbalance-factor" in done.stdout) == (status == 0)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "yaml" in imported
    assert not imported & {"torch", "timm", "numpy"}


def test_every_recipe_key_is_a_flag():
    for key in TYPES:
        assert flag(key) == f"--{key.replace('_', '-')}"
    flags = "--lr 0.5 --no-amp --mean 0.1 0.2 0.3 --model-kwargs taps=[1,2] in_chans=1"
    arguments = parse(["train", *flags.split()])
    assert recipe_overrides(arguments) == {
        "lr": 0.5, "amp": False, "mean": [0.1, 0.2, 0.3], "model_kwargs": {"taps": [1, 2], "in_chans": 1},
    }  # fmt: skip


def test_recipes_says_what_the_keys_of_a_recipe_say(capsys):
    assert main(["recipes"]) == 0
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in capsys.readouterr().out.splitlines() if line}
    assert lines["mbib_resnet20.digits"] == "digits, exp 24 mbib 60"
    assert "figure3_beta" in lines
    assert lines["cifar_resnet32.crt_cifar100_lt_if50"] == "torch/cifar100, exp 50 ce + crt 200 + 30"
    for name, path in packaged_recipes().items():
        recipe = load_recipe(path)
        assert lines[name].startswith(recipe.dataset)
        assert lines[name].endswith(str(recipe.epochs))


def test_methods_lists_what_a_recipe_may_name(capsys):
    assert main(["methods"]) == 0
    listed = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert set(METHODS) <= set(listed)
    assert all(METHODS[name].title in listed[name] and METHODS[name].citation in listed[name] for name in METHODS)


# A command takes the flags that have an effect on it, and no others

MODEL, RUN = "mbib_resnet32.cifar100_lt_if100", "runs/x"
OTHER_COMMANDS = {
    "data": ["photos"],
    "validate": [MODEL],
    "aggregate": [MODEL],
    "analyze": [MODEL],
    "predict": [MODEL, "image.png"],
    "publish": [RUN],
    "export": [MODEL, "--format", "onnx"],
    "demo": [MODEL],
    "report": [RUN],
    "models": [],
    "methods": [],
    "recipes": [],
}
NO_EFFECT = {
    "--lr": "0.1", "--epochs": "3", "--sampler": "balanced", "--method": "ce", "--hflip": "0.1", "--opt": "adamw",
    "--seed": "1", "--torchcompile": None, "--checkpoint-seconds": "1", "--experiment": "x", "--pretrained": None,
    "--method.beta": "3", "--stage2.lr": "0.1",
}  # fmt: skip


def test_every_command_is_asked():
    assert COMMANDS.keys() == {*OTHER_COMMANDS, "train", "sweep"}


@pytest.mark.parametrize("command", OTHER_COMMANDS)
def test_flags_without_an_effect_are_refused(fails, command):
    for given, value in NO_EFFECT.items():
        if (command, given) == ("aggregate", "--seed"):
            continue  # that one is its own
        message = fails(command, *OTHER_COMMANDS[command], given, *([] if value is None else [value]))
        if "." in given:
            assert message == f"mbib: error: unexpected flag {given}; see mbib {command} --help\n"
        else:
            assert f"unknown flag of mbib {command} '{given}'" in message


def test_evaluations_take_the_keys_that_evaluations_read():
    """By their own declaration: whatever describes data, preprocessing, model and machine, and nothing of training."""
    for key, item in KEYS.items():
        of_training = item.metadata["group"] in ("mixing", "method", "optimisation", "output")
        assert not (of_training and item.metadata["evaluation"] and key != "validation_batch_size"), key
        assert (flag(key) in flags_of("validate")) == item.metadata["evaluation"], key
        assert key == "output" or (flag(key) in flags_of("analyze")) == item.metadata["evaluation"], key


def test_a_sweep_takes_the_keys_of_a_recipe_but_those_it_sets_itself():
    assert {key for key in KEYS if flag(key) not in flags_of("sweep")} == {"seed", "experiment", "resume"}


# Help


@cache
def help_of(*arguments):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as ended:
        main([*arguments, "--help"])
    assert ended.value.code == 0
    return out.getvalue()


def flags_of(command):
    return {word.strip(",") for word in help_of(command).split() if word.startswith("--")}


def section(text, title):
    """The lines of help under a title, in one."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(title))
    end = next((i for i in range(start + 1, len(lines)) if lines[i] and not lines[i].startswith(" ")), len(lines))
    return " ".join(" ".join(lines[start:end]).split())


def test_help_of_a_recipe_shows_its_values_in_groups():
    text = help_of("train", "mbib_resnet20.digits")
    for group in ("data", "input", "mixing", "model", "method", "optimisation", "machine", "output"):
        assert f"\n{group}:" in text
    optimisation = section(text, "optimisation:")
    assert "--lr FLOAT learning rate [0.05]" in optimisation  # the recipe's, not the default
    assert "how gradients are clipped (norm, value, agc) [norm]" in optimisation
    assert "[1]" in section(help_of("train", "mbib_resnet20.digits", "--epochs", "1", "--warmup-epochs", "0"), "optimi")


def test_help_of_a_recipe_shows_its_methods_settings_with_defaults_and_choices():
    text = section(help_of("train", "mbib_resnet20.digits"), "method: mbib (MBIB):")
    assert METHODS["mbib"].citation in text
    assert "--method.beta FLOAT weight of the self-distillation loss (eq. 9) [5.0]" in text
    assert "--method.observation-weights" in text
    assert "[0.1 0.3 1.0]" in text
    sequential = section(help_of("train", "mbib_resnet32.se_mbib_digits"), "method: se_mbib (SE-MBIB):")
    assert "(one, observation) [one]" in sequential
    changed = help_of("train", "mbib_resnet20.digits", "--method", "ldam_drw", "--method.scale", "7")
    assert "[7.0]" in section(changed, "method: ldam_drw (LDAM-DRW):")
    assert "method: mbib" not in changed


def test_help_of_a_recipe_of_stages_shows_each_stages_method():
    text = help_of("train", "cifar_resnet32.tau_norm_digits", "--stage1.method", "focal")
    assert "--stage1.method.gamma FLOAT" in section(text, "stage1.method: focal (Focal):")
    assert "--stage2.method.tau FLOAT" in section(text, "stage2.method: tau_norm (tau-norm):")


def test_help_of_a_recipe_of_stages_shows_the_values_of_each():
    text = help_of("train", "cifar_resnet32.crt_cifar100_lt_if100")
    optimisation = section(text, "optimisation:")
    assert "[stage1 200, stage2 30]" in optimisation
    assert "[stage1 161 181, stage2 11 21]" in optimisation
    assert "learning rate [0.1] " in optimisation, "the same in both"
    assert "[stage1 ce, stage2 crt]" in section(text, "method:")
    assert "Values in [ ] are those of the recipe." in " ".join(text.split())
    assert "Values in [ ]" not in " ".join(help_of("sweep").split()), "which shows none"


def test_help_of_every_method_names_all_of_its_settings():
    for name in METHODS:
        start = ["--initial-checkpoint", "x"] if METHODS[name].needs_start else []
        start += ["--epochs", "0", "--warmup-epochs", "0"] if METHODS[name].post_hoc else []
        text = help_of("train", "mbib_resnet20.digits", "--method", name, *start)
        for item in dataclasses.fields(METHODS[name].Settings):
            assert f"--method.{item.name.replace('_', '-')}" in text
            assert item.metadata["help"].split()[0] in text


def test_help_of_what_cannot_be_is_an_error_too(fails):
    assert "did you mean 'mbib_resnet20.digits'" in fails("train", "mbib_resnet20.digts", "--help")
    assert "unknown setting" in fails("train", "--method.betta", "1", "--help")


def test_settings_and_stages_are_flags():
    arguments = parse(["train", "--method.beta", "3", "--stage2.method.observation-weights=[1, 2]", "--lr", "0.5"])
    assert recipe_overrides(arguments) == {
        "lr": 0.5, "method.beta": 3, "stage2.method.observation_weights": [1, 2],
    }  # fmt: skip
    views = parse(["train", "--views", "{}", "{cutout: 8, aa: null}"])
    assert recipe_overrides(views) == {"views": [{}, {"cutout": 8, "aa": None}]}
    assert recipe_overrides(parse(["train", "--plugin", "a.py", "--plugin", "b.py"])) == {"plugin": ["a.py", "b.py"]}
    assert recipe_overrides(parse(["train", "--train", "classifier", "--reset", "none"])) == {
        "train": "classifier", "reset": "none",
    }  # fmt: skip


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]


@pytest.mark.slow
def test_torchrun_with_two_processes_trains_and_counts_every_sample_once(tmp_path):
    """Two gloo processes; the evaluation of 340 images must not depend on how many processes share it."""
    script = os.path.join(os.path.dirname(__file__), "..", "tools", "train.py")
    flags = ["--epochs", "1", "--warmup-epochs", "0", "--device", "cpu", "--workers", "0", "--output", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*TORCHRUN, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", script, *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "mbib_resnet20.digits"
    assert done.stdout.count(str(folder)) == 1, "one process writes and prints"
    assert main(["validate", str(folder), "--device", "cpu", "--results", str(tmp_path / "one.json")]) == 0
    alone = json.loads((tmp_path / "one.json").read_text())["heads"]
    shared = json.loads((folder / "metrics.json").read_text())
    assert shared["environment"]["processes"] == 2
    for head, values in shared["result"]["heads"].items():
        assert values["per_class"] == alone[head]["per_class"]


def test_a_folder_that_may_not_be_written_is_an_error(monkeypatch, capsys):
    def denied(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", "runs/x")

    monkeypatch.setattr("mbib_timm.cli.run", denied)
    assert main(["recipes"]) == 2
    assert capsys.readouterr().err == "mbib: error: Permission denied: runs/x\n"
