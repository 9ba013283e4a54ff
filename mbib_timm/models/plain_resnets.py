"""The ResNets of the long-tail benchmarks that timm lacks: CIFAR's, and the classic ResNet-10.

CIFAR's are those of He et al. (2016, section 4.2): a 3x3 stem and three stages of 16, 32 and 64 channels. Their
shortcuts have no parameters (option A): where a block halves the map and doubles the channels, the input is subsampled
with stride 2 and padded with zero channels. The ResNet-10 of ImageNet-LT has the classic 7x7 stem and one BasicBlock
per stage, where timm has `resnet10t`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import SelectAdaptivePool2d, get_device_dtype
from timm.models import PretrainedCfg, checkpoint, checkpoint_seq, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

from mbib_timm.models.backbones import feature_take_indices
from mbib_timm.models.heads import TORCH, create_classifier, init_classifier, renew_classifier
from mbib_timm.models.weights import filter_state_dict
from mbib_timm.models.zoo import create_published, published_cfgs

__all__ = ["CifarResNet", "ClassicResNet"]

STAGE_CHANNELS = (16, 32, 64)
CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2023, 0.1994, 0.2010)


class PadShortcut(nn.Module):
    """The option-A shortcut: stride-2 subsampling, then zero channels on both sides.

    Args:
        extra_channels: zero channels to add in all.
    """

    def __init__(self, extra_channels: int) -> None:
        super().__init__()
        self.before = extra_channels // 2
        self.after = extra_channels - self.before

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))


class CifarResNet(nn.Module):
    """ResNet for 32x32 images; every block is a level of `feature_info`, so every block can be tapped.

    Level 0 is the stem, level i the i-th block. With n blocks a stage the stages end at levels n, 2n and 3n.

    Args:
        blocks_per_stage: residual blocks in each of the three stages; the depth is ``6 n + 2``.
        num_classes: classes of the classifier; 0 for none.
        in_chans: channels of the images.
        global_pool: timm pooling type before the classifier.
        drop_rate: dropout before the classifier.
        classifier: its kind, see `create_classifier`.
        classifier_scale: of a cosine classifier.
        channels: of the three stages.
    """

    def __init__(
        self,
        blocks_per_stage: int,
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        classifier: str = "linear",
        classifier_scale: float | None = None,
        channels: Sequence[int] = STAGE_CHANNELS,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False

        width = channels[0]
        self.conv1 = nn.Conv2d(in_chans, width, 3, padding=1, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(width, **dd)
        self.act1 = nn.ReLU(inplace=True)
        self.feature_info: list[dict[str, Any]] = [dict(num_chs=width, reduction=1, module="act1")]
        stages = []
        for stage, out_channels in enumerate(channels, start=1):
            blocks = []
            for i in range(blocks_per_stage):
                halves = stage > 1 and i == 0
                shortcut = PadShortcut(out_channels - width) if halves else None
                blocks.append(BasicBlock(width, out_channels, 2 if halves else 1, shortcut, **dd))
                width = out_channels
                info = dict(num_chs=width, reduction=2 ** (stage - 1), module=f"layer{stage}.{i}")
                self.feature_info.append(info)
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3 = stages

        self.num_features = width
        self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        self.head_hidden_size = width * self.global_pool.feat_mult()
        self.classifier_kind, self.classifier_scale = classifier, classifier_scale
        self.fc = create_classifier(classifier, self.head_hidden_size, num_classes, classifier_scale, TORCH, **dd)
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Kaiming initialisation of convolutions and of the classifier."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        init_classifier(self.fc)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Return the parameter groups in order of depth: stem, then stages (coarse) or blocks."""
        return dict(stem=r"^conv1|bn1", blocks=r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)")

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks' activations in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the classifier."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; the pooling stays as it is when `global_pool` is None."""
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
            self.global_pool.train(self.training)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.fc = renew_classifier(
            self.fc,
            self.classifier_kind,
            self.head_hidden_size,
            num_classes,
            self.classifier_scale,
            **get_device_dtype(self),
        )

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last map, (B, C, H/4, W/4)."""
        x = self.act1(self.bn1(self.conv1(x)))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq([self.layer1, self.layer2, self.layer3], x, flatten=True)
        return self.layer3(self.layer2(self.layer1(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits (B, K), or the pooled vector (B, C) with `pre_logits`."""
        x = self.global_pool(x)
        if self.drop_rate:
            x = F.dropout(x, p=float(self.drop_rate), training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    @torch.jit.ignore
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return the last map and the maps of the chosen levels (all of them by default), as timm's models do."""
        assert output_fmt == "NCHW", "Output shape must be NCHW."
        take_indices, last = feature_take_indices(len(self.feature_info), indices)
        x = self.act1(self.bn1(self.conv1(x)))
        intermediates = [x] if 0 in take_indices else []
        for level, block in enumerate((*self.layer1, *self.layer2, *self.layer3), start=1):
            if stop_early and level > last:
                break
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
            if level in take_indices:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the blocks after the last chosen level, and the classifier with them."""
        take_indices, last = feature_take_indices(len(self.feature_info), indices)
        stages = (self.layer1, self.layer2, self.layer3)
        kept = last
        for stage in stages:
            del stage[max(0, min(kept, len(stage))) :]
            kept -= len(stage)
        shortened = last < len(self.feature_info) - 1
        if shortened:
            self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return take_indices


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


_CIFAR_CFG = PretrainedCfg(
    num_classes=100,
    input_size=(3, 32, 32),
    pool_size=(8, 8),
    crop_pct=1.0,
    interpolation="bicubic",
    mean=CIFAR_MEAN,
    std=CIFAR_STD,
    first_conv="conv1",
    classifier="fc",
    license="apache-2.0",
)
_CLASSIC_CFG = PretrainedCfg(
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

DEPTHS = (20, 32, 44, 56)

default_cfgs = generate_default_cfgs(
    {
        name: cfg
        for architecture in (f"cifar_resnet{depth}" for depth in DEPTHS)
        for name, cfg in (published_cfgs(architecture, _CIFAR_CFG) or {architecture: _CIFAR_CFG}).items()
    }
    | {"classic_resnet10": _CLASSIC_CFG}
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> CifarResNet:
    """Build a CIFAR ResNet of 6 n + 2 layers under a registered name."""
    blocks = (int(variant.removeprefix("cifar_resnet")) - 2) // 6
    return create_published(
        partial(CifarResNet, blocks),
        variant,
        pretrained,
        pretrained_filter_fn=filter_state_dict,
        feature_cfg=dict(out_indices=(blocks, 2 * blocks, 3 * blocks), flatten_sequential=True),
        **kwargs,
    )


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-20 for CIFAR."""
    return _create("cifar_resnet20", pretrained, **kwargs)


@register_model
def cifar_resnet32(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-32 for CIFAR, the backbone of the paper's Table 1."""
    return _create("cifar_resnet32", pretrained, **kwargs)


@register_model
def cifar_resnet44(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-44 for CIFAR."""
    return _create("cifar_resnet44", pretrained, **kwargs)


@register_model
def cifar_resnet56(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-56 for CIFAR."""
    return _create("cifar_resnet56", pretrained, **kwargs)


@register_model
def classic_resnet10(pretrained: bool = False, **kwargs: Any) -> ClassicResNet:
    """ResNet-10 with BasicBlocks [1, 1, 1, 1] and 64 to 512 channels."""
    args = dict(layers=(1, 1, 1, 1), pretrained_filter_fn=filter_state_dict)
    return create_published(ClassicResNet, "classic_resnet10", pretrained, **dict(args, **kwargs))
