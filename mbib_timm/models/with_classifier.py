"""Any timm backbone with a classifier from our factory: `with_classifier`.

timm.create_model('with_classifier', backbone='resnet50.a1_in1k', classifier='cosine', pretrained=True)
"""

import dataclasses
from typing import Any

import timm
import torch
from timm.layers import get_device_dtype
from timm.models import PretrainedCfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from mbib_timm.models.backbones import (
    FeatureNet,
    PooledModel,
    backbone_cfg,
    backbone_traits,
    prefixed_levels,
    require_backbone,
)
from mbib_timm.models.heads import create_classifier, renew_classifier
from mbib_timm.models.weights import filter_state_dict
from mbib_timm.models.zoo import create_published

__all__ = ["WithClassifier"]


class WithClassifier(PooledModel):
    """A timm backbone without its classifier, under the keys ``backbone.<timm's key>``, and a classifier.

    Args:
        backbone: timm model name.
        num_classes: classes K; 0 for none.
        in_chans: channels of the images.
        global_pool: timm pooling type; the backbone's own when None.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the backbone.
        classifier: its kind, see `create_classifier`.
        classifier_scale: of a cosine classifier.
        img_size: image size, for backbones whose parameters depend on it.
        backbone_args: further keyword arguments of the backbone.

    Raises:
        MbibError: an unknown backbone or classifier, with the valid ones.
    """

    __jit_unused_properties__ = ("feature_info", "num_features", "head_hidden_size", "pooled_widths")

    def __init__(
        self,
        backbone: str = "resnet50",
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        classifier: str = "linear",
        classifier_scale: float | None = None,
        img_size: int | tuple[int, int] | None = None,
        backbone_args: dict[str, Any] | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_backbone(backbone)
        self.backbone_name = backbone
        self.backbone_args = dict(backbone_args or {})
        if img_size is not None:
            self.backbone_args["img_size"] = img_size
        self.num_classes = num_classes
        self.in_chans = in_chans
        # timm leaves out what is None; many backbones do not know all of these.
        optional = {"global_pool": global_pool, "drop_path_rate": drop_path_rate or None}
        self.backbone = timm.create_model(
            backbone, num_classes=0, in_chans=in_chans, **optional, **self.backbone_args, device=device, dtype=dtype
        )
        self._traits = backbone_traits(self.backbone)
        # Here and not in the backbone, some of which drop nothing before the classifier, or cannot.
        self.drop = nn.Dropout(drop_rate)
        self.classifier_kind, self.classifier_scale = classifier, classifier_scale
        width = self.head_hidden_size
        self.classifier = create_classifier(
            classifier, width, num_classes, classifier_scale, device=device, dtype=dtype
        )

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """The backbone's levels."""
        return prefixed_levels(self.backbone.feature_info)

    @property
    def num_features(self) -> int:
        """Channels of the last map."""
        return int(self.backbone.num_features)

    @property
    def head_hidden_size(self) -> int:
        """Width of the pooled features."""
        return int(self.backbone.head_hidden_size)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the classifier."""
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by one of the same kind; the pooling stays as it is when `global_pool` is None."""
        if global_pool is not None:
            before = getattr(self.backbone, "_model_args", {})
            self.backbone.reset_classifier(0, global_pool)
            # What timm notes of a backbone whose pooling changes, such as that a norm stays where it was.
            noted = getattr(self.backbone, "_model_args", {}).items()
            self.backbone_args |= {key: value for key, value in noted if before.get(key) != value}
            if hasattr(self, "_model_args"):  # what timm saves with the model
                changed = {"global_pool": global_pool, "backbone_args": self.backbone_args}
                self._model_args: Any = {**self._model_args, **changed}
        self.num_classes = num_classes
        kind, scale, width = self.classifier_kind, self.classifier_scale, self.head_hidden_size
        self.classifier = renew_classifier(self.classifier, kind, width, num_classes, scale, **get_device_dtype(self))

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the backbone's last map, in the backbone's format, e.g. (B, C, H, W)."""
        return self.backbone.forward_features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits (B, K) of the last map; with `pre_logits` the pooled features (B, D)."""
        x = self.backbone.forward_head(x, pre_logits=True)
        return x if pre_logits else self.classifier(self.drop(x))

    @property
    def pooled_widths(self) -> tuple[int, ...]:
        """Widths of what `pool_features` returns."""
        return (self.head_hidden_size,)

    @torch.jit.ignore
    def _pool_features(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the pooled features (B, D) that the classifier stands on, alone in a tuple."""
        return (self.forward_head(self.forward_features(x), pre_logits=True),)

    @torch.jit.ignore
    def forward_pooled(self, pooled: tuple[Tensor, ...]) -> Tensor:
        """Return the logits (B, K), as `forward` does, from what `pool_features` returns."""
        return self.classifier(self.drop(pooled[0]))

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what lies behind the last chosen level, and the classifier with it."""
        width = self.head_hidden_size
        take: list[int] = self.backbone.prune_intermediate_layers(indices, prune_norm=prune_norm, prune_head=prune_head)
        if prune_head or self.head_hidden_size != width or max(take) < len(self.backbone.feature_info) - 1:
            self.num_classes = 0
            self.classifier = nn.Identity()
        return take


default_cfgs = generate_default_cfgs({"with_classifier": PretrainedCfg()})


@register_model
def with_classifier(pretrained: bool = False, backbone: str = "resnet50", **kwargs: Any) -> WithClassifier:
    """Any timm backbone with a linear, cosine or scaled classifier; `pretrained` loads the backbone's own weights."""
    backbone_name = backbone.partition(".")[0]
    if kwargs.get("pretrained_cfg") is None:
        kwargs["pretrained_cfg"] = dataclasses.asdict(backbone_cfg(backbone, "classifier"))
    return create_published(
        WithClassifier,
        "with_classifier",
        pretrained,
        backbone=backbone_name,
        pretrained_filter_fn=filter_state_dict,
        feature_cfg=dict(feature_cls=FeatureNet, out_indices=None),
        **kwargs,
    )
