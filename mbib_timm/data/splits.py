"""The data of a run: its splits, the long-tailed subset, the class counts; opened and checked against one another."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from shlex import quote

import numpy as np

from mbib_timm.data.archives import ArchiveReader
from mbib_timm.data.groups import hold_out_groups, require_groups
from mbib_timm.data.image_tables import NO_LABEL
from mbib_timm.data.images import ArrayReader, Split, evenly_spaced
from mbib_timm.data.long_tail import count_classes, hold_out, long_tailed_counts, long_tailed_indices, named
from mbib_timm.data.paths import PathReader
from mbib_timm.data.sources import LEFT_OUT, NO_READABLE, UNREADABLE, Source
from mbib_timm.errors import DataError, MbibError, few, nearest
from mbib_timm.files import composed, counted, in_words
from mbib_timm.recipe import Recipe, train_command

NAMES = 10_000  # of a split's images that its digest looks at, evenly spread
# Share of letters from which another class's name counts as a slip: fewer letters are alike in badger and bridge.
SLIP = 0.75


@dataclass(frozen=True)
class Splits:
    """The data of a run.

    Attributes:
        train: training images, the long-tailed subset where the recipe asks for one.
        val: images evaluated during training, with the labels of training.
        test: images evaluated once at the end, with the labels of training; or None.
        class_counts: training images of each class, (K,).
        class_names: in label order, where they are known.
        held_out: images that are never trained on, for methods that choose a constant; or None. See `open_data`.
        held_out_from: what those are, in words, for the record.
        shared: a line on each evaluated split of which images, or others of their groups, are trained on.
    """

    train: Split
    val: Split
    test: Split | None
    class_counts: np.ndarray
    class_names: tuple[str, ...] | None
    held_out: Split | None = None
    held_out_from: str = "none"
    shared: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """Classes K."""
        return len(self.class_counts)

    def opened(self) -> list[Split]:
        """Return the splits that there are: training, and what is evaluated; the result is on the last of them."""
        return [self.train, self.val, *([] if self.test is None else [self.test])]

    @cached_property
    def digest(self) -> str:
        """Digest of the images, wherever they lie: class names, all labels, and names of up to `NAMES` of each split.

        Names begin below the folder that all of them are in. What the files hold is not looked at.
        """
        digest = hashlib.sha256(json.dumps(self.class_names).encode())
        splits = self.opened()
        names = [_some_names(split) for split in splits]
        common = _common_folder([name for each in names for name in each])
        for split, each in zip(splits, names, strict=True):
            digest.update(b"%d\0" % len(split))
            digest.update(np.ascontiguousarray(split.targets, dtype=np.int64).data)
            digest.update(b"".join(name.removeprefix(common) + b"\0" for name in each))
        return digest.hexdigest()

    def require_held_out(self) -> Split:
        """Return the images that are never trained on. Raises MbibError where there are none."""
        if self.held_out is None:
            raise MbibError(
                "every image is trained or tested on, which leaves none to choose a hyperparameter on: set "
                "holdout: 0.1 to keep a tenth of each class's training images out of training"
            )
        return self.held_out


def _some_names(split: Split) -> list[bytes]:
    return [os.path.normpath(name) for name in split.files(evenly_spaced(len(split), NAMES))]


def _common_folder(names: Sequence[bytes]) -> bytes:
    """Return the folder that all paths are in, with its slash; nothing where there is none."""
    if len({os.path.isabs(name) for name in names}) != 1:
        return b""
    return os.path.join(os.path.commonpath([os.path.dirname(min(names)), os.path.dirname(max(names))]), b"")


def open_data(recipe: Recipe, source: Source | None = None) -> Splits:
    """Open the recipe's splits, take the long-tailed subset, count the classes, and check that all of it fits.

    Images for methods that choose a constant are, in this order:

    1. with ``holdout`` above 0, that share of each class of the (long-tailed) training images, at least one of a class
       with two or more and never the last one, in whole groups where the images have groups, drawn by
       ``subset_seed``: they are not trained on, and not counted;
    2. of a long-tailed subset, the training images that it leaves out, which may be none of the largest class;
    3. where there is a test split and it has other images, the validation split;
    4. none.

    Args:
        recipe: names the data.
        source: of them, where it is open already.

    Raises:
        MbibError: a share to hold out of data that have splits.
        DataError: data that are missing, malformed, or do not fit the recipe or one another; a test split that is the
            validation split under another name.
    """
    names, source = recipe.split_names, source or Source(recipe)
    if source.has_splits and recipe.val_fraction != Recipe.val_fraction:
        raise MbibError("recipe key 'val_fraction' has no effect: the data have splits of their own")
    train, *evaluated = source.splits(names)
    held_out, held_out_from = None, "none"
    if recipe.group_by is not None:  # of one split alone they serve its intervals
        found = [split.groups for split in (train, *evaluated) if split.groups is not None]
        require_groups(recipe, np.concatenate(found), train.path(0))
    with _unreadable_said(train):
        num_classes = _num_classes(recipe, train)
        matched = [
            match_classes(name, split, train.class_names, num_classes)
            for name, split in zip(names[1:], evaluated, strict=True)
        ]
        counts = count_classes(train.targets, num_classes, train.class_names)
    val, test = matched[0], matched[1] if matched[1:] else None
    twice = 0 if test is None else _number_shared(val, test, names[1] == names[2])
    if test is not None and twice == len(val) == len(test):
        raise DataError(
            f"the splits {names[1]!r} and {names[2]!r} are the same {counted(len(test), 'image')}: the data have one "
            "split for evaluation; omit the test split"
        )
    if recipe.imbalance != "none":
        wanted = long_tailed_counts(recipe, counts, train.class_names)
        kept = long_tailed_indices(train.targets, wanted, recipe.subset_seed)
        left_out, besides = np.setdiff1d(np.arange(len(train)), kept), ""
        if recipe.val_split == LEFT_OUT:
            evaluated_on = val.indices_of(np.arange(len(val)))
            left_out = left_out[~np.isin(train.indices_of(left_out), evaluated_on)]
            besides = " beside those evaluated"
        if len(left_out):
            held_out = train.subset(left_out)
            held_out_from = f"the {len(left_out):,} training images that the long-tailed subset leaves out{besides}"
        train = train.subset(kept)
    if recipe.holdout > 0:
        train, held_out = _hold_out(recipe, train)
        groups = "" if train.groups is None else ", in whole groups"
        held_out_from = f"{100 * recipe.holdout:g} % of each class's training images{groups}, which are not trained on"
    counts = count_classes(train.targets, num_classes, train.class_names)
    shared = [_images_trained_on(train, split, name, names[0]) for name, split in zip(names[1:], matched, strict=True)]
    shared += [_groups_trained_on(train, split, name) for name, split in zip(names[1:], matched, strict=True)]
    if test is not None and twice:
        shared.append(f"split {names[2]!r}: {twice:,} of its {counted(len(test), 'image')} are in {names[1]!r} too")
    elif held_out is None and test is not None:
        held_out, held_out_from = val, f"the validation split {recipe.val_split!r}"
    return Splits(train, val, test, counts, train.class_names, held_out, held_out_from, tuple(filter(None, shared)))


@contextmanager
def _unreadable_said(train: Split) -> Iterator[None]:
    """Add what training has lost, unreadable or without a label, to an error about classes, of which it may be the
    reason."""
    try:
        yield
    except DataError as error:
        lost = {why: train.left_out[why] for why in (UNREADABLE, NO_READABLE, NO_LABEL) if why in train.left_out}
        if not lost:
            raise
        raise DataError(f"{error}; left out of training: {in_words(lost)}") from None


def _images_trained_on(train: Split, evaluated: Split, name: str, training_name: str) -> str:
    """Return a line on the images of an evaluated split that are trained on; empty where there are none."""
    number = _number_shared(train, evaluated, name == training_name)
    if number == 0:
        return ""
    return (
        f"split {name!r}: {number:,} of its {counted(len(evaluated), 'image')} are trained on; their accuracy says "
        "nothing about other images"
    )


def _groups_trained_on(train: Split, evaluated: Split, name: str) -> str:
    """Return a line on the images of an evaluated split whose groups are trained on; empty where there are none."""
    if train.groups is None or evaluated.groups is None:
        return ""
    number = np.isin(evaluated.groups, train.groups[train.groups != ""]).sum()
    of = f"split {name!r}: {number:,} of its {counted(len(evaluated), 'image')}"
    return f"{of} belong to groups that are trained on" if number else ""


def _number_shared(first: Split, second: Split, one_name: bool) -> int:
    """Return how many images of the second split are in the first; `one_name` where both have the same name."""
    if not second.in_files and not one_name:
        # Images that are no files have numbers, which hold within one split: it may have two names.
        one, other = first.reader, second.reader
        if not (isinstance(one, ArrayReader) and isinstance(other, ArrayReader) and len(first) == len(second)):
            return 0
        return len(second) * np.array_equal(one.images[first.indices], other.images[second.indices])
    candidates = _perhaps_shared(first, second)
    if candidates is not None and len(candidates) == 0:
        return 0
    files = set(first.files(candidates))
    return sum(file in files for file in second.files())


def _perhaps_shared(train: Split, evaluated: Split) -> np.ndarray | None:
    """Return the places of training images that may be in another split too, by hashes; None where any may be.

    None of one archive is in another.
    """
    first, second = train.reader, evaluated.reader
    if isinstance(first, ArchiveReader) and isinstance(second, ArchiveReader):
        common = {*map(os.path.normpath, first.archives)} & {*map(os.path.normpath, second.archives)}
        return None if common else np.empty(0, dtype=np.int64)
    if not (isinstance(first, PathReader) and isinstance(second, PathReader) and first.names_alike(second)):
        return None
    wanted = np.sort(second.names.hashes(evaluated.indices))
    hashes = first.names.hashes(train.indices)
    # A look at 22 bits of each, in a table that a processor's cache holds, leaves few that are searched for.
    table = np.zeros(1 << 22, dtype=bool)
    table[wanted >> np.uint64(42)] = True
    found = np.flatnonzero(table[hashes >> np.uint64(42)])
    return found[wanted[np.searchsorted(wanted, hashes[found]).clip(max=len(wanted) - 1)] == hashes[found]]


def _num_classes(recipe: Recipe, train: Split) -> int:
    highest = int(train.targets.max()) + 1
    in_data = len(train.class_names) if train.class_names is not None else highest
    if highest > in_data:
        raise DataError(f"label {highest - 1} has no name: class map {recipe.class_map} names classes 0..{in_data - 1}")
    if train.class_names is not None and in_data < 2:
        place, names = recipe.table or recipe.data_dir or recipe.dataset, ", ".join(train.class_names)
        hint = ""
        inner = Path(place, names)
        if recipe.dataset == "folder" and inner.is_dir() and any(entry.is_dir() for entry in inner.iterdir()):
            hint = f"; if the folders in {names!r} are the classes, give --data-dir {quote(str(inner))}"
        raise DataError(f"{place} holds {in_data} class ({names}); a classifier needs two or more{hint}")
    if recipe.num_classes is not None and recipe.num_classes != in_data:
        hint = ""
        if recipe.dataset == "folder" and recipe.data_dir and recipe.imbalance != "none":  # a benchmark's recipe
            hint = f"; images of your own train with: {train_command(recipe.data_dir)}"
        raise DataError(f"the data have {in_data} classes, recipe key 'num_classes' says {recipe.num_classes}{hint}")
    return in_data


def _hold_out(recipe: Recipe, train: Split) -> tuple[Split, Split]:
    """Return the images to train on, and those that the recipe holds out."""
    # Seeded through MT19937, it is another stream than that which has drawn the long-tailed subset.
    generator = np.random.RandomState(np.random.MT19937(recipe.subset_seed))
    if train.groups is not None:
        held_out = hold_out_groups(train.targets, train.groups, recipe.holdout, generator)
        one = "group of training images"
    else:
        held_out, one = hold_out(train.targets, recipe.holdout, generator), "training image"
    if not held_out.any():
        raise DataError(f"recipe key 'holdout': every class has one {one}, which is needed for training")
    return train.subset(np.flatnonzero(~held_out)), train.subset(np.flatnonzero(held_out))


def match_classes(
    name: str, split: Split, class_names: Sequence[str] | None, num_classes: int, instead: str = ""
) -> Split:
    """Return a split with the labels of training: classes of one name are one class, in whatever order they come.

    A split may lack classes; see `missing_classes`. Where names are not known on either side, the labels' numbers
    decide. Names are compared in Unicode's composed form.

    Args:
        name: of the split, for messages.
        split: its labels are those of its own classes.
        class_names: of training, in label order; None where they are not known.
        num_classes: classes K of training.
        instead: what to do where training has none of the classes.

    Raises:
        DataError: no images, labels out of range, a name that training has not, or one that stands for two classes.
    """
    if len(split) == 0:
        raise DataError(f"split {name!r} has no images")
    own = split.class_names
    if own is not None and class_names is not None and tuple(own) != tuple(class_names):
        return replace(
            split, targets=_renumbered(name, split, own, class_names, instead), class_names=tuple(class_names)
        )
    if own is not None and len(own) != num_classes:
        raise DataError(
            f"split {name!r} has {counted(len(own), 'class')}, training has {num_classes}, without names to match"
        )
    if split.targets.min() < 0 or split.targets.max() >= num_classes:
        raise DataError(
            f"split {name!r} has labels {split.targets.min()}..{split.targets.max()}, training has "
            f"{num_classes} classes"
        )
    return split


def _renumbered(
    name: str, split: Split, own: Sequence[str], class_names: Sequence[str], instead: str = ""
) -> np.ndarray:
    """Return the labels (N,) of training for those of a split's own classes."""
    known = [composed(each) for each in class_names]
    given = {int(label): composed(own[label]) for label in np.unique(split.targets)}
    for names, where in ((known, "training"), ([*given.values()], f"split {name!r}")):
        if twice := next((each for each, number in Counter(names).items() if number > 1), None):
            raise DataError(f"{where} has two classes {twice!r}, and split {name!r} other classes: no match by name")
    labels = {each: label for label, each in enumerate(known)}
    if unknown := [each for each in given.values() if each not in labels]:
        foreign = bool(instead) and 2 * len(unknown) > len(given)
        near = [[] if foreign else nearest(each, known, most=1, alike=SLIP) for each in unknown]
        hints = [f" (did you mean {found[0]!r}?)" if found else "" for found in near]
        had = "" if any(hints) else f"; training has {few([*map(repr, known)])}"
        if not foreign:
            which = "it" if len(unknown) == 1 else "them"
            instead = f"; rename {which}, or leave {which} out"
        raise DataError(
            f"split {split.called or name!r} has {counted(len(unknown), 'class')} not in training: "
            f"{few([f'{each!r}{hint}' for each, hint in zip(unknown, hints, strict=True)])}{had}{instead}"
        )
    to_label = np.full(len(own), -1, dtype=np.int64)
    to_label[[*given]] = [labels[each] for each in given.values()]
    return to_label[split.targets]


def missing_classes(name: str, split: Split, num_classes: int) -> str:
    """Return a line on the classes of which an evaluated split has no images; empty where it has some of every class.

    Args:
        name: of the split.
        split: with the labels of training.
        num_classes: classes K of training.
    """
    missing = np.setdiff1d(np.arange(num_classes), split.targets)
    if not len(missing):
        return ""
    names = named(split.class_names, num_classes)
    return (
        f"split {name!r} has no images of {len(missing)} of the {num_classes} classes, which are not measured: "
        f"{few([names[i] for i in missing])}"
    )
