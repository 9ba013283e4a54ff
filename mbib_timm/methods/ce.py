"""Cross-entropy: the baseline (CE in Table 1)."""

from torch import Tensor

from mbib_timm.methods.base import Method, register
from mbib_timm.methods.functional import adjusted_cross_entropy


@register("ce")
class CrossEntropy(Method):
    """Plain cross-entropy on every head: the baseline, which does nothing about the imbalance."""

    title = "CE"
    soft_targets = True
    takes_class_weights = True

    def head_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy of logits (B, K) for targets (B,) or (B, K)."""
        return adjusted_cross_entropy(logits, targets, weight=self.label_weights, normalize=False)
