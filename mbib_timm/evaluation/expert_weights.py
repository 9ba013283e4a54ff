"""Test-time aggregation of experts (Zhang et al. 2022, SADE): their weights from unlabelled images, and the test sets.

    w = softmax(a),  maximise  mean_i cos( softmax(sum_e w_e z_e(x_i')), softmax(sum_e w_e z_e(x_i'')) )

Two random views x' and x'' of an image should get one prediction: an expert is the more consistent the better it knows
the classes that the images come from.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mbib_timm.data.long_tail import exponential_profile, largest_class, long_tailed_indices
from mbib_timm.errors import unknown_name

# The authors' constants for CIFAR.
EPOCHS = 5
BATCH_SIZE = 128
LEARNING_RATE = 0.1
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
SMALLEST_WEIGHT = 0.05

FACTORS = (50, 25, 10, 5, 2)
# Imbalance factor and direction of the test sets: from the training frequencies over the uniform ones to the reversed.
DISTRIBUTIONS: dict[str, tuple[int, int]] = {
    **{f"forward{factor}": (factor, 1) for factor in FACTORS},
    "uniform": (1, 1),
    **{f"backward{factor}": (factor, -1) for factor in reversed(FACTORS)},
}


def weighted_logits(logits: Tensor, weights: Tensor) -> Tensor:
    """Return ``sum_e w_e z_e``, (B, K), of the experts' logits (E, B, K) and weights (E,)."""
    return torch.tensordot(weights, logits, dims=1)


def view_consistency(first: Tensor, second: Tensor, weights: Tensor) -> Tensor:
    """Return the mean cosine similarity of the predictions for two views of the same images, a scalar.

    Args:
        first, second: logits of the experts, (E, B, K).
        weights: of the experts, (E,).
    """
    one, other = (weighted_logits(logits, weights).softmax(dim=-1) for logits in (first, second))
    return F.cosine_similarity(one, other, dim=-1).mean()


class Learnt(NamedTuple):
    """Weights of experts.

    Attributes:
        weights: (E,), positive; their sum is 1.
        epochs: in which they were learnt.
    """

    weights: Tensor
    epochs: int


def learn_weights(
    epochs: Iterable[Iterable[tuple[Tensor, Tensor]]], experts: int, device: torch.device | str = "cpu"
) -> Learnt:
    """Learn weights under which the experts agree on two views of an image: SGD on E numbers, no labels.

    Learning ends after an epoch that leaves an expert with a weight below `SMALLEST_WEIGHT`.

    Args:
        epochs: for each the logits of the experts for the two views of every batch, (E, B, K) each.
        experts: their number E.
        device: of the logits.
    """
    a = nn.Parameter(torch.full((experts,), 1 / experts, device=device))
    optimizer = torch.optim.SGD([a], LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True)
    done = 0
    for batches in epochs:
        for first, second in batches:
            loss = -view_consistency(first.float(), second.float(), a.softmax(dim=0))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        done += 1
        if a.softmax(dim=0).min().item() < SMALLEST_WEIGHT:  # waits for the device, once an epoch
            break
    return Learnt(a.detach().softmax(dim=0), done)


def draw_test_set(distribution: str, targets: np.ndarray, class_counts: np.ndarray, seed: int) -> np.ndarray:
    """Choose the images of a test set with another class distribution.

    Args:
        distribution: one of `DISTRIBUTIONS`: ``uniform`` for all images, ``forward10`` for frequencies that fall as the
            training images do, from the class with the most to that with the fewest, by a factor of 10 in all, and
            ``backward10`` for frequencies that rise.
        targets: labels (N,) of the test images.
        class_counts: training images of each class, (K,).
        seed: chooses the images.

    Returns:
        Their places, ascending.

    Raises:
        MbibError: an unknown distribution.
        DataError: too few test images for one.
    """
    if distribution not in DISTRIBUTIONS:
        raise unknown_name("test distribution", distribution, DISTRIBUTIONS)
    factor, direction = DISTRIBUTIONS[distribution]
    if factor == 1:
        return np.arange(len(targets))
    order = np.argsort(-class_counts, kind="stable")[::direction]
    available = np.bincount(targets, minlength=len(class_counts))[order]
    counts = np.empty(len(order), dtype=np.int64)
    counts[order] = exponential_profile(len(order), largest_class(available, "exp", factor), factor)
    return np.sort(long_tailed_indices(targets, counts.tolist(), seed))
