"""What ``config.json`` says of a trained model: read and checked as a whole, before anything is built by it."""

import dataclasses
import inspect
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
from timm.models import PretrainedCfg, build_model_with_cfg

from mbib_timm.errors import CheckpointError, MbibError, first_line, unknown_name
from mbib_timm.files import from_plain, parse_json, printable, read_content
from mbib_timm.models.hub import split_repository
from mbib_timm.models.pretraining import Origin
from mbib_timm.recipe.keys import LARGEST_SIDE, MOST_CLASSES

LARGEST_BYTES = 8 * 2**20
MOST_CHANNELS, MOST_IMAGES = 1024, 10**12
PRIORS = ("uniform", "train")


@dataclass(frozen=True)
class ModelConfig:
    """What ``config.json`` says of a model; None for what it does not say.

    Attributes:
        architecture: the name that builds it.
        tag: of its weights.
        num_classes: classes K.
        model_args: keyword arguments of the architecture.
        class_names: in label order.
        class_counts: training images of each class, (K,), int64.
        logit_prior: the class frequencies that its logits are for, see `LoadedModel`.
        preprocessing: entries of a timm cfg that say how images become its input.
        training_data: what it was trained on: a key of the zoo's data sets, or what the recipe calls them.
        origin: where that training started.
    """

    architecture: str | None = None
    tag: str | None = None
    num_classes: int | None = None
    model_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    class_names: tuple[str, ...] | None = None
    class_counts: np.ndarray | None = None
    logit_prior: str | None = None
    preprocessing: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    training_data: str | None = None
    origin: Origin | None = None

    def require_classes(self, num_classes: int, where: str) -> None:
        """Raise CheckpointError unless what is said of the classes is said of so many; `where` is for the message."""
        for key, values in (("label_names", self.class_names), ("class_counts", self.class_counts)):
            if values is not None and len(values) != num_classes:
                raise CheckpointError(f"{where}: {key} has {len(values)} entries; the weights are for {num_classes}")


def read_config(file: Path) -> ModelConfig:
    """Read and check the ``config.json`` of a model, as timm, `mbib train` and `mbib publish` write it.

    Keys that are none of theirs may stand there too. timm reads the file again when it builds the model: what it would
    read otherwise, such as a key that stands twice, is refused here.

    Raises:
        CheckpointError: it cannot be read, or says what cannot be or contradicts itself; names the key.
    """
    content = read_content(file, "model's description", CheckpointError, LARGEST_BYTES)
    try:
        return _checked(parse_json(content.decode("utf-8")))
    except ValueError as error:  # of JSON, of UTF-8, or ours
        raise CheckpointError(f"{file}: {first_line(error)}") from None
    except RecursionError:
        raise CheckpointError(f"{file}: it is nested too deep") from None
    except MbibError as error:
        raise CheckpointError(f"{file}: {error}") from None


def _checked(content: Any) -> ModelConfig:
    _require("content", content, _MAPPING)
    # timm once wrote all of it as one mapping.
    cfg = content.get("pretrained_cfg", {key: value for key, value in content.items() if key in _CFG})
    for key, kind in _TOP.items():
        if content.get(key) is not None or (kind is _MAPPING and key in content and key != "label_descriptions"):
            _require(key, content[key], kind)
    architecture = content.get("architecture")
    if architecture is None:
        raise ValueError("architecture: missing")
    if "." in architecture or not timm.is_model(architecture):
        raise unknown_name("architecture", printable(architecture), timm.list_models())
    args = content.get("model_args", {})
    _check_cfg(cfg, args)
    num_classes = _agreed(
        {
            "num_classes": content.get("num_classes"),
            "pretrained_cfg.num_classes": cfg.get("num_classes"),
            "model_args.num_classes": args.get("num_classes"),
        }
    )
    names, counts = content.get("label_names"), content.get("class_counts")
    if names is None and isinstance(cfg.get("label_names"), list):  # where timm puts those of a model that it has read
        names = cfg["label_names"]
        _require("pretrained_cfg.label_names", names, _TOP["label_names"])
    for key, values in (("label_names", names), ("class_counts", counts)):
        if values is not None and num_classes is not None and len(values) != num_classes:
            raise ValueError(f"{key}: expected {num_classes} entries, as num_classes says, got {len(values)}")
    return ModelConfig(
        architecture=architecture,
        tag=cfg.get("tag"),
        num_classes=num_classes,
        model_args=args,
        class_names=None if names is None else tuple(names),
        class_counts=None if counts is None else np.asarray(counts, dtype=np.int64),
        logit_prior=content.get("logit_prior"),
        preprocessing={
            key: tuple(cfg[key]) if isinstance(cfg[key], list) else cfg[key]
            for key in ("input_size", "mean", "std", "crop_pct", "crop_mode", "interpolation")
            if cfg.get(key) is not None
        },
        training_data=content.get("training_data"),
        origin=_origin(content["origin"]) if "origin" in content else None,
    )


