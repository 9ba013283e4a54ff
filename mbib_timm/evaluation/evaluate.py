"""A model over a loader, to the metrics of its prediction and of every head."""

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from mbib_timm.compiling import CompileOrEager
from mbib_timm.data.batch import Batch
from mbib_timm.environment import is_distributed
from mbib_timm.errors import DataError, MbibError
from mbib_timm.evaluation.metrics import Statistics, batch_statistics, summarize
from mbib_timm.models.head_outputs import head_logits, reported_heads
from mbib_timm.results.record import HeadMetrics

# One for the process, as that of the training step.
compiled_head_logits = CompileOrEager(head_logits, "the evaluation")


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[Batch],
    class_counts: np.ndarray,
    *,
    device: torch.device,
    amp_dtype: torch.dtype | None = None,
    channels_last: bool = False,
    compile: bool = False,
    shift: Tensor | None = None,
) -> dict[str, HeadMetrics]:
    """Evaluate a model; with several processes each takes its share, and every image counts once.

    Args:
        model: gives logits (B, K) in evaluation mode; set to it, and back to its own mode afterwards.
        loader: gives batches on the device.
        class_counts: training images of each class, (K,).
        device: device of the model.
        amp_dtype: precision of autocast; None for none.
        channels_last: hand the images on in channels-last format.
        compile: compile the forward pass.
        shift: added to the logits of every head, (K,), on the device; see `log_shift`. None for nothing.

    Returns:
        The metrics of ``"prediction"`` and for each of `reported_heads`, by name.

    Raises:
        DataError: no image at all, or what the loader raises for a broken one.
        MbibError: logits that are infinite or not a number.
    """
    forward = compiled_head_logits if compile else head_logits
    was_training = model.training
    model.eval()
    names: tuple[str, ...] = ()
    sums: Statistics | None = None
    try:
        for batch in loader:
            images, targets = batch.images, batch.targets
            if channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
                logits = forward(model, images)
            names = tuple(logits)
            stacked = torch.stack([*logits.values()])
            counted = batch_statistics(stacked if shift is None else stacked.float() + shift, targets)
            sums = counted if sums is None else sums + counted
    finally:
        model.train(was_training)
    if is_distributed():
        if sums is None:  # this process had no share; it adds nothing, under the same names
            names = ("prediction", *reported_heads(model))
            nothing = torch.zeros(len(names), 0, len(class_counts), device=device)
            sums = batch_statistics(nothing, torch.zeros(0, dtype=torch.long, device=device))
        sums.all_reduce()
    if sums is None or not sums.total.any():
        raise DataError("there is no image to evaluate")
    results = {name: summarize(sums[i], class_counts) for i, name in enumerate(names)}
    # Only here, where the sums have come off the device; one bad logit makes its head's sum bad.
    broken = [name for name, metrics in results.items() if not math.isfinite(metrics.nll)]
    if broken:
        raise MbibError(
            f"evaluation: logits of {', '.join(broken)} are not finite; the weights have diverged, or "
            f"{amp_dtype or torch.float32} cannot hold them"
        )
    return results
