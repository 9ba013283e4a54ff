"""Processes that die: whenever it happens, and in whichever of them, the run goes on to the same bits.

``pytest tests/test_faults.py --faults 20`` kills 20 runs of each setting twice; by default it is one.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import faults
import numpy as np
import pytest
import yaml

TOOLS, HERE = Path(__file__).parents[1] / "tools", Path(__file__).parent
# 12 to 1 images of each class, a few steps an epoch.
SHORT = dict(
    base="digits", model="cifar_resnet20", imbalance_max=24, imbalance_factor=12, batch_size=16, warmup_epochs=1,
    epochs=2, device="cpu", workers=0, checkpoint_seconds=0,
)  # fmt: skip
SETTINGS = {
    "two stages": (dict(stages=[{"method": "ce"}, {"method": "crt"}], model_ema=True, model_ema_decay=0.5), 1),
    "queue": (dict(method={"name": "paco", "queue": 32, "features": 8}), 1),
    "within epochs": (
        dict(method="bsce", checkpoint_steps=2, loader="timm", mixup=0.3, sched_on_updates=True, model_ema=True), 1,
    ),
    "two processes within epochs": (dict(method="ce", checkpoint_steps=1, loader="timm", sched_on_updates=True), 2),
    "two processes with a queue within epochs": (
        dict(method={"name": "paco", "queue": 32, "features": 8}, checkpoint_steps=1), 2,
    ),
}  # fmt: skip
CALLS = ("replace", "fsync")


@pytest.fixture(scope="module", params=SETTINGS)
def setting(request, tmp_path_factory):
    """The command of a setting, its processes, its outcome when nobody disturbs it, its seconds and calls."""
    keys, ranks = SETTINGS[request.param]
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "_"))
    (folder / "own.yaml").write_text(yaml.safe_dump({**SHORT, **keys}))
    argv = ["train", str(folder / "own.yaml"), "--experiment", "run", "--resume", "auto", "--output"]
    start = time.monotonic()
    assert faults.run([*argv, str(folder / "whole")], folder / "log", ranks) == [0] * ranks, log(folder)
    return request.param, folder, argv, ranks, faults.outcome(folder / "whole" / "run"), time.monotonic() - start


def log(folder):
    return (folder / "log").read_text()[-3000:]


@pytest.mark.slow
def test_killed_at_any_moment_it_resumes_to_the_same_bits(setting, faults_asked):
    name, folder, argv, ranks, whole, seconds = setting
    rng = np.random.default_rng(17)
    killed = 0
    first = [*SETTINGS].index(name)
    for number in range(first, first + (faults_asked or 1)):
        output = folder / f"killed{number}"  # of its own: a finished stage beside would be taken
        rank, kind = int(rng.integers(ranks)), ("seconds", *CALLS)[number % 3]
        limit = rng.integers(1, 16) if kind in CALLS else rng.uniform(0.05, 1.0) * seconds
        # Two kills of one run, the second while it resumes. Only the first process writes.
        faults_put_in = f"{rank if kind == 'seconds' else 0} {kind} {limit}", f"{rank} seconds {seconds * rng.random()}"
        for fault in faults_put_in:
            status = faults.run([*argv, str(output)], folder / "log", ranks, fault)
            killed += -9 in status
            assert set(status) <= {0, 1, -9, -15}, log(folder)
        assert faults.run([*argv, str(output)], folder / "log", ranks) == [0] * ranks, (fault, log(folder))
        assert faults.differing(faults.outcome(output / "run"), whole) == [], faults_put_in
        assert faults.debris(output) == [], faults_put_in
        faults.remove(output)
    assert "Traceback" not in (folder / "log").read_text()
    print(f"\n{name}: {number + 1 - first} runs, {killed} kills, all resumed to the same bits")


@pytest.mark.slow
def test_a_process_that_lost_another_says_so_by_itself(tmp_path):
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({**SHORT, "method": "ce"}))
    argv = ["train", str(tmp_path / "own.yaml"), "--output", str(tmp_path), "--experiment", "run"]
    assert faults.run(argv, tmp_path / "log", 2, "1 step 5", grace=60.0) == [1, -9]
    text = log(tmp_path)
    assert "mbib: error: another of the 2 processes has ended, so process 0 does too; the reason is above" in text
    assert "Traceback" not in text


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
            "--rdzv-endpoint", "localhost:0", str(TOOLS / "train.py")]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The command of a run of two processes, whose method takes faults, and its outcome when nobody disturbs it."""
    folder = tmp_path_factory.mktemp("two")
    keys = {**SHORT, "method": "faulty_ce", "plugin": [str(HERE / "faulty_method.py")], "model_ema": True}
    (folder / "own.yaml").write_text(yaml.safe_dump(keys))
    argv = [str(folder / "own.yaml"), "--experiment", "run", "--resume", "auto", "--output"]
    assert faults.run(["train", *argv, str(folder / "whole")], folder / "log", 2) == [0, 0], log(folder)
    return argv, faults.outcome(folder / "whole" / "run")


def goes_on(argv, folder, whole):
    """Whether a run that was disturbed has no result, and goes on to that of one that was not."""
    assert not (folder / "run" / "metrics.json").exists()
    assert faults.run(["train", *argv, str(folder)], folder / "log", 2) == [0, 0], log(folder)
    return faults.differing(faults.outcome(folder / "run"), whole) == []


@pytest.mark.slow
def test_a_process_that_is_killed_takes_the_others_along_and_the_run_goes_on(undisturbed, tmp_path):
    """Started as the README says. The second is killed: the first says so by itself as well, see above."""
    argv, whole = undisturbed
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MBIB_TEST_FAULT": "1 step 5"}
    begin = time.monotonic()
    done = subprocess.run(
        [*TORCHRUN, *argv, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=240
    )
    print(f"\n{time.monotonic() - begin:.1f} s, status {done.returncode}\n{done.stderr}")
    assert done.returncode == 1
    assert time.monotonic() - begin < 120
    assert re.search("Signal 9 .SIGKILL. received by PID", done.stderr)
    assert goes_on(argv, tmp_path, whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "status", "reason"),
    [
        ("0 step 5", [-9, 1], "another of the 2 processes has ended, so process 1 does too"),
        ("1 nan 6", [1, 1], "loss part 'loss' became nan at epoch 2, step 3 in process 1; the last good"),
    ],
)
def test_the_first_process_that_is_killed_and_a_loss_that_is_not_a_number_end_both(
    undisturbed, tmp_path, monkeypatch, fault, status, reason
):
    argv, whole = undisturbed
    with monkeypatch.context() as patch:
        patch.setenv("MBIB_TEST_FAULT", fault)
        assert faults.run(["train", *argv, str(tmp_path)], tmp_path / "log", 2, grace=60.0) == status, log(tmp_path)
    assert reason in log(tmp_path)
    assert "Traceback" not in log(tmp_path)
    assert goes_on(argv, tmp_path, whole)
