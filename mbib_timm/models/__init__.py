"""Models: ResNets that timm lacks, classifiers, MBIB, experts, what is registered, trained weights, and the zoo."""

from mbib_timm.models import mbib_variants, plain_resnets, with_classifier
from mbib_timm.models.complexity import count_macs, count_parameters
from mbib_timm.models.expert_networks import Experts, MBIBExperts
from mbib_timm.models.heads import CLASSIFIERS, create_classifier
from mbib_timm.models.mbib_network import MBIB
from mbib_timm.models.plain_resnets import CifarResNet
from mbib_timm.models.weights import filter_state_dict, prefix_backbone

__all__ = [
    "CLASSIFIERS",
    "MBIB",
    "CifarResNet",
    "Experts",
    "MBIBExperts",
    "count_macs",
    "count_parameters",
    "create_classifier",
    "filter_state_dict",
    "mbib_variants",
    "plain_resnets",
    "prefix_backbone",
    "with_classifier",
]
