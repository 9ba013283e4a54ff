"""Models: CIFAR and classic ResNets that timm lacks, the MBIB network, and the registered variants."""

from mbib_timm.models import cifar_resnet, classic_resnet, mbib_resnet
from mbib_timm.models.cifar_resnet import CifarResNet
from mbib_timm.models.complexity import count_macs, count_parameters
from mbib_timm.models.mbib import MBIB
from mbib_timm.models.weights import filter_state_dict, match_backbone_keys

__all__ = [
    "MBIB",
    "CifarResNet",
    "cifar_resnet",
    "classic_resnet",
    "count_macs",
    "count_parameters",
    "filter_state_dict",
    "match_backbone_keys",
    "mbib_resnet",
]
