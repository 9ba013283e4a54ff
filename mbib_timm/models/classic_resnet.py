"""The ResNet-10 of the ImageNet-LT benchmark: classic 7x7 stem and one BasicBlock a stage (timm has `resnet10t`)."""

from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import get_device_dtype
from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet

from mbib_timm.models.classifiers import create_classifier, renew_classifier
from mbib_timm.models.weights import filter_state_dict
from mbib_timm.models.zoo import create_published

__all__ = ["ClassicResNet"]


class ClassicResNet(ResNet):
    """timm's ResNet of BasicBlocks with 64 to 512 channels, and a classifier of any kind.

    Args:
        layers: blocks in each of the four stages.
        num_classes: classes of the classifier; 0 for none.
        classifier: its kind, see `create_classifier`.
        classifier_scale: of a cosine classifier.
        kwargs: further arguments of timm's ResNet.
    """

    def __init__(
        self,
        layers: tuple[int, int, int, int],
        num_classes: int = 1000,
        classifier: str = "linear",
        classifier_scale: float | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(BasicBlock, layers, num_classes=num_classes, device=device, dtype=dtype, **kwargs)
        self.classifier_kind, self.classifier_scale = classifier, classifier_scale
        width = self.head_hidden_size
        self.fc = create_classifier(classifier, width, num_classes, classifier_scale, device=device, dtype=dtype)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by one of the same kind; the pooling stays as it is when `global_pool` is None."""
        old = self.fc
        super().reset_classifier(0, global_pool)
        self.num_classes = num_classes
        kind, scale, width = self.classifier_kind, self.classifier_scale, self.head_hidden_size
        self.fc = renew_classifier(old, kind, width, num_classes, scale, **get_device_dtype(self))


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
def classic_resnet10(pretrained: bool = False, **kwargs: Any) -> ClassicResNet:
    """ResNet-10 with BasicBlocks [1, 1, 1, 1] and 64 to 512 channels."""
    args = dict(layers=(1, 1, 1, 1), pretrained_filter_fn=filter_state_dict)
    return create_published(ClassicResNet, "classic_resnet10", pretrained, **dict(args, **kwargs))
