"""What a run sets in its process, and what it records of the machine."""

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mbib_timm.data import DataPool
from mbib_timm.environment import World, commit_of, has_bfloat16_instructions
from mbib_timm.recipe import find_recipe, load_recipe
from mbib_timm.training import setup

FAULTS = """
import resource
import torch
from mbib_timm.environment import join_world
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(min(faults() for _ in range(8)))
join_world("cpu")
print(min(faults() for _ in range(8)))
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left alone")
@pytest.mark.parametrize(
    ("limits", "kept"),
    [
        ({}, [False, True]),
        ({"MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "1000000"}, [False, False]),
    ],
)
def test_on_the_cpu_freed_memory_is_used_again_unless_the_user_has_set_limits(limits, kept):
    """Before a run has joined its world, and after that."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | limits
    command = [sys.executable, "-c", FAULTS]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    pages = 4 * 2**24 / os.sysconf("SC_PAGE_SIZE")
    # With huge pages there are fewer faults than small pages; there are none when the memory is still there.
    assert [int(faults) < pages / 1000 for faults in done.stdout.split()] == kept


THREADS = """
from mbib_timm.environment import describe_environment, join_world
print(describe_environment(join_world("cpu")).threads)
"""


@pytest.mark.slow
def test_the_threads_that_are_recorded_are_those_that_the_user_has_set():
    """Two; one is what every other test has."""
    threads = min(2, os.cpu_count() or 1)  # torch takes no more than there are cores
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    command = [sys.executable, "-c", THREADS]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert int(done.stdout) == threads


CPUINFO = Path("/proc/cpuinfo")


@pytest.mark.skipif(not CPUINFO.is_file(), reason="the system does not say")
@pytest.mark.skipif(has_bfloat16_instructions() is None, reason="this torch does not say")
def test_what_a_processor_computes_in_is_what_the_system_says():
    flags = set(CPUINFO.read_text().split())
    assert has_bfloat16_instructions() == bool(flags & {"avx512_bf16", "amx_bf16", "bf16", "svebf16"})


@pytest.mark.parametrize(
    ("able", "keys", "begins"),
    [
        (
            True,
            {},
            "note: with --amp --amp-dtype bfloat16, ResNets train about 1.5 times as fast on this processor, on",
        ),
        (True, {"epochs": 42}, None),  # 467 images: less than 20,000 passes
        (True, {"model": "resnext50_32x4d"}, None),
        (True, {"model": "tf_efficientnet_lite0"}, None),
        (True, {"model": "vit_tiny_patch16_224", "img_size": 32}, None),
        (True, {"amp": True}, None),
        (True, {"amp": False}, None),
        (False, {}, None),
        (False, {"amp": True}, "warning: this processor has no bfloat16 instructions: --amp-dtype bfloat16 works here"),
        (False, {"amp": True, "amp_dtype": "float16"}, None),
        (None, {}, None),
        (None, {"amp": True}, None),
    ],
)
def test_bfloat16_is_advised_where_it_is_faster_and_warned_of_where_it_is_slower(able, keys, begins, monkeypatch):
    monkeypatch.setattr(setup, "has_bfloat16_instructions", lambda: able)
    threads = [1]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[0])
    recipe = load_recipe(find_recipe("cifar_resnet20.ce_digits"), {"device": "cpu", "epochs": 50, **keys})
    splits = DataPool().open(recipe)
    advice = setup.set_up(recipe, splits, World(torch.device("cpu"))).advice
    assert advice is None if begins is None else advice.startswith(begins)
    if begins is not None and begins.startswith("note"):
        threads = [2]
        assert setup.set_up(recipe, splits, World(torch.device("cpu"))).advice is None


def test_advice_is_given_once_a_process():
    pool = DataPool()
    assert [pool.first_time(line) for line in ("a", "a", "b", None)] == [["a"], [], ["b"], []]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository of one commit, and its time of day far from that of its files."""
    for name in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"):
        monkeypatch.setenv(name, os.devnull)

    def git(*arguments):
        return subprocess.run(["git", "-C", tmp_path, *arguments], check=True, capture_output=True, text=True).stdout

    git("init", "-q")
    (tmp_path / "file").write_text("content")
    git("add", "file")
    git("-c", "user.name=n", "-c", "user.email=e", "commit", "-qm", "m")
    return tmp_path, git("rev-parse", "--short=12", "HEAD").strip()


def test_asking_for_the_commit_takes_no_lock(checkout):
    """`git describe --dirty` would write the index, under its lock, where a file's time has changed."""
    folder, commit = checkout
    index = folder / ".git" / "index"
    os.utime(folder / "file", (1e9, 1e9))
    before = index.stat()
    assert commit_of(folder) == commit
    (folder / ".git" / "index.lock").touch()  # somebody is committing
    assert commit_of(folder) == commit
    (folder / "file").write_text("changed")
    assert commit_of(folder) == f"{commit}-dirty"
    assert (index.stat().st_ino, index.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_git_that_does_not_answer_is_not_waited_for(checkout, tmp_path, monkeypatch):
    folder, _ = checkout
    program = tmp_path / "bin" / "git"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("mbib_timm.environment.GIT_SECONDS", 0.2)
    begin = time.monotonic()
    assert commit_of(folder) is None
    assert time.monotonic() - begin < 10
