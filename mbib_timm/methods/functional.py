"""The losses as pure functions of logits and targets, each with its equation.

Shapes: logits (B, K) of any floating dtype, everything else (K,). Targets are labels (B,), int64, or soft targets
(B, K), floating, whose rows sum to 1: the loss of these is ``sum_j t_j L(z, j)``, where L(z, j) is the loss of label j.
The arithmetic is float32 (float64 if the logits are), also inside autocast. Losses are scalars unless stated otherwise.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mbib_timm.errors import MbibError

# Logits (B, K) of more numbers, 64 MB, are gone through in blocks of so many, and once more in the backward pass: what
# a loss keeps of them would be many times their memory.
LARGE, BLOCK = 1 << 24, 1 << 21


def is_large(logits: Tensor) -> bool:
    """Return whether logits (..., B, K) are processed in blocks."""
    return logits.shape[-2] * logits.shape[-1] > LARGE


def by_image(losses: Callable[..., Tensor], logits: Tensor, *others: Tensor) -> Tensor:
    """Return the losses (..., B) of images, each a function of the image's own rows; in blocks if the rows are large.

    Args:
        losses: returns the losses of some of the images.
        logits: (..., B, K).
        others: targets (B,) or (B, K), and further logits of the images.
    """
    if not is_large(logits):
        return losses(logits, *others)
    images = max(1, BLOCK * logits.shape[-2] // logits.numel())
    targets = (values.split(images, dim=-2 if values.ndim > 1 else -1) for values in others)
    blocks = zip(logits.split(images, dim=-2), *targets, strict=True)
    return torch.cat(
        [checkpoint(losses, *block, use_reentrant=False, preserve_rng_state=False) for block in blocks], dim=-1
    )


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


def effective_number_weights(class_counts: Sequence[int] | np.ndarray | Tensor, beta: float) -> Tensor:
    """Class-balanced weights, ``w_i = (1 - beta) / (1 - beta^n_i)``, scaled to mean 1 (Cui et al. 2019).

    Args:
        class_counts: training images n of each class.
        beta: in [0, 1); 0 weighs all classes alike, and towards 1 the weights become those of 1/n.
    """
    weights = (1 - beta) / (1 - beta ** as_counts(class_counts))
    return (len(weights) * weights / weights.sum()).float()


def ldam_margins(class_counts: Sequence[int] | np.ndarray | Tensor, largest: float) -> Tensor:
    """Label-distribution-aware margins, ``m_i`` proportional to ``n_i^(-1/4)`` (Cao et al. 2019, eq. 13).

    Args:
        class_counts: training images n of each class.
        largest: the margin of the rarest class.
    """
    margins = as_counts(class_counts) ** -0.25
    return (largest * margins / margins.max()).float()


def adjusted_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    offset: Tensor | None = None,
    divisor: Tensor | None = None,
    margin: Tensor | None = None,
    weight: Tensor | None = None,
    smoothing: Tensor | None = None,
    normalize: bool = True,
) -> Tensor:
    """Cross-entropy of adjusted logits: one function for most long-tail losses; without adjustments the plain one.

    With ``z' = (z - m_y [j = y]) / a + b``, the loss of an image is
    ``w_y ((1 - eps_y) (-log softmax(z')_y) + eps_y mean_j (-log softmax(z')_j))``. Balanced softmax has b = log n (eq.
    4-6), logit adjustment b = tau log pi, CDT a = (n_max/n)^gamma, LDAM m = s m_y, class-balanced losses w, and
    label-aware smoothing eps. The weight of an image with soft targets is ``sum_j t_j w_j``.

    Args:
        logits: z, (B, K), or those of H heads, (H, B, K).
        targets: y, (B,), or t, (B, K).
        offset: b, (K,), added to the logits; or one for each head, (H, 1, K).
        divisor: a, (K,), divides them.
        margin: m, (K,), taken from the logit of the image's own class.
        weight: w, (K,), of the image's class (eq. 7).
        smoothing: eps, (K,), of the image's class.
        normalize: divide by the sum of the batch's weights, as Figure 10 does; else by the number of images B.

    Returns:
        A scalar, or one loss per head, (H,).
    """

    def soft(logits: Tensor, targets: Tensor) -> Tensor:
        logits = _full_precision(logits)
        each = _loss_of_each_label(logits, offset, divisor, margin, smoothing)
        shares = targets.to(each.dtype) if weight is None else _weights(targets, weight, each.dtype)
        return (shares * each).sum(dim=-1)

    def hard(logits: Tensor, targets: Tensor) -> Tensor:
        logits = _full_precision(logits)
        labels = targets.expand(logits.shape[:-1])[..., None]
        if margin is not None:
            logits = logits.scatter_add(-1, labels, -margin.to(logits.dtype)[labels])
        if divisor is not None:
            logits = logits / divisor
        log_probabilities = F.log_softmax(logits if offset is None else logits + offset, dim=-1)
        losses = -log_probabilities.gather(-1, labels).squeeze(-1)
        if smoothing is not None:
            eps = smoothing.to(losses.dtype)[targets]
            losses = (1 - eps) * losses - eps * log_probabilities.mean(dim=-1)
        return losses if weight is None else losses * _weights(targets, weight, losses.dtype)

    with torch.autocast(logits.device.type, enabled=False):
        losses = by_image(soft if targets.is_floating_point() else hard, logits, targets)
        if weight is None or not normalize:
            return losses.mean(dim=-1)
        return losses.sum(dim=-1) / _weights(targets, weight, losses.dtype).sum()


def _weights(targets: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the class weights of labels (B,), or of soft targets (B, K) the weighted share of each label."""
    return targets.to(dtype) * weight.to(dtype) if targets.is_floating_point() else weight.to(dtype)[targets]


