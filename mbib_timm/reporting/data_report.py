"""`mbib data`: what there is to train on, before training: as text, CSV and figure; and a split to keep."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np

from mbib_timm.data import Source, Splits, open_data, shot_groups, summary
from mbib_timm.data.archives import SUFFIXES, is_archive, refuse_packed
from mbib_timm.data.class_values import label_names
from mbib_timm.data.image_tables import DELIMITED, PARQUET
from mbib_timm.data.overview import SMALLEST_PHOTOGRAPH, median_of, shrunk_note
from mbib_timm.data.sources import LEFT_OUT, NO_READABLE
from mbib_timm.drawing import GROUP_COLORS, canvas, figure_text, render
from mbib_timm.errors import DataError, MbibError
from mbib_timm.files import (
    begins_with,
    check_place,
    contains,
    counted,
    in_words,
    make_folder,
    printable,
    require_own,
    to_csv,
    write_bytes,
)
from mbib_timm.models.preprocessing import declared_side
from mbib_timm.recipe import FOR_SMALL_IMAGES, Recipe, check_given, find_recipe, load_recipe
from mbib_timm.recipe.recipe_files import change_recipe
from mbib_timm.reporting.inspection import Duplicates, Inspection, Picture, inspect
from mbib_timm.results.tables import NOTHING, Table

# Classes of the table, and sets of duplicates, that are shown; the CSV has all.
SHOWN_CLASSES, SHOWN_SETS, SHOWN_SIZES = 60, 5, 3
NAMED_CLASSES = 60  # as many names as can be read below bars
LONGEST_NAME = 36  # characters of a class in the table and the figure
FIGURES = ("png", "pdf", "svg")
FIGURE_TITLE = "mbib data: training images of each class"  # in the file: another of this name is not replaced
# Of the table of --csv.
IMAGE_COLUMNS = ("path", "label", "split", "group", "kind", "width", "height", "error", "exact_set", "near_set")
# Sources whose images a table can name.
IN_FILES = ("folder", "table", "list", "inat2018")


def find_data(target: str, overrides: Mapping[str, Any]) -> Recipe:
    """Return the recipe that names the data: a folder or archive of images, a table of them, or a recipe's own.

    Raises:
        MbibError: nothing of the kind, or values that cannot be.
    """
    place = Path(target)
    if _is_images(place):
        return change_recipe(Recipe(dataset="folder", data_dir=target), overrides)
    if _is_table(place):
        return change_recipe(Recipe(dataset="table", table=target), overrides)
    kinds = f"a folder or archive ({', '.join(SUFFIXES)}) of images, a table ({', '.join((*DELIMITED, *PARQUET))})"
    if place.exists() and place.suffix.lower() not in (".yaml", ".yml"):
        refuse_packed(place)
        raise MbibError(f"{target} is a file of another kind: expected {kinds}, or a recipe")
    try:
        file = find_recipe(target)
    except MbibError as error:
        raise MbibError(f"there is no {target}: expected {kinds}, or a recipe; {error}") from None
    return load_recipe(file, overrides)


def _is_images(place: Path) -> bool:
    return place.is_dir() or is_archive(place)


def _is_table(place: Path) -> bool:
    return place.suffix.lower() in (*DELIMITED, *PARQUET)


def _shrunk_note(target: str, recipe: Recipe, found: Inspection) -> str | None:
    """Return a line on images that are much larger than a model's input: that of the recipe given, or else of the one
    that most begin with."""
    size, by = median_of([picture.look.size for picture in found.pictures if not picture.look.error]), ""
    if size is None or min(size) < SMALLEST_PHOTOGRAPH:
        return None
    if _is_images(Path(target)) or _is_table(Path(target)):
        recipe, by = load_recipe(find_recipe(FOR_SMALL_IMAGES)), f" by the recipe {FOR_SMALL_IMAGES}"
    return shrunk_note(size, declared_side(recipe), by)


def data_report(
    target: str,
    overrides: Mapping[str, Any],
    csv_file: Path | None = None,
    figure: Path | None = None,
    split_file: Path | None = None,
) -> Inspection:
    """Look at every image of some data, print what there is to know, and return what was found.

    Args:
        target: a folder or archive of images, a table of them, or a recipe.
        overrides: recipe keys to replace.
        csv_file: where to write a line per image.
        figure: where to draw the images of each class.
        split_file: where to write which image is in which split, as a table that ``dataset: table`` reads.

    Raises:
        MbibError: data that are missing or malformed, or files that cannot be written or hold something else.
    """
    recipe = find_data(target, overrides)
    check_given([recipe], overrides)
    if split_file is not None and recipe.dataset not in IN_FILES:
        raise MbibError(f"--write-split: the images of dataset {recipe.dataset} are not in files that a table can name")
    if split_file is not None and LEFT_OUT in recipe.split_names:
        raise MbibError(
            f"--write-split: no table says what a long-tailed subset leaves out, and split {LEFT_OUT!r} has"
        )
    if figure is not None and figure.suffix[1:].lower() not in FIGURES:
        raise MbibError(f"--figure {figure}: expected a name that ends in .{', .'.join(FIGURES)}")
    for file in (csv_file, figure, split_file):
        if file is not None:
            check_place(file)
    source = Source(recipe)
    splits = open_data(recipe, source)
    if csv_file is not None:
        require_own("--csv", csv_file, begins_with(to_csv([IMAGE_COLUMNS])), "is not a table of this command")
    if figure is not None:
        require_own("--figure", figure, contains(FIGURE_TITLE.encode()), "is not a figure of this command")
    split_content = b"" if split_file is None else split_rows(recipe, source)
    if split_file is not None:
        otherwise = "has other content, maybe edited by hand"
        require_own("--write-split", split_file, lambda file: file.read_bytes() == split_content, otherwise)
    names = label_names(splits.class_names, splits.num_classes)
    parts = list(zip(recipe.split_names, splits.opened(), strict=True))
    print("\n".join(summary(splits, recipe.holdout > 0)))
    print(f"\n{class_table(splits, names)}\n", flush=True)
    found = inspect(parts, names, recipe.workers)
    print("\n".join(lines(found, source.has_splits, recipe.val_split == LEFT_OUT)))
    if note := _shrunk_note(target, recipe, found):
        print(note)
    if csv_file is not None:
        _write(csv_file, image_rows(found))
        print(printable(str(csv_file)))
    if figure is not None:
        form = figure.suffix[1:].lower()
        _write(figure, render(lambda: class_histogram(splits, names), (form,), title=FIGURE_TITLE)[form])
        print(printable(str(figure)))
    if split_file is not None:
        _write(split_file, split_content)
        places = f"--table {quote(str(split_file))} --data-dir {quote(recipe.root)}"
        groups = "" if recipe.group_by is None else " --group-by column"
        print(printable(f"{split_file}: train on this split with --dataset table {places}{groups}"))
    return found


def _write(file: Path, content: bytes) -> None:
    make_folder(file.parent)
    write_bytes(file, content)


def class_table(splits: Splits, names: Sequence[str]) -> str:
    """Return the images of each class, largest first, as text."""
    counts = splits.class_counts
    group = {int(label): name for name, labels in shot_groups(counts).items() for label in labels}
    parts = {"evaluation": splits.val, "test": splits.test}
    others = {
        title: np.bincount(part.targets, minlength=len(counts)) for title, part in parts.items() if part is not None
    }
    order = np.argsort(-counts, kind="stable").tolist()
    half = SHOWN_CLASSES // 2
    shown = order if len(order) <= SHOWN_CLASSES else [*order[:half], None, *order[-half:]]
    rows = [
        [f"... {len(order) - 2 * half:,} more", *[""] * (2 + len(others))]
        if label is None
        else [
            printable(_short(names[label])),
            f"{counts[label]:,}",
            *(f"{other[label]:,}" if other[label] else NOTHING for other in others.values()),
            group[label],
        ]
        for label in shown
    ]
    return Table(["class", "training", *others, "shot group"], rows).text()


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 3]}..."


def lines(found: Inspection, has_splits: bool, left_out: bool) -> Iterator[str]:
    """Give what is said of the images: sizes, kinds, unreadable files, duplicates.

    Args:
        found: of them.
        has_splits: the data have splits of their own.
        left_out: what a long-tailed subset leaves out is evaluated, which is not chosen by group.
    """
    advice = "--group-by keeps together what belongs together"
    if has_splits and not left_out:
        advice = "take them out of one of the data's own splits"
    elif left_out or any(picture.group for picture in found.pictures):
        advice = ""
    readable = [picture.look for picture in found.pictures if not picture.look.error]
    if readable:
        sides = [min(look.size) for look in readable]
        yield f"shorter side: {min(sides):,} to {max(sides):,} pixels, median {int(np.median(sides)):,}"
        yield f"sizes: {_counted(Counter(f'{look.size[0]} x {look.size[1]}' for look in readable), SHOWN_SIZES)}"
        yield f"kinds: {_counted(Counter(look.kind for look in readable), 10)}"
    broken = [picture for picture in found.pictures if picture.look.error]
    yield f"unreadable: {len(broken):,}{':' if broken else ''}"
    for picture in broken:
        yield f"  {printable(picture.path)}: {printable(picture.look.error)} ({picture.split})"
    for split in dict.fromkeys(picture.split for picture in broken):
        listed = {picture.label: None for picture in found.pictures if picture.split == split}
        read = {picture.label for picture in found.pictures if picture.split == split and not picture.look.error}
        if gone := [label for label in listed if label not in read]:
            yield f"  {in_words({f'{NO_READABLE} ({split})': gone})}"
    yield from _about("exact duplicates", found.exact, found.pictures, advice)
    if found.near is None:
        yield "near duplicates: not looked for; that needs ImageHash: pip install 'mbib-timm[data]'"
    else:
        further = _without(found.near, found.exact, found.pictures)
        yield from _about("further near duplicates", further, found.pictures, advice)


def _counted(counts: Counter[str], most: int) -> str:
    rest = len(counts) - most
    text = ", ".join(f"{name}: {count:,}" for name, count in counts.most_common(most))
    return f"{text}{f', and {rest:,} more' if rest > 0 else ''}"


def _without(near: Duplicates, exact: Duplicates, pictures: Sequence[Picture]) -> Duplicates:
    """Return the near duplicates that are more than sets of exact ones."""
    sets = [each for each in near.sets if len({pictures[i].look.digest for i in each}) > 1]
    return Duplicates(sets, {place: twin for place, twin in near.leaks.items() if place not in exact.leaks})


def _about(title: str, found: Duplicates, pictures: Sequence[Picture], advice: str) -> Iterator[str]:
    images = sum(map(len, found.sets))
    sets = "one set" if len(found.sets) == 1 else f"{len(found.sets):,} sets"
    yield f"{title}: {counted(images, 'image')} in {sets}" if images else f"{title}: none"
    if not images:
        return
    mixed = [each for each in found.sets if len({pictures[i].label for i in each}) > 1]
    if mixed:
        yield f"  sets with images of several classes: {len(mixed):,}"
    if found.leaks:
        yield f"  evaluated images that are also in training: {len(found.leaks):,}{f'; {advice}' * bool(advice)}"
    # Those that matter most first.
    across = [each for each in found.sets if len({pictures[i].split for i in each}) > 1]
    shown = list({each[0]: each for each in (*mixed, *across, *found.sets)}.values())
    for each in shown[:SHOWN_SETS]:
        more = f" and {len(each) - 4:,} more" if len(each) > 4 else ""
        yield "  " + ", ".join(f"{printable(pictures[i].path)} ({pictures[i].split})" for i in each[:4]) + more
    if len(shown) > SHOWN_SETS:
        yield f"  and {len(shown) - SHOWN_SETS:,} more; the table of --csv has all"


def image_rows(found: Inspection) -> bytes:
    """Return a CSV with a line per image; duplicates have the number of their set."""
    exact, near = _numbers(found.exact), _numbers(found.near)
    rows = (
        [
            *(picture.path, picture.label, picture.split, picture.group, picture.look.kind),
            *(picture.look.size if not picture.look.error else ("", "")),
            *(picture.look.error, exact.get(place, ""), near.get(place, "")),
        ]
        for place, picture in enumerate(found.pictures)
    )
    return to_csv([IMAGE_COLUMNS, *rows])


def _numbers(found: Duplicates | None) -> dict[int, int]:
    sets = found.sets if found is not None else []
    return {place: number for number, each in enumerate(sets, start=1) for place in each}


def split_rows(recipe: Recipe, source: Source) -> bytes:
    """Return a CSV with path, class, split and group of every image, before a long-tailed subset is taken of them.

    Args:
        recipe: names the splits; others that the data have come after them.
        source: of its data.

    Raises:
        DataError: images in one of several archives, or a name that a table cannot hold.
    """
    root, others = recipe.root, source.others(recipe.split_names)
    splits = zip(
        [*recipe.split_names, *others], [*source.splits(recipe.split_names), *source.splits(others)], strict=True
    )
    rows: list[Sequence[object]] = [["path", "label", "split", "group"]]
    for name, split in splits:
        classes = label_names(split.class_names, int(split.targets.max()) + 1)
        groups = np.full(len(split), "") if split.groups is None else split.groups
        for place, label in enumerate(split.targets):
            path = split.name(place, root)
            if any(part.lower().endswith(SUFFIXES) for part in path.split("/")[:-1]):
                raise DataError(f"--write-split: {split.path(place)} is in one of several archives; unpack them")
            row = [path, classes[int(label)], name, str(groups[place])]
            if lost := next((value for value in row if value != value.strip() or "\r" in value), None):
                raise DataError(
                    f"--write-split: a table cannot hold {lost!r}, with a space at an end or a carriage return; rename "
                    "what has that name"
                )
            rows.append(row)
    return to_csv(rows, exact=True)


def class_histogram(splits: Splits, names: Sequence[str]) -> Any:
    """Draw the training images of each class, largest first, in the colours of the shot groups."""
    counts = splits.class_counts
    order = np.argsort(-counts, kind="stable")
    place = np.argsort(order)
    figure, axes = canvas(max(5.0, min(14.0, 0.16 * len(counts) + 2)), 3.5)
    for name, labels in shot_groups(counts).items():
        if len(labels):
            title = f"{name}: {counted(len(labels), 'class')}"
            axes.bar(place[labels], counts[labels], width=0.85, color=GROUP_COLORS[name], label=title)
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.5)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylabel("training images")
    axes.grid(axis="x", visible=False)
    if len(counts) <= NAMED_CLASSES:
        axes.set_xticks(
            range(len(order)), [figure_text(_short(names[label])) for label in order], rotation=90, fontsize=7
        )
    else:
        axes.set_xlabel(f"{len(counts):,} classes, largest first")
    axes.legend()
    return figure
