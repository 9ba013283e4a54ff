"""Memory that tensors take, counted operation by operation: the same on every device, to the byte."""

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations within it make, for as long as they live.

    Attributes:
        now: bytes at this moment.
        peak: the most that there were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: Iterable[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation and count what it has made."""
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in self._alive | given:
                    self._alive.add(id(storage))
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._gone, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.now)
        return made

    def _gone(self, number: int, size: int) -> None:
        self._alive.discard(number)
        self.now -= size


def peak_of(action: Callable[[], Any]) -> int:
    """Return the bytes that an action's tensors take at the most, beyond what was there before."""
    with LiveBytes() as counted:
        action()
    return counted.peak


def over_logits(action: Callable[[dict[str, Tensor]], Any], logits: dict[str, Tensor]) -> float:
    """Return the memory that an action on logits takes, over that of the logits themselves.

    Args:
        action: on the logits by head, each (B, K), which need gradients if it asks for them.
        logits: as given.
    """
    return peak_of(lambda: action(logits)) / sum(values.nbytes for values in logits.values())
