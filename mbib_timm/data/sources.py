"""Data sources, found by name, and the splits that they have or that are made of them.

Here are the digits that come with the package, torchvision's CIFAR and Fashion-MNIST, list files and Hugging Face data
sets; folders, tables and shards have files of their own.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
from PIL import Image
from timm.data import create_reader
from torchvision import datasets

from mbib_timm.data.folders import ALL, SYNONYMS, OwnSplits, has_images, open_folder, unasked
from mbib_timm.data.groups import hold_out_groups, require_groups
from mbib_timm.data.image_tables import open_table
from mbib_timm.data.images import ArrayReader, Split, TimmReader, unreadable
from mbib_timm.data.lists import CONTROL, has_listed, open_inaturalist, open_list
from mbib_timm.data.long_tail import count_classes, hold_out, left_out_indices, long_tailed_counts
from mbib_timm.data.shards import has_shards, open_shards
from mbib_timm.errors import DataError, first_line
from mbib_timm.files import printable
from mbib_timm.recipe import DATA_PLACES, Recipe, train_command
from mbib_timm.registry import Registry

DIGITS = Path(__file__).with_name("digits.npz")
TEST_IMAGES_PER_CLASS = 34
DIGIT_SIZE = 16
HFDS_PREFIX = "hfds/"
# The split of training images that a long-tailed subset leaves out, to choose settings on; and its images per class.
LEFT_OUT, MOST_LEFT_OUT = "left_out", 50
OF_LEFT_OUT = "that the long-tailed subset leaves out"
# What data without splits have none of; and what is said where a recipe calls the validation split so.
TEST = "test"
NO_TEST = "the data have no test split of their own, and this is their validation split"
# Reasons for which images and classes are left out.
UNREADABLE = "images that cannot be read"
NO_READABLE = "classes without an image that can be read"
# All images at once, of data that have no splits; else what opens a split by name.
Opened = Split | Callable[[str], Split]
# Under which torchvision keeps its data below data_dir.
TORCHVISION_FOLDERS = {
    "torch/cifar10": datasets.CIFAR10.base_folder,
    "torch/cifar100": datasets.CIFAR100.base_folder,
    "torch/fashion_mnist": datasets.FashionMNIST.__name__,
}
SOURCES: Registry[Callable[[Recipe], Opened]] = Registry("data source")


class Source:
    """A recipe's data, of which each split is opened by name. What is scanned, and split, is so once.

    Data without splits are split here: a share of each class, or of whole groups, is held out for validation by
    `subset_seed`, and a split named ``all`` has every image. There is no test split, unless the recipe names one. Of a
    recipe with a long-tailed subset the split ``left_out`` has up to 50 images per class of those that the subset
    leaves out: settings can be chosen on them without a look at test images.

    Args:
        recipe: names source and place.

    Raises:
        MbibError: an unknown source.
        DataError: data that are missing or malformed.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        for key in DATA_PLACES:
            if CONTROL.search(getattr(recipe, key) or ""):
                # Records, caches and tables could not name it.
                raise DataError(f"recipe key {key!r}: {getattr(recipe, key)!r} is not UTF-8; rename it")
        name = "hfds/NAME" if recipe.dataset.startswith(HFDS_PREFIX) else recipe.dataset
        self._opened = SOURCES[name](recipe)
        self._splits: dict[tuple[str, ...], list[Split]] = {}

    @property
    def has_splits(self) -> bool:
        """Whether the data have splits of their own."""
        return not isinstance(self._opened, Split)

    def others(self, names: Collection[str]) -> list[str]:
        """Return the names of the data's own splits beside some, where the source is folders or a table."""
        return list(unasked(self._opened.places, names)) if isinstance(self._opened, OwnSplits) else []

    @cached_property
    def _whole(self) -> Split:
        assert isinstance(self._opened, Split)
        (whole,) = usable([replace(self._opened, called=ALL)], self.recipe)
        return whole

    @cached_property
    def _held_out(self) -> np.ndarray:
        """Which images are held out, (N,), bool."""
        recipe, whole = self.recipe, self._whole
        generator = np.random.RandomState(recipe.subset_seed)
        if whole.groups is None:
            held_out = hold_out(whole.targets, recipe.val_fraction, generator)
            if not held_out.any() and whole.targets.max() > 0:  # a single class is an error of its own
                raise DataError(
                    f"{recipe.table or recipe.data_dir}: every class has one image, which training needs, and none can "
                    "be held out for evaluation; add images, or make splits train and val"
                )
            return held_out
        require_groups(recipe, whole.groups, whole.path(0))
        held_out = hold_out_groups(whole.targets, whole.groups, recipe.val_fraction, generator)
        if not held_out.any():
            raise DataError(
                f"recipe key 'group_by': with {recipe.group_by} nothing can be held out, because every group holds a "
                "class that no other group has; make the groups smaller"
            )
        return held_out

    def splits(self, names: Sequence[str]) -> list[Split]:
        """Open splits by name.

        Raises:
            DataError: no such split, data that are malformed, or images that cannot be read where the recipe says
                ``broken: stop``; of all these splits at once.
        """
        if LEFT_OUT in names:
            return self._with_left_out(names)
        if isinstance(self._opened, Split):
            return [self._part(name) for name in names]
        if tuple(names) not in self._splits:
            opened = [(name, self._opened(name)) for name in names]
            named = [replace(split, called=split.called or name) for name, split in opened]
            self._splits[tuple(names)] = usable(named, self.recipe)
        return self._splits[tuple(names)]

    def _with_left_out(self, names: Sequence[str]) -> list[Split]:
        """Open splits of which one is `LEFT_OUT`. Raises DataError where no image is left out."""
        recipe = self.recipe
        if recipe.imbalance == "none":
            raise DataError(
                f"split {LEFT_OUT!r} is what a long-tailed subset leaves out of training, and the recipe has no such "
                "subset (imbalance: none)"
            )
        others = list(dict.fromkeys([recipe.train_split, *(name for name in names if name != LEFT_OUT)]))
        opened = dict(zip(others, self.splits(others), strict=True))
        train = opened[recipe.train_split]
        counts = long_tailed_counts(
            recipe, count_classes(train.targets, int(train.targets.max()) + 1), train.class_names
        )
        chosen = left_out_indices(train.targets, counts, recipe.subset_seed, MOST_LEFT_OUT)
        if not len(chosen):
            raise DataError(
                f"split {LEFT_OUT!r}: with imbalance factor {recipe.imbalance_factor:g} every image is trained on"
            )
        said = f"up to {MOST_LEFT_OUT} of each class {OF_LEFT_OUT} of split {recipe.train_split!r}"
        opened[LEFT_OUT] = replace(train.subset(chosen, said), called=LEFT_OUT)
        return [opened[name] for name in names]

    def _part(self, name: str) -> Split:
        recipe = self.recipe
        if name == ALL or (name == recipe.train_split and recipe.split_names[1:] == [LEFT_OUT]):
            return replace(self._whole, called=name)
        training = name in (recipe.train_split, *SYNONYMS["train"])
        # Whoever asks for a test split does not mean what has been looked at during training.
        synonyms = set(SYNONYMS["validation"]) - {TEST}
        if not training and name not in (recipe.val_split, recipe.test_split, *synonyms):
            raise DataError(
                f"there is no split {name!r}: the data have none of their own, and are split into {recipe.train_split} "
                f"and {recipe.val_split}; {ALL} has every image"
            )
        chosen = f"{100 * recipe.val_fraction:g} % of each class, drawn with seed {recipe.subset_seed}"
        if recipe.group_by is not None:
            chosen = f"about {chosen}, in whole groups by {recipe.group_by}"
        if name == recipe.val_split == TEST:  # as in recipes for data that have one
            chosen = f"{chosen}; {NO_TEST}"
        kept = np.flatnonzero(~self._held_out if training else self._held_out)
        return replace(self._whole.subset(kept, f"all but {chosen}" if training else chosen), called=name)


