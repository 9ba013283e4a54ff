#!/usr/bin/env python
"""Measure training and evaluation speed: MBIB beside its plain backbone, on whatever device is there.

    python tools/benchmark.py                       # ResNet32 at 32 px, batch 128
    python tools/benchmark.py --variant resnext50 --img-size 224 --batch-size 64

Batches are random and already on the device, so that the step alone is timed: forward, loss, backward, SGD update.
The two models take turns, and the ratio is the median over the pairs. Prints a table and writes
`results/benchmark-<device>.json`.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from mbib_timm.cli import Parser
from mbib_timm.environment import describe_environment, find_device, join_world
from mbib_timm.errors import MbibError
from mbib_timm.losses import create_loss
from mbib_timm.models.mbib_resnet import VARIANTS
from mbib_timm.recipe import Recipe
from mbib_timm.training.optimization import Precision, create_optimizer
from mbib_timm.training.step import training_step
from mbib_timm.training.task import LongTailTask, head_names


def main() -> None:
    """Run the benchmark."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="resnet32", choices=list(VARIANTS), help="backbone, as in mbib_<variant>")
    parser.add_argument("--img-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--num-classes", type=int, default=100)
    parser.add_argument("--steps", type=int, default=20, help="steps of one repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", help="found when not given")
    parser.add_argument("--torchcompile", action="store_true", help="compile both models")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the results file")
    arguments = parser.parse_args()

    world = join_world(find_device(arguments.device))
    plain = VARIANTS[arguments.variant].backbone.partition(".")[0]
    contestants = {
        plain: Contestant(Recipe(model=plain, loss="ce"), arguments, world.device),
        f"mbib_{arguments.variant}": Contestant(
            Recipe(model=f"mbib_{arguments.variant}", loss="mbib"), arguments, world.device
        ),
    }
    seconds: dict[str, dict[str, list[float]]] = {
        phase: {name: [] for name in contestants} for phase in ("train", "evaluate")
    }
    for phase in seconds:
        for repeat in range(-1, arguments.repeats):
            for name, contestant in contestants.items():
                taken = contestant.time(getattr(contestant, phase))
                if repeat >= 0:  # the first repeat warms up
                    seconds[phase][name].append(taken)

    images = arguments.steps * arguments.batch_size
    rows = {
        phase: {name: summarize([images / s for s in taken]) for name, taken in by_name.items()}
        for phase, by_name in seconds.items()
    }
    ratios = {
        phase: summarize([mbib / base for base, mbib in zip(*by_name.values(), strict=True)])
        for phase, by_name in seconds.items()
    }
    settings = {key: value for key, value in vars(arguments).items() if key not in ("results", "device")}
    results = {
        "settings": settings,
        "images_per_second": rows,
        "time_mbib_over_plain": ratios,
        "environment": describe_environment(world),
    }
    report(rows, ratios)
    arguments.results.mkdir(parents=True, exist_ok=True)
    compiled = "-compiled" if arguments.torchcompile else ""
    file = arguments.results / f"benchmark-{world.device.type}-{arguments.variant}{compiled}.json"
    file.write_text(json.dumps(results, indent=2) + "\n")
    print(f"\n{file}")


class Contestant:
    """A model with its loss and optimizer, and a random batch on the device."""

    def __init__(self, recipe: Recipe, arguments: argparse.Namespace, device: torch.device) -> None:
        torch.manual_seed(0)
        self.steps, self.device = arguments.steps, device
        model = timm.create_model(recipe.model, num_classes=arguments.num_classes)
        self.model = model.to(device, memory_format=torch.channels_last)
        counts = np.arange(1, arguments.num_classes + 1)
        loss = create_loss(recipe, counts, head_names(model))
        self.task = LongTailTask(self.model, loss, device)
        self.optimizer = create_optimizer(recipe, self.model)
        self.precision = Precision.of(recipe, device)
        if arguments.torchcompile:
            self.task.compile()
        size = (arguments.batch_size, 3, arguments.img_size, arguments.img_size)
        self.images = torch.randn(size, device=device).contiguous(memory_format=torch.channels_last)
        self.targets = torch.randint(0, arguments.num_classes, size[:1], device=device)

    def train(self) -> None:
        """One training step."""
        self.task.train()
        training_step(self.task, self.optimizer, self.precision, self.images, self.targets)

    @torch.inference_mode()
    def evaluate(self) -> None:
        """One forward pass in evaluation mode."""
        self.task.eval()
        dtype = self.precision.autocast_dtype
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            self.task.trainable_module(self.images)

    def time(self, step: Callable[[], Any]) -> float:
        """Return the seconds that `steps` steps take, the device's queue included."""
        self.wait()
        start = time.perf_counter()
        for _ in range(self.steps):
            step()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()


def summarize(values: list[float]) -> dict[str, float]:
    """Return median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def report(rows: dict[str, dict[str, dict[str, float]]], ratios: dict[str, dict[str, float]]) -> None:
    """Print the table."""
    print(f"{'':<10} {'model':<18} {'images/s':>9}   {'min - max':>17}   time over plain")
    for phase, by_name in rows.items():
        for i, (name, speed) in enumerate(by_name.items()):
            spread = f"{speed['min']:.0f} - {speed['max']:.0f}"
            ratio = (
                f"{ratios[phase]['median']:.3f} ({ratios[phase]['min']:.3f} - {ratios[phase]['max']:.3f})" if i else ""
            )
            print(f"{phase:<10} {name:<18} {speed['median']:>9.0f}   {spread:>17}   {ratio}")


if __name__ == "__main__":
    try:
        main()
    except MbibError as error:
        print(f"benchmark: error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
