"""How compact classes are, and how far apart: D_intra, D_inter and their ratio (equations 15-17, Table 5)."""

import numpy as np
import torch
from torch import Tensor

from mbib_timm.analysis.posterior import mean_by_shot_group

BLOCK = 2**20  # numbers held at once beside the features, in each of a few arrays: 8 MB
# Pairs closer than this, relative to their squared norms, lose digits where distances come out of a matrix product.
NEAR = 1e-6


def distances(features: Tensor, labels: Tensor, class_counts: np.ndarray) -> dict[str, dict[str, float | None]]:
    """Return the mean intra- and inter-class distances and rho = intra / inter, over all classes and by shot group.

    Of a shot group, D_intra is the mean over its classes, and D_inter the mean over its classes i and over *all*
    other classes j. The paper does not say which j Table 5 takes; this choice makes "all" the mean of the groups,
    weighted by their classes, and a group of one class keeps its value. Classes without images are left out.

    Args:
        features: of every image, (N, C).
        labels: true classes, (N,), int64.
        class_counts: training images of each class, (K,).

    Returns:
        ``intra``, ``inter`` and ``rho`` of ``all``, ``many``, ``medium`` and ``few``; None where there is no class,
        for ``inter`` no second one, and for ``rho`` no distance between the classes.
    """
    intra, inter = (values.numpy() for values in class_distances(features, labels, len(class_counts)))
    means = {"intra": mean_by_shot_group(intra, class_counts), "inter": mean_by_shot_group(inter, class_counts)}
    result: dict[str, dict[str, float | None]] = {}
    for group in means["intra"]:
        within, between = means["intra"][group], means["inter"][group]
        rho = within / between if within is not None and between else None
        result[group] = {"intra": within, "inter": between, "rho": rho}
    return result


def class_distances(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return each class's mean intra-class distance, and its centre's mean distance to all other centres.

    Args:
        features: of every image, (N, C).
        labels: true classes, (N,), int64.
        num_classes: classes K.

    Returns:
        (K,) and (K,), float64, on the CPU; nan for classes without images, and for the second where there is no other.
    """
    images = torch.bincount(labels, minlength=num_classes)
    present = images.nonzero()[:, 0]
    members = labels.argsort(stable=True).split(images.tolist())
    intra = torch.full((num_classes,), torch.nan, dtype=torch.float64)
    inter = intra.clone()
    centres = torch.empty(len(present), features.shape[1], dtype=torch.float64, device=features.device)
    for row, label in enumerate(present.tolist()):
        points = features[members[label]].double()
        centres[row] = points.mean(dim=0)
        intra[label] = _mean_distance(points)
    if len(present) > 1:
        centres -= centres.mean(dim=0)  # shorter vectors lose fewer digits
        inter[present.cpu()] = (_distance_sums(centres) / (len(present) - 1)).cpu()
    return intra, inter


def _mean_distance(points: Tensor) -> float:
    """Return the sum of the distances of all ordered pairs, j = k included, over n^2, of points (n, C), float64."""
    # Not by a matrix product, whose cancellation moves near points apart, and each from itself.
    sums = [
        torch.cdist(rows, points, compute_mode="donot_use_mm_for_euclid_dist").sum()
        for rows in points.split(max(1, BLOCK // len(points)))
    ]
    return float(torch.stack(sums).sum()) / len(points) ** 2


def _distance_sums(centres: Tensor) -> Tensor:
    """Return the sum of each centre's distances to all centres, (K,), of centres (K, C), float64.

    The 33 million pairs of iNaturalist take a matrix product (seconds instead of minutes); pairs that are too near
    for it are computed again from their difference.
    """
    norms = torch.linalg.vecdot(centres, centres)
    sums = torch.zeros_like(norms)
    rows = max(1, BLOCK // len(centres))
    for start in range(0, len(centres), rows):
        block, rest = centres[start : start + rows], centres[start:]  # every pair once
        scale = norms[start : start + rows, None] + norms[start:]
        squared = scale - 2 * (block @ rest.T)
        near = (squared <= NEAR * scale).nonzero()
        for i, j in (pairs.T for pairs in near.split(max(1, BLOCK // centres.shape[1]))):
            squared[i, j] = (block[i] - rest[j]).square().sum(dim=1)
        distance = squared.sqrt()
        sums[start : start + rows] += distance.sum(dim=1)
        sums[start + len(block) :] += distance[:, len(block) :].sum(dim=0)
    return sums
