"""Training: stages, optimisation, checkpoints, and the run that ties them together."""

from mbib_timm.training.stages import train

__all__ = ["train"]
