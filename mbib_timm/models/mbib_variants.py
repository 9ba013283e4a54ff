"""The registered models that hold a backbone of timm's: MBIB, BIB and experts, under the names of their backbones.

`mbib_*` observes three depths of its backbone, `bib_*` the last alone. `experts_*` has experts with a classifier each,
`mbib_experts_*` experts with MBIB's heads each. A variant is one function and one line of `VARIANTS`; the names without
a backbone take any that fits:

    timm.create_model('mbib', backbone='convnext_tiny.fb_in22k', pretrained=True, num_classes=10)
    timm.create_model('experts', backbone='resnet50.a1_in1k', reduced=False, pretrained=True, num_classes=10)
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from timm.models import PretrainedCfg, generate_default_cfgs, register_model, resolve_pretrained_cfg

from mbib_timm.errors import CheckpointError
from mbib_timm.models import plain_resnets  # noqa: F401 (the backbones below must be registered)
from mbib_timm.models.backbones import FEATURES, FeatureNet, backbone_cfg
from mbib_timm.models.expert_networks import SHALLOW, Experts, MBIBExperts
from mbib_timm.models.mbib_network import MBIB
from mbib_timm.models.weights import filter_state_dict
from mbib_timm.models.zoo import backbone_cfgs, create_published

__all__: list[str] = []


class Variant(NamedTuple):
    """A registered backbone.

    Attributes:
        backbone: timm's name, with the tag of the ImageNet weights that fine-tuning starts from.
        depths: three that MBIB observes: the levels at which its last stages end, and what may lie behind them.
        backbone_args: keyword arguments of the backbone.
    """

    backbone: str
    depths: tuple[int | str, ...]
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
    "efficientnet_lite0": Variant("tf_efficientnet_lite0.in1k", (3, 4, FEATURES)),
}


# By what a name begins with: its network, and the variants that it is registered on.
_EXPERT_VARIANTS = ("resnet20", "resnet32", "resnet10", "resnet50", "resnext50")
_NETWORKS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "mbib": (MBIB, tuple(VARIANTS)),
    "bib": (MBIB, tuple(VARIANTS)),
    "experts": (Experts, _EXPERT_VARIANTS),
    "mbib_experts": (MBIBExperts, _EXPERT_VARIANTS),
}
_OBSERVATIONS = {"mbib": 3, "bib": 1}
_EXPERTS = 3  # of a network that does not say how many


def _classifiers(method: str, observations: int | None = None) -> list[str]:
    """Return the names of the classifiers of a network with the default arguments, in the order of its heads."""
    if method in _OBSERVATIONS:
        shallow = [f"training_heads.v{i}.classifier" for i in range(1, observations or _OBSERVATIONS[method])]
        return [*shallow, "observation.classifier", "bottleneck.classifier"]
    if method == "experts":
        return [f"heads.{i}.classifier" for i in range(_EXPERTS)]
    return [
        name
        for i in range(_EXPERTS)
        for name in (
            *(f"training_heads.expert{i + 1}_{v}.classifier" for v in SHALLOW),
            *(f"heads.{i}.{part}classifier" for part in ("", "bottleneck.")),
        )
    ]


default_cfgs = generate_default_cfgs(
    {
        name: cfg
        for method, (_, variants) in _NETWORKS.items()
        for variant in variants
        for name, cfg in backbone_cfgs(
            f"{method}_{variant}",
            VARIANTS[variant].backbone,
            backbone_cfg(VARIANTS[variant].backbone, _classifiers(method)),
        ).items()
    }
    | {method: PretrainedCfg() for method in _NETWORKS}
)


def _create(name: str, pretrained: bool, **kwargs: Any) -> Any:
    """Build a registered name: it begins with the network's, and ends with the backbone's.

    Raises:
        CheckpointError: `pretrained`, where there are no weights that fit.
    """
    method = next(method for method in sorted(_NETWORKS, key=len) if name.removeprefix(f"{method}_") in VARIANTS)
    variant = VARIANTS[name.removeprefix(f"{method}_")]
    args: dict[str, Any] = {"backbone": variant.backbone.partition(".")[0], **kwargs}
    args["backbone_args"] = {**variant.backbone_args, **kwargs.get("backbone_args", {})}
    ends: Any = variant.depths
    if method in _OBSERVATIONS:
        args.setdefault("taps", ends[-_OBSERVATIONS[method] :])
    else:
        cfg = resolve_pretrained_cfg(name, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
        if pretrained and (cfg.tag or "").startswith("backbone_"):
            _require_full_width(name, kwargs)
        ends = (ends[0], ends[0] + 1, ends[0] + 2)  # behind the trunk, a stage of experts is one level
    # Of a CIFAR ResNet, whose levels are its blocks, timm's features-only form gives the stages' ends by default.
    return _build(method, name, pretrained, ends if "cifar" in args["backbone"] else None, **args)


def _create_on(method: str, backbone: str, pretrained: bool, **kwargs: Any) -> Any:
    """Build a network on any backbone; `pretrained` loads the backbone's own weights."""
    backbone_name = backbone.partition(".")[0]
    if method in _OBSERVATIONS:
        kwargs.setdefault("taps", _OBSERVATIONS[method])
    if kwargs.get("pretrained_cfg") is None:
        taps = kwargs.get("taps", ())
        names = _classifiers(method, taps if isinstance(taps, int) else len(taps))
        kwargs["pretrained_cfg"] = dataclasses.asdict(backbone_cfg(backbone, names))
        if pretrained and method not in _OBSERVATIONS:
            _require_full_width(method, kwargs)
    return _build(method, method, pretrained, None, backbone=backbone_name, **kwargs)


def _require_full_width(name: str, kwargs: Mapping[str, Any]) -> None:
    """Raise CheckpointError for a backbone's weights in experts of reduced width."""
    if kwargs.get("reduced", True):
        raise CheckpointError(
            f"{name}: the backbone's weights do not fit experts of reduced width; pass reduced=False, or omit "
            "pretrained"
        )


def _build(method: str, name: str, pretrained: bool, ends: tuple[int, ...] | None, **kwargs: Any) -> Any:
    """Build a model, whose features-only form gives the levels `ends` by default, or every level."""
    network, _ = _NETWORKS[method]
    model = create_published(
        network,
        name,
        pretrained,
        pretrained_filter_fn=filter_state_dict,
        feature_cfg=dict(feature_cls=FeatureNet, out_indices=ends),
        **kwargs,
    )
    if isinstance(model, network):  # and not its features-only form
        model.name_classifiers()
    if isinstance(model, MBIB):
        model.record_choices()
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
def mbib_efficientnet_lite0(pretrained: bool = False, **kwargs: Any) -> MBIB:
    """MBIB on EfficientNet-Lite0, whose ImageNet weights the extra ``lite0`` brings by pip."""
    return _create("mbib_efficientnet_lite0", pretrained, **kwargs)


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


@register_model
def bib_efficientnet_lite0(pretrained: bool = False, **kwargs: Any) -> MBIB:
    """BIB on EfficientNet-Lite0, whose ImageNet weights the extra ``lite0`` brings by pip."""
    return _create("bib_efficientnet_lite0", pretrained, **kwargs)


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
