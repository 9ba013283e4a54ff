"""The whole training step as one CUDA graph: hundreds of kernels for the price of one launch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Steps of each batch shape that run as they are, on the stream that captures: they allocate the optimizer's state,
# let cuDNN choose its kernels, and train like every other step.
WARM_UP_STEPS = 3

Step = Callable[..., dict[str, Tensor]]
Replay = Callable[[], Any]


class GraphedStep:
    """A training step that is captured once for each batch shape and replayed from then on.

    A replay runs the captured kernels on the same memory: batches are copied into it, and learning rates, which the
    schedule changes, lie in it as tensors.

    Args:
        step: takes images (B, C, H, W) and targets (B,), updates the weights, returns scalars.
        optimizer: whose learning rates the step reads; one that accepts them as tensors.
        device: CUDA device.
    """

    def __init__(self, step: Step, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self.step, self.optimizer = step, optimizer
        self.rates = [torch.zeros((), device=device) for _ in optimizer.param_groups]
        self.runs: dict[torch.Size, int] = {}
        self.captured: dict[torch.Size, tuple[Tensor, Tensor, dict[str, Tensor], Replay]] = {}
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, images: Tensor, targets: Tensor, accumulate: int = 1, update: bool = True) -> dict[str, Tensor]:
        """Train on a batch; the scalars returned are copies, which the next step does not overwrite."""
        assert accumulate == 1
        assert update
        self._place_learning_rates()
        shape = images.shape
        if shape not in self.captured:
            self.runs[shape] = self.runs.get(shape, 0) + 1
            if self.runs[shape] <= WARM_UP_STEPS:
                return self._on_stream(images, targets)
            self.captured[shape] = self._capture(images, targets)
        held_images, held_targets, parts, replay = self.captured[shape]
        held_images.copy_(images)
        held_targets.copy_(targets)
        replay()
        return {name: value.clone() for name, value in parts.items()}

    def _place_learning_rates(self) -> None:
        """Write what the schedule has set into the tensors that the captured kernels read."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            if group["lr"] is not rate:
                rate.fill_(group["lr"])
                group["lr"] = rate

    def _on_stream(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        if self.stream is None:
            return self.step(images, targets)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            parts = self.step(images, targets)
        torch.cuda.current_stream().wait_stream(self.stream)
        return parts

    def _capture(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor], Replay]:
        """Record a step on copies of a batch; nothing is computed yet."""
        held_images, held_targets = images.clone(), targets.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            parts = self.step(held_images, held_targets)
        return held_images, held_targets, parts, graph.replay
