"""DiVE: a balanced-softmax model teaches a new network of the same kind its flattened predictions.

He et al., Distilling Virtual Examples for Long-Tailed Recognition, ICCV 2021.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mbib_timm.data import Batch
from mbib_timm.methods.base import register
from mbib_timm.methods.functional import (
    adjusted_cross_entropy,
    as_counts,
    distillation_divergence,
    tempered_log_probabilities,
)
from mbib_timm.methods.teacher import Taught, TeacherSettings
from mbib_timm.options import option


@dataclass(frozen=True)
class DiveSettings(TeacherSettings):
    """The constants of DiVE; the defaults are those of the Bag of Tricks rerun on CIFAR-100-LT."""

    temperature: float = option(2.0, "temperature T of teacher and student", above=0)
    power: float = option(0.5, "exponent p of the teacher's probabilities, which are then renormalised", above=0)
    alpha: float = option(
        0.5, "weight alpha of the distillation; that of the balanced softmax is 1 - alpha", minimum=0, maximum=1
    )


@register("dive")
class Dive(Taught):
    """Distillation of a frozen teacher's flattened predictions, beside balanced softmax.

    The loss is ``alpha T^2 KL(p_t || softmax(z/T)) + (1 - alpha) BSCE(z, y)``, mean over the student's heads. ``p_t``
    is ``softmax(z_t/T)^p``, normalised: of the teacher's raw logits, without log n. The student starts anew. A recipe's
    class weights are those of the balanced softmax.

    Raises:
        MbibError: no fitting teacher, see `Taught`, or a class without training images.
    """

    title = "DiVE"
    citation = "He et al., Distilling Virtual Examples for Long-Tailed Recognition, ICCV 2021"
    logit_prior = "uniform"
    soft_targets = True
    takes_class_weights = True
    Settings = DiveSettings
    reset = "all"

    log_counts: Tensor

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.register_buffer("log_counts", as_counts(self.facts.class_counts).log().float(), persistent=False)

    def forward(self, *batches: Batch) -> dict[str, Tensor]:
        """Return ``loss`` and its unweighted parts, ``divergence`` and ``bsce``."""
        (batch,) = batches
        heads = torch.stack([*self.logits(batch.images).values()])  # (H, B, K)
        return self.distill(self.teacher_logits(batch), heads, batch.targets)

    def distill(self, teacher: Tensor, heads: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return the loss and its parts.

        Args:
            teacher: logits z_t, (B, K).
            heads: logits z of the student's H heads, (H, B, K).
            targets: (B,) or (B, K).
        """
        temperature, alpha = self.settings.temperature, self.settings.alpha
        # softmax(z_t/T)^p, normalised, is softmax(p z_t/T).
        wanted = tempered_log_probabilities(teacher, temperature / self.settings.power)
        divergence = distillation_divergence(wanted, tempered_log_probabilities(heads, temperature)).mean()
        bsce = adjusted_cross_entropy(
            heads, targets, offset=self.log_counts, weight=self.label_weights, normalize=False
        ).mean()
        loss = alpha * temperature**2 * divergence + (1 - alpha) * bsce
        return {"loss": loss, "divergence": divergence.detach(), "bsce": bsce.detach()}
