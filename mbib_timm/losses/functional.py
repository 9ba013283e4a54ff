"""The losses as pure functions of logits and labels, each with its equation.

Shapes: logits (B, K) of any floating dtype, targets (B,) of int64 class indices, everything else (K,). The
arithmetic is float32 (float64 where the logits are), inside autocast too. Every function returns a scalar.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mbib_timm.errors import MbibError


def as_counts(class_counts: Sequence[int] | np.ndarray | Tensor) -> Tensor:
    """Return training images of each class as float64 (K,).

    Raises:
        MbibError: a class without training images: its logit adjustment would be log 0.
    """
    counts = torch.as_tensor(class_counts, dtype=torch.float64)
    if (counts <= 0).any():
        empty = (counts <= 0).nonzero().flatten().tolist()
        raise MbibError(f"the loss needs training images of every class; classes without: {empty[:10]}")
    return counts


def class_weights(class_counts: Sequence[int] | np.ndarray | Tensor, power: float) -> Tensor:
    """Weights of the classes, ``w_i = K (1/n_i)^m / sum_j (1/n_j)^m`` (eq. 7): their mean is 1.

    Args:
        class_counts: training images n of each class.
        power: the exponent m; 0 weighs all classes alike.
    """
    inverse = as_counts(class_counts) ** -power
    return (len(inverse) * inverse / inverse.sum()).float()


def class_temperatures(class_counts: Sequence[int] | np.ndarray | Tensor, gamma: float) -> Tensor:
    """Temperatures of the classes, ``T_i = (n_max / n_i)^gamma`` (below eq. 8).

    Args:
        class_counts: training images n of each class.
        gamma: the exponent; 0 gives every class temperature 1.
    """
    counts = as_counts(class_counts)
    return ((counts.max() / counts) ** gamma).float()


def _full_precision(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def balanced_softmax_cross_entropy(
    logits: Tensor, targets: Tensor, log_counts: Tensor, weight: Tensor | None = None, normalize: bool = True
) -> Tensor:
    """Balanced softmax cross-entropy: cross-entropy of ``t + log n`` (eq. 4-6), class-weighted (eq. 7).

    Args:
        logits: t, (B, K), or those of H heads, (H, B, K).
        targets: (B,).
        log_counts: log n, (K,); zeros give the plain cross-entropy.
        weight: w, (K,); None weighs all classes alike.
        normalize: divide by the sum of the weights of the batch's labels, as Figure 10 does; else by their number B.

    Returns:
        A scalar, or one loss a head, (H,).
    """
    with torch.autocast(logits.device.type, enabled=False):
        log_probabilities = F.log_softmax(_full_precision(logits) + log_counts, dim=-1)
        labels = targets.expand(logits.shape[:-1])[..., None]
        negative_log = -log_probabilities.gather(-1, labels).squeeze(-1)
        if weight is None:
            return negative_log.mean(dim=-1)
        weights = weight.to(negative_log.dtype)[targets]
        weighted = negative_log * weights
        return weighted.sum(dim=-1) / weights.sum() if normalize else weighted.mean(dim=-1)


def tempered_log_probabilities(logits: Tensor, temperatures: Tensor | None = None) -> Tensor:
    """Return ``log softmax(t/T)``, what self-distillation compares (eq. 8): of the raw logits, without log n.

    Args:
        logits: t, (..., K).
        temperatures: T, (K,), each dividing its class's logit; None for 1.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = _full_precision(logits)
        return F.log_softmax(logits if temperatures is None else logits / temperatures, dim=-1)


def distillation_divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Return ``KL(p || q)`` of log-probabilities, mean over the batch. The teacher gets no gradient.

    Args:
        teacher: log p, (B, K), or those of E pairs, (E, B, K).
        student: log q, of the same shape.

    Returns:
        A scalar, or one divergence a pair, (E,).
    """
    teacher = teacher.detach()
    return (teacher.exp() * (teacher - student)).sum(dim=-1).mean(dim=-1)


def self_distillation(teacher: Tensor, student: Tensor, temperatures: Tensor | None = None) -> Tensor:
    """Variational self-distillation loss ``KL(softmax(t/T) || softmax(s/T))``, mean over the batch (eq. 8).

    Args:
        teacher: t, the observation's logits, (B, K).
        student: s, the logits that learn from it, (B, K).
        temperatures: T, (K,), each dividing its class's logit; None for 1.
    """
    return distillation_divergence(
        tempered_log_probabilities(teacher.detach(), temperatures), tempered_log_probabilities(student, temperatures)
    )


def focal_loss(logits: Tensor, targets: Tensor, gamma: float) -> Tensor:
    """Focal loss ``-(1 - p_y)^gamma log p_y``, mean over the batch (Lin et al. 2017, eq. 4).

    Args:
        logits: (B, K).
        targets: (B,).
        gamma: focusing exponent; 0 gives the cross-entropy.
    """
    with torch.autocast(logits.device.type, enabled=False):
        negative_log = F.cross_entropy(_full_precision(logits), targets, reduction="none")
        # 1 - p from -log p without cancellation; kept off 0, where a power below 1 has no gradient.
        miss = (-torch.expm1(-negative_log)).clamp_min(torch.finfo(negative_log.dtype).tiny)
        return (miss**gamma * negative_log).mean()