def _loss_of_each_label(
    logits: Tensor, offset: Tensor | None, divisor: Tensor | None, margin: Tensor | None, smoothing: Tensor | None
) -> Tensor:
    """Return the loss of an image for every label that it could have, without class weight, (..., B, K).

    See `adjusted_cross_entropy`. A margin changes its class's logit, ``u_j = z_j / a_j + b_j``, in the loss of label j
    alone: in the log-sum-exp of that label ``u_j - m_j / a_j`` stands in the place of u_j.
    """
    adjusted = logits if divisor is None else logits / divisor
    adjusted = adjusted if offset is None else adjusted + offset
    log_probabilities = F.log_softmax(adjusted, dim=-1)
    if margin is None:
        each = -log_probabilities
        mean = each.mean(dim=-1, keepdim=True)
    else:
        shift = margin.to(adjusted.dtype) if divisor is None else margin.to(adjusted.dtype) / divisor
        # The log-sum-exp without the j-th term, less that of all: log(1 - p_j), but for the largest p, which may be 1.
        largest = log_probabilities.argmax(dim=-1, keepdim=True)
        is_largest = torch.zeros_like(log_probabilities, dtype=torch.bool).scatter_(-1, largest, True)
        others = torch.log1p(-log_probabilities.masked_fill(is_largest, -torch.inf).exp())
        beside = log_probabilities.masked_fill(is_largest, -torch.inf).logsumexp(dim=-1, keepdim=True)
        own = log_probabilities - shift
        normalizer = torch.logaddexp(torch.where(is_largest, beside, others), own)
        each = normalizer - own
        mean = normalizer - log_probabilities.mean(dim=-1, keepdim=True) + shift / logits.shape[-1]
    if smoothing is None:
        return each
    eps = smoothing.to(each.dtype)
    return (1 - eps) * each + eps * mean


def tempered_log_probabilities(logits: Tensor, temperatures: Tensor | float | None = None) -> Tensor:
    """Return ``log softmax(t/T)``, what distillation compares (eq. 8): of the raw logits, without log n.

    Args:
        logits: t, (..., K).
        temperatures: T, (K,), each dividing its class's logit, or one for all classes; None for 1.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = _full_precision(logits)
        return F.log_softmax(logits if temperatures is None else logits / temperatures, dim=-1)


def distillation_divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Return ``KL(p || q)`` of log-probabilities, mean over the batch. The teacher gets no gradient.

    Args:
        teacher: log p, (B, K), or those of E pairs, (E, B, K).
        student: log q, of the same shape; one teacher may have E students.

    Returns:
        A scalar, or one divergence per pair, (E,).
    """
    return _divergences(teacher.detach(), student).mean(dim=-1)


def _divergences(teacher: Tensor, student: Tensor) -> Tensor:
    """Return ``KL(p || q)`` of log-probabilities (..., B, K) for each image, (..., B)."""
    return (teacher.exp() * (teacher - student)).sum(dim=-1)


def self_distillation(teacher: Tensor, student: Tensor, temperatures: Tensor | None = None) -> Tensor:
    """Variational self-distillation loss ``KL(softmax(t/T) || softmax(s/T))``, mean over the batch (eq. 8).

    Args:
        teacher: t, the observation's logits, (B, K).
        student: s, the logits that learn from it, (B, K).
        temperatures: T, (K,), each dividing its class's logit; None for 1.
    """

    def divergence(student: Tensor, teacher: Tensor) -> Tensor:
        return _divergences(*(tempered_log_probabilities(logits, temperatures) for logits in (teacher, student)))

    return by_image(divergence, student, teacher.detach()).mean(dim=-1)


def focal_loss(logits: Tensor, targets: Tensor, gamma: float, weight: Tensor | None = None) -> Tensor:
    """Focal loss ``-w_y (1 - p_y)^gamma log p_y``, mean over the batch (Lin et al. 2017, eq. 4 and 5).

    Args:
        logits: (B, K).
        targets: (B,) or (B, K).
        gamma: focusing exponent; 0 is plain cross-entropy.
        weight: w, (K,), of the image's class.
    """

    def soft(logits: Tensor, targets: Tensor) -> Tensor:
        each = _focal(-F.log_softmax(_full_precision(logits), dim=-1), gamma)
        each = each if weight is None else each * weight.to(each.dtype)
        return (targets.to(each.dtype) * each).sum(dim=-1)

    def hard(logits: Tensor, targets: Tensor) -> Tensor:
        losses = _focal(F.cross_entropy(_full_precision(logits), targets, reduction="none"), gamma)
        return losses if weight is None else losses * weight.to(losses.dtype)[targets]

    with torch.autocast(logits.device.type, enabled=False):
        return by_image(soft if targets.is_floating_point() else hard, logits, targets).mean()


def _focal(negative_log: Tensor, gamma: float) -> Tensor:
    """Return ``(1 - p)^gamma (-log p)`` of -log p."""
    # 1 - p from -log p without cancellation; kept off 0, where a power below 1 has no gradient.
    miss = (-torch.expm1(-negative_log)).clamp_min(torch.finfo(negative_log.dtype).tiny)
    return miss**gamma * negative_log