def _origin(content: Any) -> Origin:
    origin: Origin = from_plain(Origin, content, "origin")
    for weights in (*origin.weights, *origin.teachers):
        if weights.repository is not None:
            split_repository(weights.repository)
    return origin


def _check_cfg(cfg: Mapping[str, Any], args: Mapping[str, Any]) -> None:
    """Check the preprocessing, and what else timm's cfg says, with the arguments of the architecture."""
    known = {item.name: item.default for item in dataclasses.fields(PretrainedCfg)}
    for key, value in cfg.items():
        if key == "state_dict" or key not in known:
            raise unknown_name("key of pretrained_cfg", printable(key), _CFG)
        if value is not None and key in _CFG:
            _require(f"pretrained_cfg.{key}", value, _CFG[key])
    for key in args:
        if key in _RESERVED:
            raise ValueError(f"model_args: {key} is not an argument of an architecture")
    for key, kind in _ARGS.items():
        if args.get(key) is not None:
            _require(f"model_args.{key}", args[key], kind)

    def resolved(key: str) -> Any:
        return known[key] if cfg.get(key) is None else cfg[key]

    channels = args.get("in_chans") or resolved("input_size")[0]
    for key in ("mean", "std"):
        if len(resolved(key)) != channels:
            raise ValueError(f"pretrained_cfg.{key}: expected {channels} numbers, one for each channel of an image")


def _agreed(stated: Mapping[str, int | None]) -> int | None:
    """Return the number of classes. Raises ValueError where it is stated more than once, and not alike."""
    given = {place: value for place, value in stated.items() if value is not None}
    if len(set(given.values())) > 1:
        raise ValueError(f"contradicts itself: {', '.join(f'{place} is {value}' for place, value in given.items())}")
    return next(iter(given.values()), None)


class _Kind(NamedTuple):
    """What a value should be, in words, and whether it is. Of a list, the kind of its elements is `each`."""

    expected: str
    fits: Callable[[Any], bool]
    each: "_Kind | None" = None


def _require(place: str, value: Any, kind: _Kind) -> None:
    if not kind.fits(value):
        text = printable(json.dumps(value))
        raise ValueError(f"{place}: expected {kind.expected}, got {text if len(text) <= 60 else f'{text[:60]}...'}")
    if kind.each is not None:
        for number, each in enumerate(value):
            _require(f"{place}[{number}]", each, kind.each)


def _is_text(value: Any) -> bool:
    # A half of a surrogate pair is no character, and cannot be written.
    return isinstance(value, str) and not any("\ud800" <= char <= "\udfff" for char in value)


