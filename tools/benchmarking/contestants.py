"""Who competes: a model trained as this package does it, and one trained as timm's train.py does it."""

import contextlib
import io
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.data import create_loader
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarking.noise import cifar_like, normalized_noise, single_image
from benchmarking.turns import timed, wait
from mbib_timm.data import DataPool, Splits, create_loaders
from mbib_timm.data.batch import Batch
from mbib_timm.data.create import opened_key
from mbib_timm.data.images import Drawn, ImageDataset
from mbib_timm.data.transforms import train_transform
from mbib_timm.environment import World, keep_freed_memory, prepare
from mbib_timm.errors import MbibError
from mbib_timm.evaluation import evaluate
from mbib_timm.evaluation.evaluate import compiled_head_logits
from mbib_timm.models.head_outputs import head_logits
from mbib_timm.models.preprocessing import settle
from mbib_timm.models.pretraining import Origin
from mbib_timm.progress import Progress
from mbib_timm.recipe import Recipe, find_recipe, load_recipe
from mbib_timm.training import train
from mbib_timm.training.epoch import LossLog, train_one_epoch
from mbib_timm.training.optimization import Precision
from mbib_timm.training.run_folder import RunFolder
from mbib_timm.training.setup import build_network, set_up
from mbib_timm.training.step import compiled_loss_parts, create_step

# The recipe of MBIB, and the name of its plain backbone.
SUBJECTS = {
    "resnet32": ("mbib_resnet32.cifar100_lt_if100", "cifar_resnet32"),
    "resnext50": ("mbib_resnext50.imagenet_lt", "resnext50_32x4d"),
}
MODELS = ("plain", "mbib")


def subject_recipe(subject: str, model: str, world: World, compiled: bool) -> Recipe:
    """Return the recipe of a contestant.

    Args:
        subject: of `SUBJECTS`.
        model: ``mbib``, or ``plain`` for the backbone with its own classifier and cross-entropy.
        world: device; on CUDA a compiled step is captured in a graph as well.
        compiled: compile training and evaluation.
    """
    name, backbone = SUBJECTS[subject]
    recipe = _on_noise(load_recipe(find_recipe(name)), world).replace(
        torchcompile=compiled, cuda_graph=compiled and world.device.type == "cuda"
    )
    return recipe if model == "mbib" else recipe.replace(model=backbone, method="ce")


def method_recipe(name: str, world: World) -> Recipe:
    """Return a recipe of a method, of several stages the last, for steps on noise that are eager on a CPU, where
    compiling takes minutes a method, and else compiled and captured. A teacher is the packaged MBIB network."""
    recipe = load_recipe(find_recipe(name))
    method = dict(recipe.method)
    if "teacher" in method:
        method["teacher"] = [SUBJECTS["resnet32"][0]]
    on_cuda = world.device.type == "cuda"
    recipe = _on_noise(recipe.replace_previous(None, method=method), world)
    return recipe.replace(torchcompile=on_cuda, cuda_graph=on_cuda)


def _on_noise(recipe: Recipe, world: World) -> Recipe:
    # A rate at which the loss on noise stays finite without a warm-up.
    recipe = recipe.replace(lr=0.01, workers=2, loader="resident", image_cache="none", device=str(world.device))
    return settle(recipe, timm.create_model(recipe.model, device="meta"))


