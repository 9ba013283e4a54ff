"""A model over a loader, to the metrics of its prediction and of every head, and to its answer for every image."""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from mbib_timm.capturing import CapturedFunction, Graphs
from mbib_timm.compiling import CompileOrEager
from mbib_timm.data.batch import Batch
from mbib_timm.environment import is_distributed, of_all, share_buffers
from mbib_timm.errors import DataError, MbibError, few
from mbib_timm.evaluation.metrics import Statistics, batch_statistics, by_group, rank, summarize, with_intervals
from mbib_timm.models.head_outputs import PREDICTION, cache_sized, head_logits, reported_heads
from mbib_timm.results.record import HeadMetrics

# One for the process, as that of the training step.
compiled_head_logits = CompileOrEager(head_logits, "the evaluation")


@dataclass(frozen=True)
class Answers:
    """What a model predicts of each of N images, in the order of the split.

    Attributes:
        index: places in the split, ascending, (N,), int64.
        targets: labels, (N,), int64.
        predicted: classes with the largest logit, (N,), int64.
        probability: softmax probabilities of these, (N,), float64.
    """

    index: np.ndarray
    targets: np.ndarray
    predicted: np.ndarray
    probability: np.ndarray


class AnswerLog:
    """The prediction's answers of an evaluation, kept on the device until someone asks.

    Args:
        groups: name of the group of each image of the split; None where images have none.
    """

    def __init__(self, groups: np.ndarray | None = None) -> None:
        self.groups = groups
        self.parts: list[Tensor] = []
        self.answers: Answers | None = None

    def add(self, logits: Tensor, batch: Batch) -> None:
        """Add the answers for a batch, of logits (B, K); nothing waits for the device."""
        # MPS has no float64; float32 holds the places of 16 million images.
        wide = torch.float32 if logits.device.type == "mps" else torch.float64
        predicted = rank(logits)[..., 0]
        probability = logits.float().softmax(dim=-1).gather(-1, predicted[:, None])[:, 0]
        self.parts.append(torch.stack([v.to(wide) for v in (batch.index, batch.targets, predicted, probability)]))

    def read(self) -> Answers:
        """Return the answers of all processes, in each. The first time this waits for the device and for the others."""
        if self.answers is None:
            own = torch.cat(self.parts, dim=1).cpu().numpy() if self.parts else np.zeros((4, 0))
            joined = np.concatenate(of_all(own), axis=1)
            joined = joined[:, np.argsort(joined[0], kind="stable")]
            index, targets, predicted = joined[:3].astype(np.int64)
            self.answers = Answers(index, targets, predicted, joined[3].astype(np.float64))
        return self.answers


