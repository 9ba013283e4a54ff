"""The single-head baselines: cross-entropy, balanced softmax and focal loss."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from mbib_timm.losses.functional import as_counts, balanced_softmax_cross_entropy, focal_loss


class CrossEntropy(nn.Module):
    """Plain cross-entropy, with log n added to the logits where class counts are given (BSCE, Ren et al. 2020).

    Args:
        class_counts: training images of each class, (K,); None for the plain loss.
    """

    log_counts: Tensor | None

    def __init__(self, class_counts: Sequence[int] | np.ndarray | Tensor | None = None) -> None:
        super().__init__()
        log_counts = None if class_counts is None else as_counts(class_counts).log().float()
        self.register_buffer("log_counts", log_counts, persistent=False)

    @property
    def logit_prior(self) -> str:
        """The class frequencies that trained logits are for; see `LOSSES`."""
        return "train" if self.log_counts is None else "uniform"

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of logits (B, K) for targets (B,)."""
        log_counts = logits.new_zeros(()) if self.log_counts is None else self.log_counts
        return balanced_softmax_cross_entropy(logits, targets, log_counts)


class FocalLoss(nn.Module):
    """Focal loss (Lin et al. 2017).

    Args:
        gamma: focusing exponent.
    """

    logit_prior = "train"

    def __init__(self, gamma: float = 2.0) -> None:
        super().__init__()
        self.gamma = gamma

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of logits (B, K) for targets (B,)."""
        return focal_loss(logits, targets, self.gamma)


class HeadwiseLoss(nn.Module):
    """A loss of one head on every head that a model has; the mean over the heads.

    Args:
        loss: takes logits (B, K) and targets (B,), returns a scalar.
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.head_loss = loss

    @property
    def logit_prior(self) -> str | None:
        """That of the heads' loss; see `LOSSES`."""
        return getattr(self.head_loss, "logit_prior", None)

    def forward(self, logits: dict[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
        """Return ``loss``, and with several heads the loss of each as ``loss_<head>``."""
        losses = {name: self.head_loss(values, targets) for name, values in logits.items()}
        total = torch.stack(list(losses.values())).mean()
        parts = {f"loss_{name}": value.detach() for name, value in losses.items()} if len(losses) > 1 else {}
        return {"loss": total, **parts}