class Trainer:
    """A model with its method, optimizer, training step and evaluation: those of `mbib train`.

    Args:
        recipe: of the model.
        counts: training images of each class, (K,).
        world: device.
    """

    def __init__(self, recipe: Recipe, counts: np.ndarray, world: World) -> None:
        self.recipe, self.counts, self.device = recipe, counts, world.device
        setup = set_up(recipe, single_image(counts), world)
        self.method, self.optimizer, self.precision = setup.method, setup.optimizer, setup.precision
        self.model = self.method.result_model()
        self.step = create_step(recipe, self.method, self.optimizer, self.precision, setup.graphs)
        self.graphs = setup.graphs
        self.epochs = 0

    def take_steps(self, images: Tensor, targets: Tensor, steps: int) -> None:
        """Train on one batch, again and again."""
        self.method.train()
        views = (images,) * len(self.recipe.choice("views"))
        batches = (Batch(views, targets, torch.arange(len(targets), device=targets.device)),)
        for _ in range(steps):
            self.step(batches)

    def train_epoch(self, loader: Any) -> None:
        """Train on every image of a loader."""
        loader.set_epoch(self.epochs)
        nothing, log = Progress(0, visible=False), LossLog(self.epochs, self.method.name)
        train_one_epoch(self.method, loader, self.step, self.recipe, log, nothing, self._follow)
        self.epochs += 1

    def _follow(self, steps: int) -> None:
        self.method.update_ema()

    def evaluate(self, loader: Iterable[Batch]) -> None:
        """Evaluate every image of a loader, with every head."""
        dtype, compiled = self.precision.autocast_dtype, self.recipe.torchcompile
        evaluate(
            self.model,
            loader,
            self.counts,
            device=self.device,
            amp_dtype=dtype,
            channels_last=self.recipe.channels_last,
            compile=compiled,
            graphs=self.graphs,
        )

    @torch.no_grad()
    def forward_only(self, images: Tensor, batches: int) -> None:
        """Run the model in evaluation mode on one batch, again and again; count nothing."""
        self.model.eval()
        forward = compiled_head_logits.on(self.device) if self.recipe.torchcompile else head_logits
        dtype = self.precision.autocast_dtype
        for _ in range(batches):
            with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
                forward(self.model, images)


def write_model(folder: Path, recipe: Recipe, size: int, counts: np.ndarray) -> None:
    """Write a recipe's network with fresh weights as a run writes its model.

    Args:
        folder: of the run.
        recipe: of the model.
        size: height and width of its images, in pixels.
        counts: training images of each class, (K,).
    """
    folder.mkdir()
    RunFolder(folder).write_model(
        build_network(recipe, len(counts)),
        input_size=(3, size, size),
        recipe=recipe,
        class_counts=counts,
        class_names=None,
        logit_prior="uniform",
        origin=Origin(),
        tag="fresh",
    )


class LabelledImages(ImageDataset):
    """Images with their labels alone, as timm's data sets give them."""

    def __getitem__(self, index: int | Drawn) -> tuple[Any, Any]:
        item = super().__getitem__(index)
        assert item is not None  # broken images are replaced
        return item[0], int(item[1][0])


