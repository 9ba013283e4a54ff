"""The benchmark: that contestants are who they claim to be, that ratios and verdicts are right, and what is kept."""

import json
import os
import time

import benchmark
import numpy as np
import pytest
import torch
from benchmarking import contestants, noise, results_file, turns
from benchmarking.profiling import Operation, summary
from benchmarking.targets import ROWS, Machine, verdict
from torch import nn
from torch.nn import functional as F

from mbib_timm.environment import Environment, World, join_world
from mbib_timm.errors import MbibError
from mbib_timm.files import to_json
from mbib_timm.recipe import find_recipe, load_recipe
from mbib_timm.training.optimization import Precision

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world() -> World:
    return join_world("cpu")


# Contestants


def test_mbib_is_the_recipes_own_and_plain_differs_in_model_and_method_alone(world):
    mbib, plain = (
        contestants.subject_recipe("resnet32", model, world, compiled=True) for model in contestants.MODELS[::-1]
    )
    own = load_recipe(find_recipe("mbib_resnet32.cifar100_lt_if100"))
    assert (mbib.model, mbib.method, mbib.batch_size) == (own.model, own.method, own.batch_size)
    assert plain.method == {"name": "ce"}
    assert plain.replace(model=mbib.model, method=mbib.method) == mbib


def test_whole_runs_are_on_noise_and_open_no_data(world, monkeypatch):
    monkeypatch.setattr(contestants.WholeRuns, "train", lambda runs, epochs: None)
    recipe = contestants.subject_recipe("resnet32", "mbib", world, compiled=False)
    opened = contestants.WholeRuns(recipe, 8).pool.open(recipe.replace(epochs=9, output="elsewhere"))
    assert [split.reader.name for split in (opened.train, opened.val)] == ["noise", "noise"]


def test_noise_has_the_class_counts_of_the_real_subset(world):
    splits = noise.cifar_like(None)
    assert len(splits.train) == 10_847
    assert len(splits.val) == 10_000
    np.testing.assert_array_equal(np.bincount(splits.train.targets), splits.class_counts)


