"""Where the time of a training step goes: timm's loop and this package's, as tables of operations."""

from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarking.contestants import TimmLoop, Trainer, subject_recipe
from benchmarking.noise import cifar_like
from benchmarking.turns import Settings, seconds
from mbib_timm.data import create_loaders
from mbib_timm.results.tables import Table

TOP = 15
STEPS = 20
# What a line of text says of an operation, by parts of its name.
KINDS = {
    "waiting for images": ("dataloader",),
    "fused operations": ("cpp_fused", "triton", "compiledfxgraph"),
    "convolutions": ("conv", "cudnn", "xmma", "cutlass", "implicit"),
    "batch normalisation": ("batch_norm", "bn_fw", "bn_bw"),
    "waiting for the device": ("item", "_local_scalar", "synchronize"),
    "copies and layout": ("copy", "contiguous", "memcpy", "index_select", "gather"),
    "the optimizer": ("optimizer", "sgd", "foreach", "multi_tensor"),
}


class Operation(NamedTuple):
    """An operation's name, its own seconds, without those of operations that it calls, and its calls."""

    name: str
    seconds: float
    calls: int


def write_profile(settings: Settings, header: str) -> str:
    """Return the profiles before and after, as Markdown, under a header that says where and when."""
    world = settings.world
    # Kernels of the compiled code appear by name.
    torch._inductor.config.cpp.enable_kernel_profile = True
    torch._dynamo.reset()
    steps = settings.steps or STEPS
    recipe = subject_recipe("resnet32", "plain", world, settings.torchcompile)
    splits = cifar_like(steps * recipe.batch_size)
    loader = create_loaders(splits, recipe, (3, 32, 32), world.device).train
    trainer = Trainer(recipe, splits.class_counts, world)
    with ProcessPoolExecutor(1, get_context("spawn")) as own_process:
        before = own_process.submit(profiled_timm, settings).result()
    after = profiled(lambda: trainer.train_epoch(loader), settings)
    text = f"# Where a training step goes, on {world.device.type}\n\n{header}\n\n"
    text += f"Plain ResNet32, batch {recipe.batch_size}, {len(loader)} steps of a whole pass over 32x32 images.\n"
    return (
        text
        + section("Before: timm's loader and loop", *before, len(loader))
        + section(
            f"After: resident images, {'compiled step' if recipe.torchcompile else 'eager step'}"
            f"{', captured' if recipe.cuda_graph else ''}",
            *after,
            len(loader),
        )
    )


def profiled_timm(settings: Settings) -> tuple[list[Operation], float]:
    """Return what `profiled` says of timm's loop."""
    recipe = subject_recipe("resnet32", "plain", settings.world, compiled=False)
    splits = cifar_like((settings.steps or STEPS) * recipe.batch_size)
    return profiled(TimmLoop(recipe, splits, settings.world).train_epoch, settings)


def profiled(epoch: Callable[[], Any], settings: Settings) -> tuple[list[Operation], float]:
    """Return the operations of an epoch, slowest first, and the epoch's seconds.

    On CUDA the operations are the device's; what is missing to the whole, the device was idle.
    """
    for _ in range(settings.pass_warm_ups):
        epoch()
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * settings.on_cuda]
    with profile(activities=activities) as profiler:
        taken = seconds(epoch, settings.world.device)
    wanted = DeviceType.CUDA if settings.on_cuda else DeviceType.CPU
    own = "self_device_time_total" if settings.on_cuda else "self_cpu_time_total"
    events: Iterable[Any] = profiler.key_averages()
    operations = [
        Operation(event.key, getattr(event, own) / 1e6, event.count)
        for event in events
        if event.device_type == wanted and not event.is_user_annotation
    ]
    return sorted(operations, key=lambda operation: -operation.seconds), taken


def section(title: str, operations: list[Operation], taken: float, steps: int) -> str:
    """Return one profile as Markdown, with a line on what it says."""
    rows = []
    for name, own, calls in operations[:TOP]:
        shown = name if len(name) <= 80 else f"{name[:77]}..."
        rows.append([f"`{shown}`", f"{1e3 * own / steps:.2f}", f"{100 * own / taken:.1f} %", f"{calls / steps:.1f}"])
    table = Table(["operation", "own ms per step", "share", "calls per step"], rows)
    return f"\n## {title}\n\n{summary(operations, taken, steps)}\n\n{table.markdown()}\n"


def summary(operations: list[Operation], taken: float, steps: int) -> str:
    """Return in one line what a step's time is spent on."""
    shares = dict.fromkeys(KINDS, 0.0)
    for name, own, _ in operations:
        for kind, parts in KINDS.items():
            if any(part in name.lower() for part in parts):
                shares[kind] += own / taken
                break
    told = sorted(((share, kind) for kind, share in shares.items() if share >= 0.005), reverse=True)
    rest = 1 - sum(share for share, _ in told)
    spent = [f"{100 * share:.0f} % {kind}" for share, kind in told]
    return (
        f"{1e3 * taken / steps:.1f} ms per step under the profiler: {', '.join(spent)}; "
        f"{100 * rest:.0f} % other or idle."
    )
