"""The zoo: which models are published, on which data, and where their weights are.

A published model's name is `arch.tag`, and so is the name of its recipe, its run's folder, its card and its Hub
repository; the tag says the data, and for a plain network the method before it. Once it is trained,
`mbib_timm/zoo/<arch.tag>/` holds what the repository holds: config.json, recipe.yaml and metrics.json, and small
weights as well.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import timm
from timm.models import build_model_with_cfg
from timm.models._builder import resolve_pretrained_cfg
from timm.models._pretrained import PretrainedCfg

from mbib_timm.errors import CheckpointError

# The Hub organisation of all repositories.
ORGANIZATION = "mbib-timm"


class Dataset(NamedTuple):
    """What a published model is trained on.

    Attributes:
        title: as people call it.
        num_classes: classes K.
        licence: of the images, in a sentence.
        preprocessing: entries of a timm cfg, where they are not those of the backbone.
    """

    title: str
    num_classes: int
    licence: str
    preprocessing: Mapping[str, Any] = MappingProxyType({})


_CIFAR_TERMS = "CIFAR-100 (Krizhevsky 2009) is a subset of the 80 million tiny images, and came without a licence."
_IMAGENET_TERMS = "ImageNet's images are for non-commercial research and education, by its terms of access."
_INAT_TERMS = "The iNaturalist 2018 images are under their photographers' licences, for non-commercial use."
_NO_SOURCE = dict(hf_hub_id=None, url=None, file=None, paper_ids=None, paper_name=None, origin_url=None)
_CENTER_224 = dict(crop_pct=0.875, interpolation="bilinear", test_input_size=None, test_crop_pct=None)
_INAT = dict(_CENTER_224, mean=(0.466, 0.471, 0.380), std=(0.195, 0.194, 0.192))

_CIFAR100_LT = ("cifar100_lt_if100", "cifar100_lt_if50", "cifar100_lt_if10")
_INAT2018 = ("inat2018_200e", "inat2018_90e")

# By what a tag ends in, which is the recipe's folder.
DATASETS = {
    "cifar100_lt_if100": Dataset("CIFAR-100-LT, imbalance factor 100", 100, _CIFAR_TERMS),
    "cifar100_lt_if50": Dataset("CIFAR-100-LT, imbalance factor 50", 100, _CIFAR_TERMS),
    "cifar100_lt_if10": Dataset("CIFAR-100-LT, imbalance factor 10", 100, _CIFAR_TERMS),
    "imagenet_lt": Dataset("ImageNet-LT", 1000, _IMAGENET_TERMS, _CENTER_224),
    "inat2018_200e": Dataset("iNaturalist 2018, 200 epochs", 8142, _INAT_TERMS, _INAT),
    "inat2018_90e": Dataset("iNaturalist 2018, 90 epochs", 8142, _INAT_TERMS, _INAT),
}

# The methods that a plain network is published with, and the arguments of the network where a method has its own.
# LDAM's loss has the scale, so its classifier takes none (METHODS 2.4).
_METHODS: dict[str, dict[str, Any]] = {
    "ce": {},
    "focal": {},
    "bsce": {},
    "ldam_drw": {"classifier": "cosine", "classifier_scale": 1.0},
    "crt": {},
    "tau_norm": {},
}

# What each registered model is published for, one tag per recipe of the paper's; the first is its default.
PUBLISHED = {
    "mbib_resnet32": _CIFAR100_LT,
    "bib_resnet32": _CIFAR100_LT,
    "cifar_resnet32": tuple(f"{method}_{dataset}" for method in _METHODS for dataset in _CIFAR100_LT),
    "mbib_resnet10": ("imagenet_lt",),
    "bib_resnet10": ("imagenet_lt",),
    "mbib_resnext50": ("imagenet_lt",),
    "bib_resnext50": ("imagenet_lt",),
    "mbib_resnet50": _INAT2018,
    "bib_resnet50": _INAT2018,
}


@dataclass(frozen=True)
class ZooModel:
    """A published name, whether or not its weights exist yet.

    Attributes:
        name: ``arch.tag``.
    """

    name: str

    @property
    def architecture(self) -> str:
        """The registered name that builds it."""
        return self.name.partition(".")[0]

    @property
    def tag(self) -> str:
        """The method, where the architecture does not say it, the data set and the schedule."""
        return self.name.partition(".")[2]

    @property
    def _dataset(self) -> str:
        (name,) = (name for name in DATASETS if self.tag == name or self.tag.endswith(f"_{name}"))
        return name

    @property
    def dataset(self) -> Dataset:
        """What it is trained on."""
        return DATASETS[self._dataset]

    @property
    def model_args(self) -> dict[str, Any]:
        """Keyword arguments of the architecture, where the method has a network of its own."""
        return dict(_METHODS.get(self.tag.removesuffix(self._dataset).rstrip("_"), {}))

    @property
    def recipe(self) -> str:
        """Name of the recipe that trains it."""
        return self.name

    @property
    def repository(self) -> str:
        """Its Hub repository."""
        return f"{ORGANIZATION}/{self.name}"

    @property
    def folder(self) -> Path:
        """Where the package keeps what is known of it."""
        return Path(__file__).parents[1] / "zoo" / self.name

    @property
    def is_trained(self) -> bool:
        """True if its weights exist, here or on the Hub."""
        return (self.folder / "metrics.json").is_file()

    @property
    def weights(self) -> Path | None:
        """The weights' file in the package; None where they are on the Hub, or nowhere."""
        file = self.folder / "model.safetensors"
        return file if self.is_trained and file.is_file() else None

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """The ``metrics.json`` of the run that the weights come from."""
        content: dict[str, Any] = json.loads((self.folder / "metrics.json").read_text(encoding="utf-8"))
        return content

    def source(self) -> dict[str, Any]:
        """Return the entries of a timm cfg that say where the weights are; none of them where there are no weights."""
        if self.weights is not None:
            return {"file": str(self.weights)}
        return {"hf_hub_id": self.repository} if self.is_trained else {}