def _logits(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Return `head_logits`, of as many images at once as suit the device; any network may give something else."""
    parts = [head_logits(model, batch) for batch in cache_sized(images)]
    found: object = parts[0][PREDICTION]
    if not isinstance(found, Tensor) or found.ndim != 2:
        got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise MbibError(f"{type(model).__name__}: expected logits (B, K) in evaluation mode, got {got}")
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _counted(
    model: nn.Module,
    forward: Callable[[nn.Module, Tensor], dict[str, Tensor]],
    amp_dtype: torch.dtype | None,
    shift: Tensor | None,
    images: Tensor,
    targets: Tensor,
) -> dict[str, Tensor]:
    """Return the prediction's logits (B, K) of a batch under `PREDICTION`, and the fields of its `Statistics`."""
    with torch.autocast(images.device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
        logits = forward(model, images)
    stacked = torch.stack([*logits.values()])
    stacked = stacked if shift is None else stacked.float() + shift
    return {PREDICTION: stacked[[*logits].index(PREDICTION)], **vars(batch_statistics(stacked, targets))}


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
    answers: AnswerLog | None = None,
    graphs: Graphs | None = None,
) -> dict[str, HeadMetrics]:
    """Evaluate a model; with several processes each takes its share, and every image counts once.

    All processes evaluate the first one's weights: its buffers go to the others.

    Args:
        model: gives logits (B, K) in evaluation mode; set to it, and afterwards every layer back to its own mode.
        loader: gives batches on the device.
        class_counts: training images of each class, (K,).
        device: device of the model.
        amp_dtype: precision of autocast; None for none.
        channels_last: hand the images on in channels-last format.
        compile: compile the forward pass.
        shift: added to the logits of every head, (K,), on the device; see `log_shift`. None for nothing.
        answers: an empty log that takes the prediction's; with it the prediction's metrics have all intervals, and for
            every head a group of images counts as one.
        graphs: of the run that evaluates the model more than once: capture the work on a batch, and replay it in later
            evaluations. None for none.

    Returns:
        The metrics of ``"prediction"`` and for each of `reported_heads`, by name.

    Raises:
        DataError: no image at all, or what the loader raises for a broken one.
        MbibError: logits that are infinite or not a number, or of another number of classes than the counts.
    """
    eager = partial(_counted, model, _logits, amp_dtype, shift)
    whole = partial(_counted, model, compiled_head_logits.on(device), amp_dtype, shift) if compile else eager
    count: Callable[[Tensor, Tensor], dict[str, Tensor]] = whole
    if graphs is not None:
        assert shift is None
        key = (model, amp_dtype, compile)
        count = graphs.functions.setdefault(key, CapturedFunction(whole, eager, graphs, "the evaluation"))
    names = (PREDICTION, *reported_heads(model))
    # Of each layer: a loop may keep some in evaluation mode, such as frozen BatchNorm.
    modes = [(module, module.training) for module in model.modules()]
    share_buffers(model)
    model.eval()
    sums: Statistics | None = None
    try:
        # Around the batches' own: weights are cast once. Not where they are captured: a graph casts what is there then.
        with torch.autocast(device.type, enabled=False) if graphs is None else nullcontext():
            for batch in loader:
                fields = count(batch.laid_out(channels_last).images, batch.targets)
                prediction = fields.pop(PREDICTION)
                if prediction.shape[-1] != len(class_counts):
                    of_model, given = prediction.shape[-1], len(class_counts)
                    raise MbibError(f"the model has {of_model} classes, and there are class counts of {given}")
                counted = Statistics(**fields)
                sums = counted if sums is None else sums + counted
                if answers is not None:
                    answers.add(prediction, batch)
    finally:
        model.train(modes[0][1])  # which a model may do in its own way
        for module, mode in modes:
            module.training = mode
    if is_distributed():
        if sums is None:  # this process had no share; it adds nothing, under the same names
            nothing = torch.zeros(len(names), 0, len(class_counts), device=device)
            sums = batch_statistics(nothing, torch.zeros(0, dtype=torch.long, device=device))
        sums.all_reduce()
    if sums is None or not sums.total.any():
        raise DataError("there is no image to evaluate")
    return metrics_of(sums, names, class_counts, answers, amp_dtype)


def metrics_of(
    sums: Statistics,
    names: Sequence[str],
    class_counts: np.ndarray,
    answers: AnswerLog | None,
    amp_dtype: torch.dtype | None = None,
) -> dict[str, HeadMetrics]:
    """Return the metrics of what was counted of several heads, by name; raises MbibError as `evaluate` does."""
    results = {name: summarize(sums[i], class_counts) for i, name in enumerate(names)}
    # Only here, where the sums have come off the device; one bad logit makes its head's sum bad.
    broken = [name for name, metrics in results.items() if not math.isfinite(metrics.nll)]
    if broken:
        raise MbibError(
            f"evaluation: logits of {few(broken, 1)} are not finite; the weights have diverged, or "
            f"{str(amp_dtype or torch.float32).removeprefix('torch.')} cannot hold them; in training, lower --lr, or "
            "add --clip-grad 5"
        )
    if answers is not None:
        found = answers.read()
        groups = None if answers.groups is None else answers.groups[found.index]
        results = {name: by_group(metrics, groups) for name, metrics in results.items()}
        results[PREDICTION] = with_intervals(results[PREDICTION], found.targets, found.predicted, class_counts, groups)
    return results
