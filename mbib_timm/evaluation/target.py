"""What is to be evaluated: a trained model by any name, and the data that belong to it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
from torch import nn

from mbib_timm.data import DataPool, match_classes, missing_classes, open_data
from mbib_timm.data.batch import Loader
from mbib_timm.data.folders import ALL
from mbib_timm.data.images import Split
from mbib_timm.data.lists import find_list
from mbib_timm.data.loaders import timm_eval_loader
from mbib_timm.data.overview import SMALL_INPUT, warnings
from mbib_timm.data.sources import NO_TEST, is_image_folder
from mbib_timm.environment import World
from mbib_timm.errors import MbibError
from mbib_timm.evaluation.trained_images import evaluated_line
from mbib_timm.files import counted, printable
from mbib_timm.models.preprocessing import as_predicted, input_size, settle
from mbib_timm.models.weights import Source as ModelSource
from mbib_timm.models.weights import create_trained, find_source
from mbib_timm.models.zoo import is_published
from mbib_timm.recipe import FOR_PHOTOGRAPHS, FOR_SMALL_IMAGES, Recipe, find_recipe, load_recipe

# Sources whose labels are numbers, with names only where a file has them; and keys of lists.
OF_NUMBERS = ("list", "wds")
LISTS = ("train_list", "val_list", "test_list")


@dataclass(frozen=True)
class Target:
    """A trained model, and what says which data it belongs to.

    Attributes:
        name: as it was asked for.
        source: where the model is.
        recipe: names the data.
        elsewhere: the data are others than those that the model's own recipe names.
        said: recipe keys that whoever asked for it has given.
        note: on which of the images in another folder those are; empty where nothing has to be said.
    """

    name: str
    source: ModelSource
    recipe: Recipe
    elsewhere: bool = False
    said: frozenset[str] = frozenset()
    note: str = ""

    def class_counts(self) -> np.ndarray:
        """Return the training images of each class: from the checkpoint, or from the training data."""
        counts = self.source.config.class_counts
        return open_data(self.recipe).class_counts if counts is None else counts


@dataclass(frozen=True)
class OpenTarget:
    """A trained model on its device, with the images to evaluate it on.

    Attributes:
        model: in evaluation mode.
        recipe: of the images' preprocessing: the model's own, with the keys that were asked for.
        class_counts: training images of each class, (K,).
        class_names: in label order, where they are known.
        input_size: of the images, (C, H, W).
        split: name of the images' split.
        images: of the split, with the labels of training.
        loader: gives batches of them.
        notes: what whoever reads the result should know of the images: a line each.
        trained_on: a line on those that the model was trained on, which is among the notes; empty where there are none.
    """

    model: nn.Module
    recipe: Recipe
    class_counts: np.ndarray
    class_names: tuple[str, ...] | None
    input_size: tuple[int, int, int]
    split: str
    images: Split
    loader: Loader
    notes: tuple[str, ...]
    trained_on: str = ""


def find_target(name: str, recipe: str | None = None, overrides: Mapping[str, Any] | None = None) -> Target:
    """Find a trained model, and the recipe that names its data.

    Args:
        name: a run's folder, ``local-dir:FOLDER``, ``hf-hub:REPO``, or a timm model name.
        recipe: name of the recipe that says which data; a run's folder and a published model have their own.
        overrides: recipe keys to replace; a `data_dir` of images is read as such, whatever the recipe's data are.

    Raises:
        MbibError: no such model, or nothing that says which data.
    """
    source = find_source(name)
    if recipe is None and is_published(source.name):
        recipe = source.name  # the package's recipe knows where to download the data
    file = source.file("recipe.yaml") if recipe is None else find_recipe(recipe)
    if file is None:
        raise MbibError(
            f"{name} does not say which data to use: give --recipe NAME (see mbib recipes), and flags to change it"
        )
    own, asked = load_recipe(file), load_recipe(file, overrides)
    said = frozenset(overrides or ())
    if recipe is None and "data_dir" in said and not said & {"dataset", "table"}:
        _require_own_folder(name, own, asked)
    note = ""
    if "data_dir" in said and not said & {"dataset", "dataset_download", *LISTS}:
        asked = _with_lists_of(own, asked)
        if is_image_folder(asked):
            if asked.dataset in OF_NUMBERS and source.config.class_names is None:
                raise _nameless(name, asked)
            asked = load_recipe(file, {**(overrides or {}), "dataset": "folder"})
        elif recipe is None and asked.dataset == "list" and _place(own) != _place(asked):
            note = (
                f"evaluating the images that the run's list names, under {asked.data_dir}; --dataset folder takes all "
                "that are there, by class folders"
            )
    return Target(name, source, asked, elsewhere=_place(own) != _place(asked), said=said, note=note)


def _with_lists_of(own: Recipe, asked: Recipe) -> Recipe:
    """Return a recipe for another folder, whose lists are those of the recipe's own folder where it has none."""
    if asked.dataset != "list" or asked.data_dir is None or own.data_dir is None:
        return asked
    folder, lists = Path(asked.data_dir), {key: name for key in LISTS if (name := getattr(asked, key)) is not None}
    gone = {key: Path(own.data_dir, name) for key, name in lists.items() if find_list(name, folder) is None}
    return asked.replace(**{key: str(file) for key, file in gone.items() if file.is_file()})


