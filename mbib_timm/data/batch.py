"""A batch as every loader gives it."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """Images with their labels, on the device.

    Attributes:
        views: augmented copies of the images, normalised, (B, C, H, W) each; one unless a method asks for more.
        targets: labels (B,), int64.
        index: the images' positions in their split, (B,), int64; -1 where a source streams.
    """

    views: tuple[Tensor, ...]
    targets: Tensor
    index: Tensor

    @property
    def images(self) -> Tensor:
        """The images, (B, C, H, W): their first view."""
        return self.views[0]

    def map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """Return a batch of changed tensors."""
        return Batch(tuple(change(view) for view in self.views), change(self.targets), change(self.index))

    def tensors(self) -> tuple[Tensor, ...]:
        """Return all tensors in one order."""
        return (*self.views, self.targets, self.index)
