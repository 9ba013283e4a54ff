"""Where a backbone is observed: its levels by index or name, and the backbone cut off behind the last of them."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import timm
from timm.models._features import FeatureGetterNet
from timm.models._pretrained import PretrainedCfg
from torch import nn

from mbib_timm.errors import MbibError, unknown_name

# What a model that holds a backbone calls it: the first part of the backbone's keys.
PREFIX = "backbone."


def skeleton(backbone: str, backbone_args: Mapping[str, Any]) -> nn.Module:
    """Build the plain backbone on the meta device, without memory, to read its levels and its keys.

    Raises:
        MbibError: timm does not know the backbone.
    """
    if not timm.is_model(backbone):
        raise unknown_name("backbone", backbone, timm.list_models())
    return timm.create_model(backbone, device="meta", **backbone_args)


def resolve_taps(backbone: str, taps: Sequence[int | str], backbone_args: Mapping[str, Any]) -> tuple[int, ...]:
    """Return taps as ascending indices into the backbone's ``feature_info``.

    Args:
        backbone: timm model name.
        taps: indices, negative ones from the end, or names of the levels' modules.
        backbone_args: keyword arguments of the backbone.

    Raises:
        MbibError: an unknown backbone or tap, a backbone that timm cannot tap, no tap, or taps that are not in order
            of depth.
    """
    plain = skeleton(backbone, backbone_args)
    if not hasattr(plain, "forward_intermediates") or not getattr(plain, "feature_info", None):
        raise MbibError(f"backbone {backbone!r} cannot be tapped: it has no forward_intermediates, as timm's models do")
    feature_info: Any = plain.feature_info
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


def create_tapped(backbone: str, levels: Sequence[int], **kwargs: Any) -> Any:
    """Build a backbone that ends at its last tapped level, under timm's own keys.

    timm's ``features_only`` prunes what lies behind that level; the model inside its feature net is returned, and its
    ``forward_intermediates`` gives the maps.

    Raises:
        MbibError: timm builds the features-only form of this backbone as another network.
    """
    try:
        net = timm.create_model(backbone, features_only=True, feature_cls="getter", out_indices=tuple(levels), **kwargs)
    except TypeError as error:
        if "feature_cls" not in str(error):
            raise
        raise MbibError(f"backbone {backbone!r} cannot be tapped: its features_only takes no feature class") from None
    return net.model


class FeatureNet(FeatureGetterNet):
    """timm's feature net over ``forward_intermediates``, with gradient checkpointing: `features_only` of our models."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's activations in the backward pass instead of keeping them."""
        self.model.set_grad_checkpointing(enable)


def prefixed_levels(feature_info: Any) -> list[dict[str, Any]]:
    """Return a backbone's ``feature_info`` as that of the model that holds it."""
    return [dict(info, module=PREFIX + info["module"]) for info in feature_info]


def prefixed_groups(backbone: Any, coarse: bool) -> Any:
    """Return a backbone's ``group_matcher`` as that of the model that holds it; what follows the backbone comes last.

    timm matches a pattern from the start of a name: ``^`` says nothing there and is left out, except in ``[^...]``. A
    backbone that has no groups is one.
    """

    def prefixed(pattern: str) -> str:
        unanchored = re.sub(r"(?<!\[)\^", "", pattern)
        return f"^{re.escape(PREFIX)}(?:{unanchored})"

    if not hasattr(backbone, "group_matcher"):
        return {"stem": prefixed("")}
    matcher = backbone.group_matcher(coarse=coarse)
    if callable(matcher):
        return lambda name: matcher(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else float("inf")
    return {
        name: prefixed(spec) if isinstance(spec, str) else [(prefixed(pattern), suffix) for pattern, suffix in spec]
        for name, spec in matcher.items()
        if spec is not None
    }


def prefixed_names(names: str | Sequence[str] | None) -> Any:
    """Return a cfg's name or names of a backbone's layers as those of the model that holds it."""
    if names is None or isinstance(names, str):
        return PREFIX + names if names else None
    return tuple(PREFIX + name for name in names)


def backbone_cfg(backbone: str, classifier: str | Sequence[str]) -> PretrainedCfg:
    """Return the cfg of a backbone, with its weights' location, as that of the model that holds it.

    Args:
        backbone: timm model name, with or without tag.
        classifier: name or names of the model's classifiers.
    """
    cfg = timm.get_pretrained_cfg(backbone) or PretrainedCfg()
    return dataclasses.replace(
        cfg,
        url=None,
        architecture=None,
        tag=None,
        classifier=classifier if isinstance(classifier, str) else tuple(classifier),
        first_conv=prefixed_names(cfg.first_conv),
    )
