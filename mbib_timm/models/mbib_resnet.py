"""The registered models: `mbib_*` observes three depths of its backbone, `bib_*` the last alone.

A variant is one function and one line of `VARIANTS`; `mbib` and `bib` take any backbone of timm:

    timm.create_model('mbib', backbone='convnext_tiny.fb_in22k', pretrained=True, num_classes=10)
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import timm
from timm.models import generate_default_cfgs, register_model
from timm.models._pretrained import PretrainedCfg

from mbib_timm.models import cifar_resnet, classic_resnet  # noqa: F401 (the backbones below must be registered)
from mbib_timm.models.mbib import MBIB
from mbib_timm.models.taps import FeatureNet, backbone_cfg
from mbib_timm.models.weights import filter_state_dict
from mbib_timm.models.zoo import backbone_cfgs, create_published

__all__: list[str] = []


class Variant(NamedTuple):
    """A registered backbone.

    Attributes:
        backbone: timm's name, with the tag of the ImageNet weights that fine-tuning starts from.
        stage_ends: the observed levels.
        backbone_args: keyword arguments of the backbone.
    """

    backbone: str
    stage_ends: tuple[int, int, int]
    backbone_args: Mapping[str, Any] = MappingProxyType({})


# timm starts every residual branch at zero (zero_init_last); the long-tail benchmarks do not.
_PLAIN_START = {"zero_init_last": False}
_IMAGENET_ENDS = (2, 3, 4)

VARIANTS = {
    "resnet20": Variant("cifar_resnet20", (3, 6, 9)),
    "resnet32": Variant("cifar_resnet32", (5, 10, 15)),
    "resnet44": Variant("cifar_resnet44", (7, 14, 21)),
    "resnet56": Variant("cifar_resnet56", (9, 18, 27)),
    "resnet10": Variant("classic_resnet10", _IMAGENET_ENDS, _PLAIN_START),
    "resnet18": Variant("resnet18.a1_in1k", _IMAGENET_ENDS, _PLAIN_START),
    "resnet34": Variant("resnet34.a1_in1k", _IMAGENET_ENDS, _PLAIN_START),
    "resnet50": Variant("resnet50.a1_in1k", _IMAGENET_ENDS, _PLAIN_START),
    "resnet101": Variant("resnet101.a1_in1k", _IMAGENET_ENDS, _PLAIN_START),
    "resnet152": Variant("resnet152.a1_in1k", _IMAGENET_ENDS, _PLAIN_START),
    "resnext50": Variant("resnext50_32x4d.a1_in1k", _IMAGENET_ENDS, _PLAIN_START),
    "resnext101": Variant("resnext101_32x8d.tv_in1k", _IMAGENET_ENDS, _PLAIN_START),
}


def _cfg(backbone: str, observations: int) -> PretrainedCfg:
    trained_heads = [f"training_heads.v{i}.classifier" for i in range(1, observations)]
    return backbone_cfg(backbone, (*trained_heads, "observation.classifier", "bottleneck.classifier"))


default_cfgs = generate_default_cfgs(
    {
        name: cfg
        for variant_name, variant in VARIANTS.items()
        for method, observations in (("mbib", 3), ("bib", 1))
        for name, cfg in backbone_cfgs(
            f"{method}_{variant_name}", variant.backbone, _cfg(variant.backbone, observations)
        ).items()
    }
    | {"mbib": PretrainedCfg(), "bib": PretrainedCfg()}
)


def _create(name: str, pretrained: bool, **kwargs: Any) -> MBIB:
    """Build a registered name: its method says how many observations, its variant which backbone.

    Raises:
        CheckpointError: `pretrained`, where there are no weights.
    """
    method, _, variant_name = name.partition("_")
    variant = VARIANTS[variant_name]
    args: dict[str, Any] = dict(
        backbone=variant.backbone.partition(".")[0],
        taps=variant.stage_ends if method == "mbib" else variant.stage_ends[-1:],
    )
    args.update(kwargs)
    args["backbone_args"] = {**variant.backbone_args, **kwargs.get("backbone_args", {})}
    return _build(name, pretrained, **args)


def _create_on(name: str, backbone: str, pretrained: bool, **kwargs: Any) -> MBIB:
    """Build `mbib` or `bib` on any backbone; `pretrained` loads the backbone's own weights."""
    backbone_name = backbone.partition(".")[0]
    taps = kwargs.setdefault("taps", (-3, -2, -1) if name == "mbib" else (-1,))
    if kwargs.get("pretrained_cfg") is None and timm.is_model(backbone_name):
        kwargs["pretrained_cfg"] = dataclasses.asdict(_cfg(backbone, len(taps)))
    return _build(name, pretrained, backbone=backbone_name, **kwargs)


def _build(name: str, pretrained: bool, **kwargs: Any) -> MBIB:
    """Build a model, which in timm's features-only form gives every level of its backbone.

    Of a CIFAR ResNet, whose levels are its blocks, that form gives the stages' ends by default.
    """
    ends = VARIANTS[name.partition("_")[2]].stage_ends if "cifar" in kwargs["backbone"] and "_" in name else None
    model = create_published(
        MBIB,
        name,
        pretrained,
        pretrained_filter_fn=filter_state_dict,
        feature_cfg=dict(feature_cls=FeatureNet, out_indices=ends),
        **kwargs,
    )
    if isinstance(model, MBIB):
        model.name_classifiers()
    return model


@register_model
def mbib(pretrained: bool = False, backbone: str = "resnet50", **kwargs: Any) -> MBIB:
    """MBIB on any timm backbone; `taps` chooses the observed levels, by default the last three."""
    return _create_on("mbib", backbone, pretrained, **kwargs)


