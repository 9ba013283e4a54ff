"""The measurements: contestants take turns within a repeat, and ratios are taken within a repeat."""

import contextlib
import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from timm import create_model
from torch import Tensor

from benchmarking.contestants import (
    MODELS,
    SUBJECTS,
    Convolutions,
    Trainer,
    WholeRuns,
    method_recipe,
    peak_memory,
    require_compiled,
    resident_contestant,
    run_contestant,
    subject_recipe,
    timm_contestant,
    write_model,
)
from benchmarking.live_memory import over_logits
from benchmarking.noise import cifar_like, class_counts, decoded_noise, normalized_noise, photographs
from benchmarking.targets import CPU_JOBS, LOSSES_OF_CLASSES, METHOD_RECIPES, SWEEP_JOBS
from benchmarking.turns import AtOnce, Conditions, OwnProcess, Record, Settings, ratios, take_turns, timed
from mbib_timm.capturing import WARM_UP_CALLS
from mbib_timm.data import DataPool, create_loaders
from mbib_timm.data.batch import Batch, TrainLoader
from mbib_timm.data.loaders import ResidentLoader
from mbib_timm.data.samplers import TrainingSampler
from mbib_timm.environment import World
from mbib_timm.errors import MbibError
from mbib_timm.evaluation.evaluate import AnswerLog
from mbib_timm.evaluation.metrics import batch_statistics
from mbib_timm.inference.inputs import find_images
from mbib_timm.inference.predict import predict
from mbib_timm.inference.prediction_files import OutputChoice
from mbib_timm.inference.predictor import Predictor
from mbib_timm.methods import METHODS, Facts, Method
from mbib_timm.models.weights import load_model
from mbib_timm.recipe import DEFAULT_RECIPE, Recipe

# In the second, the optimizer has its buffers.
MEMORY_STEPS = 2
EPOCHS = 200  # of whole runs
PREDICTED_BATCH = 64


