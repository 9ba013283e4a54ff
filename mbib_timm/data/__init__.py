"""Data: sources, long-tailed subsets, preprocessing and loaders.

`open_data` finds out what there is, and checks it; `create_loaders` makes batches of it.
"""

from mbib_timm.data.class_counts import count_classes, shot_groups
from mbib_timm.data.create import DataPool, Loaders, build_eval_loader, choose_loader, create_loaders
from mbib_timm.data.images import Split
from mbib_timm.data.loaders import Loader
from mbib_timm.data.sources import SOURCES, open_split
from mbib_timm.data.splits import Splits, open_data

__all__ = [
    "SOURCES",
    "DataPool",
    "Loader",
    "Loaders",
    "Split",
    "Splits",
    "build_eval_loader",
    "choose_loader",
    "count_classes",
    "create_loaders",
    "open_data",
    "open_split",
    "shot_groups",
]
