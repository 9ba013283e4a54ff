"""tau-normalisation: the rows of a trained classifier are brought towards one length.

Kang et al., Decoupling Representation and Classifier for Long-Tailed Recognition, ICLR 2020.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mbib_timm.data.batch import Batch
from mbib_timm.environment import is_distributed
from mbib_timm.errors import MbibError
from mbib_timm.methods.base import Method, Passes, register
from mbib_timm.methods.class_means import captured_inputs
from mbib_timm.models.head_outputs import classifiers_of
from mbib_timm.options import option


@dataclass(frozen=True)
class TauNormSettings:
    """The constants of tau-normalisation."""

    tau: float | None = option(
        None, "exponent; chosen on held-out training images among 0, 0.1, ..., 2 when not given", minimum=0
    )


CANDIDATES = tuple(step / 10 for step in range(21))


def normalized_rows(weight: Tensor, tau: float) -> Tensor:
    """Return ``W_j / |W_j|^tau`` (K, D): 0 leaves the rows as they are, 1 gives them length 1."""
    return weight / weight.norm(dim=1, keepdim=True) ** tau


@register("tau_norm")
class TauNorm(Method):
    """Divides the rows of every linear classifier by ``|W_j|^tau`` and drops its bias; trains nothing.

    The exponent with the best mean of the class accuracies on held-out training images is taken, the smallest of
    several that are best.
    """

    title = "tau-norm"
    citation = "Kang et al., Decoupling Representation and Classifier for Long-Tailed Recognition, ICLR 2020"
    logit_prior = "uniform"
    Settings = TauNormSettings
    needs_start = True
    post_hoc = True

    def check_network(self) -> None:
        """Raise MbibError for a network without linear classifiers."""
        self._classifiers()

    @classmethod
    def needs_held_out(cls, settings: TauNormSettings) -> bool:
        """Return whether tau is to be chosen."""
        return settings.tau is None

    def finish(self, data: Passes) -> None:
        """Choose tau where it is not given, and normalise the classifiers."""
        classifiers = self._classifiers()
        self.tau = self._choose(classifiers, data.held_out) if self.settings.tau is None else self.settings.tau
        with torch.no_grad():
            for classifier in classifiers:
                classifier.weight.copy_(normalized_rows(classifier.weight, self.tau))
                classifier.bias.zero_()

    def report(self) -> dict[str, float]:
        """Return tau, where it was not given."""
        return {"tau": self.tau} if self.settings.tau is None else {}

    def _classifiers(self) -> list[nn.Linear]:
        classifiers: Any = classifiers_of(self.result_model())
        for classifier in classifiers:
            if type(classifier) is not nn.Linear:
                raise MbibError(f"method {self.name!r} needs linear classifiers, got {type(classifier).__name__}")
        return list(classifiers)

    @torch.no_grad()
    def _choose(self, classifiers: list[nn.Linear], images: Iterable[Batch]) -> float:
        """Return the exponent whose predictions have the best mean of class accuracies; one pass for all of them."""
        model = self.result_model().eval()
        counts = torch.zeros(len(CANDIDATES) + 1, classifiers[0].out_features, device=self.device)
        with captured_inputs(classifiers) as seen:
            for batch in images:
                seen.clear()
                model(batch.images)
                for i, tau in enumerate(CANDIDATES):
                    # What a model of several heads predicts is the mean of those that an evaluation calls.
                    logits = [inputs @ normalized_rows(layer.weight, tau).T for layer, inputs in seen.items()]
                    correct = torch.stack(logits).mean(dim=0).argmax(dim=1) == batch.targets
                    counts[i].index_add_(0, batch.targets, correct.to(counts.dtype))
                counts[-1].index_add_(0, batch.targets, torch.ones_like(correct, dtype=counts.dtype))
        if is_distributed():
            torch.distributed.all_reduce(counts)
        *correct_by_tau, total = counts.double()
        present = total > 0
        accuracies = [float((correct[present] / total[present]).mean()) for correct in correct_by_tau]
        return CANDIDATES[accuracies.index(max(accuracies))]
