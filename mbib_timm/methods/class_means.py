"""Cosine classifiers whose rows are the directions of the class means of their own inputs.

The inputs are standardised, where BatchNorm stands before the classifier, and brought to length 1: Mensink et al.,
TPAMI 2013; on long tails Kang et al., ICLR 2020, and as a start of training LIFT, ICML 2024.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mbib_timm.data.batch import Batch
from mbib_timm.environment import is_distributed
from mbib_timm.errors import MbibError
from mbib_timm.models.head_outputs import classifiers_of, head_logits
from mbib_timm.models.heads import CosineClassifier
from mbib_timm.models.parts import part_of

CLASS_MEANS = "class_means"
# Statistics that differ by less, in units of the features' standard deviation, are the same: of the same inputs, added
# in another order.
SAME_STATISTICS = 1e-3


def require_class_means(model: nn.Module, class_counts: np.ndarray, class_names: Sequence[str] | None = None) -> None:
    """Raise MbibError where a model's classifiers cannot start from class means.

    Args:
        model: whose classifiers.
        class_counts: training images of each class, (K,).
        class_names: in label order, where they are known.
    """
    for classifier in classifiers_of(model):
        if not isinstance(classifier, CosineClassifier):
            raise MbibError(
                f"classifier_start: {CLASS_MEANS} needs cosine classifiers, whose rows are directions, and this model "
                f"has {type(classifier).__name__}; expected model_kwargs: {{classifier: cosine}}"
            )
    for label in np.flatnonzero(class_counts == 0)[:1]:
        raise MbibError(
            f"classifier_start: {CLASS_MEANS} needs a training image of every class, and class "
            f"{_class_name(label, class_names)} has none"
        )


@torch.no_grad()
def start_from_class_means(model: nn.Module, images: Iterable[Batch], class_names: Sequence[str] | None = None) -> None:
    """Set every classifier of a model from the class means of its own inputs, in place.

    First the statistics of the heads' BatchNorm layers become those of the images: exactly, whatever the order of the
    images. A layer behind another one, as z's is behind v's, is right once that one is; so passes are repeated until
    nothing changes: one, and one more for each such layer in a row. The backbone stays as it is.

    Args:
        model: with cosine classifiers; ends in the mode in which it came.
        images: gives batches on the device with labels (B,), from the start each time; in several processes each
            process its share.
        class_names: in label order, for messages.

    Raises:
        MbibError: a class without an image, or with features that have no direction: all zero, or not finite.
    """
    classifiers: Any = classifiers_of(model)
    norms = head_norms(model)
    was_training = model.training
    model.eval()
    try:
        for _ in range(len(norms) + 1):
            moments, class_sums, class_images = _statistics(model, images, norms, classifiers)
            if not _set_statistics(norms, moments):
                break
    finally:
        model.train(was_training)
    for label in (class_images == 0).nonzero()[:1, 0].tolist():  # every class has some, see `require_class_means`
        raise MbibError(
            f"classifier_start: {CLASS_MEANS}: none of the training images of class {_class_name(label, class_names)} "
            "can be read; --broken skip leaves such images, and the class, out"
        )
    names = {id(module): name for name, module in model.named_modules()}
    for classifier, sums in zip(classifiers, class_sums, strict=True):
        lengths = sums.norm(dim=1)
        for label in (~(lengths.isfinite() & (lengths > 0))).nonzero()[:1, 0].tolist():
            raise MbibError(
                f"classifier_start: {CLASS_MEANS}: the features of class {_class_name(label, class_names)} before "
                f"{names[id(classifier)]} have no mean direction; expected finite ones that are not all zero"
            )
        classifier.weight.copy_(sums / lengths[:, None])


def head_norms(model: nn.Module) -> list[Any]:
    """Return the BatchNorm layers of a model's heads that keep statistics."""
    heads = part_of(model, "heads")
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and f"{name}.running_mean" in heads
    ]


@contextmanager
def captured_inputs(layers: Iterable[nn.Module]) -> Iterator[dict[Any, Tensor]]:
    """Give a mapping that takes what each of some layers is given, in order of their calls, at every forward pass."""
    seen: dict[Any, Tensor] = {}
    hooks = [layer.register_forward_pre_hook(lambda layer, args: seen.update({layer: args[0]})) for layer in layers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _statistics(
    model: nn.Module, images: Iterable[Batch], norms: Sequence[Any], classifiers: Sequence[Any]
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Return, of one pass in evaluation mode, what enters the layers.

    Returns:
        Of each norm (3, C): number, sum and sum of squares of its inputs, from the running mean; of each classifier the
        sum over each class of its inputs at length 1, (K, D); and the images of each class, (K,).
    """
    device = classifiers[0].weight.device
    wide: dict[str, Any] = {"device": device, "dtype": torch.float32 if device.type == "mps" else torch.float64}
    moments = [torch.zeros(3, norm.num_features, **wide) for norm in norms]
    class_sums = [torch.zeros(classifier.weight.shape, **wide) for classifier in classifiers]
    class_images = torch.zeros(len(class_sums[0]), **wide)
    with captured_inputs([*norms, *classifiers]) as seen:
        for batch in images:
            head_logits(model, batch.images)
            class_images.index_add_(0, batch.targets, torch.ones(len(batch.targets), **wide))
            for norm, sums in zip(norms, moments, strict=True):
                rows = (seen[norm].movedim(1, -1).flatten(0, -2) - norm.running_mean).to(**wide)
                sums += torch.stack([torch.full_like(sums[0], len(rows)), rows.sum(dim=0), rows.square().sum(dim=0)])
            for classifier, sums in zip(classifiers, class_sums, strict=True):
                sums.index_add_(0, batch.targets, F.normalize(seen[classifier].float(), dim=1).to(**wide))
    if is_distributed():
        for sums in (*moments, *class_sums, class_images):
            torch.distributed.all_reduce(sums)
    return moments, class_sums, class_images


def _set_statistics(norms: Sequence[Any], moments: Sequence[Tensor]) -> bool:
    """Set the running statistics of BatchNorm layers, and return whether one of them was another before."""
    changed = False
    for norm, (number, first, second) in zip(norms, moments, strict=True):
        shift = first / number
        variance = (second - first * shift) / (number - 1).clamp(min=1)  # unbiased, as torch keeps it
        scale = variance.clamp(min=norm.eps)
        moved = torch.maximum(shift.abs() / scale.sqrt(), (variance - norm.running_var).abs() / scale)
        if not bool((moved < SAME_STATISTICS).all()):
            norm.running_mean += shift
            norm.running_var.copy_(variance)
            changed = True
    return changed


def _class_name(label: int, class_names: Sequence[str] | None) -> str:
    return str(label) if class_names is None else repr(class_names[label])
