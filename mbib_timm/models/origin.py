"""Where a run starts, decided here alone from its recipe and the weights that it names; and how that is said."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import timm

from mbib_timm.errors import MbibError
from mbib_timm.files import printable
from mbib_timm.models import pip_weights
from mbib_timm.models.hub import split_repository
from mbib_timm.models.model_config import ModelConfig
from mbib_timm.models.pretraining import PRETRAINING, UNKNOWN, Origin, Weights, data_of_tag, in_order
from mbib_timm.models.weights import Source, find_source
from mbib_timm.models.zoo import DATASETS, ZooModel
from mbib_timm.recipe import Recipe
from mbib_timm.recipe.declared import named_models

# Whose repositories hold timm's own weights, under the names of timm.
TIMM = "timm"
# A tag of our models that hold a backbone: its weights are those of the backbone's tag.
BACKBONE = "backbone_"
# Of timm's lists of ImageNet's classes those that weights are trained on.
IMAGENETS = {"in1k": "imagenet-1k", "in12k": "imagenet-12k", "in21k": "imagenet-21k", "in22k": "imagenet-22k"}
SAME = "the same data"
PREVIOUS = "previous"  # of teachers: the stage before


def starts_from_weights(recipe: Recipe) -> bool:
    """Return whether a recipe starts from weights: its first stage does."""
    return recipe.chain()[0].takes_weights


@dataclass(frozen=True)
class OwnData:
    """What a run is trained on: what was trained on the same has seen no other data.

    Attributes:
        name: its key in the zoo; None where it has none, or for a run that is not of the zoo.
        class_counts: training images of each class; None where they are not known.
        class_names: of the classes, in the same order; None where the data have none.
    """

    name: str | None = None
    class_counts: list[int] | None = None
    class_names: list[str] | None = None

    def is_of(self, config: ModelConfig) -> bool:
        """Return whether a model was trained on these data."""
        if self.name is not None and config.training_data == self.name:
            return True
        if config.class_counts is None or config.class_counts.tolist() != self.class_counts:
            return False
        return (None if config.class_names is None else list(config.class_names)) == self.class_names


def origin_of(recipe: Recipe, own: OwnData, previous: Path | None = None) -> Origin:
    """Return where a run starts: the first stage's start, and the teachers of all stages.

    Args:
        recipe: of the run; of several stages the last.
        own: what it is trained on.
        previous: folder of the stage before, which says where it started.

    Raises:
        MbibError: weights that are not there.
    """
    before = None if previous is None else Source(f"local-dir:{previous}", folder=previous).config.origin
    if before is not None:
        return Origin(before.weights, [*before.teachers, *_teachers(recipe, own)])
    teachers = [each for stage in recipe.chain() for each in _teachers(stage, own)]
    return Origin(_start(recipe.chain()[0], own) if starts_from_weights(recipe) else [], teachers)


def _start(first: Recipe, own: OwnData) -> list[Weights]:
    if first.initial_checkpoint is not None:
        return _of_checkpoint(Path(first.initial_checkpoint), own)
    return _of_model(first.model, first.model_kwargs, own)


def _teachers(stage: Recipe, own: OwnData) -> list[Weights]:
    """Return the teachers of a stage that have seen other data than it has."""
    found = []
    for target in named_models(stage.method):
        if target == PREVIOUS:
            continue
        source = find_source(target)
        steps = _of_source(source, own) if source.has_files else _of_model(target, {}, own)
        found += steps if any(step.data for step in steps) else []
    return found


def _of_checkpoint(path: Path, own: OwnData) -> list[Weights]:
    folder = path if path.is_dir() else path.parent
    if (folder / "config.json").is_file():
        try:
            return _of_source(Source(f"local-dir:{folder}", folder=folder), own)
        except MbibError:  # something else's config.json
            pass
    return [Weights("file", printable(path.name), None, [UNKNOWN])]


def _of_model(name: str, model_kwargs: dict[str, Any], own: OwnData) -> list[Weights]:
    """Return what a model's published weights are, given its name and the arguments that it is created with."""
    if ":" in name:
        return _of_source(find_source(name), own)
    entry = inspect.signature(timm.model_entrypoint(name.partition(".")[0])).parameters
    if "backbone" in entry:  # a name without a backbone of its own, whose weights are the backbone's
        return _of_model(model_kwargs.get("backbone", entry["backbone"].default), {}, own)
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=True)
    tag = (cfg.tag if cfg is not None else None) or ""
    model = ZooModel(f"{name.partition('.')[0]}.{tag}")
    if model.is_trained:
        return _of_source(Source(model.name, folder=model.folder), own)
    repository = (cfg.hf_hub_id if cfg is not None else None) or None
    owner, _, place = (repository or "").partition("/")
    weights = place if owner == TIMM and place else f"{name.partition('.')[0]}.{tag}".rstrip(".")
    data = data_of_tag(tag.removeprefix(BACKBONE))
    if repository == pip_weights.REPOSITORY and pip_weights.packaged_file() is not None:
        return [Weights("package", weights, None, data)]  # perhaps not the same numbers as the repository's
    return [Weights("timm", weights, repository, data)]


