"""SADE: three experts, trained towards the training, the uniform and the reversed class frequencies.

Zhang et al., Self-Supervised Aggregation of Diverse Experts for Test-Agnostic Long-Tailed Recognition, NeurIPS 2022.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mbib_timm.errors import MbibError
from mbib_timm.files import counted
from mbib_timm.methods.base import Method, register
from mbib_timm.methods.functional import adjusted_cross_entropy, as_counts
from mbib_timm.models.head_outputs import expert_heads
from mbib_timm.options import option

EXPERTS = 3


def reversed_counts(class_counts: Sequence[int] | np.ndarray | Tensor) -> Tensor:
    """Return for each class the training images of the class of the reversed rank, (K,): the rarest gets the most.

    Args:
        class_counts: training images n of each class; among equals the first class counts as the rarer one.
    """
    ascending, order = as_counts(class_counts).sort(stable=True)
    return torch.empty_like(ascending).scatter_(0, order, ascending.flip(0))


def expert_offsets(class_counts: Sequence[int] | np.ndarray | Tensor, tau: float) -> Tensor:
    """Return what is added to the logits of each expert in its loss, ``0, log pi, log pi - tau log pi_rev``, (3, K).

    The first expert learns the training frequencies pi, the second the uniform ones (balanced softmax), the third the
    reversed ones.

    Args:
        class_counts: training images of each class.
        tau: strength of the third.
    """
    counts = as_counts(class_counts)
    log_prior = (counts / counts.sum()).log()
    log_reversed = (reversed_counts(counts) / counts.sum()).log()
    return torch.stack([torch.zeros_like(log_prior), log_prior, log_prior - tau * log_reversed]).float()


def experts_of(method: Method) -> Mapping[str, tuple[str, ...]]:
    """Return the heads of a method's network by expert. Raises MbibError unless there are three experts."""
    experts = expert_heads(method.result_model())
    if len(experts) != EXPERTS:
        found = f"this one has {counted(len(experts), 'expert')}" if experts else "this one has none"
        raise MbibError(
            f"method {method.name!r} needs a model of exactly three experts, one for each of its losses, such as "
            f"experts_resnet32 or mbib_experts_resnet32; {found}"
        )
    return experts


@dataclass(frozen=True)
class SadeSettings:
    """The constants of SADE; the defaults are the authors' for CIFAR and ImageNet-LT."""

    tau: float = option(
        2.0, "strength of the reversed frequencies in the third expert's loss; 1 for iNaturalist", minimum=0
    )
    scale: float = option(30.0, "factor s on the cosines", above=0)


@register("sade")
class SADE(Method):
    """Cross-entropies of three experts, each with its own class frequencies, summed; cosine classifiers.

    The prediction is the mean of the experts' logits. Raises MbibError for another number of experts than three, for
    experts of several heads, and for a class without training images.
    """

    title = "SADE"
    citation = (
        "Zhang et al., Self-Supervised Aggregation of Diverse Experts for Test-Agnostic Long-Tailed Recognition, "
        "NeurIPS 2022"
    )
    logit_prior = "uniform"
    Settings = SadeSettings
    soft_targets = True
    takes_class_weights = True

    offsets: Tensor

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        offsets = expert_offsets(self.facts.class_counts, self.settings.tau)
        self.register_buffer("offsets", offsets[:, None], persistent=False)

    def check_network(self) -> None:
        """Raise MbibError unless the network has three experts with one head each."""
        experts = experts_of(self)
        if any(len(heads) > 1 for heads in experts.values()):
            raise MbibError(
                f"method {self.name!r} needs experts with one head each, such as those of experts_resnet32; this "
                f"model's first has {', '.join(next(iter(experts.values())))}: see method sade_mbib"
            )

    @classmethod
    def build_network(cls, settings: SadeSettings, build: Callable[..., nn.Module]) -> nn.Module:
        """Build the model with cosine classifiers, with `scale` in them."""
        return build(classifier="cosine", classifier_scale=settings.scale)

    def loss(self, logits: dict[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
        """Return ``loss``, the sum of the experts' losses, and these by expert.

        Args:
            logits: (B, K) of every expert.
            targets: (B,), int64, or (B, K).
        """
        losses = adjusted_cross_entropy(
            torch.stack([*logits.values()]),
            targets,
            offset=self.offsets,
            weight=self.label_weights,
            normalize=False,
        )
        parts = {f"loss_{name}": value for name, value in zip(logits, losses.detach(), strict=True)}
        return {"loss": losses.sum(), **parts}
