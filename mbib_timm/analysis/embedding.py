"""Features of some classes in the plane, by t-SNE (van der Maaten & Hinton 2008; appendix E and figure 8)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from mbib_timm.errors import MbibError, few

CLASSES = 10  # as figure 8 has them
IMAGES_PER_CLASS = 100
PERPLEXITY = 30.0
SEED = 0  # of the images that are shown, and of t-SNE


@dataclass(frozen=True)
class Embedding:
    """Images of some classes in the plane.

    Attributes:
        classes: those that are shown.
        labels: true class of each of the M images, class by class.
        points: by the features' name a place (x, y) for each image.
        perplexity: of t-SNE.
        seed: of the choice of images, and of t-SNE.
    """

    classes: list[int]
    labels: list[int]
    points: dict[str, list[list[float]]]
    perplexity: float
    seed: int


def embed(
    features: Mapping[str, Tensor],
    labels: np.ndarray,
    class_counts: np.ndarray,
    classes: Sequence[int] | None = None,
    images_per_class: int = IMAGES_PER_CLASS,
) -> Embedding:
    """Put images of some classes in the plane, the same images for every kind of features.

    Args:
        features: of every image by name, (N, C) each.
        labels: true classes, (N,), int64.
        class_counts: training images of each class, (K,).
        classes: labels of those to show; ten from the head to the tail when None.
        images_per_class: of each.

    Raises:
        MbibError: classes without images, or fewer than four images.
    """
    chosen = spread_classes(labels, class_counts) if classes is None else list(dict.fromkeys(classes))
    places = choose_images(labels, chosen, images_per_class, SEED)
    points = {name: tsne(values[places].numpy(), SEED).astype(np.float64) for name, values in features.items()}
    return Embedding(
        classes=chosen,
        labels=labels[places].tolist(),
        points={name: np.round(plane, 2).tolist() for name, plane in points.items()},
        perplexity=perplexity_for(len(places)),
        seed=SEED,
    )


def require_scikit_learn() -> None:
    """Raise MbibError where scikit-learn is not installed: before a pass over the data, and not after it."""
    try:
        import sklearn.manifold  # noqa: F401
    except ImportError:
        raise MbibError("t-SNE needs scikit-learn: pip install 'mbib-timm[analyze]'") from None


def spread_classes(labels: np.ndarray, class_counts: np.ndarray) -> list[int]:
    """Return ten classes spread evenly over the order by training images, the largest and the smallest among them.

    Where there are fewer, all are returned.

    Args:
        labels: true classes of the images at hand, (N,); only these classes are chosen from.
        class_counts: training images of each class, (K,).
    """
    present = np.unique(labels)
    ordered = present[np.argsort(-class_counts[present], kind="stable")]
    places = np.linspace(0, len(ordered) - 1, min(CLASSES, len(ordered))).round().astype(int)
    return [int(label) for label in ordered[places]]


def choose_images(labels: np.ndarray, classes: Sequence[int], per_class: int, seed: int) -> np.ndarray:
    """Return places in `labels`, (N,), of at most `per_class` images of each class, the same for the same seed.

    They stand class by class, ascending in each. Raises MbibError for a class without images.
    """
    generator = np.random.default_rng(seed)
    chosen = []
    for label in classes:
        places = np.flatnonzero(labels == label)
        if not len(places):
            raise MbibError(
                f"class {label} has no image to show; classes with images: {few(np.unique(labels).tolist(), 20)}"
            )
        chosen.append(np.sort(generator.permutation(places)[:per_class]))
    return np.concatenate(chosen)


def perplexity_for(images: int) -> float:
    """Return t-SNE's perplexity: 30, or less for few points, which need about three neighbours for each unit of it.

    Raises:
        MbibError: fewer than four images.
    """
    if images < 4:
        raise MbibError(f"t-SNE needs at least 4 images, got {images}; choose more classes or more images of each")
    return min(PERPLEXITY, (images - 1) / 3)


def tsne(features: np.ndarray, seed: int) -> np.ndarray:
    """Return a place in the plane for each image, (N, 2), float32, of features (N, C); the same for the same seed.

    Raises:
        MbibError: fewer than four images.
    """
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # scikit-learn depends on it

    # Two principal components are where it starts from; features that vary along one axis, or not at all, have not two.
    start = "pca" if (features.std(axis=0) > 0).sum() >= 2 else "random"
    perplexity = perplexity_for(len(features))
    with threadpool_limits(1):  # several threads sum up in an order of their own
        method = TSNE(init=start, perplexity=perplexity, random_state=seed)
        points: np.ndarray = method.fit_transform(np.asarray(features, dtype=np.float32))
    return points
