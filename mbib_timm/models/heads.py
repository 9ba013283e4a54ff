"""The heads of an MBIB network: observations of the backbone's maps, and the bottleneck."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from mbib_timm.models.classifiers import create_classifier

LINEAR: Callable[..., nn.Module] = partial(create_classifier, "linear")


class Observation(nn.Module):
    """An observation v of the input: a pooled, normalised map and its classifier.

    Args:
        channels: channels C of the map.
        num_classes: classes K of the classifier; 0 for none.
        norm: normalise the pooled vector (BatchNorm1d).
        drop_rate: dropout before the classifier.
        classifier: makes it, from its width, the classes, device and dtype.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        norm: bool = True,
        drop_rate: float = 0.0,
        classifier: Callable[..., nn.Module] = LINEAR,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.num_features = channels
        self.norm = nn.BatchNorm1d(channels, **dd) if norm else nn.Identity()
        self.drop = nn.Dropout(drop_rate)
        self.classifier = classifier(channels, num_classes, **dd)

    def forward(self, pooled: Tensor) -> Tensor:
        """Return the logits (B, K) of a pooled map (B, C)."""
        return self.classifier(self.drop(self.norm(pooled)))


class Bottleneck(nn.Module):
    """The bottleneck z = [ReLU] BatchNorm1d(FC(v)) and its classifier g.

    Args:
        in_features: width of v.
        features: width of z.
        num_classes: classes K of the classifier; 0 for none.
        act: apply ReLU; the paper does not say.
        drop_rate: dropout before the classifier.
        classifier: makes it, from its width, the classes, device and dtype.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        num_classes: int,
        act: bool = True,
        drop_rate: float = 0.0,
        classifier: Callable[..., nn.Module] = LINEAR,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.num_features = features
        self.fc = LINEAR(in_features, features, **dd)
        self.norm = nn.BatchNorm1d(features, **dd)
        self.act = nn.ReLU() if act else nn.Identity()
        self.drop = nn.Dropout(drop_rate)
        self.classifier = classifier(features, num_classes, **dd)

    def embed(self, v: Tensor) -> Tensor:
        """Return z (B, F) of an observation v (B, C)."""
        return self.act(self.norm(self.fc(v)))

    def forward(self, v: Tensor) -> Tensor:
        """Return the logits g(z) (B, K)."""
        return self.classifier(self.drop(self.embed(v)))


class ObservationWithBottleneck(Observation):
    """The last observation v and the bottleneck z, with a classifier each; the mean of their logits is the prediction.

    Args:
        channels, num_classes, norm, drop_rate, classifier: of the observation, see `Observation`.
        features, act: of the bottleneck, see `Bottleneck`.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        norm: bool = True,
        drop_rate: float = 0.0,
        classifier: Callable[..., nn.Module] = LINEAR,
        *,
        features: int,
        act: bool = True,
        **dd: Any,
    ) -> None:
        super().__init__(channels, num_classes, norm, drop_rate, classifier, **dd)
        self.bottleneck = Bottleneck(channels, features, num_classes, act, drop_rate, classifier, **dd)

    def both(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits (B, K) of v and those of z, of a pooled map (B, C)."""
        v = self.norm(pooled)
        return self.classifier(self.drop(v)), self.bottleneck(v)

    def forward(self, pooled: Tensor) -> Tensor:
        """Return the mean (B, K) of the logits of v and z."""
        of_v, of_z = self.both(pooled)
        return (of_v + of_z) / 2
