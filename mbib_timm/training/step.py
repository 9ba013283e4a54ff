"""One training step as a pure function of a batch: forward, losses, backward, update. Compiling wraps it."""

from collections.abc import Callable

import torch
from timm.utils import dispatch_clip_grad
from torch import Tensor

from mbib_timm.compiling import CompileOrEager
from mbib_timm.training.optimization import Precision
from mbib_timm.training.task import LongTailTask

LossParts = Callable[[LongTailTask, Tensor, Tensor, torch.dtype | None], dict[str, Tensor]]


def loss_parts(
    task: LongTailTask, images: Tensor, targets: Tensor, autocast_dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Return the loss of a batch and its parts, scalars on the device.

    Args:
        task: gives them.
        images: (B, C, H, W).
        targets: (B,), int64.
        autocast_dtype: of mixed precision; None for full precision.
    """
    with torch.autocast(images.device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
        return task(images, targets)


# One for the process: runs of the same model and loss share the compiled code.
compiled_loss_parts = CompileOrEager(loss_parts, "the training step")


def training_step(
    task: LongTailTask,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    targets: Tensor,
    precision: Precision,
    *,
    compute: LossParts = loss_parts,
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
        compute: `loss_parts`, or that function compiled.
        accumulate: batches that share this update; each counts 1/accumulate.
        update: update the weights after this batch.
        clip_grad: clip gradients at this value.
        clip_mode: timm's ways of clipping.

    Returns:
        The loss parts of the batch, detached scalars that are still on the device.
    """
    parts = compute(task, images, targets, precision.autocast_dtype)
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
