"""Experiment trackers, on request: TensorBoard and Weights & Biases, through their own packages."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from mbib_timm.errors import MbibError
from mbib_timm.recipe import Recipe
from mbib_timm.results.record import Epoch


class Tracker(Protocol):
    """Is told the numbers of every epoch."""

    def log(self, epoch: Epoch) -> None:
        """Record an epoch's numbers."""

    def close(self) -> None:
        """Flush and end."""


class TensorBoard:
    """Writes event files under ``tensorboard/`` of the run's folder."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise MbibError("log_tensorboard needs TensorBoard: pip install 'mbib-timm[tensorboard]'") from None
        self.writer: Any = SummaryWriter(folder / "tensorboard")

    def log(self, epoch: Epoch) -> None:
        """Record an epoch's numbers."""
        for name, value in epoch.row().items():
            if name != "epoch" and value is not None:
                self.writer.add_scalar(name.replace("_", "/", 1), value, epoch.epoch)

    def close(self) -> None:
        """Flush and end."""
        self.writer.close()


class WeightsAndBiases:
    """Logs to a Weights & Biases run of the same name."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise MbibError("log_wandb needs Weights & Biases: pip install 'mbib-timm[wandb]'") from None
        self.run: Any = wandb.init(project="mbib_timm", name=name, dir=str(folder), config=dict(config))

    def log(self, epoch: Epoch) -> None:
        """Record an epoch's numbers."""
        self.run.log({key: value for key, value in epoch.row().items() if value is not None}, step=epoch.epoch)

    def close(self) -> None:
        """Flush and end."""
        self.run.finish()


def create_trackers(recipe: Recipe, folder: Path, name: str) -> list[Tracker]:
    """Start the trackers that the recipe asks for. Raises MbibError for a package that is missing."""
    trackers: list[Tracker] = []
    if recipe.log_tensorboard:
        trackers.append(TensorBoard(folder))
    if recipe.log_wandb:
        trackers.append(WeightsAndBiases(folder, name, recipe.to_dict()))
    return trackers