def _of_source(source: Source, own: OwnData) -> list[Weights]:
    """Return what the weights of a model with a config.json are: of a run, of the zoo, or of a repository."""
    config = source.config
    repository: str | None
    named = f"{config.architecture}.{config.tag}".removesuffix(".None")
    if source.repository is not None:
        repository, _ = split_repository(source.repository)
        owner, _, place = repository.partition("/")
        if owner == TIMM:
            return [Weights("timm", place, repository, data_of_tag(place.partition(".")[2]))]
        kind, name = "hub", repository
    else:
        published = source.name == source.folder.name if source.folder is not None else False
        repository = ZooModel(named).repository if published else None
        kind, name = "run", printable(named)
    if config.origin is None or config.training_data is None:  # another program's
        return [Weights(kind, name, repository, [UNKNOWN])]
    data = [] if own.is_of(config) else [config.training_data]
    before = config.origin
    return [*before.weights, *before.teachers, Weights(kind, name, repository, data)]


# How it is said


def data_title(name: str) -> str:
    """Return what people call data, by its key in the zoo or in `PRETRAINING`, or as a recipe has it."""
    if name == UNKNOWN:
        return "data that are not known"
    return DATASETS[name].title if name in DATASETS else PRETRAINING.get(name, f"other data ({printable(name)})")


def data_text(data: Sequence[str]) -> str:
    """Return data in the order of training: ``LAION-2B, then ImageNet-1k``."""
    return ", then ".join(map(data_title, data))


def origin_text(origin: Origin) -> str:
    """Return where a run started in a few words, for a cell or a line: ``resnet50.a1_in1k (ImageNet-1k)``.

    Of weights that were trained on the run's own data after others it says so: ``(ImageNet-1k, then the same data)``.
    """
    if origin.is_scratch:
        return "from scratch"
    seen = [title for step in origin.weights for title in (map(data_title, step.data) if step.data else [SAME])]
    seen += [data_title(name) for teacher in origin.teachers for name in teacher.data]
    return f"{start_name(origin)} ({', then '.join(in_order(seen))})"


def start_name(origin: Origin) -> str:
    """Return the name of the weights that a run which is not from scratch started from, and those of its teachers."""
    said = [printable(weights.name) for weights in origin.weights[-1:]]
    if origin.teachers:
        said.append(f"teacher {', '.join(printable(each.name) for each in origin.teachers)}")
    return ", ".join(said)


def overlap_text(data: Sequence[str], dataset: str, class_names: Sequence[str] | None) -> str:
    """Return what is known of whether the classes of a run were in what its weights were trained on, in sentences.

    Args:
        data: that the weights were trained on.
        dataset: of the run: its key in the zoo, or the recipe's.
        class_names: of the run's classes; None where they are not known.
    """
    said = []
    distinct = list(dict.fromkeys(data))
    imagenets = [name for name in distinct if name in IMAGENETS]
    if dataset == "imagenet_lt" and imagenets:
        shared, total = _shared_classes(imagenets[-1])
        seen = f", and {data_title(imagenets[-1])} has {shared:,} of its {total:,} classes"
        if "in1k" in imagenets:
            seen = ", and the pretraining has seen all training images of that"
        said.append(
            f"ImageNet-LT is a subset of ImageNet-1k{seen}: the classes that are rare here were not rare in the "
            "pretraining. This is not a result of long-tailed learning."
        )
        distinct = [name for name in distinct if name not in IMAGENETS]
    counted = False
    for name in distinct:
        title, known = data_title(name), _class_names(name)
        if name == UNKNOWN:
            said.append("What the weights have seen is not known in full, and so whether these classes were among it.")
        elif not known or class_names is None:
            said.append(f"How many images of these classes are in {title} is not known; check it.")
        else:
            common, counted = sum(_plain(each) in known for each in class_names), True
            one = common == 1
            said.append(
                f"{common:,} of the {len(class_names):,} class names also occur{'s' if one else ''} in {title}."
            )
    if counted:
        said.append("The same name may mean different things, and the same thing may have different names.")
    if imagenets == ["in1k"] and dataset.startswith(("cifar100_lt", "torch/cifar100")):
        said.append(
            "95 of CIFAR-100's class names also occur in ImageNet-22k, of which ImageNet-1k is a part: the "
            "pretraining may have seen many images of what is rare here."
        )
    if imagenets and dataset.startswith("inat2018"):
        said.append(
            "ImageNet has classes of animals and plants, some of them species; how many are iNaturalist's is not "
            "counted here."
        )
    return " ".join(said)


@cache
def _class_names(name: str) -> frozenset[str]:
    """Return the names of data's classes, with their synonyms; none where they are not known."""
    if name in DATASETS:
        return frozenset(map(_plain, DATASETS[name].class_names))
    if name not in IMAGENETS:
        return frozenset()
    from timm.data import ImageNetInfo

    info = ImageNetInfo(IMAGENETS[name])
    described = (info.index_to_description(label) for label in range(info.num_classes()))
    return frozenset(_plain(each) for synonyms in described for each in synonyms.split(","))


def _shared_classes(name: str) -> tuple[int, int]:
    """Return how many of ImageNet-1k's classes another ImageNet has, and how many there are."""
    from timm.data import ImageNetInfo

    own, other = (
        {info.index_to_label_name(i) for i in range(info.num_classes())}
        for info in map(ImageNetInfo, ("imagenet-1k", IMAGENETS[name]))
    )
    return len(own & other), len(own)


def _plain(name: str) -> str:
    """Return a class's name as names are compared: ``maple_tree`` is ``Maple tree``."""
    return " ".join(name.replace("_", " ").replace("-", " ").lower().split())
