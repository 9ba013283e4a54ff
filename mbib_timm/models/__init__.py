"""Models: CIFAR and classic ResNets that timm lacks, classifiers, MBIB, experts, what is registered, and the zoo."""

from mbib_timm.models import cifar_resnet, classic_resnet, experts_resnet, mbib_resnet, with_classifier
from mbib_timm.models.cifar_resnet import CifarResNet
from mbib_timm.models.classifiers import CLASSIFIERS, create_classifier
from mbib_timm.models.complexity import count_macs, count_parameters
from mbib_timm.models.experts import Experts, MBIBExperts
from mbib_timm.models.mbib import MBIB
from mbib_timm.models.weights import filter_state_dict, prefix_backbone

__all__ = [
    "CLASSIFIERS",
    "MBIB",
    "CifarResNet",
    "Experts",
    "MBIBExperts",
    "cifar_resnet",
    "classic_resnet",
    "count_macs",
    "count_parameters",
    "create_classifier",
    "experts_resnet",
    "filter_state_dict",
    "mbib_resnet",
    "prefix_backbone",
    "with_classifier",
]
