"""Augmentation policies: which operations an image goes through, drawn at random. Recipe key ``aa``.

``cifar10``: what AutoAugment found for CIFAR-10 (Cubuk et al. 2019): one of 25 pairs of operations, each with a
probability and a level of its own. ``rand-m9-n2-mstd0.5-inc1``: RandAugment (Cubuk et al. 2020) as timm has it, in
timm's notation. timm's other policies work on single images, and so on timm's loader alone.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mbib_timm.data.images import channelwise
from mbib_timm.data.pixels import NOTHING, NUMBER
from mbib_timm.recipe import Recipe
from mbib_timm.recipe.policy_names import parse_policy

CIFAR10, CIFAR10_FILL = "cifar10", 128
# Operation, probability in tenths and level 0 to 9, twice for each pair.
_CIFAR10_PAIRS = """
    invert 1 7 contrast 2 6         rotate 7 2 translate_x 3 9      sharpness 8 1 sharpness 9 3
    shear_y 5 8 translate_y 7 9     autocontrast 5 8 equalize 9 2   shear_y 2 7 posterize 3 7
    color 4 3 brightness 6 7        sharpness 3 9 brightness 7 9    equalize 6 5 equalize 5 1
    contrast 6 7 sharpness 6 5      color 7 7 translate_x 5 8       equalize 3 7 autocontrast 4 8
    translate_y 4 3 sharpness 2 6   brightness 9 6 color 2 8        solarize 5 2 invert 0 3
    equalize 2 0 autocontrast 6 0   equalize 2 8 equalize 6 4       color 9 9 equalize 6 6
    autocontrast 8 4 solarize 2 8   brightness 1 3 color 7 0        solarize 4 5 autocontrast 9 3
    translate_y 9 9 translate_y 7 9 autocontrast 9 2 solarize 8 3   equalize 8 8 invert 1 3
    translate_y 7 9 autocontrast 9 1
"""
# From the share 0..1 of the largest level to the argument; and whether its distance from `around` has a random sign.
_CIFAR10_LEVELS = {
    "shear_y": (0.0, 0.3),
    "translate_x": (0.0, 150 / 331),
    "translate_y": (0.0, 150 / 331),
    "rotate": (0.0, 30.0),
    "brightness": (1.0, 0.9),
    "contrast": (1.0, 0.9),
    "color": (1.0, 0.9),
    "sharpness": (1.0, 0.9),
}


def mean_color(recipe: Recipe, channels: int) -> tuple[int, ...]:
    """Return the fill value outside the image of policies other than `CIFAR10`, as timm has it: the mean of each
    channel."""
    return tuple(min(255, round(255 * value)) for value in channelwise(recipe.settled("mean"), channels))


class Policy(Protocol):
    """Draws operations for images."""

    def draw(self, n: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Return the operations, (n, steps), int64, `NOTHING` where there is none, and their arguments, float64."""


class AutoAugmentCifar10:
    """AutoAugment's policy for CIFAR-10 (Cubuk et al. 2019)."""

    def __init__(self) -> None:
        words = _CIFAR10_PAIRS.split()
        names, tenths, levels = words[::3], [int(word) for word in words[1::3]], [int(word) for word in words[2::3]]
        arguments = [_cifar10_argument(name, level) for name, level in zip(names, levels, strict=True)]
        self.operations = torch.tensor([NUMBER[name] for name in names]).view(-1, 2)
        self.probabilities = torch.tensor(tenths).view(-1, 2) / 10
        self.around, self.reach = torch.tensor(arguments, dtype=torch.float64).view(-1, 2, 2).unbind(-1)

    def draw(self, n: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Draw a pair for each of n images."""
        pairs = torch.randint(len(self.operations), (n,), generator=generator)
        applied = torch.rand(n, 2, generator=generator) < self.probabilities[pairs]
        signs = 2 * torch.randint(2, (n, 2), generator=generator) - 1
        operations = self.operations[pairs].masked_fill(~applied, NOTHING)
        return operations, self.around[pairs] + signs * self.reach[pairs]


def _cifar10_argument(name: str, level: int) -> tuple[float, float]:
    """Return what an operation's argument lies around, and how far from it, with a random sign."""
    if name in _CIFAR10_LEVELS:
        around, largest = _CIFAR10_LEVELS[name]
        return around, largest * level / 9
    fixed = {"posterize": float(round(8 - 4 * level / 9)), "solarize": 256 - 256 * level / 9}
    return fixed.get(name, 0.0), 0.0


@dataclass(frozen=True)
class RandAugment:
    """RandAugment as timm has it: `steps` operations of 15, drawn with replacement, each applied with a probability.

    Args:
        magnitude: 0 to 10.
        steps: operations that an image may go through.
        deviation: standard deviation of the magnitude.
        probability: of each operation.
        increasing: posterize, solarize and the enhancements too get stronger with the magnitude (timm's ``inc``).
    """

    magnitude: float = 10.0
    steps: int = 2
    deviation: float = 0.0
    probability: float = 0.5
    increasing: bool = False

    def draw(self, n: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Draw the operations of n images."""
        shape = (n, self.steps)
        operations = torch.randint(len(NUMBER), shape, generator=generator)
        applied = torch.rand(shape, generator=generator) < self.probability
        noise = torch.randn(shape, dtype=torch.float64, generator=generator)
        signs = (2 * torch.randint(2, shape, generator=generator) - 1).double()
        share = (self.magnitude + self.deviation * noise).clamp(0, 10) / 10
        if self.increasing:
            factor = (1 + 0.9 * signs * share).clamp(min=0.1)
            bits, threshold = 4 - (4 * share).floor(), 256 - (256 * share).floor()
        else:
            factor, bits, threshold = 0.1 + 1.8 * share, (4 * share).floor(), (256 * share).floor().clamp(max=256)
        arguments = {
            "shear_x": signs * 0.3 * share,
            "shear_y": signs * 0.3 * share,
            "translate_x": signs * 0.45 * share,
            "translate_y": signs * 0.45 * share,
            "rotate": signs * 30 * share,
            "brightness": factor,
            "contrast": factor,
            "color": factor,
            "sharpness": factor,
            "posterize": bits,
            "solarize": threshold,
            "solarize_add": (110 * share).floor().clamp(max=128),
        }
        chosen = torch.zeros(shape, dtype=torch.float64)
        for name, values in arguments.items():
            chosen = torch.where(operations == NUMBER[name], values, chosen)
        return operations.masked_fill(~applied, NOTHING), chosen


def create_policy(aa: str) -> Policy | None:
    """Return the policy of a recipe's ``aa``; None for one that only timm has.

    Raises:
        MbibError: a name that is neither one of ours nor one of timm's.
    """
    name, given, operations = parse_policy(aa)
    if name == CIFAR10:
        return AutoAugmentCifar10()
    # timm draws magnitudes uniformly where their deviation is above 100.
    if name != "rand" or operations is not None or "mmax" in given or given.get("mstd", 0.0) > 100:
        return None
    return RandAugment(
        given.get("m", 10.0),
        int(given.get("n", 2)),
        given.get("mstd", 0.0),
        given.get("p", 0.5),
        bool(given.get("inc", 0)),
    )
