"""A function of tensors as one CUDA graph: hundreds of kernels for the price of one launch."""

import gc
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

# Calls that run as they are, on the stream that captures: they allocate an optimizer's state, let cuDNN choose its
# kernels, and compute like every other call.
WARM_UP_CALLS = 3

# Of tensors, in tuples or alone.
Function = Callable[..., dict[str, Tensor]]
Replay = Callable[[], None]


class Graphs:
    """The CUDA graphs of one run: on one stream, in one pool of memory.

    The graphs may use each other's memory, since nothing stays in it: what a replay gives is copied at once.

    Args:
        device: CUDA device.

    Attributes:
        functions: captured ones that serve more than once, by a key of what they compute.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.functions: dict[Hashable, CapturedFunction] = {}

    def run(self, function: Function, arguments: Any) -> tuple[dict[str, Tensor], list[str]]:
        """Call a function on the stream that captures; return its result, and where it waited for the device."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream), _noted_waits() as waits:
            result = function(*arguments)
        current.wait_stream(self.stream)
        return result, waits

    def capture(self, function: Function, arguments: Any) -> tuple[dict[str, Tensor], Replay]:
        """Record a call; nothing is computed yet. Returns where the result will be, and what computes it."""
        gc.collect()  # what is collected while a graph records may call CUDA, and spoil the graph
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as one that pins memory, may call CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            result = function(*arguments)
        return result, graph.replay


@contextmanager
def _noted_waits() -> Iterator[list[str]]:
    """Give a list that takes the places, file and line, of calls that wait for the device."""
    waits: list[str] = []
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield waits
    finally:
        torch.cuda.set_sync_debug_mode(before)
    for warning in caught:
        if "synchronizing CUDA operation" in str(warning.message):
            waits.append(f"{warning.filename}, line {warning.lineno}")
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


class CapturedFunction:
    """A function that is captured for the shapes of its largest call, and replayed from then on.

    A replay runs the captured kernels on the same memory: arguments are copied into it. Arguments of other shapes, such
    as a short last batch, go to `otherwise`: a second graph would cost more than it saves. A function that waits for
    the device cannot be captured; it runs as it is, and a warning says where it waits.

    Args:
        function: takes tensors, or tuples of them, and returns tensors by name.
        otherwise: the same for other shapes.
        graphs: of the run.
        what: what the function computes, for the warning.
    """

    def __init__(self, function: Function, otherwise: Function, graphs: Graphs, what: str) -> None:
        self.function, self.otherwise, self.graphs, self.what = function, otherwise, graphs, what
        self.shapes: list[tuple[torch.Size, torch.dtype]] = []
        self.size = -1  # of all arguments together, in elements
        self.calls = 0
        self.waits = False
        self.captured: tuple[Any, dict[str, Tensor], Replay] | None = None

    def __call__(self, *arguments: Any) -> dict[str, Tensor]:
        """Call the function; what it returns is not overwritten by the next call."""
        given = tree_leaves(arguments)
        shapes = [(tensor.shape, tensor.dtype) for tensor in given]
        size = sum(tensor.numel() for tensor in given)
        if size > self.size:  # the first call, or the whole batch after a short one, with which a resumed run may begin
            self.shapes, self.size, self.calls, self.captured = shapes, size, 0, None
        if shapes != self.shapes:
            return self.otherwise(*arguments)
        if self.waits:
            return self.function(*arguments)
        self.calls += 1
        if self.calls <= WARM_UP_CALLS:
            result, waits = self.graphs.run(self.function, arguments)
            if waits and self.calls == WARM_UP_CALLS:  # the first calls may wait, to compile or to choose kernels
                self.waits = True
                warnings.warn(f"{self.what} is not captured: it waits for the device ({waits[0]})", stacklevel=2)
            return result
        if self.captured is None:
            held = tree_map(torch.clone, arguments)
            self.captured = (held, *self.graphs.capture(self.function, held))
        held, result, replay = self.captured
        for place, tensor in zip(tree_leaves(held), given, strict=True):
            place.copy_(tensor)
        replay()
        return {name: value.clone() for name, value in result.items()}
