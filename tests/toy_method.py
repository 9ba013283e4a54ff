"""A method in a file of its own: log n is added to logits that a learnt scale multiplies, more of it every epoch."""

from dataclasses import dataclass

import torch

from mbib_timm.methods import Method, option, register
from mbib_timm.methods.functional import adjusted_cross_entropy, as_counts


@dataclass(frozen=True)
class ToySettings:
    """Its constants."""

    strength: float = option(1.0, "share of log n that is added in the last epoch", minimum=0)


@register("toy")
class Toy(Method):
    """Cross-entropy of s z + a(e) log n, where s is learnt and stays below 1.01."""

    title, citation, logit_prior, Settings = "Toy", "nobody's", "uniform", ToySettings

    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("log_counts", as_counts(self.facts.class_counts).log().float(), persistent=False)
        self.register_buffer("offset", torch.zeros(len(self.facts.class_counts)))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.scale = torch.nn.Parameter(torch.ones(()))

    def start_epoch(self, epoch):
        self.offset.copy_(self.log_counts * self.settings.strength * (epoch + 1) / self.facts.epochs)

    def head_loss(self, logits, targets):
        return adjusted_cross_entropy(self.scale * logits, targets, offset=self.offset)

    def after_step(self):
        self.scale.clamp_(max=1.01)
        self.updates += 1
