"""The optimizer side of a run, built from the recipe: timm's optimizer, schedule and gradient scaler."""

from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.utils import NativeScaler, dispatch_clip_grad
from torch import Tensor, nn

from mbib_timm.errors import MbibError, unknown_name
from mbib_timm.recipe import Recipe
from mbib_timm.training.task import LongTailTask

SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant")


def create_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """Build timm's optimizer. Raises MbibError for an unknown name or keyword."""
    if recipe.opt not in list_optimizers():
        raise unknown_name("optimizer", recipe.opt, list_optimizers())
    try:
        return create_optimizer_v2(
            model,
            opt=recipe.opt,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            momentum=recipe.momentum,
            filter_bias_and_bn=recipe.filter_bias_and_bn,
            layer_decay=recipe.layer_decay,
            **recipe.opt_kwargs,
        )
    except TypeError as error:
        raise MbibError(f"recipe key 'opt_kwargs': {error}") from None


def create_schedule(recipe: Recipe, optimizer: torch.optim.Optimizer) -> Any:
    """Build timm's schedule, stepped once an epoch. Raises MbibError for an unknown name."""
    if recipe.sched not in SCHEDULES:
        raise unknown_name("schedule", recipe.sched, SCHEDULES)
    schedule, _ = create_scheduler_v2(
        optimizer,
        sched=recipe.sched,
        num_epochs=recipe.epochs,
        decay_milestones=recipe.decay_milestones,
        decay_rate=recipe.decay_rate,
        min_lr=recipe.min_lr,
        warmup_epochs=recipe.warmup_epochs,
        warmup_lr=recipe.warmup_lr,
    )
    return schedule


@dataclass(frozen=True)
class Precision:
    """How a step computes: autocast dtype, or None for full precision; and the scaler that float16 needs."""

    autocast_dtype: torch.dtype | None
    scaler: NativeScaler | None

    @classmethod
    def of(cls, recipe: Recipe, device: torch.device) -> "Precision":
        """Choose from the recipe: mixed precision is on for CUDA unless the recipe says otherwise."""
        enabled = device.type == "cuda" if recipe.amp is None else recipe.amp
        if not enabled:
            return cls(None, None)
        dtype = torch.bfloat16 if recipe.amp_dtype == "bfloat16" else torch.float16
        scaler = NativeScaler(device=device.type) if dtype is torch.float16 else None
        return cls(dtype, scaler)


def training_step(
    task: LongTailTask,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    targets: Tensor,
    precision: Precision,
    *,
    accumulate: int = 1,
    update: bool = True,
    clip_grad: float | None = None,
    clip_mode: str = "norm",
) -> dict[str, Tensor]:
    """Compute the loss of a batch, add its gradients, and update the weights.

    Args:
        task: gives the loss parts of a batch.
        optimizer: updates the weights, and is cleared afterwards.
        images: (B, C, H, W).
        targets: (B,), int64.
        precision: autocast and scaler.
        accumulate: batches that share this update; each counts 1/accumulate.
        update: update the weights after this batch.
        clip_grad: clip gradients at this value.
        clip_mode: timm's ways of clipping.

    Returns:
        The loss parts of the batch, detached scalars that are still on the device.
    """
    with torch.autocast(
        images.device.type, dtype=precision.autocast_dtype, enabled=precision.autocast_dtype is not None
    ):
        parts = task(images, targets)
    loss = parts["loss"] / accumulate
    parameters = list(task.get_clip_parameters(exclude_head=clip_mode == "agc")) if clip_grad else None
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
    return {name: value.detach() for name, value in parts.items()}
