"""Strict loading: a checkpoint fits a model key by key, or the keys at fault are named.

timm loads leniently whenever the number of classes differs: a renamed layer would stay random without a word.
`filter_state_dict` runs before timm's loading and refuses such checkpoints.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from mbib_timm.errors import CheckpointError
from mbib_timm.models.taps import PREFIX, skeleton

TRAINING_HEADS = "training_heads."


def filter_state_dict(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return a checkpoint under the model's own keys; timm calls this as ``pretrained_filter_fn``.

    Accepts a checkpoint of the same model, or, where the model holds a backbone, one of the plain backbone. What the
    checkpoint cannot give keeps its fresh initialisation: the classifiers, where it is of another number of classes;
    heads that serve training only, where it was published without them; all but the backbone, where it is of that.

    Raises:
        CheckpointError: missing or unexpected keys, by name.
    """
    own: dict[str, Tensor] = model.state_dict()
    if hasattr(model, "backbone_name") and not any(key.startswith(PREFIX) for key in state_dict):
        heads = {key: value for key, value in own.items() if not key.startswith(PREFIX)}
        return {**heads, **prefix_backbone(state_dict, model)}
    fresh: tuple[str, ...] = ()
    if not any(key.startswith(TRAINING_HEADS) for key in state_dict):
        fresh += (TRAINING_HEADS,)
    cfg: Any = getattr(model, "pretrained_cfg", {})
    if model.num_classes != cfg.get("num_classes"):
        fresh += tuple(f"{name}." for name in classifier_names(model))
    kept = {key: value for key, value in state_dict.items() if not key.startswith(fresh)}
    kept |= {key: value for key, value in own.items() if key.startswith(fresh)}
    _require_same_keys(kept, own, "checkpoint")
    return kept


def prefix_backbone(state_dict: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Return a plain backbone's checkpoint under the keys of a model that holds the backbone, such as an MBIB model.

    Every key of the plain backbone but its classifier's must be there and no other. What the model has no use for,
    such as the layers behind its last tap, is left out.

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
    sources = {key: model.plain_key(key) for key in model.backbone.state_dict()}
    return {PREFIX + key: state_dict[source] for key, source in sources.items() if source in state_dict}


def classifier_names(model: Any) -> tuple[str, ...]:
    """Return the names of a model's classifiers, in the order in which it gives their logits."""
    classifiers = model.get_classifier()
    names = {id(module): name for name, module in model.named_modules()}
    return tuple(names[id(c)] for c in (classifiers if isinstance(classifiers, tuple) else (classifiers,)))


def _require_same_keys(given: Iterable[str], expected: Iterable[str], what: str) -> None:
    given, expected = set(given), set(expected)
    problems = [
        f"{label} {', '.join(sorted(keys)[:5])}{f' and {len(keys) - 5} more' if len(keys) > 5 else ''}"
        for label, keys in (("missing keys:", expected - given), ("unexpected keys:", given - expected))
        if keys
    ]
    if problems:
        raise CheckpointError(f"{what} does not fit the model; {'; '.join(problems)}")
