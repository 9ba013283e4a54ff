"""Data: sources, long-tailed subsets, preprocessing and loaders.

`open_data` finds out what there is, and checks it; `create_loaders` makes batches of it for a run, and `create_passes`
for a method that looks at images once training is done.
"""

from mbib_timm.data.batch import Batch
from mbib_timm.data.class_counts import count_classes, shot_groups
from mbib_timm.data.create import (
    DataPool,
    Loaders,
    Passes,
    build_eval_loader,
    build_views_loader,
    choose_loader,
    create_loaders,
    create_passes,
)
from mbib_timm.data.images import Split
from mbib_timm.data.loaders import Loader, TrainLoader
from mbib_timm.data.samplers import SAMPLERS, check_sampler, class_probabilities, parse_sampler, sampler
from mbib_timm.data.sources import SOURCES, open_split
from mbib_timm.data.splits import Splits, open_data

__all__ = [
    "SAMPLERS",
    "SOURCES",
    "Batch",
    "DataPool",
    "Loader",
    "Loaders",
    "Passes",
    "Split",
    "Splits",
    "TrainLoader",
    "build_eval_loader",
    "build_views_loader",
    "check_sampler",
    "choose_loader",
    "class_probabilities",
    "count_classes",
    "create_loaders",
    "create_passes",
    "open_data",
    "open_split",
    "parse_sampler",
    "sampler",
    "shot_groups",
]
