"""The ResNet-10 of the ImageNet-LT benchmark: classic 7x7 stem and one BasicBlock a stage (timm has `resnet10t`)."""

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet

__all__: list[str] = []

default_cfgs = generate_default_cfgs(
    {
        "classic_resnet10": dict(
            num_classes=1000,
            input_size=(3, 224, 224),
            pool_size=(7, 7),
            crop_pct=0.875,
            interpolation="bilinear",
            mean=IMAGENET_DEFAULT_MEAN,
            std=IMAGENET_DEFAULT_STD,
            first_conv="conv1",
            classifier="fc",
            license="apache-2.0",
        )
    }
)


@register_model
def classic_resnet10(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-10 with BasicBlocks [1, 1, 1, 1] and 64 to 512 channels."""
    model_args = dict(block=BasicBlock, layers=(1, 1, 1, 1))
    return build_model_with_cfg(ResNet, "classic_resnet10", pretrained, **dict(model_args, **kwargs))
