"""BIB, MBIB and their relatives: every structure of the paper as weighted edges from teacher to student, and one loss.

BIB       (v3, z)                                  eq. 9, figure 1
MBIB      (v1, z): a   (v2, z): b   (v3, z): 1     eq. 11, figure 2
SE-MBIB   (v1, v2)     (v2, v3)     (v3, z)        figure 5 (a)
ALL-MBIB  the edges of both                        figure 5 (b)

The paper gives no weights for the sequential edges of SE-MBIB and ALL-MBIB: they weigh 1, or a, b, ..., 1 in order of
depth, by the setting `sequential_weights`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import timm
import torch
from torch import Tensor, nn

from mbib_timm.errors import MbibError
from mbib_timm.methods.base import Method, register
from mbib_timm.methods.functional import (
    adjusted_cross_entropy,
    as_counts,
    class_temperatures,
    class_weights,
    distillation_divergence,
    is_large,
    self_distillation,
    tempered_log_probabilities,
)
from mbib_timm.models.weights import TRAINING_HEADS
from mbib_timm.options import option

CITATION = "Mixture of Balanced Information Bottlenecks for Long-Tailed Visual Recognition, TMLR 2025"


class Edge(NamedTuple):
    """One BIB term: `weight` times BSC(teacher) + BSC(student) + beta VSD(teacher, student)."""

    teacher: str
    student: str
    weight: float


def bib_edges(heads: Sequence[str]) -> list[Edge]:
    """BIB between the last observation and z (eq. 9). Heads are observations in order of depth, then z."""
    *_, last, z = heads
    return [Edge(last, z, 1.0)]


def mbib_edges(heads: Sequence[str], weights: Sequence[float]) -> list[Edge]:
    """BIB between every observation and z (eq. 11), with weights a, b, ..., 1."""
    *observations, z = heads
    return [Edge(v, z, weight) for v, weight in zip(observations, weights, strict=True)]


def se_mbib_edges(heads: Sequence[str], weights: Sequence[float]) -> list[Edge]:
    """BIB between each head and the next deeper one (figure 5 (a))."""
    return [Edge(v, deeper, weight) for (v, deeper), weight in zip(pairwise(heads), weights, strict=True)]


def all_mbib_edges(heads: Sequence[str], weights: Sequence[float], sequential: Sequence[float]) -> list[Edge]:
    """The union of MBIB's and SE-MBIB's edges (figure 5 (b)); the edge that both have weighs what MBIB's does."""
    edges = mbib_edges(heads, weights)
    present = {(edge.teacher, edge.student) for edge in edges}
    return edges + [edge for edge in se_mbib_edges(heads, sequential) if edge[:2] not in present]


@dataclass(frozen=True)
class BibSettings:
    """The constants of BIB."""

    beta: float = option(5.0, "weight of the self-distillation loss (eq. 9)", minimum=0)
    gamma: float = option(0.0, "exponent of the class temperatures (eq. 8)", minimum=0)
    class_weight_power: float = option(0.1, "exponent m of the class weights (eq. 7)", minimum=0)
    normalize_class_weights: bool = option(
        True, "divide a batch's class-weighted loss by the sum of the weights instead of the number of images"
    )
    logit_adjustment: bool = option(
        True, "add log n to the logits (eq. 4); otherwise the terms are plain cross-entropies"
    )


@dataclass(frozen=True)
class MbibSettings(BibSettings):
    """The constants of MBIB."""

    observation_weights: list[float] = option(
        [0.1, 0.3, 1.0], "weights a, b, ..., 1 of the observations' BIB terms (eq. 11)", minimum=0
    )


@dataclass(frozen=True)
class SequentialSettings(MbibSettings):
    """The constants of SE-MBIB and ALL-MBIB."""

    sequential_weights: str = option(
        "one",
        "weights of the edges from each head to the next: one, or observation for a, b, ..., 1",
        choices=("one", "observation"),
    )


