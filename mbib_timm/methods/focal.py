"""Focal loss: images that are already classified well count less (Lin et al. 2017)."""

from dataclasses import dataclass

from torch import Tensor

from mbib_timm.methods.base import Method, register
from mbib_timm.methods.functional import focal_loss
from mbib_timm.options import option


@dataclass(frozen=True)
class FocalSettings:
    """The constants of the focal loss."""

    gamma: float = option(2.0, "focusing exponent; 0 is plain cross-entropy", minimum=0)


@register("focal")
class Focal(Method):
    """Softmax focal loss on every head: images that are already classified well count less."""

    title = "Focal"
    citation = "Lin et al., Focal Loss for Dense Object Detection, ICCV 2017"
    Settings = FocalSettings
    soft_targets = True
    takes_class_weights = True

    def head_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the focal loss of logits (B, K) for targets (B,) or (B, K)."""
        return focal_loss(logits, targets, self.settings.gamma, self.label_weights)
