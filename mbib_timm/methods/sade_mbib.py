"""SADE + MBIB: MBIB's loss on each of three experts, under the class frequencies that SADE trains it towards.

The paper reports such a combination (Table 8) and says only that MBIB is incorporated into each expert. What stands
here is this project's proposal, with the fewest choices that fit both papers:

    L = sum over experts e of  a BIB_e(v1, z_e) + b BIB_e(v2_e, z_e) + BIB_e(v3_e, z_e)

BIB_e(t, s) = BSC_e(t) + BSC_e(s) + beta VSD(t, s) is MBIB's (eq. 9), with the expert's offset 0, log pi or
log pi - tau log pi_rev in the place of log n. Self-distillation compares raw logits, as in MBIB: teacher and student
are of one expert, and carry the same offset.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mbib_timm.errors import MbibError
from mbib_timm.methods.base import register
from mbib_timm.methods.mbib import CITATION, Bottleneck, Edge, MbibSettings, mbib_edges
from mbib_timm.methods.sade import expert_offsets, experts_of
from mbib_timm.options import option


@dataclass(frozen=True)
class SadeMbibSettings(MbibSettings):
    """The constants of MBIB, alike for every expert, and SADE's tau."""

    tau: float = option(2.0, "strength of the reversed frequencies in the third expert's loss", minimum=0)


@register("sade_mbib")
class SadeMBIB(Bottleneck):
    """Our proposal for SADE + MBIB: MBIB's loss on each of three experts, each with its own class frequencies.

    Raises:
        MbibError: another number of experts than three, weights that do not fit an expert's observations, or a class
            without training images.
    """

    title = "SADE + MBIB (ours)"
    citation = CITATION
    Settings = SadeMbibSettings
    example = "mbib_experts_resnet32"

    def check_network(self) -> None:
        """Raise MbibError unless the network has three experts with observations and a bottleneck each, whose offsets
        differ."""
        if not self.settings.logit_adjustment:
            raise MbibError(
                f"setting 'logit_adjustment' of method {self.name!r}: without it all experts would learn the same "
                "class frequencies, and tau would have no effect"
            )
        if any(len(heads) < 2 for heads in experts_of(self).values()):
            raise self.unfit("a model of three experts with observations and a bottleneck each")
        self.graph(self.head_names)

    def graph(self, heads: Sequence[str]) -> list[Edge]:
        """Return the edges from every observation of an expert to its z."""
        return [
            edge
            for of_expert in experts_of(self).values()
            for edge in mbib_edges(of_expert, self.observation_weights(of_expert[:-1]))
        ]

    def head_offsets(self) -> Tensor:
        """Return the offset of the expert that a head belongs to, (H, 1, K), of the heads in `head_weights`."""
        offsets = expert_offsets(self.facts.class_counts, self.settings.tau)
        of_head = {
            head: offset for heads, offset in zip(experts_of(self).values(), offsets, strict=True) for head in heads
        }
        return torch.stack([of_head[head] for head in self.head_weights])[:, None]