def _nameless(name: str, asked: Recipe) -> MbibError:
    """Return the error for a folder of images of which a model without class names cannot know the labels."""
    key = "test_list" if len(asked.split_names) > 2 else "val_list"
    flags = f"--{key.replace('_', '-')} FILE, with lines '<relative path> <label>'"
    if asked.dataset == "list":
        found = f"has none of the images that the lists name, and {name} has no class names"
    else:
        found, flags = f"has no shards, and {name} has no class names", f"--dataset list {flags}"
    return MbibError(
        f"--data-dir {asked.data_dir}: the folder {found} to match class folders by: add {flags}; or --dataset folder, "
        "if the class folders in the order of their names are labels 0, 1, ..."
    )


def _require_own_folder(name: str, own: Recipe, asked: Recipe) -> None:
    """Raise MbibError for a folder beside the one that the paths of a run's table begin at.

    Images of the table would be evaluated there, and not those of the folder.
    """
    if own.dataset != "table" or own.table is None or asked.data_dir is None:
        return
    if Path(asked.data_dir).resolve() != Path(own.root).resolve():
        raise MbibError(
            f"{name} was trained on the table {own.table}, whose images lie in another folder than {asked.data_dir}: "
            "add --dataset folder for all images there, or --table FILE for those that a table names"
        )


def _place(recipe: Recipe) -> tuple[str, ...]:
    """Return where a recipe's data are."""
    places = (getattr(recipe, key, None) for key in ("data_dir", "table"))
    return (recipe.dataset, *("" if place is None else str(Path(place).resolve()) for place in places))


def open_target(target: Target, world: World, split: str | None = None) -> OpenTarget:
    """Create the model and make batches of the images.

    Args:
        target: which model and which data.
        world: this process among others; each gets its share of the images.
        split: the images' split; by default the one that the run's result is on.

    Raises:
        MbibError: weights or images that are missing, or that do not fit one another.
    """
    recipe, source = target.recipe, target.source
    # A run's folder and a published name know their own arguments; a bare timm name takes the recipe's.
    model = create_trained(source, **({} if source.has_files else recipe.model_kwargs))
    counts = target.class_counts()
    num_classes = int(getattr(model, "num_classes", len(counts)))
    if len(counts) != num_classes:
        raise MbibError(f"{target.name} has {num_classes} classes, but the data have {len(counts)}")
    if source.has_files:
        recipe = as_predicted(recipe, model, target.said)
    recipe = settle(recipe, model)
    size = input_size(recipe, model)
    names = source.config.class_names
    pool, asked = DataPool(), split is not None
    split, images, notes = _open_images(target, split, names, num_classes, min(size[1:]), pool)
    loader = timm_eval_loader(images, recipe, size, world)
    notes = (*notes, *warnings([images]))
    if missing := missing_classes(split, images, num_classes):
        notes = (*notes, missing)
    trained_on = "" if source.folder is None else evaluated_line(source.folder, split, images, target.recipe, pool)
    if trained_on:
        notes = (*notes, f"warning: {trained_on}")
    if not asked and split == ALL and (trained_on or source.folder is None or not images.in_files):
        # Or it is not known which the model was trained on.
        notes = (*notes, f"--split {recipe.val_split} takes only the images that training would hold out")
    names = images.class_names if names is None else names
    notes = tuple(map(printable, notes))  # names in them are somebody else's
    return OpenTarget(model.to(world.device), recipe, counts, names, size, split, images, loader, notes, trained_on)


def _open_images(
    target: Target, split: str | None, names: tuple[str, ...] | None, num_classes: int, side: int, pool: DataPool
) -> tuple[str, Split, tuple[str, ...]]:
    """Return the name of the split to evaluate, its images with the labels of training, and notes on them.

    Of other data than the model's own, which have no splits, all images are evaluated: the share that training would
    have held out is no split of theirs. `side` is that of the model's images.
    """
    recipe, data = target.recipe, pool.source(target.recipe)
    whole = split is None and target.elsewhere and not data.has_splits
    name = ALL if whole else split or recipe.split_names[-1]
    (opened,) = data.splits([name])
    notes: tuple[str, ...] = (target.note,) if target.note else ()
    if whole:
        place = recipe.table or recipe.data_dir or recipe.dataset
        notes = (f"evaluating all {counted(len(opened), 'image')} of {place}",)
    elif opened.chosen.endswith(NO_TEST):
        notes = (f"split {name!r}: {opened.chosen}",)
    learn = f"mbib train {learnt_by(target.source, side)} --model {quote(target.source.name)} --data-dir FOLDER"
    instead = f"; the model knows other classes; to learn these: {learn}"
    return name, match_classes(name, opened, names, num_classes, instead), notes


def learnt_by(source: ModelSource, side: int) -> str:
    """Return the packaged recipe by which a model for images of a side learns other classes.

    Of those for photographs it is the one that says most of what the model is, and nothing else.
    """
    if side <= SMALL_INPUT:
        return FOR_SMALL_IMAGES
    parts = {name: load_recipe(find_recipe(name)).model_kwargs for name in FOR_PHOTOGRAPHS}
    fitting = [name for name, of_recipe in parts.items() if of_recipe.items() <= source.config.model_args.items()]
    return max(fitting, key=lambda name: len(parts[name]))
