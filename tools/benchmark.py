#!/usr/bin/env python
"""Measure the speed targets side by side, on whatever device is there.

    python tools/benchmark.py                                      # everything that this device can measure
    python tools/benchmark.py --only step-resnet32 start           # some of it; the file's other rows stay
    python tools/benchmark.py --only --profile                     # only where the time of a step goes

Contestants take turns within a repeat, ratios are taken within a repeat, and the first repeats warm up: compiling and
capturing are not measured. Images are noise made in memory, 10,847 of 32x32 in the class counts of CIFAR-100-LT IF100
for ResNet32. Prints a table and writes `results/benchmark-<device>.json`: every figure, medians, versions, hardware,
commit, threads; with `--profile` also `results/profile-<device>.md`.

- pipeline: whole passes over the data, from the start of the loader's iteration. "timm" is the plain backbone trained
  as timm's train.py does it: PIL pad-crop and flip in two workers, eager step, `loss.item()` after each, all in a
  process of its own, which nothing that is set here can speed up. Against it the same backbone, batch and precision
  here: resident, compiled, on CUDA captured. Decoding, once a run, is not included. The convolutions alone, forward and
  backward, say what the machine allows.
- side-by-side: on the CPU, two such runs at once, a process and a thread each: their images/s, twice those of the
  slower one, in bf16 over timm's loop in float32 and in bf16, and over two of timm's loops in bf16 on a thread each;
  and in float32 over timm's loop in float32.
- step-*: the training step alone, on one batch on the device; step-methods: that of each method's recipe beside the
  step of cross-entropy on the plain backbone.
- augmentation: whole epochs with strong augmentation beside crop and flip alone.
- memory-*: peak memory of two eager training steps and the model, beyond what was taken before the model was built:
  on CUDA the allocator's, on the CPU the resident memory of a fresh process for each figure.
- evaluate-*: evaluation from resident images, all heads counted, and the plain forward pass alone on one batch.
- predict-*: `mbib predict` on files in a folder, from loading the model to the last row of CSV, beside the forward pass
  of its batches alone, and beside reading and decoding the files alone.
- throughput-resnext50, epochs-200, and epochs-200-sweep, several runs at once in a process each: on CUDA.
- start: `mbib train` on digits, eager, from the end of `import torch, timm`, in a process for each figure;
  start-list: the same with a list of 10,000,000 images, and the memory that it takes.
- memory-classes: tensors that losses with their backward pass, and an evaluation, make of logits of 100,000 classes.
"""

import argparse
import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarking.measurements import MEASURE
from benchmarking.results_file import merge, plain_text, read_results, require_same_machine
from benchmarking.targets import MEASUREMENTS, ROWS
from benchmarking.turns import Settings

from mbib_timm.environment import Environment, World, describe_environment, find_device, join_world
from mbib_timm.errors import MbibError
from mbib_timm.files import to_json, write_bytes
from mbib_timm.flags import Parser


def build_parser() -> Parser:
    """Build the parser."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--only", nargs="*", choices=MEASUREMENTS, metavar="NAME", help=", ".join(MEASUREMENTS))
    parser.add_argument("--device", help="found when not given")
    parser.add_argument("--repeats", type=int, default=5, help="that count, after those that warm up")
    parser.add_argument("--steps", type=int, help="steps of a repeat; each measurement's own when not given")
    parser.add_argument("--pass-images", type=int, help="images of a pass over the data at most")
    parser.add_argument(
        "--torchcompile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compile what the table says is compiled; without, those rows stay as they are",
    )
    parser.add_argument(
        "--torchcompile-large", action="store_true", help="compile ResNeXt50 on the CPU too, which takes minutes"
    )
    parser.add_argument("--profile", action="store_true", help="write where the time of a training step goes")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the results file")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark. Raises MbibError for what the command line or an earlier file do not allow."""
    arguments = build_parser().parse_args(argv)
    for name in ("repeats", "steps", "pass_images"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise MbibError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(arguments, name)}")
    world = join_world(find_device(arguments.device))
    settings = Settings(
        world,
        arguments.repeats,
        arguments.steps,
        arguments.pass_images,
        arguments.torchcompile,
        arguments.torchcompile_large,
    )
    environment = replace(
        describe_environment(world), command=shlex.join(["python", "tools/benchmark.py", *sys.argv[1:]])
    )
    name = device_name(world, environment)
    file = arguments.results / f"benchmark-{name}.json"
    results = read_results(file) if file.is_file() else None
    if results is not None:
        require_same_machine(results, environment, file)
    arguments.results.mkdir(parents=True, exist_ok=True)
    for measurement in chosen(arguments.only, world):
        begun = time.perf_counter()
        results = merge(results, environment, MEASURE[measurement](settings))
        # After each, so that what comes later cannot lose it.
        write_bytes(file, to_json(results))
        print(f"{measurement}: measured in {time.perf_counter() - begun:.0f} s", flush=True)
    if results is not None:
        print(f"\n{plain_text(results)}\n\n{file}")
    if arguments.profile:
        from benchmarking.profiling import write_profile

        text = write_profile(
            settings,
            f"hardware {environment.hardware}, threads {environment.threads}, torch {environment.torch}, "
            f"timm {environment.timm}, commit {environment.commit}",
        )
        (arguments.results / f"profile-{name}.md").write_text(text, encoding="utf-8")
        print(f"{arguments.results / f'profile-{name}.md'}")


def chosen(only: Sequence[str] | None, world: World) -> list[str]:
    """Return what to measure: all that the device can, or what was asked for.

    Raises:
        MbibError: asked for what the device cannot measure.
    """
    device = world.device.type
    impossible = {row.measurement for row in ROWS.values() if not row.is_measured_on(device)}
    if device != "cuda" and not (device == "cpu" and sys.platform == "linux"):
        impossible |= {name for name in MEASUREMENTS if name.startswith("memory-")}
    if only is None:
        return [name for name in MEASUREMENTS if name not in impossible]
    for name in only:
        if name in impossible:
            raise MbibError(f"{name} cannot be measured on {device}")
    return [name for name in MEASUREMENTS if name in only]


def device_name(world: World, environment: Environment) -> str:
    """Return ``cpu``, ``mps``, or the name of the CUDA device: ``nvidia-h200``."""
    if world.device.type != "cuda":
        return world.device.type
    return re.sub(r"[^a-z0-9]+", "-", environment.hardware.lower()).strip("-")


if __name__ == "__main__":
    try:
        main()
    except MbibError as error:
        print(f"benchmark: error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
