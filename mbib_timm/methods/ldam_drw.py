"""LDAM-DRW: margins that grow as classes get rarer, on a cosine classifier, and class weights late in training.

Cao et al., Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss, NeurIPS 2019.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mbib_timm.methods.base import Method, register
from mbib_timm.methods.functional import adjusted_cross_entropy, effective_number_weights, ldam_margins
from mbib_timm.options import option


@dataclass(frozen=True)
class LdamDrwSettings:
    """The constants of LDAM-DRW; the defaults are the authors' for CIFAR."""

    max_margin: float = option(0.5, "margin of the rarest class, in cosine", minimum=0)
    scale: float = option(30.0, "factor s on the cosines", above=0)
    reweight_from: float = option(
        0.8, "fraction of the epochs after which class weights apply (DRW); 1 for never", minimum=0, maximum=1
    )
    effective_beta: float = option(0.9999, "beta of the effective numbers behind the class weights", minimum=0, below=1)


@register("ldam_drw")
class LdamDrw(Method):
    """Cross-entropy with larger margins for rarer classes; late in training, weighted by effective numbers of images.

    The logits are ``s (cos - m_y [j = y])``. The weighted mean divides by the sum of the batch's weights; a recipe's
    class weights multiply these. The class weights are a buffer that an epoch's start writes, so a captured step stays
    valid.
    """

    title = "LDAM-DRW"
    citation = "Cao et al., Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss, NeurIPS 2019"
    logit_prior = "uniform"
    Settings = LdamDrwSettings
    soft_targets = True
    takes_class_weights = True

    weights: Tensor
    deferred_weights: Tensor
    margins: Tensor

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        counts, settings = self.facts.class_counts, self.settings
        margins = settings.scale * ldam_margins(counts, settings.max_margin)
        self.register_buffer("margins", margins, persistent=False)
        deferred = effective_number_weights(counts, settings.effective_beta)
        self.register_buffer("deferred_weights", deferred, persistent=False)
        self.register_buffer("weights", torch.ones(len(counts)), persistent=False)

    @classmethod
    def build_network(cls, settings: LdamDrwSettings, build: Callable[..., nn.Module]) -> nn.Module:
        """Build the model with cosine classifiers: with `scale` in them, so that their logits are a softmax's."""
        return build(classifier="cosine", classifier_scale=settings.scale)

    def start_epoch(self, epoch: int) -> None:
        """Set the class weights of an epoch: none before the switch (DRW)."""
        deferred = epoch >= round(self.settings.reweight_from * self.facts.epochs)
        self.weights.copy_(self.deferred_weights if deferred else torch.ones_like(self.weights))

    def head_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of scaled cosines (B, K) for targets (B,) or (B, K)."""
        return adjusted_cross_entropy(logits, targets, margin=self.margins, weight=self.weighted(self.weights))