def usable(splits: Sequence[Split], recipe: Recipe) -> list[Split]:
    """Return splits without their unreadable images, where the recipe wants those found beforehand.

    A class without readable images is left out of a split's classes.

    Raises:
        DataError: unreadable images where the recipe says ``broken: stop``; names all of them.
    """
    if recipe.broken == "replace":
        return list(splits)
    found = [unreadable(split, recipe.workers) for split in splits]
    if recipe.broken == "stop" and any(found):
        named = [f"{split.path(i)}: {why}" for split, bad in zip(splits, found, strict=True) for i, why in bad.items()]
        first = f"{UNREADABLE}: {len(named):,}; --broken skip leaves them out"
        raise DataError("\n  ".join([first, *map(printable, named)]))
    return [without(split, bad) for split, bad in zip(splits, found, strict=True)]


def without(split: Split, bad: Mapping[int, str]) -> Split:
    """Return a split without the images at some places, of which it is known why. Raises DataError if none is left."""
    if not bad:
        return split
    if len(bad) == len(split):
        place, why = next(iter(bad.items()))
        raise DataError(
            f"none of the {len(split):,} images {split.said} can be read; the first is {split.path(place)}: {why}"
        )
    kept = replace(split.subset(np.setdiff1d(np.arange(len(split)), list(bad))), missing="")
    left_out = {**split.left_out, UNREADABLE: tuple(f"{split.path(place)}: {why}" for place, why in bad.items())}
    if split.class_names is None:
        return replace(kept, left_out=left_out)
    gone = np.setdiff1d(split.targets, kept.targets)
    if len(gone):
        # Classes that this split has had no images of keep their place: other splits may have them. By number, as two
        # classes may have one name.
        left = np.setdiff1d(np.arange(len(split.class_names)), gone)
        names = tuple(split.class_names[label] for label in left)
        kept = replace(kept, targets=np.searchsorted(left, kept.targets).astype(np.int64), class_names=names)
        left_out[NO_READABLE] = tuple(split.class_names[label] for label in gone)
    return replace(kept, left_out=left_out)