def _is_whole(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e6 and math.isfinite(value)


def _whole(least: int, most: int) -> _Kind:
    return _Kind(f"a whole number from {least} to {most:,}", lambda value: _is_whole(value, least, most))


def _one_of(*names: str) -> _Kind:
    return _Kind(f"one of {', '.join(names)}", lambda value: isinstance(value, str) and value in names)


def _list_of(each: _Kind, plural: str) -> _Kind:
    return _Kind(f"a list of {plural}", lambda value: isinstance(value, list) and len(value) > 0, each)


_MAPPING = _Kind("keys and values", lambda value: isinstance(value, dict))
_TEXT = _Kind("a text", _is_text)
_FLAG = _Kind("true or false", lambda value: isinstance(value, bool))
_TEXTS = _Kind("a text, or a list of texts", lambda v: all(map(_is_text, v if isinstance(v, list) else [v])))
_SHARE = _Kind("a number from 0.01 to 2", lambda value: _is_number(value) and 0.01 <= value <= 2)
_MEANS = _list_of(_Kind("a number", _is_number), "numbers")
_STDS = _list_of(_Kind("a number above 0", lambda value: _is_number(value) and value > 1e-6), "numbers")
_CLASSES = _whole(0, MOST_CLASSES)
_SIDE = _whole(1, LARGEST_SIDE)
_SIZE = _Kind(
    f"[channels, height, width], whole numbers from 1 to {MOST_CHANNELS:,} and {LARGEST_SIDE:,}",
    lambda value: (
        isinstance(value, list)
        and len(value) == 3
        and all(map(_is_whole, value, (1, 1, 1), (MOST_CHANNELS, LARGEST_SIDE, LARGEST_SIDE)))
    ),
)
_SIDES = _Kind(
    f"a whole number from 1 to {LARGEST_SIDE:,}, or two",
    lambda v: _SIDE.fits(v) or (isinstance(v, list) and len(v) == 2 and all(map(_SIDE.fits, v))),
)
_POOL = _list_of(_whole(1, LARGEST_SIDE), "whole numbers")
_LABELS = _Kind("a list of names, or a mapping of them", lambda value: isinstance(value, list | dict))

# What is checked of the file, by key; null is as good as nothing, but for the mappings that timm looks into.
_TOP = {
    "architecture": _TEXT,
    "num_classes": _CLASSES,
    "num_features": _whole(0, 10**9),
    "label_names": _list_of(_TEXT, "class names"),
    "label_descriptions": _MAPPING,
    "class_counts": _list_of(_whole(1, MOST_IMAGES), "numbers of training images"),
    "logit_prior": _one_of(*PRIORS),
    "training_data": _TEXT,
    "origin": _MAPPING,
    "model_args": _MAPPING,
    "pretrained_cfg": _MAPPING,
}
_CFG = {
    **dict.fromkeys(("input_size", "test_input_size", "min_input_size"), _SIZE),
    **dict.fromkeys(("crop_pct", "test_crop_pct"), _SHARE),
    **dict.fromkeys(("pool_size", "test_pool_size"), _POOL),
    **dict.fromkeys(("first_conv", "classifier", "url", "paper_ids", "notes"), _TEXTS),
    **dict.fromkeys(("label_names", "label_descriptions"), _LABELS),
    **dict.fromkeys(("architecture", "tag", "license", "description", "origin_url", "paper_name"), _TEXT),
    **dict.fromkeys(("file", "hf_hub_id", "hf_hub_filename", "source"), _TEXT),
    "interpolation": _one_of("bilinear", "bicubic", "nearest", "box", "hamming", "lanczos"),
    "crop_mode": _one_of("center", "squash", "border"),
    "mean": _MEANS,
    "std": _STDS,
    "num_classes": _CLASSES,
    "label_offset": _CLASSES,
    "fixed_input_size": _FLAG,
    "custom_load": _Kind("true, false or a text", lambda value: isinstance(value, bool | str)),
}
_ARGS = {"num_classes": _CLASSES, "in_chans": _whole(1, MOST_CHANNELS), "img_size": _SIDES}
# Arguments by which timm would build something else than the architecture, or load the weights less strictly.
_RESERVED = {
    *inspect.signature(build_model_with_cfg).parameters,
    *inspect.signature(timm.create_model).parameters,
    *("features_only", "pruned", "device", "dtype"),
} - {"kwargs"}