@register_model
def bib(pretrained: bool = False, backbone: str = "resnet50", **kwargs: Any) -> MBIB:
    """BIB on any timm backbone, observed at its last level."""
    return _create_on("bib", backbone, pretrained, **kwargs)


@register_model
def mbib_resnet20(pretrained: bool = False, **kwargs: Any) -> MBIB:
    """MBIB on CIFAR ResNet-20."""
    return _create("mbib_resnet20", pretrained, **kwargs)


@register_model
def mbib_resnet32(pretrained: bool = False, **kwargs: Any) -> MBIB:
    """MBIB on CIFAR ResNet-32 (Table 1)."""
    return _create("mbib_resnet32", pretrained, **kwargs)


@register_model
def mbib_resnet44(pretrained: bool = False, **kwargs: Any) -> MBIB:
    """MBIB on CIFAR ResNet-44."""
    return _create("mbib_resnet44", pretrained, **kwargs)


@register_model
def mbib_resnet56(pretrained: bool = False, **kwargs: Any) -> MBIB:
    """MBIB on CIFAR ResNet-56."""
    return _create("mbib_resnet56", pretrained, **kwargs)


@register_model
def mbib_resnet10(pretrained: bool = False, **kwargs: Any) -> MBIB:
    """MBIB on the classic ResNet-10 (Table 2)."""
    return _create("mbib_resnet10", pretrained, **kwargs)


@register_model
def mbib_resnet18(pretrained: bool = False, **kwargs: Any) -> MBIB:
    """MBIB on ResNet-18."""
    return _create("mbib_resnet18", pretrained, **kwargs)


@register_model
def mbib_resnet34(pretrained: bool = False, **kwargs: Any) -> MBIB:
    """MBIB on ResNet-34."""
    return _create("mbib_resnet34", pretrained, **kwargs)


@register_model
def mbib_resnet50(pretrained: bool = False, **kwargs: Any) -> MBIB:
    """MBIB on ResNet-50 (Table 3)."""
    return _create("mbib_resnet50", pretrained, **kwargs)


@register_model
def mbib_resnet101(pretrained: bool = False, **kwargs: Any) -> MBIB:
    """MBIB on ResNet-101."""
    return _create("mbib_resnet101", pretrained, **kwargs)


@register_model
def mbib_resnet152(pretrained: bool = False, **kwargs: Any) -> MBIB:
    """MBIB on ResNet-152."""
    return _create("mbib_resnet152", pretrained, **kwargs)


@register_model
def mbib_resnext50(pretrained: bool = False, **kwargs: Any) -> MBIB:
    """MBIB on ResNeXt-50 32x4d (Table 2)."""
    return _create("mbib_resnext50", pretrained, **kwargs)


@register_model
def mbib_resnext101(pretrained: bool = False, **kwargs: Any) -> MBIB:
    """MBIB on ResNeXt-101 32x8d."""
    return _create("mbib_resnext101", pretrained, **kwargs)


@register_model
def bib_resnet20(pretrained: bool = False, **kwargs: Any) -> MBIB:
    """BIB on CIFAR ResNet-20."""
    return _create("bib_resnet20", pretrained, **kwargs)


@register_model
def bib_resnet32(pretrained: bool = False, **kwargs: Any) -> MBIB:
    """BIB on CIFAR ResNet-32 (Table 1)."""
    return _create("bib_resnet32", pretrained, **kwargs)


@register_model
def bib_resnet44(pretrained: bool = False, **kwargs: Any) -> MBIB:
    """BIB on CIFAR ResNet-44."""
    return _create("bib_resnet44", pretrained, **kwargs)


@register_model
def bib_resnet56(pretrained: bool = False, **kwargs: Any) -> MBIB:
    """BIB on CIFAR ResNet-56."""
    return _create("bib_resnet56", pretrained, **kwargs)


@register_model
def bib_resnet10(pretrained: bool = False, **kwargs: Any) -> MBIB:
    """BIB on the classic ResNet-10 (Table 2)."""
    return _create("bib_resnet10", pretrained, **kwargs)


@register_model
def bib_resnet18(pretrained: bool = False, **kwargs: Any) -> MBIB:
    """BIB on ResNet-18."""
    return _create("bib_resnet18", pretrained, **kwargs)


@register_model
def bib_resnet34(pretrained: bool = False, **kwargs: Any) -> MBIB:
    """BIB on ResNet-34."""
    return _create("bib_resnet34", pretrained, **kwargs)


@register_model
def bib_resnet50(pretrained: bool = False, **kwargs: Any) -> MBIB:
    """BIB on ResNet-50 (Table 3)."""
    return _create("bib_resnet50", pretrained, **kwargs)


@register_model
def bib_resnet101(pretrained: bool = False, **kwargs: Any) -> MBIB:
    """BIB on ResNet-101."""
    return _create("bib_resnet101", pretrained, **kwargs)


@register_model
def bib_resnet152(pretrained: bool = False, **kwargs: Any) -> MBIB:
    """BIB on ResNet-152."""
    return _create("bib_resnet152", pretrained, **kwargs)


@register_model
def bib_resnext50(pretrained: bool = False, **kwargs: Any) -> MBIB:
    """BIB on ResNeXt-50 32x4d (Table 2)."""
    return _create("bib_resnext50", pretrained, **kwargs)


@register_model
def bib_resnext101(pretrained: bool = False, **kwargs: Any) -> MBIB:
    """BIB on ResNeXt-101 32x8d."""
    return _create("bib_resnext101", pretrained, **kwargs)
