"""Classifiers on pooled features f (B, D): linear, cosine and scaled, from one factory.

linear    z = W f + b
cosine    z_j = s <f / |f|, W_j / |W_j|>, without bias (LDAM, RIDE, SADE)
scaled    z_j = s_j (W_j f + b_j), s learnable and 1 at first (LWS)
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mbib_timm.errors import MbibError, unknown_name

CLASSIFIERS = ("linear", "cosine", "scaled")
DEFAULT_SCALE = 30.0


class CosineClassifier(nn.Module):
    """Logits s <f / |f|, W_j / |W_j|>: they depend on the directions of f and W alone.

    Args:
        in_features: width D of the features.
        out_features: classes K.
        scale: s; 1 where the loss has a scale of its own, as LDAM's has.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scale: float = DEFAULT_SCALE,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        init_classifier(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, K) of features (B, D), in the dtype of the weight."""
        # Under autocast the features come in half precision and the weight does not: normalise and scale in its dtype.
        features = F.normalize(x.to(self.weight.dtype), dim=-1)
        cosines = F.linear(features, F.normalize(self.weight, dim=-1))
        return self.scale * cosines.to(self.weight.dtype)

    def extra_repr(self) -> str:
        """Return what `repr` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, scale={self.scale:g}"


class ScaledClassifier(nn.Linear):
    """A linear classifier whose logits, bias and all, are multiplied by a learnable scale for each class."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, device=device, dtype=dtype)
        self.scale = nn.Parameter(torch.ones(out_features, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, K) of features (B, D)."""
        return self.scale * F.linear(x, self.weight, self.bias)


def create_classifier(
    kind: str, in_features: int, num_classes: int, scale: float | None = None, init: bool = True, **dd: Any
) -> nn.Module:
    """Create a classifier.

    Args:
        kind: one of `CLASSIFIERS`.
        in_features: width D of the features.
        num_classes: classes K; 0 gives the identity.
        scale: of a cosine classifier, 30 when None; the other kinds take none.
        init: initialise it; False leaves that to a network's `init_weights`, which draws in order of depth.
        dd: device and dtype.

    Raises:
        MbibError: an unknown kind, or a scale for a kind that has none.
    """
    if kind not in CLASSIFIERS:
        raise unknown_name("classifier", str(kind), CLASSIFIERS)
    if scale is not None and kind != "cosine":
        raise MbibError(f"classifier_scale is for the cosine classifier; a {kind} one takes none")
    if num_classes <= 0:
        return nn.Identity()
    if kind == "cosine":
        return CosineClassifier(in_features, num_classes, DEFAULT_SCALE if scale is None else scale, **dd)
    classifier = (nn.Linear if kind == "linear" else ScaledClassifier)(in_features, num_classes, **dd)
    if init:
        init_classifier(classifier)
    return classifier


@torch.no_grad()
def init_classifier(classifier: nn.Module) -> None:
    """Initialise a classifier anew: Kaiming-normal weights and zero bias; cosine as LDAM does."""
    if isinstance(classifier, CosineClassifier):
        weight = nn.init.uniform_(classifier.weight, -1.0, 1.0)
        weight.copy_(F.normalize(weight, dim=-1))
    elif isinstance(classifier, nn.Linear):
        nn.init.kaiming_normal_(classifier.weight)
        nn.init.zeros_(classifier.bias)
        if isinstance(classifier, ScaledClassifier):
            nn.init.ones_(classifier.scale)


def renew_classifier(
    old: nn.Module, kind: str, in_features: int, num_classes: int, scale: float | None = None, **dd: Any
) -> nn.Module:
    """Create a classifier in the place of `old`: trained where that was, in training mode where that was."""
    fresh = create_classifier(kind, in_features, num_classes, scale, **dd)
    reference = next(old.parameters(), None)
    if reference is not None:
        fresh.requires_grad_(reference.requires_grad)
    return fresh.train(old.training)
