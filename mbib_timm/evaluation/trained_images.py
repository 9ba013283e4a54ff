"""Which images a run was trained on: their accuracy says nothing about other images."""

import csv
import io
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from mbib_timm.data import DataPool, Split
from mbib_timm.data.sources import UNREADABLE
from mbib_timm.errors import MbibError
from mbib_timm.evaluation.answer_files import PREDICTIONS
from mbib_timm.files import counted, from_cell, printable, read_text
from mbib_timm.recipe import DATA_PLACES, OPENED_BY, Recipe, load_recipe
from mbib_timm.results.record import RECORD, RunRecord, read_record

COPY = "their folder has images of the same names and labels as its own"
# How a line about several images speaks of one.
SINGULAR = {
    "were trained": "was trained",
    "their folder": "its folder",
    "as its own": "as the run's own",
    "they are": "it is",
    "they lie": "it lies",
}


def evaluated_line(run: Path, split: str, images: Split, recipe: Recipe, pool: DataPool, by: str = "") -> str:
    """Return the line of `trained_on_line` on a split of a recipe's data; images that are no files have none."""
    if not images.in_files:
        return ""
    what = f"the {counted(len(images), 'evaluated image')}"
    return trained_on_line(run, set(images.files()), what, pool, by, recipe, split)


def trained_on_line(
    run: Path,
    files: Collection[bytes],
    what: str,
    pool: DataPool,
    by: str = "",
    evaluated: Recipe | None = None,
    split: str = "",
) -> str:
    """Return a line on the images that a run was trained on; empty where there are none, and for what is no run.

    Where the run's data have changed, what is in their training split by now may have been among them; of data without
    splits, images of its folder that it has not evaluated. And so may images that lie elsewhere, where all that is
    there has the names and labels of the run's data: it is a copy.

    Args:
        run: folder of the run.
        files: absolute, normalised paths of images.
        what: they are, such as ``the 53 evaluated images``.
        pool: opens the run's data, or has them.
        by: says which run, such as `` by the other run``.
        evaluated: says where the images' data are; None where no recipe does.
        split: of these data that the images are.
    """
    if not files or not (run / RECORD).is_file() or not (run / "recipe.yaml").is_file():
        return ""
    try:
        written, record = load_recipe(run / "recipe.yaml"), read_record(run)
        start = _started_in(run, written)
        # Images that cannot be read would be looked for in all of them.
        recipe = _from(start, written).replace(broken="replace")
        beside = evaluated is not None and split in recipe.split_names[1:] and _same_images(evaluated, recipe)
        if beside and pool.source(recipe).has_splits:
            return ""  # what it shares with the training split is said where the data are opened
        inside, copied = _inside(recipe, files, pool), False
        if not inside and evaluated is not None and evaluated.dataset == recipe.dataset:
            recipe, copied = recipe.replace(**{key: getattr(evaluated, key) for key in DATA_PLACES}), True
            inside = _inside(recipe, files, pool)
        inside -= _unread(record, start)
        if not inside or (copied and not record.inputs):
            return ""
        has_splits, splits = pool.source(recipe).has_splits, pool.open(recipe)
        in_training = inside.intersection(map(os.path.abspath, splits.train.files()))
        # Without the images that a run has skipped, and in older runs, nothing says whether the data have changed.
        since = ", whose images have changed since" if record.inputs and written.broken != "skip" else ""
        if record.inputs and record.inputs[-1].data == splits.digest:
            trained = len(in_training)
            perhaps = f"may have been trained on{by}: {COPY}" if copied else f"were trained on{by}"
        elif copied:
            return ""
        elif has_splits:
            trained = len(in_training)
            perhaps = f"may have been trained on{by}: they are in its training split{since}"
        else:
            trained = len(inside - _evaluated(run, recipe, start))
            name = printable(os.path.basename(os.path.abspath(run)))
            perhaps = f"may have been trained on{by}: they lie in the folder that {name} was trained from{since}"
    except (MbibError, OSError):  # a run of data or of a plugin that are not here
        return ""
    if not trained:
        return ""
    their = "their"
    if trained == 1:
        their = "its"
        for plural, singular in SINGULAR.items():
            perhaps = perhaps.replace(plural, singular)
    return f"{trained:,} of {what} {perhaps}; {their} accuracy says nothing about other images"


def _same_images(one: Recipe, other: Recipe) -> bool:
    """Return whether two recipes open the same images, but for those that cannot be read."""
    return all(_opened_by(one, key) == _opened_by(other, key) for key in OPENED_BY if key != "broken")


def _opened_by(recipe: Recipe, key: str) -> Any:
    value = getattr(recipe, key)
    return os.path.abspath(value) if key in DATA_PLACES and value is not None else value


def _started_in(run: Path, recipe: Recipe) -> Path:
    """Return the folder that a run was started in: what its folder of runs, if relative, lies in; otherwise ours."""
    output, folder = Path(os.path.normpath(recipe.output)), Path(os.path.abspath(run)).parent
    above = len(folder.parts) - len(output.parts)
    if output.is_absolute() or above < 1 or folder.parts[above:] != output.parts:
        return Path.cwd()
    return Path(*folder.parts[:above])


def _from(start: Path, recipe: Recipe) -> Recipe:
    """Return a recipe whose relative places begin at a folder, those that are there."""
    if start == Path.cwd():
        return recipe
    places = {key: start / place for key in DATA_PLACES if (place := getattr(recipe, key)) is not None}
    return recipe.replace(**{key: str(place) for key, place in places.items() if place.exists()})


def _inside(recipe: Recipe, files: Collection[bytes], pool: DataPool) -> set[bytes]:
    """Return those of the files that lie where a recipe's data do: in its folder, or where its table says."""
    found = set(map(os.path.abspath, files))
    if recipe.table is not None:
        splits = pool.source(recipe).splits(recipe.split_names) if Path(recipe.table).is_file() else []
        return {name for split in splits for name in map(os.path.abspath, split.files()) if name in found}
    if recipe.data_dir is None:
        return set()
    root = os.path.join(os.path.abspath(os.fsencode(recipe.data_dir)), b"")
    return {file for file in found if file.startswith(root)}


def _unread(record: RunRecord, start: Path) -> set[bytes]:
    """Return the images that a run which was started in a folder could not read, and so has not trained on."""
    # Those that it has skipped are recorded with why, after a colon: of several the path may end at any.
    skipped = [
        entry[: colon.start()] for entry in record.left_out.get(UNREADABLE, ()) for colon in re.finditer(": ", entry)
    ]
    names = [*record.replaced_images, *record.left_out_images, *skipped]
    return {os.path.abspath(os.path.join(os.fsencode(start), os.fsencode(name))) for name in names}


def _evaluated(run: Path, recipe: Recipe, start: Path) -> set[bytes]:
    """Return the images that a run has evaluated, which was started in a folder."""
    if not (run / PREDICTIONS).is_file():
        return set()
    rows = csv.DictReader(io.StringIO(read_text(run / PREDICTIONS, "predictions of a run"), newline=""))
    names = [from_cell(row["image"]) for row in rows if row.get("image")]
    root = os.fsencode(start / (recipe.data_dir or ""))
    return {os.path.abspath(os.path.join(root, os.fsencode(name))) for name in names}
