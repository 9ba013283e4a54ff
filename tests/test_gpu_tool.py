"""The tool for a machine with a GPU: its plan, its data, its clock, and what comes back; nothing here needs one."""

import re
import runpy
import sys
import tarfile
import time
from types import SimpleNamespace

import gpu
import numpy as np
import pytest
from archive_images import assert_same
from pack import pack
from PIL import Image

from mbib_timm.data import open_data
from mbib_timm.errors import MbibError
from mbib_timm.recipe import find_recipe, list_sweeps, load_recipe

RECIPE = """
dataset: folder
data_dir: {data}
val_split: test
model: cifar_resnet20
method: ce
imbalance: exp
imbalance_factor: {factor}
workers: 0
"""


@pytest.mark.parametrize("phases", [gpu.PLAN, gpu.DRY])
def test_every_recipe_of_the_plan_exists(phases):
    for phase in phases:
        if isinstance(phase.recipes, str):
            assert phase.recipes in list_sweeps()
            continue
        for name in phase.recipes:
            assert load_recipe(find_recipe(name)).epochs >= 0
    assert len({phase.name for phase in phases}) == len(phases)


@pytest.fixture
def images(tmp_path):
    """Coloured images in class folders: 40 of training and 3 of testing for each of four classes."""
    random = np.random.RandomState(0)
    for split, count in (("train", 40), ("test", 3)):
        for label in "abcd":
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(random.randint(0, 256, (4, 4, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return tmp_path / "images"


def recipe_of(folder, data, factor):
    file = folder / f"if{factor}.yaml"
    file.write_text(RECIPE.format(data=data, factor=factor))
    return file


@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_one_packed_file_holds_the_subsets_of_all_factors_in_their_order(tmp_path, images, image_format):
    """Against the subsets of the images themselves: the same images in the same order, and so the same batches."""
    whole = recipe_of(tmp_path, images, 4)
    pack(load_recipe(whole), tmp_path / "packed.tar", image_format)
    for factor in (20, 10, 4):
        own = open_data(load_recipe(recipe_of(tmp_path, images, factor)))
        packed = open_data(load_recipe(recipe_of(tmp_path, tmp_path / "packed.tar", factor)))
        assert packed.class_counts.tolist() == own.class_counts.tolist()
        assert_same(packed.train, own.train)
        assert_same(packed.val, own.val)


def test_other_images_than_those_of_the_plan_are_refused(tmp_path, images):
    pack(load_recipe(recipe_of(tmp_path, images, 4)), tmp_path / "packed.tar", "png")
    with pytest.raises(MbibError, match=r"packed\.tar does not hold the images of mbib_resnet32\.cifar100_lt_if10"):
        gpu.require_whole(tmp_path / "packed.tar")


SLEEPER = """
import time
try:
    print("on", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("saved")
"""
DEAF = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('on', flush=True)\ntime.sleep(60)\n"


@pytest.mark.parametrize(("code", "said", "grace"), [(SLEEPER, ["on", "saved"], 20), (DEAF, ["on"], 0.5)])
def test_what_runs_when_the_time_is_up_is_interrupted_and_then_killed(tmp_path, monkeypatch, code, said, grace):
    """By a clock that is at the grace before the end once the command has begun, and until then at 0."""
    log, begun, ends = tmp_path / "log.txt", time.monotonic(), 100
    clock = SimpleNamespace(monotonic=lambda: ends - grace if log.exists() and log.read_text() else 0)
    monkeypatch.setattr(gpu, "time", clock)
    monkeypatch.setattr(gpu, "GRACE", grace)
    assert gpu.run_phase([sys.executable, "-c", code], log, ends, gpu.Archives(tmp_path)) is None
    assert time.monotonic() - begun < 60
    assert log.read_text().split() == said


def test_a_command_that_ends_gives_its_status(tmp_path):
    ends = time.monotonic() + 60
    assert gpu.run_phase([sys.executable, "-c", "exit(3)"], tmp_path / "log.txt", ends, gpu.Archives(tmp_path)) == 3


def test_the_archives_hold_results_weights_and_what_is_not_finished(tmp_path):
    finished, other, begun = (tmp_path / "runs" / "s" / name for name in ("a-seed0", "a-seed1", "b-seed0"))
    for run in (finished, other, begun):
        run.mkdir(parents=True)
        (run / "recipe.yaml").write_text("lr: 1\n")
        (run / "last.ckpt").write_bytes(b"x")
    for run in (finished, other):
        (run / "metrics.json").write_text("{}")
        (run / "model.safetensors").write_bytes(b"w")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "table.md").write_text("t")
    gpu.Archives(tmp_path).renew()

    def names(archive):
        with tarfile.open(tmp_path / archive) as opened:
            return sorted(opened.getnames())

    assert names("weights.tar") == ["runs/s/a-seed0/model.safetensors"]
    assert names("checkpoints.tar") == ["runs/s/b-seed0/last.ckpt", "runs/s/b-seed0/recipe.yaml"]
    kept = [f"runs/s/{run}/{file}" for run in ("a-seed0", "a-seed1") for file in ("metrics.json", "recipe.yaml")]
    assert names("results.tar") == ["results/table.md", *kept]
    gpu.take_up(tmp_path, tmp_path / "next")
    assert (tmp_path / "next" / "runs" / "s" / "b-seed0" / "last.ckpt").read_bytes() == b"x"
    with pytest.raises(MbibError, match=r"there is no results\.tar or"):
        gpu.take_up(tmp_path / "nowhere", tmp_path / "next")


@pytest.fixture
def call(monkeypatch, capsys):
    """Call the tool in this process; return what it prints."""

    def called(*arguments):
        monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, arguments)])
        gpu.main()
        return capsys.readouterr().out

    return called


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dry-run"], "expected the packed images, or --dry-run, and -o FOLDER"),
        (["-o", "out"], "expected the packed images, or --dry-run, and -o FOLDER"),
        (["--only", "table2", "--list"], "there is no phase 'table2'; there are checks, benchmark, table1_if100"),
    ],
)
def test_what_cannot_be_is_an_error(arguments, message, tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MbibError, match=message):
        call(*arguments)
    assert not (tmp_path / "out").exists()


def test_an_error_is_a_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "-o", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(gpu.__file__, run_name="__main__")
    assert end.value.code == 2
    assert "gpu: error: expected the packed images" in capsys.readouterr().err


@pytest.mark.slow
def test_a_dry_run_goes_on_where_another_was_stopped(tmp_path, call):
    """With the digits: the first call has no time for its last phase, the second skips what is done."""
    dry = ("--dry-run", "--only", "digits", "--jobs", "1", "-o")
    assert "not begun, the time is up" in call(*dry, tmp_path / "one", "--minutes", "0.4")
    assert "digits: done," in call(*dry, tmp_path / "one")
    assert "digits: done before" in call(*dry, tmp_path / "two", "--from", tmp_path / "one")
    table = (tmp_path / "two" / "results" / "digits-1e" / "table.md").read_text()
    assert re.findall(r"\| (\S+) \| 2 \|", table) == ["cifar_resnet20.ce_digits", "mbib_resnet20.digits"]