def is_image_folder(recipe: Recipe) -> bool:
    """Return whether `data_dir` is of images in files that the recipe's source would not read.

    It is one that holds images, or an archive, where the source is the digits or torchvision's and its data are not
    there; or a folder that holds images but no shards, or none of those that the recipe's lists name.
    """
    if recipe.data_dir is None:
        return False
    place, own = Path(recipe.data_dir), {"digits": None, **TORCHVISION_FOLDERS}
    if recipe.dataset in own:
        folder = own[recipe.dataset]
        return not (folder is not None and (place / folder).exists()) and has_images(place)
    if recipe.dataset == "wds":
        return place.is_dir() and not has_shards(place) and has_images(place)
    if recipe.dataset == "list":
        lists = filter(None, (recipe.train_list, recipe.val_list, recipe.test_list))
        return place.is_dir() and not any(has_listed(each, recipe.data_dir) for each in lists) and has_images(place)
    return False


def open_split(recipe: Recipe, split: str) -> Split:
    """Open one split of the recipe's data, see `Source`.

    Args:
        recipe: names source and place.
        split: name of the split.

    Raises:
        MbibError: an unknown source.
        DataError: data that are missing or malformed.
    """
    return Source(recipe).splits([split])[0]


@SOURCES.register("digits")
def _digits(recipe: Recipe) -> Opened:
    if recipe.data_dir is not None:
        raise DataError(
            f"the digits come with scikit-learn, and data_dir {recipe.data_dir} would have no effect; images of your "
            f"own train with: {train_command(recipe.data_dir)}"
        )
    return open_digits


@SOURCES.register("folder")
def _folder(recipe: Recipe) -> Opened:
    names = (recipe.train_split, recipe.val_split, recipe.test_split or "test")
    return open_folder(recipe.data_dir, names, recipe.group_by)


SOURCES.register("table")(open_table)


@SOURCES.register("wds")
def _shards(recipe: Recipe) -> Opened:
    names = (recipe.train_split, recipe.val_split, recipe.test_split or "test")
    return open_shards(recipe.data_dir, names, recipe.class_map, recipe.workers)


def _list_of(recipe: Recipe, split: str) -> tuple[str | None, str]:
    """Return a split's list file, and the recipe key that gives it."""
    lists = {
        recipe.test_split or "test": (recipe.test_list, "test_list"),
        recipe.val_split: (recipe.val_list, "val_list"),
        recipe.train_split: (recipe.train_list, "train_list"),
    }
    if split not in lists:
        raise DataError(f"there is no list of split {split!r}: the recipe names {', '.join(reversed(lists))}")
    return lists[split]


@SOURCES.register("list")
def _list(recipe: Recipe) -> Opened:
    def opened(split: str) -> Split:
        file, key = _list_of(recipe, split)
        return open_list(file, recipe.data_dir, key, recipe.class_map)

    return opened


@SOURCES.register("inat2018")
def _inat2018(recipe: Recipe) -> Opened:
    def opened(split: str) -> Split:
        file, key = _list_of(recipe, split)
        return open_inaturalist(file, recipe.data_dir, key)

    return opened