# Every published name, whether or not its weights exist yet.
ZOO = [ZooModel(f"{architecture}.{tag}") for architecture, tags in PUBLISHED.items() for tag in tags]


def published_cfgs(architecture: str, cfg: PretrainedCfg) -> dict[str, PretrainedCfg]:
    """Return the cfgs of a registered model's published weights, by `arch.tag`; its default is starred, and last.

    Args:
        architecture: the registered name.
        cfg: of the model on ImageNet's classes or CIFAR's, with its keys.
    """
    cfgs = {}
    for tag in reversed(PUBLISHED.get(architecture, ())):
        model = ZooModel(f"{architecture}.{tag}")
        entries = {**_NO_SOURCE, "num_classes": model.dataset.num_classes, **model.dataset.preprocessing}
        # timm takes the first tag with weights for the default, unless a star says which it is.
        star = "*" if tag == PUBLISHED[architecture][0] else ""
        cfgs[model.name + star] = dataclasses.replace(cfg, **{**entries, **model.source()})
    return cfgs


def create_published(build: Callable[..., Any], architecture: str, pretrained: bool, **kwargs: Any) -> Any:
    """Build a registered model under its tag: with the network of the tag's method, and only with weights that exist.

    Args:
        build: the model's class.
        architecture: the registered name.
        pretrained: load the weights.
        kwargs: what timm gave the entry point, and further arguments of timm's `build_model_with_cfg`.

    Raises:
        CheckpointError: `pretrained`, where there are no weights.
    """
    cfg = resolve_pretrained_cfg(architecture, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    if pretrained:
        _require_weights(architecture, cfg)
    model_args: dict[str, Any] = {}
    if cfg.tag in PUBLISHED.get(architecture, ()):
        model_args = ZooModel(f"{architecture}.{cfg.tag}").model_args
    if kwargs.get("classifier", model_args.get("classifier")) != model_args.get("classifier"):
        model_args = {}
    model = build_model_with_cfg(build, architecture, pretrained, **{**model_args, **kwargs})
    model._model_args = model_args  # timm adds the caller's own; together they go into config.json
    return model


def _require_weights(architecture: str, cfg: PretrainedCfg) -> None:
    """Raise CheckpointError where a cfg of a registered model has no weights."""
    if cfg.has_weights or cfg.state_dict is not None:
        return
    others = [other for other in timm.list_pretrained(f"{architecture}.*") if other != architecture]
    instead = f"; there are weights for {', '.join(others)}" if others else ""
    if cfg.tag not in PUBLISHED.get(architecture, ()):
        raise CheckpointError(f"{architecture} has no weights of its own{instead}")
    model = ZooModel(f"{architecture}.{cfg.tag}")
    raise CheckpointError(f"no weights for {model.name}; train with `mbib train {model.recipe}`{instead}")
