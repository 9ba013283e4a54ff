"""Training: task, optimisation, checkpoints, and the run that ties them together."""

from mbib_timm.training.run import train

__all__ = ["train"]
