"""The registered networks of experts: `experts_*` with a classifier each, `mbib_experts_*` with MBIB's heads each.

`experts` and `mbib_experts` take any ResNet:

    timm.create_model('experts', backbone='resnet50.a1_in1k', reduced=False, pretrained=True, num_classes=10)
"""

import dataclasses
from typing import Any

import timm
from timm.models import generate_default_cfgs, register_model
from timm.models._builder import resolve_pretrained_cfg
from timm.models._pretrained import PretrainedCfg

from mbib_timm.errors import CheckpointError
from mbib_timm.models.experts import PREDICTING, SHALLOW, Experts, MBIBExperts
from mbib_timm.models.mbib_resnet import VARIANTS
from mbib_timm.models.taps import FeatureNet, backbone_cfg
from mbib_timm.models.weights import filter_state_dict
from mbib_timm.models.zoo import backbone_cfgs, create_published

__all__: list[str] = []

NAMES = ("resnet20", "resnet32", "resnet10", "resnet50", "resnext50")
METHODS = {"experts": Experts, "mbib_experts": MBIBExperts}
EXPERTS = 3  # of a network that does not say how many


def _cfg(method: str, backbone: str) -> PretrainedCfg:
    heads = range(EXPERTS)
    if method == "experts":
        return backbone_cfg(backbone, [f"heads.{i}.classifier" for i in heads])
    names = [
        name
        for i in heads
        for name in (
            *(f"training_heads.expert{i + 1}_{v}.classifier" for v in SHALLOW),
            *(f"heads.{i}.{part}classifier" for part in ("", "bottleneck.")),
        )
    ]
    assert len(names) == EXPERTS * (len(SHALLOW) + len(PREDICTING))
    return backbone_cfg(backbone, names)


default_cfgs = generate_default_cfgs(
    {
        name: cfg
        for method in METHODS
        for variant in NAMES
        for name, cfg in backbone_cfgs(
            f"{method}_{variant}", VARIANTS[variant].backbone, _cfg(method, VARIANTS[variant].backbone)
        ).items()
    }
    | {method: PretrainedCfg() for method in METHODS}
)


def _create(name: str, pretrained: bool, **kwargs: Any) -> Any:
    """Build a registered name: what stands before its last underscore says which heads, the rest which backbone.

    Raises:
        CheckpointError: `pretrained`, where there are no weights that fit.
    """
    method, _, variant_name = name.rpartition("_")
    variant = VARIANTS[variant_name]
    cfg = resolve_pretrained_cfg(name, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    if pretrained and (cfg.tag or "").startswith("backbone_"):
        _require_full_width(name, kwargs)
    args = {"backbone": variant.backbone.partition(".")[0], **kwargs}
    args["backbone_args"] = {**variant.backbone_args, **kwargs.get("backbone_args", {})}
    # Of a CIFAR ResNet, whose levels are its blocks, timm's features-only form gives the stages' ends by default.
    trunk = variant.stage_ends[0]
    ends = (trunk, trunk + 1, trunk + 2) if "cifar" in variant.backbone else None
    return _build(method, name, pretrained, ends, **args)


def _create_on(method: str, backbone: str, pretrained: bool, **kwargs: Any) -> Any:
    """Build `experts` or `mbib_experts` on any backbone; `pretrained` loads the backbone's own weights."""
    backbone_name = backbone.partition(".")[0]
    if kwargs.get("pretrained_cfg") is None and timm.is_model(backbone_name):
        kwargs["pretrained_cfg"] = dataclasses.asdict(_cfg(method, backbone))
        if pretrained:
            _require_full_width(method, kwargs)
    return _build(method, method, pretrained, None, backbone=backbone_name, **kwargs)


def _require_full_width(name: str, kwargs: dict[str, Any]) -> None:
    if kwargs.get("reduced", True):
        raise CheckpointError(
            f"{name}: the backbone's weights do not fit experts of reduced width; pass reduced=False, or leave "
            "pretrained out"
        )


def _build(method: str, name: str, pretrained: bool, ends: tuple[int, ...] | None, **kwargs: Any) -> Any:
    model = create_published(
        METHODS[method],
        name,
        pretrained,
        pretrained_filter_fn=filter_state_dict,
        feature_cfg=dict(feature_cls=FeatureNet, out_indices=ends),
        **kwargs,
    )
    if isinstance(model, Experts | MBIBExperts):
        model.name_classifiers()
    return model


@register_model
def experts(pretrained: bool = False, backbone: str = "resnet50", **kwargs: Any) -> Experts:
    """Experts on a ResNet or ResNeXt of CIFAR's or of timm's."""
    return _create_on("experts", backbone, pretrained, **kwargs)


@register_model
def mbib_experts(pretrained: bool = False, backbone: str = "resnet50", **kwargs: Any) -> MBIBExperts:
    """Experts with MBIB's heads on a ResNet or ResNeXt of CIFAR's or of timm's."""
    return _create_on("mbib_experts", backbone, pretrained, **kwargs)


@register_model
def experts_resnet20(pretrained: bool = False, **kwargs: Any) -> Experts:
    """Experts on CIFAR ResNet-20."""
    return _create("experts_resnet20", pretrained, **kwargs)


@register_model
def experts_resnet32(pretrained: bool = False, **kwargs: Any) -> Experts:
    """Experts on CIFAR ResNet-32 (Table 1)."""
    return _create("experts_resnet32", pretrained, **kwargs)


@register_model
def experts_resnet10(pretrained: bool = False, **kwargs: Any) -> Experts:
    """Experts on the classic ResNet-10."""
    return _create("experts_resnet10", pretrained, **kwargs)


@register_model
def experts_resnet50(pretrained: bool = False, **kwargs: Any) -> Experts:
    """Experts on ResNet-50 (Table 3)."""
    return _create("experts_resnet50", pretrained, **kwargs)


@register_model
def experts_resnext50(pretrained: bool = False, **kwargs: Any) -> Experts:
    """Experts on ResNeXt-50 32x4d (Table 2)."""
    return _create("experts_resnext50", pretrained, **kwargs)


@register_model
def mbib_experts_resnet20(pretrained: bool = False, **kwargs: Any) -> MBIBExperts:
    """Experts with MBIB's heads on CIFAR ResNet-20."""
    return _create("mbib_experts_resnet20", pretrained, **kwargs)


@register_model
def mbib_experts_resnet32(pretrained: bool = False, **kwargs: Any) -> MBIBExperts:
    """Experts with MBIB's heads on CIFAR ResNet-32."""
    return _create("mbib_experts_resnet32", pretrained, **kwargs)


@register_model
def mbib_experts_resnet10(pretrained: bool = False, **kwargs: Any) -> MBIBExperts:
    """Experts with MBIB's heads on the classic ResNet-10."""
    return _create("mbib_experts_resnet10", pretrained, **kwargs)


@register_model
def mbib_experts_resnet50(pretrained: bool = False, **kwargs: Any) -> MBIBExperts:
    """Experts with MBIB's heads on ResNet-50."""
    return _create("mbib_experts_resnet50", pretrained, **kwargs)


@register_model
def mbib_experts_resnext50(pretrained: bool = False, **kwargs: Any) -> MBIBExperts:
    """Experts with MBIB's heads on ResNeXt-50 32x4d."""
    return _create("mbib_experts_resnext50", pretrained, **kwargs)
