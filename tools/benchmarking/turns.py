"""How a measurement goes: what was chosen, contestants that take turns, and the record of their figures."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch

from mbib_timm.capturing import WARM_UP_CALLS
from mbib_timm.environment import World
from mbib_timm.recipe import Recipe


@dataclass(frozen=True)
class Settings:
    """What the command line chooses.

    Attributes:
        world: device.
        repeats: of every contestant.
        steps: of a repeat; each measurement's own when None.
        pass_images: images of a pass over the data at most; all of them when None.
        torchcompile: compile what is compiled in the table.
        torchcompile_large: compile ResNeXt50 on the CPU as well, which takes minutes.
    """

    world: World
    repeats: int = 5
    steps: int | None = None
    pass_images: int | None = None
    torchcompile: bool = True
    torchcompile_large: bool = False

    @property
    def on_cuda(self) -> bool:
        """True on a CUDA device."""
        return self.world.device.type == "cuda"

    @property
    def pass_warm_ups(self) -> int:
        """Passes after which every batch shape, also the short last one's, has been compiled and captured."""
        return WARM_UP_CALLS + 2 if self.on_cuda else 1


@dataclass(frozen=True)
class Conditions:
    """What was measured, exactly; None for what a measurement has not.

    Attributes:
        batch_size: images per batch.
        torchcompile: the step, or the evaluation, was compiled.
        cuda_graph: the step was captured.
        amp: the recipe's; None also leaves mixed precision to the device.
        amp_dtype: of mixed precision.
        channels_last: memory format.
        workers: processes that load images.
        images: of a pass over the data.
        timm_images: of a pass of timm's loop.
        size: height and width of the images, in pixels.
        steps: of a repeat.
        epochs: of a run.
        recipe: its name.
        recipes: names by method.
        val_interval: epochs from one evaluation to the next.
        jobs: runs at once.
    """

    batch_size: int | None = None
    torchcompile: bool | None = None
    cuda_graph: bool | None = None
    amp: bool | None = None
    amp_dtype: str | None = None
    channels_last: bool | None = None
    workers: int | None = None
    images: int | None = None
    timm_images: int | None = None
    size: int | None = None
    steps: int | None = None
    epochs: int | None = None
    recipe: str | None = None
    recipes: dict[str, str] | None = None
    val_interval: int | None = None
    jobs: int | None = None

    @classmethod
    def of(cls, recipe: Recipe) -> "Conditions":
        """Return what a recipe sets."""
        return cls(
            recipe.batch_size,
            recipe.torchcompile,
            recipe.cuda_graph,
            recipe.amp,
            recipe.amp_dtype,
            recipe.channels_last,
            recipe.workers,
        )


@dataclass(frozen=True)
class Record:
    """What contestants were measured at.

    Attributes:
        name: of the record.
        unit: of the figures.
        figures: one per repeat, by contestant.
        rows: values of rows of the table, one per repeat.
        settings: what was measured, exactly.
    """

    name: str
    unit: str
    figures: dict[str, list[float]]
    rows: dict[str, list[float]]
    settings: Conditions


def wait(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds(action: Callable[[], Any], device: torch.device) -> float:
    """Return how long an action takes, the device's queue included."""
    wait(device)
    start = time.perf_counter()
    action()
    wait(device)
    return time.perf_counter() - start


class OwnProcess:
    """A contestant in a process of its own, which nothing that this package sets in its process can reach.

    Args:
        build: returns the contestant, there; a function of a module.
        arguments: of `build`.
        threads: of the process; torch's own choice when None.
    """

    def __init__(self, build: Callable[..., Callable[[], float]], *arguments: Any, threads: int | None = None) -> None:
        context = get_context("spawn")
        self.executor = ProcessPoolExecutor(1, context, initializer=_build, initargs=(build, arguments, threads))

    def begin(self) -> "Future[float]":
        """Return its figure, once it is there."""
        return self.executor.submit(_figure)

    def __call__(self) -> float:
        """Return its figure."""
        return self.begin().result()

    def end(self) -> None:
        """End the process."""
        self.executor.shutdown()


_built: dict[str, Callable[[], float]] = {}


def _build(build: Callable[..., Callable[[], float]], arguments: tuple[Any, ...], threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
    _built["contestant"] = build(*arguments)


def _figure() -> float:
    return _built["contestant"]()


class AtOnce:
    """A number of contestants of one kind, each in a process of its own, see `OwnProcess`, at the same time."""

    def __init__(
        self, number: int, build: Callable[..., Callable[[], float]], *arguments: Any, threads: int | None = None
    ) -> None:
        self.processes = [OwnProcess(build, *arguments, threads=threads) for _ in range(number)]

    def figures(self) -> list[float]:
        """Return the figure of each."""
        return [figure.result() for figure in [process.begin() for process in self.processes]]

    def images_per_second(self) -> float:
        """Return images/s of all, whose figures are images/s: as many as the slowest times their number."""
        return len(self.processes) * min(self.figures())

    def seconds_each(self) -> float:
        """Return the seconds that one costs, whose figures are seconds: those of the slowest by their number."""
        return max(self.figures()) / len(self.processes)

    def end(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.end()


def take_turns(contestants: dict[str, Callable[[], float]], repeats: int, warm_ups: int = 1) -> dict[str, list[float]]:
    """Return each contestant's figures, one per repeat; every other repeat runs in the opposite order.

    Args:
        contestants: give a figure each time.
        repeats: that count.
        warm_ups: repeats before them that do not.
    """
    figures: dict[str, list[float]] = {name: [] for name in contestants}
    for repeat in range(-warm_ups, repeats):
        for name in list(contestants)[:: -1 if repeat % 2 else 1]:
            figure = contestants[name]()
            if repeat >= 0:
                figures[name].append(figure)
    return figures


def ratios(numerators: list[float], denominators: list[float]) -> list[float]:
    """Return the ratio within each repeat."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def timed(action: Callable[[], Any], device: torch.device, images: int | None = None) -> Callable[[], float]:
    """Return a contestant: the seconds that an action takes, or the images per second."""
    return (lambda: seconds(action, device)) if images is None else (lambda: images / seconds(action, device))
