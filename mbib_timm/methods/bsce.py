"""Balanced softmax: cross-entropy of logits to which log n is added in training (Ren et al. 2020; eq. 4-6)."""

from typing import Any

from torch import Tensor

from mbib_timm.methods.base import Method, register
from mbib_timm.methods.functional import adjusted_cross_entropy, as_counts


@register("bsce")
class BalancedSoftmax(Method):
    """Balanced softmax cross-entropy on every head: in training, the log of a class's number of images is added to its
    logit, so that frequent classes are not preferred. Raises MbibError for a class without training images."""

    title = "BSCE"
    citation = "Ren et al., Balanced Meta-Softmax for Long-Tailed Visual Recognition, NeurIPS 2020"
    logit_prior = "uniform"
    soft_targets = True
    takes_class_weights = True

    log_counts: Tensor

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.register_buffer("log_counts", as_counts(self.facts.class_counts).log().float(), persistent=False)

    def head_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy of logits (B, K) plus log n for targets (B,) or (B, K)."""
        return adjusted_cross_entropy(
            logits, targets, offset=self.log_counts, weight=self.label_weights, normalize=False
        )
