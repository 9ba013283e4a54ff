"""What a run's name says: the architecture, then behind the dot the method, where the architecture does not say it, and
the data."""

import re

from mbib_timm.methods import METHODS


def data_of(name: str) -> str:
    """Return what the name of a recipe or of a run says of its data; empty where it says nothing.

    ``cifar100_lt_if100`` of ``cifar_resnet32.bsce_cifar100_lt_if100``; of a sweep's recipe what all runs share:
    ``cifar100_lt`` of ``{method}cifar100_lt_if{imbalance_factor}``.
    """
    folder, _, last = name.rpartition("/")
    fixed = re.sub(r"_?[a-z]*{.*?}", "", last.removesuffix(".yaml"))
    if "." not in fixed and "{" not in last:
        return folder.rpartition("/")[2]
    tag = fixed.partition(".")[2] if "." in fixed else fixed
    methods = [method for method in METHODS if tag.startswith(f"{method}_")]
    return tag.removeprefix(f"{max(methods, key=len)}_") if methods else tag
