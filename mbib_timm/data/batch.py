"""What a loader gives: images, labels, and which images they are."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """A batch on the device.

    Attributes:
        views: the images, each (B, C, H, W), normalised; one view, unless the method asks for more.
        targets: labels (B,), int64; soft targets (B, K), float32, whose rows sum to 1, in the training of a recipe that
            mixes images or smooths labels.
        index: positions in the split (B,), int64; in training in the training subset. A broken image that was replaced
            has the position of its replacement, so that ``split.targets[index]`` are the labels; a mixed image that of
            the image that another one was mixed into.
    """

    views: tuple[Tensor, ...]
    targets: Tensor
    index: Tensor  # type: ignore[assignment]  # hides a method of tuples that nothing calls on a batch

    @property
    def images(self) -> Tensor:
        """The first view."""
        return self.views[0]

    def map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """Return a batch of changed tensors."""
        return Batch(tuple(change(view) for view in self.views), change(self.targets), change(self.index))

    def tensors(self) -> tuple[Tensor, ...]:
        """Return all tensors in one order."""
        return (*self.views, self.targets, self.index)
