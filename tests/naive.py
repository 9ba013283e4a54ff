"""The losses' equations written out image by image, in Python's own float64: what the package's are held against."""

import math

import numpy as np


def naive_adjusted_cross_entropy(
    logits, targets, *, offset=None, divisor=None, margin=None, weight=None, smoothing=None, normalize=True
):
    """z' = (z - m_y [j = y]) / a + b; w_y ((1 - eps_y) (-log p_y) + eps_y mean_j (-log p_j)), summed and divided."""
    numerator = denominator = 0.0
    for row, y in zip(logits.tolist(), targets.tolist(), strict=True):
        adjusted = []
        for j, z in enumerate(row):
            z = z - margin[j] if margin is not None and j == y else z
            z = z / divisor[j] if divisor is not None else z
            adjusted.append(z + offset[j] if offset is not None else z)
        total = sum(math.exp(z) for z in adjusted)
        negative_log = [math.log(total) - z for z in adjusted]
        eps = smoothing[y] if smoothing is not None else 0.0
        w = weight[y] if weight is not None else 1.0
        numerator += w * ((1 - eps) * negative_log[y] + eps * sum(negative_log) / len(row))
        denominator += w if normalize else 1.0
    return numerator / denominator


def naive_focal(logits, targets, gamma):
    """(1 - p_y)^gamma (-log p_y), mean over the batch."""
    total = 0.0
    for row, y in zip(logits.tolist(), targets.tolist(), strict=True):
        exponentials = [math.exp(z) for z in row]
        p = exponentials[y] / sum(exponentials)
        total += -((1 - p) ** gamma) * math.log(p)
    return total / len(targets)


# Equations 4 to 9 of the paper


def naive_weights(counts, m):
    """Equation 7."""
    total = sum((1 / n) ** m for n in counts)
    return [len(counts) * (1 / n) ** m / total for n in counts]


def naive_bsc(logits, targets, counts, m):
    """Equations 4 to 7."""
    weights = naive_weights(counts, m)
    numerator = denominator = 0.0
    for row, y in zip(logits.tolist(), targets.tolist(), strict=True):
        exponentials = [n * math.exp(t) for t, n in zip(row, counts, strict=True)]
        numerator += -weights[y] * math.log(exponentials[y] / sum(exponentials))
        denominator += weights[y]
    return numerator / denominator


def naive_vsd(teacher, student, counts, gamma):
    """Equation 8."""
    temperatures = [(max(counts) / n) ** gamma for n in counts]
    total = 0.0
    for t_row, s_row in zip(teacher.tolist(), student.tolist(), strict=True):
        p = [math.exp(t / T) for t, T in zip(t_row, temperatures, strict=True)]
        q = [math.exp(s / T) for s, T in zip(s_row, temperatures, strict=True)]
        p_sum, q_sum = sum(p), sum(q)
        total += sum(a / p_sum * math.log(a / p_sum * q_sum / b) for a, b in zip(p, q, strict=True))
    return total / len(teacher)


def naive_bib(teacher, student, targets, counts, beta, gamma, m):
    """Equation 9."""
    return (
        naive_bsc(teacher, targets, counts, m)
        + naive_bsc(student, targets, counts, m)
        + beta * naive_vsd(teacher, student, counts, gamma)
    )


def naive_plain(logits, targets, weights, divisor):
    """Class-weighted cross-entropy of the raw logits."""
    total = 0.0
    for row, y in zip(logits.tolist(), targets.tolist(), strict=True):
        total += -weights[y] * (row[y] - math.log(sum(math.exp(t) for t in row)))
    return total / divisor


def listing_of_figure_10(labels, v_logits, z_logits, sample_per_class, beta, gamma, power):
    """What the listing in the paper's appendix J computes, step by step and in its order, in numpy."""
    n, rows = np.asarray(sample_per_class, dtype=float), np.arange(len(labels))
    temperature = (1 / (n / n.max())) ** gamma

    def log_softmax(x):
        x = x - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    p_t = np.exp(log_softmax(v_logits / temperature))
    vsd_loss = (p_t * np.log(p_t) - p_t * log_softmax(z_logits / temperature)).sum(-1).mean()
    weights = 1 / n**power
    weights = weights / weights.sum() * len(n)
    # torch's mean of a weighted cross-entropy divides by the sum of the labels' weights.
    w = weights[labels] / weights[labels].sum()
    loss1 = -(w * log_softmax(v_logits + np.log(n))[rows, labels]).sum()
    loss2 = -(w * log_softmax(z_logits + np.log(n))[rows, labels]).sum()
    return loss1 + loss2 + beta * vsd_loss
