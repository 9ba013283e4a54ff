"""What stands on pooled features: classifiers from one factory, MBIB's observations of a map, and its bottleneck.

A classifier gives logits z of features f (B, D):

linear    z = W f + b
cosine    z_j = s <f / |f|, W_j / |W_j|>, without bias (LDAM, RIDE, SADE)
scaled    z_j = s_j (W_j f + b_j), s learnable and 1 at first (LWS)
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mbib_timm.errors import MbibError, unknown_name

CLASSIFIERS = ("linear", "cosine", "scaled")
DEFAULT_SCALE = 30.0
# How linear layers start: Kaiming-normal weights and zero bias, or as torch's `nn.Linear` does, both uniform.
KAIMING, TORCH = "kaiming", "torch"
INITS = (KAIMING, TORCH)
# What a bottleneck does, in this order; the paper says FC, and Table 6 that there is a BatchNorm.
BOTTLENECKS = ("fc-norm-relu", "fc-relu-norm", "fc-norm")


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
    kind: str, in_features: int, num_classes: int, scale: float | None = None, init: str = KAIMING, **dd: Any
) -> nn.Module:
    """Create a classifier.

    Args:
        kind: one of `CLASSIFIERS`.
        in_features: width D of the features.
        num_classes: classes K; 0 gives the identity.
        scale: of a cosine classifier, 30 when None; the other kinds take none.
        init: how a linear or scaled one starts, one of `INITS`.
        dd: device and dtype.

    Raises:
        MbibError: an unknown kind or start, or a scale for a kind that has none.
    """
    if init not in INITS:
        raise unknown_name("head_init", str(init), INITS)
    if kind not in CLASSIFIERS:
        raise unknown_name("classifier", str(kind), CLASSIFIERS)
    if scale is not None and kind != "cosine":
        raise MbibError(f"classifier_scale is for the cosine classifier; a {kind} one takes none")
    if num_classes <= 0:
        return nn.Identity()
    if kind == "cosine":
        return CosineClassifier(in_features, num_classes, DEFAULT_SCALE if scale is None else scale, **dd)
    classifier = (nn.Linear if kind == "linear" else ScaledClassifier)(in_features, num_classes, **dd)
    if init == KAIMING:
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
    old: nn.Module,
    kind: str,
    in_features: int,
    num_classes: int,
    scale: float | None = None,
    init: str = KAIMING,
    **dd: Any,
) -> nn.Module:
    """Create a classifier in the place of `old`: trained where that was, in training mode where that was."""
    fresh = create_classifier(kind, in_features, num_classes, scale, init, **dd)
    reference = next(old.parameters(), None)
    if reference is not None:
        fresh.requires_grad_(reference.requires_grad)
    return fresh.train(old.training)


LINEAR: Callable[..., nn.Module] = partial(create_classifier, "linear")


class Observation(nn.Module):
    """An observation v of the input: a pooled map, normalised, and its classifier.

    Args:
        channels: channels C of the map.
        num_classes: classes K of the classifier; 0 for none.
        norm: normalise the pooled vector (BatchNorm1d).
        drop_rate: dropout before the classifier.
        classifier: makes it, from its width, the classes, device and dtype.
        raw: the normalisation belongs to the classifier, and v is the pooled vector itself.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        norm: bool = True,
        drop_rate: float = 0.0,
        classifier: Callable[..., nn.Module] = LINEAR,
        raw: bool = False,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.num_features = channels
        self.raw = raw
        self.norm = nn.BatchNorm1d(channels, **dd) if norm else nn.Identity()
        self.drop = nn.Dropout(drop_rate)
        self.classifier = classifier(channels, num_classes, **dd)

    def embed(self, pooled: Tensor) -> Tensor:
        """Return v (B, C) of a pooled map (B, C)."""
        return pooled if self.raw else self.norm(pooled)

    def classify(self, v: Tensor) -> Tensor:
        """Return the logits (B, K) of v (B, C)."""
        return self.classifier(self.drop(self.norm(v) if self.raw else v))

    def forward(self, pooled: Tensor) -> Tensor:
        """Return the logits (B, K) of a pooled map (B, C)."""
        return self.classify(self.embed(pooled))


class Bottleneck(nn.Module):
    """The bottleneck z of v, a fully connected layer with BatchNorm1d and ReLU, and its classifier g.

    Args:
        in_features: width of v.
        features: width of z.
        num_classes: classes K of the classifier; 0 for none.
        layers: which, and in which order: one of `BOTTLENECKS`. The paper does not say.
        drop_rate: dropout before the classifier.
        linear: makes a linear layer, from its widths, device and dtype.
        classifier: makes it, from its width, the classes, device and dtype.

    Raises:
        MbibError: a width below 1, or other layers.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        num_classes: int,
        layers: str = BOTTLENECKS[0],
        drop_rate: float = 0.0,
        linear: Callable[..., nn.Module] = LINEAR,
        classifier: Callable[..., nn.Module] = LINEAR,
        **dd: Any,
    ) -> None:
        super().__init__()
        if features < 1:
            raise MbibError(f"bottleneck_features: expected at least 1, got {features}")
        if layers not in BOTTLENECKS:
            raise unknown_name("bottleneck_layers", str(layers), BOTTLENECKS)
        self.num_features = features
        self.norm_last = layers == "fc-relu-norm"
        self.fc = linear(in_features, features, **dd)
        self.norm = nn.BatchNorm1d(features, **dd)
        self.act = nn.ReLU() if "relu" in layers else nn.Identity()
        self.drop = nn.Dropout(drop_rate)
        self.classifier = classifier(features, num_classes, **dd)

    def embed(self, v: Tensor) -> Tensor:
        """Return z (B, F) of an observation v (B, C)."""
        z = self.fc(v)
        return self.norm(self.act(z)) if self.norm_last else self.act(self.norm(z))

    def classify(self, z: Tensor) -> Tensor:
        """Return the logits g(z) (B, K)."""
        return self.classifier(self.drop(z))

    def forward(self, v: Tensor) -> Tensor:
        """Return the logits g(z) (B, K) of an observation v (B, C)."""
        return self.classify(self.embed(v))


class ObservationWithBottleneck(Observation):
    """The last observation v and the bottleneck z, with a classifier each; the mean of their logits is the prediction.

    Args:
        channels, num_classes, drop_rate, classifier: of the observation, see `Observation`.
        features: width of the bottleneck.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        drop_rate: float = 0.0,
        classifier: Callable[..., nn.Module] = LINEAR,
        *,
        features: int,
        **dd: Any,
    ) -> None:
        super().__init__(channels, num_classes, True, drop_rate, classifier, **dd)
        self.bottleneck = Bottleneck(channels, features, num_classes, drop_rate=drop_rate, classifier=classifier, **dd)

    def forward(self, pooled: Tensor) -> Tensor:
        """Return the mean (B, K) of the logits of v and z."""
        v = self.embed(pooled)
        return (self.classify(v) + self.bottleneck(v)) / 2
