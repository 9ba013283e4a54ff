"""Where a backbone is observed: its levels by index or name, and a feature net that ends at one of them."""

from collections.abc import Sequence
from typing import Any

import timm
from timm.models._features import FeatureDictNet, FeatureGetterNet
from torch import nn

from mbib_timm.errors import MbibError, unknown_name


def resolve_taps(backbone: str, taps: Sequence[int | str], backbone_args: dict[str, Any]) -> tuple[int, ...]:
    """Return taps as ascending indices into the backbone's ``feature_info``.

    Args:
        backbone: timm model name.
        taps: indices, negative ones from the end, or names of the levels' modules.
        backbone_args: keyword arguments of the backbone.

    Raises:
        MbibError: an unknown backbone or tap, no tap, or taps that are not in order of depth.
    """
    feature_info: Any = skeleton(backbone, backbone_args).feature_info
    modules = [info["module"] for info in feature_info]
    levels = []
    for tap in taps:
        if isinstance(tap, str):
            if tap not in modules:
                raise unknown_name(f"tap of {backbone}", tap, modules)
            levels.append(modules.index(tap))
        elif -len(modules) <= tap < len(modules):
            levels.append(tap % len(modules))
        else:
            listing = ", ".join(f"{i}: {name}" for i, name in enumerate(modules))
            raise MbibError(f"unknown tap {tap} of {backbone}: its levels are {listing}")
    if not levels or levels != sorted(set(levels)):
        raise MbibError(f"taps of {backbone} must be one or more levels in order of depth, got {list(taps)}")
    return tuple(levels)


def skeleton(backbone: str, backbone_args: dict[str, Any]) -> nn.Module:
    """Build the plain backbone on the meta device, without memory, to read its levels and its keys.

    Raises:
        MbibError: timm does not know the backbone, or it cannot be tapped.
    """
    if not timm.is_model(backbone):
        raise unknown_name("backbone", backbone, timm.list_models())
    model = timm.create_model(backbone, device="meta", **backbone_args)
    if not getattr(model, "feature_info", None):
        raise MbibError(f"backbone {backbone!r} cannot be tapped: timm lists no features for it")
    return model


def truncate(net: nn.Module, last: int) -> None:
    """Drop the modules of a timm feature net that come after its output number `last`."""
    if isinstance(net, FeatureDictNet):
        tapped = list(net.return_layers)[: last + 1]
        names = list(net.keys())
        for name in names[names.index(tapped[-1]) + 1 :]:
            del net[name]
        net.return_layers = {name: net.return_layers[name] for name in tapped}
    elif isinstance(net, FeatureGetterNet):
        net.out_indices = net.model.prune_intermediate_layers(list(net.out_indices)[: last + 1])
    else:
        raise MbibError(f"{type(net).__name__} cannot be pruned")
    net.feature_info = net.feature_info.from_other(tuple(net.feature_info.out_indices)[: last + 1])
