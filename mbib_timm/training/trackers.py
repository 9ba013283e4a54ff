"""Experiment trackers, on request: TensorBoard, Trackio and Weights & Biases, through their own packages."""

import importlib
import os
from pathlib import Path
from typing import Any, Protocol

from mbib_timm.errors import MbibError
from mbib_timm.recipe import Recipe
from mbib_timm.results.record import Epoch

# By recipe key, what is imported, and its name; the extra of this package is called as the key is.
PACKAGES = {
    "log_tensorboard": ("torch.utils.tensorboard", "TensorBoard"),
    "log_trackio": ("trackio", "Trackio"),
    "log_wandb": ("wandb", "Weights & Biases"),
}


class Tracker(Protocol):
    """Is told the numbers of every epoch."""

    def log(self, epoch: Epoch) -> None:
        """Record an epoch's numbers."""

    def close(self) -> None:
        """Flush and end."""


class TensorBoard:
    """Writes event files under ``tensorboard/`` of the run's folder."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(folder / "tensorboard")

    def log(self, epoch: Epoch) -> None:
        """Record an epoch's numbers."""
        for name, value in epoch.row().items():
            if name != "epoch" and value is not None:
                self.writer.add_scalar(name.replace("_", "/", 1), value, epoch.epoch)

    def close(self) -> None:
        """Flush and end."""
        self.writer.close()


class RunOfTracker:
    """A run of Weights & Biases, or of Trackio, whose runs are alike.

    Args:
        package: the module.
        name: of the run.
        recipe: what is trained.
        given: further arguments of the package's ``init``.
    """

    def __init__(self, package: str, name: str, recipe: Recipe, **given: Any) -> None:
        init = importlib.import_module(package).init
        self.run: Any = init(project="mbib_timm", name=name, config=recipe.to_dict(), **given)

    def log(self, epoch: Epoch) -> None:
        """Record an epoch's numbers."""
        self.run.log({key: value for key, value in epoch.row().items() if value is not None}, step=epoch.epoch)

    def close(self) -> None:
        """Flush and end."""
        self.run.finish()


def require_trackers(recipe: Recipe) -> None:
    """Raise MbibError where the package of a tracker that the recipe asks for is missing."""
    for key, (module, title) in PACKAGES.items():
        if getattr(recipe, key):
            try:
                importlib.import_module(module)
            except ImportError:
                extra = key.removeprefix("log_")
                raise MbibError(f"{key} needs {title}: pip install 'mbib-timm[{extra}]'") from None


def create_trackers(recipe: Recipe, folder: Path, resumed: bool) -> list[Tracker]:
    """Start the trackers that the recipe asks for, named after the run's folder.

    Args:
        recipe: what is trained, and where its folders lie (``output``).
        folder: the run's folder.
        resumed: whether the run goes on from a checkpoint; so does its Trackio run then.
    """
    name = Path(os.path.relpath(folder, recipe.output)).as_posix()
    trackers: list[Tracker] = []
    if recipe.log_tensorboard:
        trackers.append(TensorBoard(folder))
    if recipe.log_trackio:
        trackers.append(RunOfTracker("trackio", name, recipe, resume="allow" if resumed else "never"))
    if recipe.log_wandb:
        trackers.append(RunOfTracker("wandb", name, recipe, dir=str(folder)))
    return trackers