def pipeline(settings: Settings) -> Iterator[Record]:
    """Measure whole passes over CIFAR-100-LT IF100's shape: loader, augmentation, transfer, steps."""
    world, device = settings.world, settings.world.device
    splits = cifar_like(settings.pass_images)
    recipes = {model: subject_recipe("resnet32", model, world, settings.torchcompile) for model in MODELS}
    if len(splits.train) < recipes["plain"].batch_size:
        raise MbibError(f"--pass-images: expected a whole batch of {recipes['plain'].batch_size} at least")
    timm = OwnProcess(
        timm_contestant, subject_recipe("resnet32", "plain", world, compiled=False), settings.pass_images, world
    )
    contestants: dict[str, Callable[[], float]] = {"timm": timm}
    pool = DataPool()
    trainers = {model: Trainer(recipe, splits.class_counts, world) for model, recipe in recipes.items()}
    for model, recipe in recipes.items():
        loader = create_loaders(splits, recipe, (3, 32, 32), device, pool=pool).train
        contestants[model] = timed(partial(trainers[model].train_epoch, loader), device, len(splits.train))
    batch, _ = normalized_noise(recipes["plain"].batch_size, 32, splits.num_classes, device)
    convolutions = Convolutions(trainers["plain"].model, batch, trainers["plain"].precision)
    steps = max(1, len(splits.train) // len(batch) // 2)
    contestants["convolutions"] = timed(partial(convolutions.take_steps, steps), device, steps * len(batch))
    figures = take_turns(contestants, settings.repeats, settings.pass_warm_ups)
    timm.end()
    require_compiled()
    rows = {
        "pipeline": ratios(figures["plain"], figures["timm"]),
        "pipeline-mbib": ratios(figures["mbib"], figures["timm"]),
        "pipeline-convolutions": ratios(figures["convolutions"], figures["timm"]),
    }
    # timm's loader leaves the last short batch out.
    timm_images = len(splits.train) // len(batch) * len(batch)
    described = replace(Conditions.of(recipes["plain"]), images=len(splits.train), timm_images=timm_images)
    yield Record("pipeline", "images/s", figures, rows, described)


def side_by_side(settings: Settings) -> Iterator[Record]:
    """Measure two runs at once on a thread each, in bf16 and in float32, beside one of timm's loops and two such."""
    world, images = settings.world, settings.pass_images
    float32 = subject_recipe("resnet32", "plain", world, compiled=False)
    bf16 = float32.replace(amp=True, amp_dtype="bfloat16")
    ours = bf16.replace(torchcompile=settings.torchcompile)
    two = AtOnce(CPU_JOBS, resident_contestant, ours, images, world, threads=1)
    two_float32 = AtOnce(CPU_JOBS, resident_contestant, ours.replace(amp=False), images, world, threads=1)
    two_of_timm = AtOnce(CPU_JOBS, timm_contestant, bf16, images, world, threads=1)
    timm = {
        "timm": OwnProcess(timm_contestant, float32, images, world),
        "timm bf16": OwnProcess(timm_contestant, bf16, images, world),
    }
    contestants: dict[str, Callable[[], float]] = {
        **timm,
        "two runs": two.images_per_second,
        "two runs float32": two_float32.images_per_second,
        "two of timm": two_of_timm.images_per_second,
    }
    figures = take_turns(contestants, settings.repeats, settings.pass_warm_ups)
    for process in (*two.processes, *two_float32.processes, *two_of_timm.processes, *timm.values()):
        process.end()
    rows = {
        "side-by-side": ratios(figures["two runs"], figures["timm"]),
        "side-by-side-float32": ratios(figures["two runs float32"], figures["timm"]),
        "side-by-side-bf16": ratios(figures["two runs"], figures["timm bf16"]),
        "side-by-side-timm": ratios(figures["two runs"], figures["two of timm"]),
    }
    described = replace(Conditions.of(ours), images=len(cifar_like(images).train), jobs=CPU_JOBS)
    yield Record("side-by-side", "images/s", figures, rows, described)


def step(subject: str, settings: Settings) -> Iterator[Record]:
    """Measure the training step alone, on one batch that is on the device."""
    world, device = settings.world, settings.world.device
    batch_size, size, steps = batch_of(subject, settings)
    steps = settings.steps or steps
    counts = class_counts(subject)
    compiled = settings.torchcompile and (subject == "resnet32" or settings.on_cuda or settings.torchcompile_large)
    for kind in ("eager", "compiled") if compiled else ("eager",):
        recipes = {model: subject_recipe(subject, model, world, kind == "compiled") for model in MODELS}
        batch = normalized_noise(batch_size, size, len(counts), device)
        trainers = {model: Trainer(recipe, counts, world) for model, recipe in recipes.items()}
        for trainer in trainers.values():
            trainer.take_steps(*batch, WARM_UP_CALLS + 1 if settings.on_cuda else 1)
        contestants = {
            model: timed(partial(trainer.take_steps, *batch, steps), device) for model, trainer in trainers.items()
        }
        figures = take_turns(contestants, settings.repeats)
        require_compiled()
        row = f"step-{subject}" if kind == "compiled" else f"step-{subject}-eager"
        described = replace(Conditions.of(recipes["plain"]), batch_size=batch_size, size=size, steps=steps)
        yield Record(
            row, f"seconds for {steps} steps", figures, {row: ratios(figures["mbib"], figures["plain"])}, described
        )


def step_of_methods(settings: Settings) -> Iterator[Record]:
    """Measure the training step of each method's recipe beside that of cross-entropy, on one batch on the device."""
    world, device = settings.world, settings.world.device
    batch_size, size, steps = batch_of("resnet32", settings)
    steps = settings.steps or steps
    counts = class_counts("resnet32")
    recipes = {"CE": subject_recipe("resnet32", "plain", world, compiled=settings.on_cuda)}
    recipes |= {title: method_recipe(name, world) for title, name in METHOD_RECIPES.items()}
    images, targets = normalized_noise(batch_size, size, len(counts), device)
    contestants = {}
    for title, recipe in recipes.items():
        trainer = Trainer(recipe, counts, world)
        trainer.take_steps(images, targets, WARM_UP_CALLS + 1 if settings.on_cuda else 1)
        contestants[title] = timed(partial(trainer.take_steps, images, targets, steps), device)
    figures = take_turns(contestants, settings.repeats)
    rows = {f"step-methods-{title}": ratios(figures[title], figures["CE"]) for title in METHOD_RECIPES}
    described = replace(
        Conditions.of(recipes["CE"]), batch_size=batch_size, size=size, steps=steps, recipes=METHOD_RECIPES
    )
    yield Record("step-methods", f"seconds for {steps} steps", figures, rows, described)


def augmentation(settings: Settings) -> Iterator[Record]:
    """Measure whole epochs with strong and with plain augmentation, and batches of two views without training."""
    world, device = settings.world, settings.world.device
    splits = cifar_like(settings.pass_images)
    pool = DataPool()
    plain = subject_recipe("resnet32", "plain", world, settings.torchcompile)
    strong = plain.replace(aa="cifar10", cutout=16)
    two_views = method_recipe(METHOD_RECIPES["PaCo"], world)
    views = two_views.augmentations()
    loaders = {
        "plain": create_loaders(splits, plain, (3, 32, 32), device, pool=pool).train,
        "strong": create_loaders(splits, strong, (3, 32, 32), device, pool=pool).train,
        "two views": create_loaders(splits, two_views, (3, 32, 32), device, pool=pool, views=views).train,
    }
    trainer = Trainer(plain, splits.class_counts, world)
    epochs = {f"{name} epoch": partial(trainer.train_epoch, loaders[name]) for name in ("plain", "strong")}
    batches = {f"{name} batches": partial(through, loaders[name]) for name in ("plain", "two views")}
    contestants = {name: timed(action, device) for name, action in (epochs | batches).items()}
    figures = take_turns(contestants, settings.repeats, settings.pass_warm_ups)
    require_compiled()
    rows = {
        "augmentation": ratios(figures["strong epoch"], figures["plain epoch"]),
        "augmentation-views": ratios(figures["two views batches"], figures["plain batches"]),
    }
    yield Record(
        "augmentation", "seconds per pass", figures, rows, replace(Conditions.of(plain), images=len(splits.train))
    )


def through(loader: TrainLoader) -> None:
    """Go through the batches of an epoch."""
    loader.set_epoch(0)
    for _ in loader:
        pass


def memory(subject: str, settings: Settings) -> Iterator[Record]:
    """Measure the peak memory of eager training steps: see `peak_memory`; on the CPU in a process each."""
    batch_size, size, _ = batch_of(subject, settings)
    recipes = {model: subject_recipe(subject, model, settings.world, compiled=False) for model in MODELS}

    def measure(model: str) -> float:
        arguments = (recipes[model], class_counts(subject), batch_size, size, MEMORY_STEPS, settings.world)
        if settings.on_cuda:
            return peak_memory(*arguments)
        with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
            return fresh.submit(peak_memory, *arguments).result()

    figures = take_turns({model: partial(measure, model) for model in MODELS}, settings.repeats, warm_ups=0)
    row = f"memory-{subject}"
    described = replace(Conditions.of(recipes["plain"]), batch_size=batch_size, size=size, steps=MEMORY_STEPS)
    yield Record(row, "bytes", figures, {row: ratios(figures["mbib"], figures["plain"])}, described)


def evaluation(subject: str, settings: Settings) -> Iterator[Record]:
    """Measure evaluation from resident images, all heads counted, beside the plain forward pass on one batch."""
    world, device = settings.world, settings.world.device
    _, size, _ = batch_of(subject, settings)
    counts = class_counts(subject)
    images = settings.pass_images or (10_240 if settings.on_cuda else 2_560)
    recipes = {model: subject_recipe(subject, model, world, settings.torchcompile) for model in MODELS}
    decoded = decoded_noise(images, size, size, len(counts), device)
    loader = ResidentLoader(decoded, recipes["plain"], (3, size, size), World(device), None)
    trainers = {model: Trainer(recipe, counts, world) for model, recipe in recipes.items()}
    batch, _ = normalized_noise(min(images, recipes["plain"].validation_batch_size), size, len(counts), device)
    actions = {model: partial(trainer.evaluate, loader) for model, trainer in trainers.items()}
    actions["plain forward"] = partial(trainers["plain"].forward_only, batch, len(loader))
    contestants = {who: timed(action, device) for who, action in actions.items()}
    figures = take_turns(contestants, settings.repeats)
    require_compiled()
    row = f"evaluate-{subject}"
    rows = {
        row: ratios(figures["mbib"], figures["plain"]),
        f"{row}-forward": ratios(figures["mbib"], figures["plain forward"]),
    }
    described = replace(Conditions.of(recipes["plain"]), images=images, size=size, batch_size=len(batch))
    yield Record(row, "seconds per pass", figures, rows, described)


def prediction(subject: str, settings: Settings) -> Iterator[Record]:
    """Measure `mbib predict` of files, with loading the model and writing CSV, beside the bare forward pass."""
    device = settings.world.device
    _, size, _ = batch_of(subject, settings)
    counts = class_counts(subject)
    images = settings.pass_images or 2_000
    recipe = subject_recipe(subject, "mbib", settings.world, compiled=False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model", recipe, size, counts)
        photographs(folder / "images", images, (32, 32) if subject == "resnet32" else (500, 375))
        model = load_model(str(folder / "model"))
        predictor = Predictor(model, device=device)
        (found,) = find_images([str(folder / "images")])
        batch, _ = normalized_noise(PREDICTED_BATCH, size, len(counts), device)
        whole = (batch,) * (images // PREDICTED_BATCH) + (batch[: images % PREDICTED_BATCH],)

        @torch.inference_mode()
        def forward() -> None:
            for part in whole:
                predictor.module(part)

        def command() -> None:
            with contextlib.redirect_stdout(io.StringIO()):
                predict(
                    str(folder / "model"),
                    [str(folder / "images")],
                    OutputChoice(file=folder / "out.csv"),
                    batch_size=PREDICTED_BATCH,
                    device=str(device),
                )

        actions = {
            "mbib predict": command,
            "reading": lambda: sum(len(part) for part, *_ in predictor.batches(found.images, PREDICTED_BATCH)),
            "forward": forward,
        }
        figures = take_turns({who: timed(action, device) for who, action in actions.items()}, settings.repeats)
    row = f"predict-{subject}"
    rows = {
        row: ratios(figures["mbib predict"], figures["forward"]),
        f"{row}-reading": ratios(figures["reading"], figures["forward"]),
    }
    yield Record(row, "seconds per pass", figures, rows, Conditions(PREDICTED_BATCH, images=images, size=size))


def throughput(settings: Settings) -> Iterator[Record]:
    """Measure training on resident images of 375x500 pixels: random resized crops, jitter, MBIB-ResNeXt50's steps."""
    world, device = settings.world, settings.world.device
    recipe = subject_recipe("resnext50", "mbib", world, settings.torchcompile)
    images = settings.pass_images or 6_400
    counts = class_counts("resnext50")
    decoded = decoded_noise(images, 375, 500, len(counts), device)
    order = TrainingSampler(decoded.targets.cpu().numpy(), len(counts), recipe, World(device))
    loader = ResidentLoader(decoded, recipe, (3, 224, 224), World(device), order)
    epoch = partial(Trainer(recipe, counts, world).train_epoch, TrainLoader([loader]))
    speeds = take_turns({"mbib": timed(epoch, device, images)}, settings.repeats, settings.pass_warm_ups)
    require_compiled()
    rows = {"throughput-resnext50": speeds["mbib"]}
    yield Record(
        "throughput-resnext50", "images/s", speeds, rows, replace(Conditions.of(recipe), images=images, size=224)
    )


def runs_recipe(settings: Settings) -> Recipe:
    """Return MBIB's recipe for whole runs, evaluated every fifth epoch."""
    return subject_recipe("resnet32", "mbib", settings.world, settings.torchcompile).replace(val_interval=5)


def epochs(settings: Settings) -> Iterator[Record]:
    """Measure whole runs of `mbib train`, without compiling: a short run has done that."""
    recipe = runs_recipe(settings)
    runs = WholeRuns(recipe, settings.pass_images)
    inside: list[float] = []
    whole = timed(lambda: inside.append(runs.train(EPOCHS)), settings.world.device)
    figures = take_turns({"whole run": whole}, settings.repeats, warm_ups=0)
    figures["training and evaluation"] = inside
    rows = {"epochs-200": inside, "epochs-200-whole": figures["whole run"]}
    described = replace(Conditions.of(recipe), epochs=EPOCHS, val_interval=recipe.val_interval)
    yield Record("epochs-200", "seconds", figures, rows, described)


def epochs_in_a_sweep(settings: Settings) -> Iterator[Record]:
    """Measure such runs several at a time on one device, in a process each, start, checkpoints and figures included."""
    recipe = runs_recipe(settings)
    runs = AtOnce(SWEEP_JOBS, run_contestant, recipe, settings.pass_images, EPOCHS, threads=1)
    figures = take_turns({"a run": runs.seconds_each}, settings.repeats, warm_ups=0)
    runs.end()
    described = replace(Conditions.of(recipe), epochs=EPOCHS, val_interval=recipe.val_interval, jobs=SWEEP_JOBS)
    yield Record("epochs-200-sweep", "seconds a run", figures, {"epochs-200-sweep": figures["a run"]}, described)


# Runs `mbib train` with a first step that tells the time as it begins and as it is done, and ends the process. The step
# is left out unless the first argument is "whole".
START = """
import os, sys, time
import timm, torch
started = time.perf_counter()

def peak():  # in kB; ru_maxrss would have the parent's in it
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])

before = peak()
from mbib_timm import cli
from mbib_timm.training import run

create_step = run.create_step

def until_the_first(*arguments):
    step = create_step(*arguments)
    def first(*batch):
        begun = time.perf_counter()
        if sys.argv[1] == "whole":
            step(*batch)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        kilobytes = peak() - before
        print("\\nseconds", begun - started, time.perf_counter() - started, kilobytes, flush=True)
        os._exit(0)
    return first

run.create_step = until_the_first
sys.exit(cli.main(["train", *sys.argv[2:]]))
"""


class Start(NamedTuple):
    """How `mbib train` comes to its first step, from the end of `import torch, timm` on.

    Attributes:
        begins: seconds until the step.
        ends: seconds until it is done; where it is left out the same.
        gigabytes: of memory that the process has come to take until then, at the most.
    """

    begins: float
    ends: float
    gigabytes: float


def to_first_step(settings: Settings, *flags: str, whole: bool) -> Start:
    """Run `mbib train` until its first step, and the step too for the `whole`."""
    with tempfile.TemporaryDirectory() as folder:
        own = ["--device", str(settings.world.device), "--no-torchcompile", "--no-cuda-graph", "--output", folder]
        command = [sys.executable, "-c", START, "whole" if whole else "begin", *flags, *own]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("seconds ")]
    if not lines:
        raise MbibError(f"mbib train did not come to its first step: {done.stderr.strip()[-300:]}")
    _, begins, ends, kilobytes = lines[-1]
    return Start(float(begins), float(ends), int(kilobytes) * 1024 / 1e9)


def start(settings: Settings) -> Iterator[Record]:
    """Measure `mbib train` on digits, eager, from the end of `import torch, timm` to its first step."""
    begun: list[float] = []

    def run() -> float:
        came = to_first_step(settings, whole=True)
        begun.append(came.begins)
        return came.ends

    done = take_turns({"mbib train": run}, settings.repeats)["mbib train"]
    figures = {"first step begins": begun[1:], "first step done": done}
    yield Record(
        "start", "seconds", figures, {"start": begun[1:], "start-step": done}, Conditions(recipe=DEFAULT_RECIPE)
    )


def start_list(settings: Settings) -> Iterator[Record]:
    """Measure the same with a list of 10,000,000 images in 10,000 classes: the class folders are links to one; and the
    memory that it takes, with a small network, which is not what is measured."""
    recipe, model, classes, images, evaluated = "mbib_resnet50.inat2018_90e", "mbib_resnet20", 10_000, 1_000, 3
    memory: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photographs(folder / "images", images + evaluated, (375, 500))
        files = sorted(path.name for path in (folder / "images").iterdir())
        for number in range(classes):
            (folder / f"n{number:08d}").symlink_to(folder / "images")
        for split, chosen in (("train", files[:images]), ("val", files[images:])):
            with (folder / f"{split}.txt").open("w") as lines:
                for number in range(classes):
                    lines.writelines(f"n{number:08d}/{file} {number}\n" for file in chosen)
        flags = ["--data-dir", name, "--train-list", f"{name}/train.txt", "--val-list", f"{name}/val.txt"]
        flags += ["--workers", "2", "--image-cache", "none", "--num-classes", str(classes), "--model", model]

        def run() -> float:
            came = to_first_step(settings, recipe, *flags, whole=False)
            memory.append(came.gigabytes)
            return came.begins

        begun = take_turns({"first step begins": run}, settings.repeats)["first step begins"]
    figures = {"first step begins": begun, "gigabytes": memory[1:]}
    yield Record(
        "start-list",
        "seconds; gigabytes",
        figures,
        {"start-list": begun, "start-list-memory": memory[1:]},
        Conditions(recipe=f"{recipe} with {model}", workers=2, images=images * classes),
    )


def memory_of_classes(settings: Settings) -> Iterator[Record]:
    """Measure the memory of losses, with their backward pass, and of an evaluation on 100,000 classes, over that of the
    logits: bytes of live tensors, the same whatever the device."""
    classes, images = 100_000, 192
    counts = np.maximum(1, 1_000_000 / np.arange(1, classes + 1)).astype(np.int64)
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(classes, (images,), generator=generator)
    actions: dict[str, Callable[[], float]] = {}

    def loss(method: Method) -> float:
        heads = {
            head: torch.randn(images, classes, generator=generator, requires_grad=True) for head in method.head_names
        }
        return over_logits(lambda logits: method.loss(logits, targets)["loss"].backward(), heads)

    def evaluated() -> float:
        def count(logits: dict[str, Tensor]) -> None:
            log = AnswerLog()
            stacked = torch.stack([*logits.values()])
            batch_statistics(stacked, targets)
            log.add(stacked[0], Batch((), targets, targets))

        heads = {str(head): torch.randn(images, classes, generator=generator) for head in range(5)}
        return over_logits(count, heads)

    for name, network in LOSSES_OF_CLASSES.items():
        kind = METHODS[name]
        model = kind.build_network(kind.Settings(), partial(create_model, network, num_classes=classes))
        actions[name] = partial(loss, kind(model, kind.Settings(), Facts(counts, 1), torch.device("cpu")))
    actions["evaluation"] = evaluated
    figures = take_turns(actions, 1, warm_ups=0)
    rows = {"memory-classes": [max(value for (value,) in figures.values())]}
    yield Record("memory-classes", "bytes over those of the logits", figures, rows, Conditions(images, images=images))


def batch_of(subject: str, settings: Settings) -> tuple[int, int, int]:
    """Return batch size, image size and steps of a repeat."""
    if subject == "resnet32":
        return 128, 32, 200 if settings.on_cuda else 20
    return 64, 224, 50 if settings.on_cuda else 1


MEASURE: dict[str, Callable[[Settings], Iterator[Record]]] = {
    "pipeline": pipeline,
    "side-by-side": side_by_side,
    **{f"step-{subject}": partial(step, subject) for subject in SUBJECTS},
    "step-methods": step_of_methods,
    "augmentation": augmentation,
    **{f"memory-{subject}": partial(memory, subject) for subject in SUBJECTS},
    **{f"evaluate-{subject}": partial(evaluation, subject) for subject in SUBJECTS},
    **{f"predict-{subject}": partial(prediction, subject) for subject in SUBJECTS},
    "epochs-200": epochs,
    "epochs-200-sweep": epochs_in_a_sweep,
    "throughput-resnext50": throughput,
    "start": start,
    "start-list": start_list,
    "memory-classes": memory_of_classes,
}
