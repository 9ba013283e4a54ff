"""One training step as a pure function of batches: forward, losses, backward, update.

Compiling and capturing are wrappers around it, chosen in `create_step`, and nothing else knows which is in use.
"""

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from timm.utils import dispatch_clip_grad
from torch import Tensor

from mbib_timm.capturing import CapturedFunction, Graphs
from mbib_timm.compiling import CompileOrEager
from mbib_timm.data.batch import Batch
from mbib_timm.environment import World
from mbib_timm.errors import MbibError
from mbib_timm.methods import Method
from mbib_timm.methods.base import no_scalar
from mbib_timm.recipe import Recipe
from mbib_timm.training.optimization import Precision, takes_tensor_rates

Batches = tuple[Batch, ...]


class TrainingStep(Protocol):
    """Trains on a batch per stream. Returns scalars on the device, ``loss`` first."""

    def __call__(self, batches: Batches, accumulate: int = 1, update: bool = True) -> dict[str, Tensor]: ...


LossParts = Callable[[Method, Batches, torch.dtype | None], dict[str, Tensor]]


def loss_parts(method: Method, batches: Batches, autocast_dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Return the loss and its parts, scalars on the device.

    Args:
        method: gives them.
        batches: a batch per stream.
        autocast_dtype: of mixed precision; None for full precision.
    """
    with torch.autocast(batches[0].targets.device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
        return method(*batches)


# One for the process: runs of the same network and method share the compiled code.
compiled_loss_parts = CompileOrEager(loss_parts, "the training step")


def find_graphs(recipe: Recipe, optimizer: torch.optim.Optimizer, precision: Precision, world: World) -> Graphs | None:
    """Return what captures the steps and evaluations of a run; None where they are not captured.

    Args:
        recipe: says whether they are; on CUDA they are where it says nothing and nothing speaks against it.
        optimizer: updates the weights.
        precision: autocast and scaler.
        world: device and processes.

    Raises:
        MbibError: a CUDA graph is asked for where a step cannot be captured.
    """
    if recipe.cuda_graph is False:
        return None
    obstacles = {
        f"device {world.device.type}": world.device.type != "cuda",
        f"{world.world_size} processes": world.world_size > 1,
        "grad_accum_steps": recipe.grad_accum_steps > 1,
        "amp_dtype float16, whose scaler waits for the device": precision.scaler is not None,
        f"optimizer {recipe.opt!r}, which takes no learning rate as a tensor": not takes_tensor_rates(optimizer),
    }
    found = next((obstacle for obstacle, there in obstacles.items() if there), None)
    if found is None:
        return Graphs(world.device)
    if recipe.cuda_graph:
        raise MbibError(
            f"recipe key 'cuda_graph': a step cannot be captured with {found}; leave the key out, and steps are "
            "captured where they can be"
        )
    return None


def create_step(
    recipe: Recipe,
    method: Method,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    graphs: Graphs | None = None,
) -> TrainingStep:
    """Build the training step of a run: eager, compiled, captured in a CUDA graph, or both.

    Args:
        recipe: chooses, and gives the clipping.
        method: gives the losses.
        optimizer: updates the weights.
        precision: autocast and scaler.
        graphs: capture it; see `find_graphs`.
    """
    eager = partial(training_step, method, optimizer, precision, clip_grad=recipe.clip_grad, clip_mode=recipe.clip_mode)
    step = partial(eager, compute=compiled_loss_parts.on(method.device)) if recipe.torchcompile else eager
    return step if graphs is None else CapturedStep(step, eager, optimizer, graphs)


class CapturedStep:
    """A training step that is captured once and replayed from then on; see `CapturedFunction`.

    Learning rates, which the schedule changes, lie in the graph's memory as tensors.

    Args:
        step: takes a batch per stream, updates the weights, returns scalars.
        otherwise: the same for batches of other shapes: for the short last one.
        optimizer: whose learning rates the step reads; one that accepts them as tensors.
        graphs: of the run.
    """

    def __init__(
        self, step: TrainingStep, otherwise: TrainingStep, optimizer: torch.optim.Optimizer, graphs: Graphs
    ) -> None:
        self.optimizer = optimizer
        self.rates = [torch.zeros((), device=group["params"][0].device) for group in optimizer.param_groups]
        self.take = CapturedFunction(step, otherwise, graphs, "the training step")

    def __call__(self, batches: Batches, accumulate: int = 1, update: bool = True) -> dict[str, Tensor]:
        """Train on a batch per stream; the scalars returned are copies, which the next step does not overwrite."""
        assert accumulate == 1
        assert update
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            if group["lr"] is not rate:  # the schedule has set another
                rate.fill_(group["lr"])
                group["lr"] = rate
        return self.take(batches)


def training_step(
    method: Method,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    batches: Batches,
    accumulate: int = 1,
    update: bool = True,
    *,
    compute: LossParts = loss_parts,
    clip_grad: float | None = None,
    clip_mode: str = "norm",
) -> dict[str, Tensor]:
    """Compute the loss, add its gradients, and update the weights.

    Args:
        method: gives the loss parts, and follows the update.
        optimizer: updates the weights, and is cleared afterwards.
        precision: autocast and scaler.
        batches: a batch per stream.
        accumulate: steps that share this update; each counts 1/accumulate.
        update: update the weights after this step.
        compute: `loss_parts`, or that function compiled.
        clip_grad: clip gradients at this value.
        clip_mode: timm's ways of clipping.

    Returns:
        The loss parts, detached scalars that are still on the device.
    """
    parts = compute(method, batches, precision.autocast_dtype)
    expected = f"method {method.name!r}: expected named scalars from forward and loss, 'loss' among them, got"
    if not isinstance(parts, dict) or "loss" not in parts:
        raise MbibError(
            f"{expected} "
            f"{', '.join(map(repr, parts)) or 'none' if isinstance(parts, dict) else f'a {type(parts).__name__}'}"
        )
    for name, value in parts.items():
        if found := no_scalar(value):
            raise MbibError(f"{expected} {found} for {name!r}")
    if not parts["loss"].requires_grad:
        raise MbibError(
            f"method {method.name!r}: its loss has no gradient: nothing connects it to the weights that train; look "
            "for detach(), argmax, item() or torch.no_grad() in its formula"
        )
    loss = parts["loss"] / accumulate
    parameters = list(method.get_clip_parameters(exclude_head=clip_mode == "agc")) if clip_grad else None
    if precision.scaler is not None:
        precision.scaler(
            loss, optimizer, clip_grad=clip_grad, clip_mode=clip_mode, parameters=parameters, need_update=update
        )
    else:
        loss.backward()
        if update:
            if clip_grad is not None:
                dispatch_clip_grad(parameters, value=clip_grad, mode=clip_mode)
            optimizer.step()
    if update:
        optimizer.zero_grad()
        with torch.no_grad():
            method.after_step()
    return {name: value.detach() for name, value in parts.items()}