def _open_torchvision(kind: Callable[..., Any], recipe: Recipe, split: str) -> Split:
    name = kind.__name__
    if split not in ("train", "test", "validation"):
        raise DataError(f"{name} has the splits train and test, not {split!r}")
    root = Path(recipe.data_dir or "data")
    if recipe.data_dir is not None and is_image_folder(recipe) and has_images(root, folders=True):
        # Before a download puts other images beside them, which would train without a word.
        raise DataError(
            f"data_dir {root} holds class folders with images, and no {name}, which would need a folder of its own; "
            f"images of your own train with: {train_command(recipe.data_dir)}"
        )
    try:
        found = kind(str(root), train=split == "train", download=recipe.dataset_download)
    except (RuntimeError, OSError) as error:
        if isinstance(error, URLError) or first_line(error).startswith("Error downloading"):
            raise DataError(
                f"{name} cannot be downloaded (is there a network?): put it into {root}; images of your own train "
                f"with: {train_command('FOLDER')}"
            ) from None
        reason = first_line(error) if recipe.dataset_download else "missing or damaged; --dataset-download fetches it"
        raise DataError(f"cannot open {name} under {root}: {reason}") from None
    return Split(ArrayReader(np.asarray(found.data), name), np.array(found.targets), class_names=tuple(found.classes))


SOURCES.register("torch/cifar10")(partial(partial, _open_torchvision, datasets.CIFAR10))
SOURCES.register("torch/cifar100")(partial(partial, _open_torchvision, datasets.CIFAR100))
SOURCES.register("torch/fashion_mnist")(partial(partial, _open_torchvision, datasets.FashionMNIST))


@SOURCES.register("hfds/NAME")
def _hugging_face(recipe: Recipe) -> Opened:
    return partial(_open_hugging_face, recipe)


def _open_hugging_face(recipe: Recipe, split: str) -> Split:
    try:
        reader: Any = create_reader(recipe.dataset, root=recipe.data_dir, split=split)
    except ImportError:
        raise DataError("hfds/ needs Hugging Face datasets: pip install 'mbib-timm[hfds]'") from None
    except Exception as error:  # whatever the library makes of a name, a folder or an answer
        raise DataError(f"cannot open {recipe.dataset}, split {split!r}: {first_line(error)}") from None
    # The whole column at once: the reader's own iteration takes a minute for a million images.
    targets = np.asarray(reader.dataset.select_columns(reader.label_key).with_format("numpy")[:][reader.label_key])
    if targets.dtype.kind not in "iu":
        raise DataError(f"{recipe.dataset}: labels must be integers, column {reader.label_key!r} is {targets.dtype}")
    names = sorted(reader.class_to_idx, key=reader.class_to_idx.__getitem__)
    inside = f"{recipe.dataset} {split}"
    return Split(TimmReader(reader, inside), targets.astype(np.int64), class_names=tuple(map(str, names)) or None)


def open_digits(split: str) -> Split:
    """Open the embedded data: 1,797 handwritten digits of 8x8 pixels, enlarged to 16x16. Nothing is downloaded.

    E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository (1998),
    doi:10.24432/C50P49, CC BY 4.0: the test part, in the order in which scikit-learn has it; grey values 0 to 16. The
    last 34 images of each class are the test set, the other 1,457 the training set.

    Args:
        split: ``train``, or ``test`` or ``validation`` for the test set.

    Raises:
        DataError: an unknown split.
    """
    if split not in ("train", "test", "validation"):
        raise DataError(f"digits have the splits train and test, not {split!r}")
    with np.load(DIGITS) as digits:
        grey, targets = digits["images"], digits["targets"].astype(np.int64)
    in_test = np.zeros(len(targets), dtype=bool)
    for label in range(10):
        in_test[np.flatnonzero(targets == label)[-TEST_IMAGES_PER_CLASS:]] = True
    chosen = ~in_test if split == "train" else in_test
    grey = np.rint(grey[chosen] * (255 / 16)).astype(np.uint8)
    size = (DIGIT_SIZE, DIGIT_SIZE)
    images = np.stack([np.asarray(Image.fromarray(g).resize(size, Image.Resampling.BICUBIC)) for g in grey])
    return Split(ArrayReader(images, "digits"), targets[chosen], class_names=tuple("0123456789"))
