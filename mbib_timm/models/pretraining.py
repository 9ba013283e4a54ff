"""What trained weights have seen: the data that timm's tags name, and the origin of a run as its record keeps it."""

from collections.abc import Iterable
from dataclasses import dataclass, field

UNKNOWN = "unknown"
# Data that weights are trained on, by the name that timm's tags have for them.
PRETRAINING = {
    "in1k": "ImageNet-1k",
    "in12k": "ImageNet-12k",
    "in21k": "ImageNet-21k",
    "inw21k": "ImageNet-21k of winter 2021",
    "in22k": "ImageNet-22k",
    "inat21": "iNaturalist 2021",
    "openai": "OpenAI's 400 million image-text pairs (CLIP, WIT)",
    "laion400m": "LAION-400M",
    "laion2b": "LAION-2B",
    "laiona": "LAION-Aesthetics",
    "datacomp1b": "DataComp-1B",
    "datacompxl": "DataComp XL",
    "dfn2b": "DFN-2B",
    "dfn5b": "DFN-5B",
    "dfndr2b": "DFNDR-2B",
    "merged2b": "Merged-2B",
    "m30m": "Merged-30M",
    "m38m": "Merged-38M",
    "metaclip": "MetaCLIP's image-text pairs",
    "metaclip2": "MetaCLIP 2's image-text pairs",
    "webli": "WebLI",
    "cc12m": "CC12M",
    "yfcc15m": "YFCC-15M",
    "yfcc100m": "YFCC-100M",
    "ig1b": "one billion Instagram images with hashtags",
    "swag": "3.6 billion Instagram images with hashtags (SWAG)",
    "seer": "one billion public Instagram images (SEER)",
    "jft": "JFT-300M",
    "lvd142m": "LVD-142M",
    "lvd1689m": "LVD-1689M",
    "sat493m": "SAT-493M",
    "sa1b": "SA-1B",
    "bamboo": "Bamboo",
}
# Other words of tags that stand for data; the self-supervised weights of timm under these names are ImageNet-1k's.
_ALSO = {"mae": "in1k", "fcmae": "in1k", "dino": "in1k", "merged38m": "m38m"}
# Words that say that weights have seen something before; where the tag does not say what, it is unknown.
_AFTER = ("ft", "lc", "ssld")


def data_of_tag(tag: str) -> list[str]:
    """Return the data that a tag of timm's names, in the order of training: keys of `PRETRAINING`, or `UNKNOWN`.

    ``laion2b_ft_in12k_in1k`` gives laion2b, in12k, in1k; ``clip_ft_in1k`` something unknown, then in1k. What a teacher
    of distilled weights has seen no tag says.
    """
    found: list[str] = []
    for word in tag.split("_"):
        if word in _AFTER and not found:
            found.append(UNKNOWN)
        name = _ALSO.get(word, word)
        if name in PRETRAINING:
            found.append(name)
    return in_order(found) or [UNKNOWN]


def in_order(data: Iterable[str]) -> list[str]:
    """Return names of data without those that follow themselves."""
    kept: list[str] = []
    for name in data:
        if kept[-1:] != [name]:
            kept.append(name)
    return kept


@dataclass(frozen=True)
class Weights:
    """Weights that a run, or the run before it, started from.

    Attributes:
        source: ``timm``; ``package`` (installed by pip); ``run`` (of this package: a folder, or one of the zoo);
            ``hub`` (anybody's repository); ``file``; or `UNKNOWN`.
        name: ``arch.tag``, or that of a repository or a file, without its folder.
        repository: on the Hub; None where there is none.
        data: what they were trained on, in order, beyond what they started from themselves: keys of `PRETRAINING` or of
            the zoo's data sets, names of a recipe's `dataset`, or `UNKNOWN`. Empty where it was the run's own data.
    """

    source: str
    name: str
    repository: str | None
    data: list[str]


@dataclass(frozen=True)
class Origin:
    """Where a run started. It is in the run's record, and in the config.json that follows the model.

    Attributes:
        weights: that its first stage started from, with those that these started from before them; empty for a run from
            scratch.
        teachers: models trained on other data that it learnt from.
    """

    weights: list[Weights] = field(default_factory=list)
    teachers: list[Weights] = field(default_factory=list)

    @property
    def is_scratch(self) -> bool:
        """True if all that the run has learnt is from its own training."""
        return not self.weights and not self.teachers

    @property
    def data(self) -> list[str]:
        """What was seen beside the run's own data, in order."""
        return in_order(name for each in (*self.weights, *self.teachers) for name in each.data)

    @property
    def base_model(self) -> str | None:
        """The repository on the Hub of the nearest weights that have one."""
        return next((each.repository for each in reversed(self.weights) if each.repository), None)


# Of a record that does not say it.
NOT_RECORDED = Origin([Weights(UNKNOWN, UNKNOWN, None, [UNKNOWN])])