class Bottleneck(Method):
    """The sum of the BIB terms of a graph of edges (eq. 9, 11, 12).

    Each head's balanced softmax cross-entropy is computed once, and weighs what its edges weigh together: z, which
    every edge of MBIB reaches, weighs a + b + 1.

    Raises:
        MbibError: a network without bottleneck, weights that do not fit its observations, or a class without training
            images.
    """

    citation = CITATION
    Settings: ClassVar[type] = BibSettings
    soft_targets = True
    takes_class_weights = True
    example: ClassVar[str] = "mbib_resnet50"  # of a network that fits

    bsc_weights: Tensor
    vsd_weights: Tensor
    logit_offsets: Tensor
    class_weights: Tensor
    temperatures: Tensor | None

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        counts, settings = self.facts.class_counts, self.settings
        self.edges = tuple(self.graph(self.head_names))
        self.head_weights: dict[str, float] = {}
        for edge in self.edges:
            for head in edge[:2]:
                self.head_weights[head] = self.head_weights.get(head, 0.0) + edge.weight
        # As tensors, so that other weights and another beta need no other compiled code.
        self._constant("bsc_weights", torch.tensor([*self.head_weights.values()]))
        self._constant("vsd_weights", settings.beta * torch.tensor([edge.weight for edge in self.edges]))
        offsets = self.head_offsets()
        self._constant("logit_offsets", offsets if settings.logit_adjustment else 0 * offsets)
        self._constant("class_weights", class_weights(counts, settings.class_weight_power))
        self._constant("temperatures", class_temperatures(counts, settings.gamma) if settings.gamma else None)

    def check_network(self) -> None:
        """Raise MbibError for a network without observations or bottleneck, or with others than there are weights."""
        bottleneck = getattr(self.get_eval_model(), "bottleneck_head", None)
        if bottleneck is None or len(self.head_names) < 2:
            raise self.unfit("a model with observations and a bottleneck")
        self.graph(self.head_names)

    def unfit(self, needed: str) -> MbibError:
        """Return the error for a network that is not what is needed; it names one, where there is on its backbone."""
        model = self.get_eval_model()
        architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture", "")
        network, backbone = self.example.rpartition("_")[0], architecture.rpartition("_")[2]
        fitting = f"{network}_{backbone}" if timm.is_model(f"{network}_{backbone}") else self.example
        # A bare module stands for no model, where a loss alone is asked for.
        returned = f"; this one returns only {', '.join(self.head_names)}" if type(model) is not nn.Module else ""
        return MbibError(f"method {self.name!r} needs {needed}, such as {fitting}{returned}")

    def head_offsets(self) -> Tensor:
        """Return what is added to logits (eq. 4), (K,); or for each head of `head_weights`, (H, 1, K)."""
        return as_counts(self.facts.class_counts).log().float()

    def prepare_distributed(self, device_ids: list[int] | None = None, **ddp_kwargs: Any) -> "Method":
        """Wrap the network for several processes. Heads that no edge names, which `bib` leaves as they are on a network
        of several observations, are frozen: torch would wait for their gradients."""
        idle = tuple(f"{TRAINING_HEADS}{head}." for head in self.head_names if head not in self.head_weights)
        for name, parameter in self.trainable_module.named_parameters():
            if name.startswith(idle):
                parameter.requires_grad_(False)
        return super().prepare_distributed(device_ids, **ddp_kwargs)

    def _constant(self, name: str, value: Tensor | None) -> None:
        self.register_buffer(name, value, persistent=False)

    @property
    def logit_prior(self) -> str:
        """The class frequencies that trained logits are for, without class weights."""
        return "uniform" if self.settings.logit_adjustment else "train"

    @property
    def own_weights(self) -> Tensor:
        """The class weights of eq. 7, (K,)."""
        return self.class_weights

    def graph(self, heads: Sequence[str]) -> list[Edge]:
        """Return the edges between a network's heads: observations in order of depth, then z."""
        raise NotImplementedError

    def observation_weights(self, observations: Sequence[str]) -> list[float]:
        """Return a, b, ..., 1. Raises MbibError for another number of weights than of observations."""
        weights: list[float] = self.settings.observation_weights
        if len(weights) != len(observations):
            raise MbibError(
                f"setting 'observation_weights' of method {self.name!r}: expected {len(observations)} numbers, one for "
                f"each of {', '.join(observations)}, got {weights}"
            )
        return weights

    def sequential_weights(self, observations: Sequence[str]) -> list[float]:
        """Return the weights of the edges from each head to the next."""
        weights = self.observation_weights(observations)
        return weights if self.settings.sequential_weights == "observation" else [1.0] * len(weights)

    def loss(self, logits: dict[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
        """Return ``loss`` and its unweighted parts, ``bsc_<head>`` and ``vsd_<teacher>_<student>``.

        Args:
            logits: (B, K) of every head that an edge names.
            targets: (B,), int64, or (B, K); the VSD terms do not need them.
        """
        heads = tuple(self.head_weights)
        if is_large(logits[heads[0]]):
            bsc, vsd = self._terms_one_by_one(logits, targets)
        else:
            bsc, vsd = self._terms(logits, targets)
        loss = (self.bsc_weights * bsc).sum() + (self.vsd_weights * vsd).sum()
        parts = {f"bsc_{head}": value for head, value in zip(heads, bsc.detach(), strict=True)}
        for edge, value in zip(self.edges, vsd.detach(), strict=True):
            parts[f"vsd_{edge.teacher}_{edge.student}"] = value
        return {"loss": loss, **parts}

    def _terms(self, logits: dict[str, Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cross-entropies of the heads, (H,), and the divergences of the edges, (E,)."""
        heads = tuple(self.head_weights)
        # One log-softmax with and one without log n for all heads together, however many edges a head has.
        stacked = torch.stack([logits[head] for head in heads])
        bsc = adjusted_cross_entropy(
            stacked,
            targets,
            offset=self.logit_offsets,
            weight=self.weighted(self.class_weights),
            normalize=self.settings.normalize_class_weights,
        )
        log_probabilities = dict(zip(heads, tempered_log_probabilities(stacked, self.temperatures), strict=True))
        vsd = distillation_divergence(
            torch.stack([log_probabilities[edge.teacher] for edge in self.edges]),
            torch.stack([log_probabilities[edge.student] for edge in self.edges]),
        )
        return bsc, vsd

    def _terms_one_by_one(self, logits: dict[str, Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the same of large logits, without a copy of those of all heads."""
        heads = tuple(self.head_weights)
        offsets = self.logit_offsets if self.logit_offsets.ndim == 3 else [self.logit_offsets] * len(heads)
        bsc = [
            adjusted_cross_entropy(
                logits[head],
                targets,
                offset=offset,
                weight=self.weighted(self.class_weights),
                normalize=self.settings.normalize_class_weights,
            )
            for head, offset in zip(heads, offsets, strict=True)
        ]
        vsd = [self_distillation(logits[edge.teacher], logits[edge.student], self.temperatures) for edge in self.edges]
        return torch.stack(bsc), torch.stack(vsd)


@register("bib")
class BIB(Bottleneck):
    """Balanced information bottleneck: one observation, the pooled last map, teaches z, a bottleneck behind it
    (eq. 9, figure 1)."""

    title = "BIB"
    example = "bib_resnet50"

    def graph(self, heads: Sequence[str]) -> list[Edge]:
        """Return the edge from the last observation to z."""
        return bib_edges(heads)


@register("mbib")
class MBIB(Bottleneck):
    """Mixture of balanced information bottlenecks: observations at several depths each teach z (eq. 11, figure 2)."""

    title = "MBIB"
    Settings = MbibSettings

    def graph(self, heads: Sequence[str]) -> list[Edge]:
        """Return the edges from every observation to z."""
        return mbib_edges(heads, self.observation_weights(heads[:-1]))


@register("se_mbib")
class SequentialMBIB(Bottleneck):
    """SE-MBIB: each head teaches the next deeper one (figure 5 (a))."""

    title = "SE-MBIB"
    Settings = SequentialSettings

    def graph(self, heads: Sequence[str]) -> list[Edge]:
        """Return the edges from each head to the next."""
        return se_mbib_edges(heads, self.sequential_weights(heads[:-1]))


@register("all_mbib")
class AllMBIB(Bottleneck):
    """ALL-MBIB: the edges of MBIB and of SE-MBIB (figure 5 (b))."""

    title = "ALL-MBIB"
    Settings = SequentialSettings

    def graph(self, heads: Sequence[str]) -> list[Edge]:
        """Return the edges of both."""
        observations = heads[:-1]
        return all_mbib_edges(heads, self.observation_weights(observations), self.sequential_weights(observations))
