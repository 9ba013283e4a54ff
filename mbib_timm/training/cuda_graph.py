"""The whole training step as one CUDA graph: hundreds of kernels for the price of one launch."""

from collections.abc import Callable

import torch
from torch import Tensor

from mbib_timm.data.batch import Batch

# Steps of each batch shape that run as they are, on the stream that captures: they allocate the optimizer's state,
# let cuDNN choose its kernels, and train like every other step.
WARM_UP_STEPS = 3

Step = Callable[..., dict[str, Tensor]]
Replay = Callable[[], None]
Batches = tuple[Batch, ...]
Shapes = tuple[torch.Size, ...]


class GraphedStep:
    """A training step that is captured once for each batch shape and replayed from then on.

    A replay runs the captured kernels on the same memory: batches are copied into it, and learning rates, which the
    schedule changes, lie in it as tensors.

    Args:
        step: takes a batch per stream, updates the weights, returns scalars.
        optimizer: whose learning rates the step reads; one that accepts them as tensors.
        device: CUDA device.
    """

    def __init__(self, step: Step, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self.step, self.optimizer = step, optimizer
        self.rates = [torch.zeros((), device=device) for _ in optimizer.param_groups]
        self.runs: dict[Shapes, int] = {}
        self.captured: dict[Shapes, tuple[Batches, dict[str, Tensor], Replay]] = {}
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batches: Batches, accumulate: int = 1, update: bool = True) -> dict[str, Tensor]:
        """Train on a batch per stream; the scalars returned are copies, which the next step does not overwrite."""
        assert accumulate == 1
        assert update
        self._place_learning_rates()
        given = [tensor for batch in batches for tensor in batch.tensors()]
        shapes = tuple(tensor.shape for tensor in given)
        if shapes not in self.captured:
            self.runs[shapes] = self.runs.get(shapes, 0) + 1
            if self.runs[shapes] <= WARM_UP_STEPS:
                return self._on_stream(batches)
            self.captured[shapes] = self._capture(batches)
        held, parts, replay = self.captured[shapes]
        for place, tensor in zip((t for batch in held for t in batch.tensors()), given, strict=True):
            place.copy_(tensor)
        replay()
        return {name: value.clone() for name, value in parts.items()}

    def _place_learning_rates(self) -> None:
        """Write what the schedule has set into the tensors that the captured kernels read."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            if group["lr"] is not rate:
                rate.fill_(group["lr"])
                group["lr"] = rate

    def _on_stream(self, batches: Batches) -> dict[str, Tensor]:
        if self.stream is None:
            return self.step(batches)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            parts = self.step(batches)
        torch.cuda.current_stream().wait_stream(self.stream)
        return parts

    def _capture(self, batches: Batches) -> tuple[Batches, dict[str, Tensor], Replay]:
        """Record a step on copies of the batches; nothing is computed yet."""
        held = tuple(batch.map(torch.clone) for batch in batches)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            parts = self.step(held)
        return held, parts, graph.replay
