"""Data: sources, long-tailed subsets, preprocessing and loaders.

`open_data` finds out what there is, and checks it; `create_loaders` makes batches of it for a run, and `Passes` for a
method that looks at images before or after training. A file imports from those above it only:

    batch                   what a loader gives
    paths, archives         paths of millions of images; tars, and the images in them
    images                  splits of images with labels, their readers
    long_tail, groups       class counts, shot groups, long-tailed subsets, images held out; images that stay together
    folders, image_tables   image folders and archives; CSV and Parquet
    lists, shards           list files, iNaturalist's json; WebDataset shards
    sources, splits         every source by name, and its splits; the data of a run, opened and checked
    overview                what the data are, in lines
    samplers                what an epoch sees, in which order
    class_values            files of a number for each class; what a class weighs in a loss
    pixels, policies        operations on the pixels of batches; policies that draw operations
    transforms              preprocessing and augmentation of single images
    decoding                resident images: decoded, cached on the disk, measured against the memory
    crops, augment          augmentation of resident images in batches
    mixing                  mixup, CutMix, label smoothing: soft targets
    loaders, features       the resident loader and timm's; features of a frozen backbone, kept on the disk
    create                  which loader a run takes; data and images that runs share
"""

from mbib_timm.data.batch import Batch, Loader, TrainLoader
from mbib_timm.data.create import (
    DataPool,
    Loaders,
    Passes,
    build_views_loader,
    choose_loader,
    create_loaders,
)
from mbib_timm.data.images import Split
from mbib_timm.data.long_tail import count_classes, shot_groups
from mbib_timm.data.overview import left_out, summary, unread_classes
from mbib_timm.data.samplers import SAMPLERS, check_sampler, class_probabilities, parse_sampler, sampler
from mbib_timm.data.sources import SOURCES, Source, open_split
from mbib_timm.data.splits import Splits, match_classes, missing_classes, open_data

__all__ = [
    "SAMPLERS",
    "SOURCES",
    "Batch",
    "DataPool",
    "Loader",
    "Loaders",
    "Passes",
    "Source",
    "Split",
    "Splits",
    "TrainLoader",
    "build_views_loader",
    "check_sampler",
    "choose_loader",
    "class_probabilities",
    "count_classes",
    "create_loaders",
    "left_out",
    "match_classes",
    "missing_classes",
    "open_data",
    "open_split",
    "parse_sampler",
    "sampler",
    "shot_groups",
    "summary",
    "unread_classes",
]
