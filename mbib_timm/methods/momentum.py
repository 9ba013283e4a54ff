"""A momentum copy of a network, and a queue of features: what contrastive methods compare images with.

Both are modules of the method, which a checkpoint keeps. They change in place, by operations of fixed shapes that wait
for nothing: a captured step stays valid.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from mbib_timm.environment import is_distributed, share_buffers

NO_LABEL = -1


class MomentumCopy(nn.Module):
    """A copy of a network whose parameters are a moving average of the network's (He et al. 2020, eq. 2).

    Its BatchNorm statistics are its own, of the images that it sees itself.

    Args:
        network: to copy.
        momentum: m, what an update keeps of the copy's parameters.
    """

    def __init__(self, network: nn.Module, momentum: float) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).requires_grad_(False)
        self.momentum = momentum

    @torch.no_grad()
    def forward(self, images: Tensor) -> Any:
        """Return the copy's output, without gradient."""
        return self.network(images)

    @torch.no_grad()
    def follow(self, network: nn.Module) -> None:
        """Move every parameter by ``1 - m`` of its difference from the network's."""
        torch._foreach_lerp_([*self.network.parameters()], [*network.parameters()], 1 - self.momentum)

    def take_modes(self, network: nn.Module) -> None:
        """Take the mode of each of the network's layers: a BatchNorm layer in evaluation mode there is so here."""
        for own, other in zip(self.network.modules(), network.modules(), strict=True):
            own.training = other.training

    def synchronize(self) -> None:
        """Take the first process's buffers in all of them, as a resumed run does, which has these alone."""
        share_buffers(self.network)


class Queue(nn.Module):
    """The last Q features of other batches and their labels: a ring buffer. An empty place has the label `NO_LABEL`.

    Args:
        size: places Q.
        width: of a feature, d.
    """

    features: Tensor
    labels: Tensor
    pointer: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("features", torch.zeros(size, width))
        self.register_buffer("labels", torch.full((size,), NO_LABEL))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))  # the oldest place, which is the next one

    @torch.no_grad()
    def put(self, features: Tensor, labels: Tensor) -> None:
        """Replace the oldest features by those of a batch, of which the last Q stay.

        With several processes the batches of all of them go in, in the same order everywhere.

        Args:
            features: (B, d).
            labels: (B,).
        """
        if is_distributed():
            features, labels = _gathered(features), _gathered(labels)
        size = len(self.labels)
        features, labels = features[-size:], labels[-size:]
        places = (self.pointer + torch.arange(len(labels), device=labels.device)) % size
        self.features.index_copy_(0, places, features.to(self.features.dtype))
        self.labels.index_copy_(0, places, labels)
        self.pointer.copy_((self.pointer + len(labels)) % size)


def _gathered(values: Tensor) -> Tensor:
    """Return the values (B, ...) of all processes, (P B, ...), in order of their ranks."""
    whole = values.new_empty(torch.distributed.get_world_size() * len(values), *values.shape[1:])
    torch.distributed.all_gather_into_tensor(whole, values.contiguous())
    return whole
