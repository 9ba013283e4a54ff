"""Strict loading: a checkpoint fits a model key by key, or the keys at fault are named.

timm loads leniently whenever the number of classes differs, and into feature nets always: a renamed layer would
stay random without a word. `filter_state_dict` runs before timm's loading and refuses such checkpoints.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from mbib_timm.errors import CheckpointError
from mbib_timm.models.mbib import MBIB
from mbib_timm.models.taps import skeleton

PREFIX = "backbone."
TRAINING_HEADS = "training_heads."


def filter_state_dict(state_dict: Mapping[str, Tensor], model: MBIB) -> dict[str, Tensor]:
    """Return a checkpoint under the model's own keys; timm calls this as ``pretrained_filter_fn``.

    Accepts a checkpoint of the same MBIB model, of any number of classes, or one of the plain backbone, in timm's
    keys. With the latter the heads keep their fresh initialisation, and so do the heads that serve training only where
    the checkpoint was published without them.

    Raises:
        CheckpointError: missing or unexpected keys, by name.
    """
    own = model.state_dict()
    if any(key.startswith(PREFIX) for key in state_dict):
        if not any(key.startswith(TRAINING_HEADS) for key in state_dict):
            fresh = {key: value for key, value in own.items() if key.startswith(TRAINING_HEADS)}
            state_dict = {**fresh, **state_dict}
        _require_same_keys(state_dict, own, "checkpoint")
        return dict(state_dict)
    backbone = match_backbone_keys(state_dict, model)
    heads = {key: value for key, value in own.items() if not key.startswith(PREFIX)}
    return {**heads, **backbone}


def match_backbone_keys(state_dict: Mapping[str, Tensor], model: MBIB) -> dict[str, Tensor]:
    """Return a plain backbone's checkpoint under the keys of the model's tapped backbone.

    Every key of the plain backbone but its classifier's must be there and no other. What lies after the last tap
    is left out.

    Raises:
        CheckpointError: missing or unexpected keys, by name.
    """
    plain = skeleton(model.backbone_name, model.backbone_args)
    cfg: Any = plain.pretrained_cfg
    classifiers = cfg.get("classifier") or ()
    prefixes = tuple(f"{name}." for name in ([classifiers] if isinstance(classifiers, str) else classifiers))
    expected = [key for key in plain.state_dict() if not key.startswith(prefixes)]
    given = [key for key in state_dict if not key.startswith(prefixes)]
    _require_same_keys(given, expected, f"checkpoint of backbone {model.backbone_name!r}")

    own = {key.removeprefix(PREFIX) for key in model.state_dict() if key.startswith(PREFIX)}
    matched = {}
    for key in given:
        # timm's feature nets keep a key, join its first two parts, or put the whole model one level down.
        for candidate in (key, key.replace(".", "_", 1), f"model.{key}", f"body.{key}"):
            if candidate in own:
                matched[PREFIX + candidate] = state_dict[key]
    _require_same_keys(matched, (PREFIX + key for key in own), f"tapped backbone {model.backbone_name!r}")
    return matched


def _require_same_keys(given: Iterable[str], expected: Iterable[str], what: str) -> None:
    given, expected = set(given), set(expected)
    problems = [
        f"{label} {', '.join(sorted(keys)[:5])}{f' and {len(keys) - 5} more' if len(keys) > 5 else ''}"
        for label, keys in (("missing keys:", expected - given), ("unexpected keys:", given - expected))
        if keys
    ]
    if problems:
        raise CheckpointError(f"{what} does not fit the model; {'; '.join(problems)}")
