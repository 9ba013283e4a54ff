"""Parameters, operations and memory of one image's forward pass, beside the paper's (Table 6 and section 4.7)."""

import copy
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from mbib_timm.models.complexity import count_macs, count_parameters
from mbib_timm.results.paper import TABLE_6

TABLE_6_SIZE = (640, 640)
COUNTS_TENSORS = "bytes of all live tensors: parameters, buffers, image and activations; no kernel workspace"
COUNTS_CUDA = "CUDA allocator's peak: parameters, buffers, image, activations and kernel workspace"


def efficiency(model: nn.Module, input_size: tuple[int, int, int]) -> dict[str, Any]:
    """Measure a model at Table 6's 3x640x640, in inference and with all heads.

    ``inference`` is the prediction alone, without classifiers that serve training only; ``all_heads``, which Table 6
    counts, computes the logits of every head, and is the same for a model with one. MACs are those of
    `count_macs`. Peak memory is that of a forward pass over one image in evaluation mode: on CUDA the allocator's, else
    that of the storages of live tensors, counted exactly on the meta device, which allocates nothing.

    Args:
        model: on any device; not changed.
        input_size: the model's own image size (C, H, W); its channels are taken, and its height and width where the
            model cannot take 640x640.

    Returns:
        ``input_size``, as used; ``inference`` and ``all_heads``, each with ``parameters``, ``macs`` and ``peak_memory``
        in bytes; ``memory_counts``, what the latter holds; ``table_6``, the paper's numbers.
    """
    bare: Any = copy.deepcopy(model).eval()
    if hasattr(bare, "remove_training_heads"):
        bare.remove_training_heads()
    complete: Any = copy.deepcopy(model).eval()
    size = _size_taken(bare, input_size)
    on_cuda = next(model.parameters()).is_cuda
    return {
        "input_size": list(size),
        "inference": _measure(bare, _prediction, size, on_cuda),
        "all_heads": _measure(complete, _all_heads, size, on_cuda),
        "memory_counts": COUNTS_CUDA if on_cuda else COUNTS_TENSORS,
        "table_6": TABLE_6,
    }


def _prediction(model: Any, images: Tensor) -> Any:
    return model(images)


def _all_heads(model: Any, images: Tensor) -> Any:
    return model.forward_heads(images) if hasattr(model, "forward_heads") else model(images)


class _Forward(nn.Module):
    """A model under another forward pass, for `count_macs`, which calls its module."""

    def __init__(self, model: nn.Module, forward: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.model, self.run = model, forward

    def forward(self, images: Tensor) -> Any:
        return self.run(self.model, images)


def _measure(
    model: nn.Module, forward: Callable[[Any, Tensor], Any], size: tuple[int, int, int], on_cuda: bool
) -> dict[str, int]:
    on_meta = _Forward(copy.deepcopy(model).to("meta"), forward)
    peak = peak_on_cuda(_Forward(model, forward), size) if on_cuda else peak_of_tensors(on_meta, size)
    return {
        "parameters": count_parameters(on_meta),
        "macs": count_macs(on_meta, size)["total"],
        "peak_memory": peak,
    }


def _size_taken(model: nn.Module, own: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return Table 6's size with the model's channels, or its own size where it cannot take that."""
    size = (own[0], *TABLE_6_SIZE)
    try:
        with torch.no_grad():
            copy.deepcopy(model).to("meta")(torch.empty(1, *size, device="meta"))
    except (AssertionError, RuntimeError, ValueError):  # timm asserts the image size, others fail in a layer
        return own
    return size


def _bytes(model: nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def peak_on_cuda(model: nn.Module, size: tuple[int, int, int]) -> int:
    """Return the allocator's peak in bytes over a forward pass, without what the process holds besides."""
    parameter = next(model.parameters())
    with torch.no_grad():
        images = torch.zeros(1, *size, device=parameter.device, dtype=parameter.dtype)
        model(images)  # the first pass allocates what libraries keep
        before = torch.cuda.memory_allocated(parameter.device) - _bytes(model) - images.untyped_storage().nbytes()
        torch.cuda.reset_peak_memory_stats(parameter.device)
        model(images)
        return torch.cuda.max_memory_allocated(parameter.device) - before


def peak_of_tensors(model: nn.Module, size: tuple[int, int, int]) -> int:
    """Return the largest number of bytes that a forward pass's live storages come to, parameters and image included."""
    parameter = next(model.parameters())
    live = _LiveBytes()
    with torch.no_grad():
        images = torch.empty(1, *size, device=parameter.device, dtype=parameter.dtype)
        for tensor in (*model.parameters(), *model.buffers(), images):
            live.add(tensor)
        with live:
            model(images)
    return live.peak


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages from the operation that makes them until nothing refers to them."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.now = self.peak = 0

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage, once however many views there are of it."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.live:
            self.live[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key).atexit = False

    def _drop(self, key: int) -> None:
        self.now -= self.live.pop(key)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self.add, output)
        return output