def test_timms_loop_trains_as_a_plain_loop_does(world):
    recipe = contestants.subject_recipe("resnet32", "plain", world, compiled=False).replace(batch_size=32, workers=0)
    loop = contestants.TimmLoop(recipe, noise.cifar_like(64), world)
    batches = [(images.clone(), targets) for images, targets in loop.loader]
    assert [images.shape for images, _ in batches] == [(32, 3, 32, 32)] * 2
    other = contestants.TimmLoop(recipe, noise.cifar_like(64), world)
    optimizer = torch.optim.SGD(
        other.model.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    other.model.train()
    for images, targets in batches:
        optimizer.zero_grad()
        F.cross_entropy(other.model(images), targets).backward()
        optimizer.step()
    loop.loader = batches
    loop.train_epoch()
    for mine, theirs in zip(loop.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_the_convolutions_are_all_of_the_networks_and_get_the_gradients_of_training(world):
    recipe = contestants.subject_recipe("resnet32", "plain", world, compiled=False).replace(batch_size=4, workers=0)
    model = contestants.TimmLoop(recipe, noise.cifar_like(8), world).model
    images, _ = noise.normalized_noise(4, 32, 100, CPU)
    work = contestants.Convolutions(model, images, Precision.of(recipe, CPU, (3, 32, 32)))
    assert [conv for conv, *_ in work.work] == [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert [inputs.requires_grad for _, inputs, _ in work.work] == [False, *[True] * 30]
    gradients = []
    conv, inputs, gradient = work.work[5]
    conv.weight.register_hook(gradients.append)
    work.take_steps(2)
    expected = nn.grad.conv2d_weight(inputs.detach(), conv.weight.shape, gradient, conv.stride, conv.padding)
    assert len(gradients) == 2
    torch.testing.assert_close(gradients[1], expected, rtol=1e-4, atol=1e-3)


def test_an_action_that_runs_longer_has_the_larger_figure():
    work = torch.ones(300, 300)
    short, long = (turns.timed(lambda n=n: [work @ work for _ in range(n)], CPU) for n in (1, 100))
    figures = turns.take_turns({"short": short, "long": long}, repeats=3)
    assert all(ratio > 1 for ratio in turns.ratios(figures["long"], figures["short"]))


def test_contestants_take_turns_in_changing_order():
    order = []
    contenders = {name: lambda name=name: order.append(name) or float(len(order)) for name in "ab"}
    figures = turns.take_turns(contenders, repeats=3, warm_ups=1)
    assert "".join(order) == "ba" + "ab" + "ba" + "ab"
    assert figures == {"a": [3.0, 6.0, 7.0], "b": [4.0, 5.0, 8.0]}


class Sleeper:
    """Says how long it took, and that there was one thread, by the sign."""

    def __init__(self, folder, number):
        self.folder, self.number = folder, number

    def __call__(self):
        (self.folder / str(os.getpid())).write_text("")
        deadline = time.monotonic() + 60
        while len(list(self.folder.iterdir())) < self.number and time.monotonic() < deadline:
            time.sleep(0.01)
        mine = sorted(int(file.name) for file in self.folder.iterdir()).index(os.getpid())
        return (1.0 + mine) * (1 if torch.get_num_threads() == 1 else -1)


@pytest.mark.slow
def test_contestants_at_once_count_as_the_slowest_of_them(tmp_path):
    """One figure is 1, the other 2: two of the slower one's images/s, or half of the slower one's seconds."""
    both = turns.AtOnce(2, Sleeper, tmp_path, 2, threads=1)
    assert sorted(both.figures()) == [1.0, 2.0]
    assert (both.images_per_second(), both.seconds_each()) == (2.0, 1.0)
    both.end()


@pytest.mark.slow
def test_peak_memory_grows_with_the_batch(world):
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    recipe = contestants.subject_recipe("resnet32", "plain", world, compiled=False)
    peaks = []
    for batch_size in (8, 64):
        with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
            arguments = (recipe, noise.class_counts("resnet32"), batch_size, 32, 1, world)
            peaks.append(fresh.submit(contestants.peak_memory, *arguments).result())
    # 31 convolutions' inputs and outputs: an image takes more than a megabyte.
    assert peaks[1] - peaks[0] > 56 * 2**20


# The table


@pytest.mark.parametrize(
    ("name", "median", "expected"),
    [
        ("pipeline", 1.2, "met"),
        ("pipeline", 0.9, "missed by 25.0 %"),
        ("step-resnet32", 1.03, "met"),
        ("step-resnet32", 1.133, "missed by 10.0 %"),
        ("pipeline-mbib", 0.1, "for information"),
        ("start", None, "not measured: `python tools/benchmark.py --device cpu --only start`"),
        ("epochs-200", None, "not measured: `python tools/benchmark.py --device cuda --only epochs-200`"),
    ],
)
def test_verdicts(name, median, expected):
    assert verdict(ROWS[name], median, Machine("cpu", "some")) == expected


def test_targets_are_the_projects():
    """As the issue that set them has them: on two CPU cores, one H100 and one H200."""
    expected = {
        "pipeline": (1.2, 4, 4),
        "side-by-side": (2.0, 2.0, 2.0),
        "side-by-side-float32": (1.2, 1.2, 1.2),
        "step-resnet32": (1.03, 1.10, 1.10),
        "step-resnext50": (1.03, 1.03, 1.03),
        "augmentation": (1.1, 1.1, 1.1),
        "memory-resnet32": (1.05, 1.05, 1.05),
        "memory-resnext50": (1.05, 1.05, 1.05),
        "evaluate-resnet32": (1.02, 1.10, 1.10),
        "epochs-200": (30, 30, 30),
        "epochs-200-sweep": (20, 20, 20),
        "throughput-resnext50": (3300, 3300, 4400),
        "start": (1, 2, 2),
    }
    machines = [Machine("cpu", "AMD EPYC"), Machine("cuda", "NVIDIA H100 80GB HBM3"), Machine("cuda", "NVIDIA H200")]
    assert {name: tuple(map(ROWS[name].target, machines)) for name in expected} == expected


def environment(commit="aaa"):
    return Environment("0", commit, "2", "1", "cpu", "some", 1, "python", cpu_count=2, threads=2)


def measured(row, values):
    return turns.Record(row, "seconds", {"mbib": values}, {row: values}, turns.Conditions())


def test_a_partial_run_keeps_the_other_rows_with_their_commit():
    first = results_file.merge(None, environment(), [measured("start", [0.4, 0.5, 0.6])])
    both = results_file.merge(first, environment("bbb"), [measured("pipeline", [1.7])])
    rows = {row.row: row for row in both.rows}
    assert (rows["start"].median, rows["start"].commit, rows["start"].verdict) == (0.5, "aaa", "met")
    assert (rows["pipeline"].median, rows["pipeline"].commit) == (1.7, "bbb")
    assert {name: record.commit for name, record in both.records.items()} == {"start": "aaa", "pipeline": "bbb"}
    assert rows["step-resnet32"].verdict.startswith("not measured")
    assert list(rows) == list(ROWS)


def test_the_readmes_table_has_every_row_and_both_kinds_of_device():
    results = results_file.merge(None, environment(), [measured("start", [0.4, 0.5, 1.6])])
    lines = results_file.markdown({"results/benchmark-cpu.json": results}).splitlines()
    assert lines[0] == "| what | `--only` | CPU target | measured | CUDA target | measured |"
    shown = [line for line in lines if line.startswith("| ")][2:]
    assert len(shown) == len(ROWS)
    assert "| start | ≤ 1 | 0.500 (0.400–1.600): met | ≤ 2 | not measured |" in "\n".join(lines)
    assert "| epochs-200 | – | – | ≤ 30 | not measured |" in "\n".join(lines)
    assert "| side-by-side | ≥ 2 | not measured | – | – |" in "\n".join(lines)
    assert lines[-1].startswith("[CPU](results/benchmark-cpu.json): some, 2 of 2 CPU cores, torch 2, timm 1; median")


def test_the_profile_says_what_the_time_goes_to():
    taken = {"aten::convolution_backward": 0.5, "cpp_fused_batch_norm": 0.3, "aten::else": 0.1}
    operations = [Operation(name, seconds, calls=5) for name, seconds in taken.items()]
    line = summary(operations, taken=1.0, steps=10)
    assert line == "100.0 ms per step under the profiler: 50 % convolutions, 30 % fused operations; 20 % other or idle."


# The command


def run(folder, *flags):
    benchmark.main(["--device", "cpu", "--repeats", "2", "--steps", "1", "--results", str(folder), *flags])
    return json.loads((folder / "benchmark-cpu.json").read_text())


@pytest.mark.slow
def test_every_figure_is_in_the_file(tmp_path, capsys):
    flags = ["--pass-images", "160", "--no-torchcompile", "--only"]
    results = run(tmp_path, *flags, "evaluate-resnet32")
    results = run(tmp_path, *flags, "step-resnet32")
    record = results["records"]["evaluate-resnet32"]
    figures = {who: values["repeats"] for who, values in record["contestants"].items()}
    assert {who: len(values) for who, values in figures.items()} == {"plain": 2, "mbib": 2, "plain forward": 2}
    rows = {row["row"]: row for row in results["rows"]}
    ratios = [a / b for a, b in zip(figures["mbib"], figures["plain"], strict=True)]
    assert rows["evaluate-resnet32"]["values"] == ratios
    assert rows["evaluate-resnet32"]["median"] == sum(ratios) / 2
    assert rows["step-resnet32-eager"]["n"] == 2
    assert rows["step-resnet32"]["median"] is None  # nothing has been compiled
    assert {"torch", "timm", "hardware", "commit", "threads", "command"} <= results["environment"].keys()
    assert "MBIB evaluation / plain evaluation, ResNet32" in capsys.readouterr().out


def test_figures_of_another_machine_are_not_mixed_in(tmp_path):
    (tmp_path / "benchmark-cpu.json").write_bytes(to_json(results_file.merge(None, environment(), [])))
    with pytest.raises(MbibError, match=r"was measured with hardware some, this is .* measure into another --results"):
        run(tmp_path, "--only", "start")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--repeats", "0"], "--repeats: expected at least 1, got 0"),
        (["--only", "epochs-200-sweep"], "epochs-200-sweep cannot be measured on cpu"),
        (["--only", "pipeline", "--pass-images", "100"], "expected a whole batch of 128 at least"),
    ],
)
def test_what_cannot_be_measured_is_refused(flags, message, tmp_path):
    with pytest.raises(MbibError, match=message):
        benchmark.main(["--device", "cpu", "--results", str(tmp_path), *flags])
