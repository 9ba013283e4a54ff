"""Tasks: what one training step computes, from a batch to named losses.

A method that needs more than logits and a loss (two views, a teacher, a second stage) is a further task: one class
and one registration.
"""

from collections.abc import Iterator
from typing import Any

import torch
from timm.task import ClassificationTask
from timm.utils import unwrap_model
from torch import Tensor, nn

from mbib_timm.registry import Registry

TASKS: Registry[type["LongTailTask"]] = Registry("task")


def head_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the logits that a model returns in training; ``("logits",)`` for one tensor."""
    names: Any = getattr(unwrap_model(model), "head_names", ("logits",))
    return tuple(names)


@TASKS.register("classification")
class LongTailTask(ClassificationTask):
    """Single-label classification with one loss over the logits of every head.

    Args:
        model: returns logits (B, K), or a tuple of them in the order of its `head_names`.
        loss: takes a dict of logits (B, K) by name and targets (B,); returns named scalars, ``loss`` first.
        device: device of the task.
    """

    def __init__(self, model: nn.Module, loss: nn.Module, device: torch.device) -> None:
        super().__init__(model, criterion=loss, device=device, verbose=False)
        self.head_names = head_names(model)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return the loss parts as scalars on the device, ``loss`` first: the one to differentiate.

        Args:
            input: images (B, C, H, W).
            target: labels (B,), int64.
        """
        output = self.trainable_module(input)
        outputs = output if isinstance(output, tuple) else (output,)
        return self.criterion(dict(zip(self.head_names, outputs, strict=True)), target)

    def get_clip_parameters(self, exclude_head: bool = False) -> Iterator[nn.Parameter]:
        """Yield the parameters whose gradients are clipped, on request without those of the classifiers."""
        model: Any = unwrap_model(self.trainable_module)
        classifiers = model.get_classifier() if exclude_head else ()
        classifiers = classifiers if isinstance(classifiers, tuple) else (classifiers,)
        excluded = {id(parameter) for classifier in classifiers for parameter in classifier.parameters()}
        return (parameter for parameter in model.parameters() if id(parameter) not in excluded)
