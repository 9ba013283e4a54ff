"""CUDA graphs without CUDA: the operations of a call are recorded with the tensors and numbers that they were given,
and a replay runs just these again, on the same memory. Whatever Python would have decided or counted anew is frozen.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mbib_timm.capturing import Graphs

aten = torch.ops.aten
# Results and shapes that the host has to wait for.
WAITING = {
    aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select, aten.bincount,
    aten._unique2, aten.unique_dim, aten.unique_consecutive,
}  # fmt: skip
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


def waits(function, arguments):
    """Whether an operation would wait for the device."""
    indices = tree_leaves(arguments[1]) if function.overloadpacket in INDEXING else []
    by_mask = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)
    return by_mask or function.overloadpacket in WAITING


class Recording(TorchDispatchMode):
    """Notes the operations below autograd: those of the forward and the backward pass, and of the optimizer."""

    def __init__(self):
        super().__init__()
        self.operations = []
        self.waits = []
        self.made, self.before = set(), {}  # storages that came during the call, and what others held before it

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        named = named or {}
        for value in tensors((arguments, named)):
            storage = value.untyped_storage()
            if storage._cdata not in self.made | self.before.keys():
                self.before[storage._cdata] = storage, storage.clone()
        result = function(*arguments, **named)
        self.operations.append((function, arguments, named, result))
        # A tensor that is made of numbers is copied from memory that is not pinned.
        if waits(function, arguments) or function.overloadpacket is aten.lift_fresh:
            self.waits.append(str(function))
        self.made |= {value.untyped_storage()._cdata for value in tensors(result)} - self.before.keys()
        return result

    def undo(self):
        """Put back what the call has changed."""
        for storage, content in self.before.values():
            storage.copy_(content)

    @torch.no_grad()
    def replay(self):
        for function, arguments, named, result in self.operations:
            given = {value.untyped_storage()._cdata for value in tensors((arguments, named))}
            for place, value in zip(tensors(result), tensors(function(*arguments, **named)), strict=True):
                # What is a part of an argument, or an argument changed in place, is there already.
                if place.untyped_storage()._cdata not in given:
                    place.detach().copy_(value)


def tensors(values):
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


class EmulatedGraphs(Graphs):
    """Graphs on the CPU."""

    def __init__(self):
        self.functions, self.captures = {}, 0

    def run(self, function, arguments):
        with Recording() as recording:
            result = function(*arguments)
        return result, recording.waits

    def capture(self, function, arguments):
        """Record a call, and undo what it did: a device that records computes nothing."""
        self.captures += 1
        state = torch.get_rng_state()
        with Recording() as recording:
            result = function(*arguments)
        recording.undo()
        torch.set_rng_state(state)
        assert not recording.waits
        return result, recording.replay
