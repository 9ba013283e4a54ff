"""The baselines of Table 1 under the names of their recipes: a plain ResNet-32, trained by another loss than MBIB's."""

from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models._pretrained import PretrainedCfg

from mbib_timm.models.cifar_resnet import CifarResNet, cifar_cfg, create_cifar_resnet
from mbib_timm.models.zoo import published_cfgs, require_weights

__all__: list[str] = []

default_cfgs = generate_default_cfgs(
    {
        name: cfg
        for architecture in ("ce_resnet32", "focal_resnet32", "bsce_resnet32")
        for name, cfg in published_cfgs(architecture, PretrainedCfg(**cifar_cfg())).items()
    }
)


def _create(name: str, pretrained: bool, **kwargs: Any) -> CifarResNet:
    if pretrained:
        require_weights(name, **kwargs)
    return create_cifar_resnet(name, 32, pretrained, **kwargs)


@register_model
def ce_resnet32(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """CIFAR ResNet-32 trained by cross-entropy (Table 1)."""
    return _create("ce_resnet32", pretrained, **kwargs)


@register_model
def focal_resnet32(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """CIFAR ResNet-32 trained by focal loss (Table 1)."""
    return _create("focal_resnet32", pretrained, **kwargs)


@register_model
def bsce_resnet32(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """CIFAR ResNet-32 trained by balanced softmax cross-entropy (Table 1)."""
    return _create("bsce_resnet32", pretrained, **kwargs)
