"""Shared fixtures: one thread a test (so that results repeat), and the folder of shared data where there is one."""

import atexit
import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

# Decoded images go where the tests' other files go, and not into the user's cache.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="mbib_tests.")

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.configuration import set_hypothesis_home_dir

set_hypothesis_home_dir(Path(os.environ["XDG_CACHE_HOME"], "hypothesis"))
# The same inputs every time, in seconds.
settings.register_profile(
    "bounded",
    derandomize=True,
    deadline=2000,
    max_examples=60,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("bounded")
torch.set_num_threads(1)
# A shell starts background jobs with SIGINT ignored, and their children would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with CIFAR-100, sample images and real list files; tests that need it skip without it."""
    folder = Path(os.environ.get("MBIB_SHARED", Path(__file__).parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}")
    return folder


# Files with the longest tests, which come first: at the end only short ones are left, and no process waits for another.
LONGEST = ("test_zoo.py", "test_docs.py", "test_tutorials.py", "test_analysis.py", "test_readme.py")
Drawn = Callable[[], contextlib.AbstractContextManager[None]]


@pytest.fixture(scope="session", autouse=True)
def figures() -> Drawn:
    """Keep runs and sweeps of this process from drawing figures, which takes longer than all else of a short run.

    Returns:
        A context in which they draw them, as in tests that are marked ``figures``.
    """
    from mbib_timm.sweeps import show_sweep
    from mbib_timm.training import stages

    draw_figures, render = stages.draw_figures, show_sweep.render
    stages.draw_figures = lambda *_: None
    show_sweep.render = lambda *_: {}

    @contextlib.contextmanager
    def drawn() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stages, "draw_figures", draw_figures)
            patch.setattr(show_sweep, "render", render)
            yield

    return drawn


@pytest.fixture(autouse=True)
def _figures_where_asked(request, figures: Drawn) -> Iterator[None]:
    with figures() if request.node.get_closest_marker("figures") else contextlib.nullcontext():
        yield


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, figures: Drawn) -> Path:
    """The folder of a short run on the digits, complete with weights, metrics and figures."""
    from mbib_timm.recipe import find_recipe, load_recipe
    from mbib_timm.training import train

    settings = dict(epochs=3, warmup_epochs=1, device="cpu", workers=0, output=str(tmp_path_factory.mktemp("runs")))
    with figures():
        return train(load_recipe(find_recipe("mbib_resnet20.digits"), settings), "mbib_resnet20.digits").folder


@pytest.fixture(scope="session")
def post_hoc_run(tmp_path_factory, figures: Drawn) -> Path:
    """The folder of a short run of two stages, the second of which trains nothing: cross-entropy, then tau-norm."""
    from mbib_timm.recipe import find_recipe, load_recipe
    from mbib_timm.training import train

    name = "cifar_resnet32.tau_norm_digits"
    places = dict(device="cpu", output=str(tmp_path_factory.mktemp("post_hoc")))
    recipe = load_recipe(find_recipe(name), {"stage1.epochs": 3, "stage1.warmup_epochs": 1, **places})
    with figures():
        return train(recipe, name).folder


@pytest.fixture
def faults_asked(request) -> int:
    """How many faults a test of such puts in: the option ``--faults``; 0 for as many as the test finds enough."""
    return request.config.getoption("--faults")


@pytest.fixture
def popen() -> Iterator[Callable[..., "subprocess.Popen[Any]"]]:
    """`subprocess.Popen`, whose processes never outlive the test."""
    started: list[subprocess.Popen[Any]] = []

    def start(*arguments: Any, **options: Any) -> "subprocess.Popen[Any]":
        started.append(subprocess.Popen(*arguments, **options))
        return started[-1]

    yield start
    for process in started:
        with process:  # closes its pipes, and waits for it
            process.kill()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--plugin", action="append", default=[], help="a method of one's own for tests/test_methods.py")
    parser.addoption(
        "--faults",
        type=int,
        default=0,
        help="kills and damages in each test of such, and all faults of the Hub; a few by default",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Longest files first; mark what needs the Hub on loopback; leave out what is not asked for or lacks its GPU."""
    items.sort(key=lambda item: item.path.name not in LONGEST)
    if not config.getoption("--faults"):
        items[:] = [item for item in items if not item.get_closest_marker("all_faults")]
    for item in items:
        if "hub" in getattr(item, "fixturenames", ()):
            item.add_marker("hub")
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_configure(config: pytest.Config) -> None:
    for plugin in config.getoption("--plugin"):
        from mbib_timm.recipe.plugins import load_plugin

        load_plugin(plugin)
