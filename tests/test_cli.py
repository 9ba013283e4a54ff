"""Bad input: one clear line, exit status 2, no traceback, nothing half-written."""

import errno
import os
import subprocess
import sys

import pytest

from mbib_timm.cli import flag, main, parse, recipe_overrides
from mbib_timm.recipe import TYPES


@pytest.fixture
def fails(tmp_path, capsys):
    """Run a command that must fail, and return its message."""

    def run(*arguments, status=2):
        before = sorted(tmp_path.rglob("*"))
        command = [
            *arguments,
            *(["--output", str(tmp_path / "runs"), "--device", "cpu"] if "train" in arguments else []),
        ]
        command = command if "--device" not in arguments else [*arguments, "--output", str(tmp_path / "runs")]
        assert main(command) == status
        message = capsys.readouterr().err
        assert message.startswith("mbib: error: ")
        assert message.count("\n") == 1
        assert "Traceback" not in message
        assert sorted(tmp_path.rglob("*")) == before
        return message

    return run


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "digts/mbib_resnet20"], "did you mean 'digits/mbib_resnet20'"),
        (["train", "--learning-rate", "1"], "unknown flag '--learning-rate'"),
        (["train", "--lrr", "1"], "did you mean '--lr'"),
        (["train", "--epochs", "many"], "--epochs: invalid int value: 'many'"),
        (["train", "--epochs", "0"], "recipe key 'epochs': expected at least 1, got 0"),
        (["train", "--imbalance-factor", "-3"], "recipe key 'imbalance_factor': expected at least 1, got -3"),
        (["train", "--imbalance-factor", "nan"], "recipe key 'imbalance_factor': expected a finite number, got nan"),
        (["train", "--model", "mbib_resnet33"], "did you mean 'mbib_resnet3"),
        (["train", "--model-kwargs", "tap=3"], "unexpected keyword argument 'tap'"),
        (["train", "--model-kwargs", "taps=[1,99]"], "unknown tap 99"),
        (["train", "--model-kwargs", "taps"], "expected name=value"),
        (["train", "--model-kwargs", "num_classes=5"], "the number of classes is that of the data"),
        (["train", "--loss", "mbibb"], "did you mean 'mbib'"),
        (["train", "--observation-weights", "1", "2"], "observation_weights"),
        (["train", "--opt", "sdg"], "did you mean 'sgd"),
        (["train", "--opt-kwargs", "nope=1"], "opt_kwargs"),
        (["train", "--sched", "cosin"], "did you mean 'cosine'"),
        (["train", "--task", "clasification"], "did you mean 'classification'"),
        (["train", "--dataset", "cifar100"], "did you mean 'torch/cifar100'"),
        (["train", "--dataset", "folder", "--data-dir", "no/such/folder"], "no/such/folder"),
        (["train", "--dataset", "folder"], "data_dir"),
        (["train", "--num-classes", "11"], "11"),
        (["train", "--num-classes", "9"], "9"),
        (["train", "--resume", "no/such/run"], "nothing to resume at no/such/run"),
        (["train", "--device", "cuda:99"], "CUDA"),
        (["train", "--device", "tpu9"], "tpu9"),
        (["train", "--initial-checkpoint", "no/weights.safetensors"], "no weights at no/weights.safetensors"),
        (["train", "--warmup-epochs", "999"], "warmup_epochs"),
        (["train", "extra", "words"], "words"),
        (["trian"], "invalid choice: 'trian'"),
        (["validate", "no_such_model"], "unknown model or folder 'no_such_model'"),
        (["validate", "mbib_resnet20"], "does not say which data"),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else None,
)
def test_bad_input(fails, arguments, expected):
    assert expected in fails(*arguments)


def test_every_recipe_key_is_a_flag():
    for key in TYPES:
        assert flag(key) == f"--{key.replace('_', '-')}"
    arguments = parse(
        [
            "train",
            "--lr",
            "0.5",
            "--no-amp",
            "--mean",
            "0.1",
            "0.2",
            "0.3",
            "--model-kwargs",
            "taps=[1,2]",
            "in_chans=1",
        ]
    )
    assert recipe_overrides(arguments) == {
        "lr": 0.5, "amp": False, "mean": [0.1, 0.2, 0.3], "model_kwargs": {"taps": [1, 2], "in_chans": 1},
    }  # fmt: skip


def test_recipes_lists_what_train_accepts(capsys):
    assert main(["recipes"]) == 0
    names = capsys.readouterr().out.split()
    assert {"digits/mbib_resnet20", "cifar100_lt_if100/mbib_resnet32"} <= set(names)


def test_the_installed_command_answers(tmp_path):
    done = subprocess.run([sys.executable, "-m", "mbib_timm", "train", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "--imbalance-factor" in done.stdout


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]


def test_torchrun_with_two_processes_trains_and_counts_every_sample_once(tmp_path):
    """Two gloo processes; the evaluation of 340 images must not depend on how many processes share it."""
    script = os.path.join(os.path.dirname(__file__), "..", "tools", "train.py")
    flags = ["--epochs", "2", "--warmup-epochs", "1", "--device", "cpu", "--workers", "0", "--output", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*TORCHRUN, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", script, *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "mbib_resnet20.digits"
    assert done.stdout.count(str(folder)) == 1, "one process writes and prints"
    assert main(["validate", str(folder), "--device", "cpu", "--results", str(tmp_path / "one.json")]) == 0
    import json

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
