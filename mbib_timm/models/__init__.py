"""Models: CIFAR and classic ResNets that timm lacks, the MBIB network, the registered variants, and the zoo."""

from mbib_timm.models import baselines, cifar_resnet, classic_resnet, mbib_resnet
from mbib_timm.models.cifar_resnet import CifarResNet
from mbib_timm.models.complexity import count_macs, count_parameters
from mbib_timm.models.mbib import MBIB
from mbib_timm.models.weights import filter_state_dict, match_backbone_keys

__all__ = [
    "MBIB",
    "CifarResNet",
    "baselines",
    "cifar_resnet",
    "classic_resnet",
    "count_macs",
    "count_parameters",
    "filter_state_dict",
    "match_backbone_keys",
    "mbib_resnet",
]
