"""Every structure of the paper as a list of weighted edges from teacher to student, and one loss for them all.

BIB       (v3, z)                                  eq. 9, figure 1
MBIB      (v1, z): a   (v2, z): b   (v3, z): 1     eq. 11, figure 2
SE-MBIB   (v1, v2)   (v2, v3)   (v3, z)            figure 5 (a)
ALL-MBIB  the edges of both                        figure 5 (b)
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mbib_timm.errors import MbibError
from mbib_timm.losses.functional import (
    as_counts,
    balanced_softmax_cross_entropy,
    class_temperatures,
    class_weights,
    distillation_divergence,
    tempered_log_probabilities,
)


class Edge(NamedTuple):
    """One BIB term: `weight` times BSC(teacher) + BSC(student) + beta VSD(teacher, student)."""

    teacher: str
    student: str
    weight: float


def bib_edges(head_names: Sequence[str]) -> list[Edge]:
    """BIB between the last observation and z (eq. 9)."""
    *_, last, z = head_names
    return [Edge(last, z, 1.0)]


def mbib_edges(head_names: Sequence[str], observation_weights: Sequence[float]) -> list[Edge]:
    """BIB between every observation and z (eq. 11).

    Args:
        head_names: observations in order of depth, then z.
        observation_weights: a, b, ..., 1: one an observation.

    Raises:
        MbibError: another number of weights than of observations.
    """
    *observations, z = head_names
    if len(observation_weights) != len(observations):
        raise MbibError(
            f"recipe key 'observation_weights': expected {len(observations)} numbers, one for each of "
            f"{', '.join(observations)}, got {list(observation_weights)}"
        )
    return [Edge(v, z, weight) for v, weight in zip(observations, observation_weights, strict=True)]


def se_mbib_edges(head_names: Sequence[str]) -> list[Edge]:
    """BIB between each head and the next deeper one (figure 5 (a))."""
    return [Edge(teacher, student, 1.0) for teacher, student in pairwise(head_names)]


def all_mbib_edges(head_names: Sequence[str], observation_weights: Sequence[float]) -> list[Edge]:
    """The union of MBIB's and SE-MBIB's edges (figure 5 (b))."""
    edges = mbib_edges(head_names, observation_weights)
    present = {(edge.teacher, edge.student) for edge in edges}
    return edges + [edge for edge in se_mbib_edges(head_names) if edge[:2] not in present]


class BottleneckLoss(nn.Module):
    """The sum of the BIB terms of a graph of edges (eq. 9, 11, 12).

    Each head's balanced softmax cross-entropy is computed once, and weighs what its edges weigh together: z, which
    every edge of MBIB reaches, weighs a + b + 1.

    Args:
        edges: what teaches what, with which weight.
        class_counts: training images of each class, (K,).
        beta: weight of the self-distillation.
        gamma: exponent of the class temperatures.
        class_weight_power: exponent m of the class weights.
        normalize_class_weights: divide by the sum of the weights of the batch's labels, not by their number.
        logit_adjustment: add log n to the logits; without it the terms are plain cross-entropies (Table 9).

    Raises:
        MbibError: a class without training images.
    """

    bsc_weights: Tensor
    vsd_weights: Tensor
    log_counts: Tensor
    weight: Tensor
    temperatures: Tensor | None

    def __init__(
        self,
        edges: Sequence[Edge],
        class_counts: Sequence[int] | np.ndarray | Tensor,
        beta: float = 5.0,
        gamma: float = 0.0,
        class_weight_power: float = 0.1,
        normalize_class_weights: bool = True,
        logit_adjustment: bool = True,
    ) -> None:
        super().__init__()
        self.edges = tuple(edges)
        self.head_weights: dict[str, float] = {}
        for edge in self.edges:
            for head in edge[:2]:
                self.head_weights[head] = self.head_weights.get(head, 0.0) + edge.weight
        # As tensors, so that other weights and another beta need no other compiled code.
        self.register_buffer("bsc_weights", torch.tensor([*self.head_weights.values()]), persistent=False)
        self.register_buffer("vsd_weights", beta * torch.tensor([e.weight for e in self.edges]), persistent=False)
        # The class frequencies that trained logits are for; see `LOSSES`.
        self.logit_prior = "uniform" if logit_adjustment else "train"
        self.normalize_class_weights = normalize_class_weights
        log_counts = as_counts(class_counts).log().float()
        self.register_buffer("log_counts", log_counts if logit_adjustment else 0 * log_counts, persistent=False)
        self.register_buffer("weight", class_weights(class_counts, class_weight_power), persistent=False)
        self.register_buffer(
            "temperatures", class_temperatures(class_counts, gamma) if gamma else None, persistent=False
        )

    def forward(self, logits: dict[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
        """Return ``loss`` and its unweighted parts, ``bsc_<head>`` and ``vsd_<teacher>_<student>``.

        Args:
            logits: (B, K) of every head that an edge names.
            targets: (B,), int64.
        """
        heads = tuple(self.head_weights)
        # One log-softmax with and one without log n for all heads together, however many edges a head has.
        stacked = torch.stack([logits[head] for head in heads])
        bsc = balanced_softmax_cross_entropy(
            stacked, targets, self.log_counts, self.weight, self.normalize_class_weights
        )
        log_probabilities = dict(zip(heads, tempered_log_probabilities(stacked, self.temperatures), strict=True))
        vsd = distillation_divergence(
            torch.stack([log_probabilities[edge.teacher] for edge in self.edges]),
            torch.stack([log_probabilities[edge.student] for edge in self.edges]),
        )
        loss = (self.bsc_weights * bsc).sum() + (self.vsd_weights * vsd).sum()
        parts = {f"bsc_{head}": value for head, value in zip(heads, bsc.detach(), strict=True)}
        parts |= {
            f"vsd_{edge.teacher}_{edge.student}": value for edge, value in zip(self.edges, vsd.detach(), strict=True)
        }
        return {"loss": loss, **parts}