class TimmLoop:
    """Training as timm's train.py does it: images decoded and augmented one by one with PIL in two worker processes
    that live from epoch to epoch, an eager step, a loss that is fetched after each step.

    Args:
        recipe: of a plain model, trained by cross-entropy.
        splits: images in memory.
        world: device.
    """

    def __init__(self, recipe: Recipe, splits: Splits, world: World) -> None:
        torch.manual_seed(0)
        if world.device.type == "cuda":  # as train.py does
            prepare(world.device)
        self.device = world.device
        self.precision = Precision.of(recipe, world.device, (3, 32, 32))
        self.model: nn.Module = build_network(recipe, splits.num_classes)
        self.model.to(world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = create_optimizer_v2(
            self.model, opt=recipe.opt, lr=recipe.lr, weight_decay=recipe.weight_decay, momentum=recipe.momentum
        )
        transform = train_transform(recipe, (3, 32, 32))
        dataset = LabelledImages(splits.train, "RGB", transform, replace_broken=True)
        self.loader = create_loader(
            dataset,
            (3, 32, 32),
            recipe.batch_size,
            is_training=True,
            no_aug=True,
            mean=tuple(recipe.settled("mean")),
            std=tuple(recipe.settled("std")),
            num_workers=recipe.workers,
            pin_memory=world.device.type == "cuda",
            device=world.device,
        )
        dataset.transform = transform  # create_loader has put its own
        self.images = len(self.loader) * recipe.batch_size  # it leaves the last short batch out

    def train_epoch(self) -> None:
        """Train on every batch of the loader."""
        self.model.train()
        dtype = self.precision.autocast_dtype
        total = 0.0
        for images, targets in self.loader:
            images = images.contiguous(memory_format=torch.channels_last)
            with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
                loss = F.cross_entropy(self.model(images), targets)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            total += loss.item() * len(images)


def timm_contestant(recipe: Recipe, pass_images: int | None, world: World) -> Callable[[], float]:
    """Return images/s of timm's loop, a pass over the data at a time; other arguments as `TimmLoop`'s."""
    loop = TimmLoop(recipe, cifar_like(pass_images), world)
    return timed(loop.train_epoch, world.device, loop.images)


def resident_contestant(recipe: Recipe, pass_images: int | None, world: World) -> Callable[[], float]:
    """Return images/s of training as this package does it, a pass over the data at a time."""
    splits = cifar_like(pass_images)
    trainer = Trainer(recipe, splits.class_counts, world)
    loader = create_loaders(splits, recipe, (3, 32, 32), world.device).train
    passes = timed(partial(trainer.train_epoch, loader), world.device, len(splits.train))

    def figure() -> float:
        speed = passes()
        require_compiled()
        return speed

    return figure


class WholeRuns:
    """Whole runs of `mbib train` on noise, one after another in this process; a short one has compiled for them."""

    def __init__(self, recipe: Recipe, pass_images: int | None) -> None:
        self.recipe = recipe
        self.pool = DataPool(opened={opened_key(recipe): cifar_like(pass_images)})
        self.train(recipe.warmup_epochs + 1)

    def train(self, epochs: int) -> float:
        """Train, and return the seconds of training and evaluation alone."""
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            done = train(self.recipe.replace(epochs=epochs, output=folder), "benchmark", self.pool)
        require_compiled()
        return done.record.training_seconds


def run_contestant(recipe: Recipe, pass_images: int | None, epochs: int) -> Callable[[], float]:
    """Return seconds of a whole run of `WholeRuns`."""
    runs = WholeRuns(recipe, pass_images)
    return timed(partial(runs.train, epochs), torch.device(str(recipe.device)))


class Convolutions:
    """Forward and backward pass of a network's convolutions and nothing else: what no training of it can beat.

    Args:
        model: the network.
        images: a batch, (B, 3, H, W), which decides the sizes.
        precision: of the training.
    """

    def __init__(self, model: nn.Module, images: Tensor, precision: Precision) -> None:
        self.device, self.dtype = images.device, precision.autocast_dtype
        self.work: list[tuple[nn.Conv2d, Tensor, Tensor]] = []
        hooks = [
            module.register_forward_hook(self._remember) for module in model.modules() if isinstance(module, nn.Conv2d)
        ]
        with torch.no_grad(), self._autocast():
            model(images)
        for hook in hooks:
            hook.remove()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def _remember(self, convolution: nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> None:
        # The images themselves need no gradient, as in training.
        needs_gradient = bool(self.work)
        self.work.append((convolution, inputs[0].clone().requires_grad_(needs_gradient), torch.randn_like(output)))

    def take_steps(self, steps: int) -> None:
        """Run them all, again and again."""
        for _ in range(steps):
            for convolution, inputs, gradient in self.work:
                with self._autocast():
                    output = convolution(inputs)
                output.backward(gradient)
                convolution.weight.grad = inputs.grad = None


def require_compiled() -> None:
    """Raise MbibError where compiling has failed, and what was measured as compiled ran eagerly."""
    if compiled_loss_parts.failed or compiled_head_logits.failed:
        raise MbibError("this machine cannot compile (see the warning above); measure with --no-torchcompile")


def peak_memory(recipe: Recipe, counts: np.ndarray, batch_size: int, size: int, steps: int, world: World) -> int:
    """Return the bytes that a model and a few of its training steps take at most, beyond what was taken before.

    On CUDA those of the allocator. On the CPU the resident memory of the process, which must be a fresh one: what an
    earlier model left behind would be used again.
    """
    on_cuda = world.device.type == "cuda"
    if on_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(world.device)
    else:
        keep_freed_memory()
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak so far, of imports, is forgotten
    before = torch.cuda.memory_allocated(world.device) if on_cuda else _process_memory("VmRSS")
    Trainer(recipe, counts, world).take_steps(*normalized_noise(batch_size, size, len(counts), world.device), steps)
    wait(world.device)
    peak = torch.cuda.max_memory_allocated(world.device) if on_cuda else _process_memory("VmHWM")
    return peak - before


def _process_memory(field: str) -> int:
    """Return VmRSS or VmHWM, the highest VmRSS so far, in bytes. (ru_maxrss would inherit the parent's.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
