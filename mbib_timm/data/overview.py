"""What the data of a run are, in a few lines: classes, images, groups, and what was left out."""

from collections.abc import Collection, Sequence

import numpy as np

from mbib_timm.data.images import Split, sampled_sizes
from mbib_timm.data.long_tail import named, shot_groups
from mbib_timm.data.sources import OF_LEFT_OUT
from mbib_timm.data.splits import Splits
from mbib_timm.errors import few
from mbib_timm.files import counted, in_words, printable
from mbib_timm.recipe import FOR_PHOTOGRAPHS

MEASURED = 32  # images of a split
# Pixels of a side: of a model's input that is for small images, and of what may be a photograph, if it is so many times
# as large as the input.
SMALL_INPUT, SMALLEST_PHOTOGRAPH, MUCH_LARGER = 64, 128, 4


def summary(splits: Splits, keeps_back: bool = False) -> list[str]:
    """Return what a run trains on and is evaluated on, a line each; what was left out comes last, as warnings.

    Args:
        splits: the run's data.
        keeps_back: whether the recipe keeps images out of training for methods that choose a constant (`holdout`).
    """
    counts = splits.class_counts
    names = named(splits.class_names, len(counts))
    shots = ", ".join(f"{len(labels):,} {name}" for name, labels in shot_groups(counts).items())
    lines = [
        f"{counted(len(counts), 'class')}, {counted(len(splits.train), 'training image')}: "
        f"{int(counts.max()):,} in the largest class, {int(counts.min()):,} in the smallest; shot groups: {shots}"
    ]
    for title, split in (("evaluation", splits.val), ("test", splits.test)):
        if split is not None:
            classes = len(np.unique(split.targets))
            found = f"{counted(len(split), 'image')} of {counted(classes, 'class')}"
            lines.append(f"{title}: {found}{f': {split.chosen}' if split.chosen else ''}")
    if keeps_back:
        lines.append(held_out_line(splits))
    if splits.train.groups is not None:
        (training, alone), (evaluated, more) = _groups(splits.train), _groups(splits.val)
        without = f"; ungrouped: {alone:,} in training, {more:,} in evaluation" if alone + more else ""
        lines.append(f"groups: {training:,} in training, {evaluated:,} in evaluation{without}")
    for title, labels in (
        ("classes of one training image", np.flatnonzero(counts == 1)),
        ("classes without an evaluation image", np.setdiff1d(np.arange(len(counts)), splits.val.targets)),
    ):
        if len(labels):
            lines.append(f"{title}: {len(labels):,} ({few([printable(names[label]) for label in labels])})")
    grouped = any(split.groups is not None or split.unused for split in (splits.train, splits.val))
    if splits.val.chosen and splits.val.in_files and not grouped and OF_LEFT_OUT not in splits.val.chosen:
        lines.append(
            "note: evaluated images were drawn one by one; if some belong together, such as frames of one burst or "
            "images of one patient or place, --group-by keeps them on one side"
        )
    lines += [printable(f"note: {line}") for line in (*_alike(splits.class_names or ()), *splits.train.notes)]
    lines += [f"warning: {line}" for line in splits.shared]
    return lines + warnings(splits.opened())


def held_out_line(splits: Splits) -> str:
    """Return on which images a method may choose a constant; of a run that does, or that keeps images back for it."""
    images = splits.require_held_out()
    of = f"{len(np.unique(images.targets)):,} of {counted(splits.num_classes, 'class')}"
    return f"for choosing a constant of the method: {splits.held_out_from} ({of})"


def _alike(class_names: Sequence[str]) -> list[str]:
    """Return a line on classes whose names are the same but for case and spaces at the ends, if there are any."""
    spellings: dict[str, dict[str, None]] = {}
    for name in class_names:
        spellings.setdefault(name.strip().casefold(), {})[name] = None
    alike = [" and ".join(map(repr, names)) for names in spellings.values() if len(names) > 1]
    if not alike:
        return []
    advice = "if they are the same class, give it one name"
    return [f"classes whose names differ in case or spaces only: {few(alike)}; {advice}"]


def warnings(splits: Sequence[Split]) -> list[str]:
    """Return what is missing of splits, and what their sources do not use or have left out, a line for each reason."""
    said = dict.fromkeys(line for split in splits for line in (split.missing, split.unused) if line)
    passed_over = [f"left out: {in_words({why: names})}" for why, names in left_out(splits).items()]
    return [f"warning: {line}" for line in (*said, *passed_over)]


def left_out(splits: Sequence[Split]) -> dict[str, list[str]]:
    """Return the names of what the sources of splits have left out, each once, by the reason."""
    merged: dict[str, dict[str, None]] = {}
    for split in splits:
        for why, names in split.left_out.items():
            merged.setdefault(why, {}).update(dict.fromkeys(names))
    return {why: list(names) for why, names in merged.items()}


def unread_classes(split: Split, broken: Collection[str]) -> list[str]:
    """Return the names of the classes of which a split has images, but none that can be read.

    Args:
        split: with the labels of training.
        broken: paths of the images that cannot be read.
    """
    if not broken:
        return []
    lost, counts = set(broken), np.bincount(split.targets)
    rare = np.flatnonzero(counts[split.targets] <= len(lost))  # others have images that are none of those
    readable = [place for place in rare if split.path(int(place)) not in lost]
    gone = np.setdiff1d(split.targets[rare], split.targets[readable])
    names = named(split.class_names, int(split.targets.max()) + 1)
    return [names[label] for label in gone]


def shrunk_note(size: tuple[int, int] | None, side: int | None, by: str = "") -> str | None:
    """Return a line on images that lose most of what is in them on their way into a model; None for others.

    Models for photographs shrink these too, but to a size at which their weights have learnt to tell things.

    Args:
        size: median width and height of the images; None where it is not known.
        side: of the model's input, the shorter one; None where it is not known.
        by: what shrinks them, where that has to be said.
    """
    if size is None or side is None or side > SMALL_INPUT or min(size) < max(SMALLEST_PHOTOGRAPH, MUCH_LARGER * side):
        return None
    width, height = size
    return (
        f"note: images of median size {width:,} x {height:,} are shrunk to {side} px{by}; recipes for photographs: "
        f"{', '.join(FOR_PHOTOGRAPHS)}"
    )


def median_size(split: Split) -> tuple[int, int] | None:
    """Return the median width and height of up to `MEASURED` images of a split; None where none can be read."""
    return median_of(sampled_sizes(split, MEASURED))


def median_of(sizes: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """Return the median of widths and that of heights; None of nothing."""
    if not sizes:
        return None
    width, height = np.median(sizes, axis=0)
    return int(width), int(height)


def _groups(split: Split) -> tuple[int, int]:
    """Return how many groups a split has, and how many of its images stand alone."""
    if split.groups is None:
        return 0, 0
    return len(set(split.groups.tolist()) - {""}), int((split.groups == "").sum())
