"""Groups of images that belong on one side of a split: of one site, burst, patient or date.

A recipe names them with `group_by`: ``column`` of a table; ``folder:N``, the N-th folder below that of the class; or
``pattern:REGEX``, the first group in parentheses of what the expression finds in an image's relative path. An image
without a group stands alone.
"""

import re
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from mbib_timm.errors import DataError
from mbib_timm.files import composed
from mbib_timm.recipe import Recipe

# Random orders of the groups that are tried; fewer of many groups, which come out alike.
TRIES, TRIED_GROUPS = 32, 20_000
# Rounds over all groups in which a choice is bettered.
ROUNDS = 4
# What it costs that a class is not held out at all: as much as three times its share.
UNCOVERED = 4.0


def group_names(group_by: str, names: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """Return the name of each image's group, (N,); empty where it has none.

    Args:
        group_by: ``folder:N`` or ``pattern:REGEX``.
        names: relative paths, which begin with the class or not.
        labels: class names of the images, in Unicode's composed form.
    """
    kind, _, argument = group_by.partition(":")
    names = [composed(name) for name in names]
    if kind == "folder":
        groups = [_folder(name, label, int(argument)) for name, label in zip(names, labels, strict=True)]
    else:
        pattern = re.compile(argument)
        groups = [match[1] or "" if (match := pattern.search(name)) else "" for name in names]
    return np.array(groups)


def require_groups(recipe: Recipe, groups: np.ndarray, first: str) -> None:
    """Check that there are groups, where something is to be held out by them.

    Args:
        recipe: names them.
        groups: names (N,).
        first: path of the first image, for the message.

    Raises:
        DataError: no image has a group.
    """
    if (groups != "").any():
        return
    if recipe.group_by == "column":
        column = recipe.group_column or "group"
        raise DataError(
            f"{recipe.table} has no groups: there is no column {column!r}, or nothing in it; --group-column names "
            "another one"
        )
    raise DataError(f"recipe key 'group_by': {recipe.group_by} gives no image a group, such as {first}")


def _folder(name: str, label: str, number: int) -> str:
    folders = name.split("/")[:-1]
    if folders and folders[0] == label:
        folders = folders[1:]
    return folders[number - 1] if len(folders) >= number else ""


def group_numbers(groups: np.ndarray) -> np.ndarray:
    """Return numbers of groups (N,), int64, from 0, for their names; an image without a group has one of its own."""
    _, numbers = np.unique(groups, return_inverse=True)
    alone = np.flatnonzero(groups == "")
    numbers[alone] = numbers.max() + 1 + np.arange(len(alone))
    return np.unique(numbers, return_inverse=True)[1].astype(np.int64)


def hold_out_groups(
    targets: np.ndarray, groups: np.ndarray, share: float, generator: np.random.RandomState
) -> np.ndarray:
    """Choose whole groups to hold out, so that of each class about a share of the images is.

    The sum over classes of the squared relative distance from that share is made small, and a class of which nothing is
    held out costs more: greedily, group by group in random order, until no group betters it, from several orders. A
    class of one group stays in training with it, and no class is held out as a whole.

    Args:
        targets: labels (N,).
        groups: names (N,); an image whose group is empty stands alone.
        share: of each class's images.
        generator: draws the orders.

    Returns:
        Which images are held out, (N,), bool; none where every group has a class of its own.
    """
    numbers = group_numbers(groups)
    count = int(numbers.max()) + 1
    # Images by group and class: of each group its classes and how many of each, for no group has many.
    pairs, images = np.unique(np.stack([numbers, targets]), axis=1, return_counts=True)
    starts = np.searchsorted(pairs[0], np.arange(count + 1))
    contents = [list(zip(pairs[1][a:b].tolist(), images[a:b].tolist(), strict=True)) for a, b in pairwise(starts)]
    groups_of = np.bincount(pairs[1]).tolist()
    sizes = np.bincount(targets)
    wanted = np.where(np.array(groups_of) > 1, np.maximum(1, np.rint(share * sizes)), 0).tolist()
    free = [number for number, content in enumerate(contents) if all(groups_of[label] > 1 for label, _ in content)]
    best, least = np.zeros(count, dtype=bool), np.inf
    for _ in range(max(1, min(TRIES, TRIED_GROUPS // count))):
        order = [free[i] for i in generator.permutation(len(free))]
        chosen, cost = _choose(order, contents, groups_of, wanted, count)
        if cost < least:
            best, least = chosen, cost
    return best[numbers]


def _choose(
    order: list[int], contents: list[list[tuple[int, int]]], groups_of: list[int], wanted: list[float], count: int
) -> tuple[np.ndarray, float]:
    """Take or leave each group as it betters the choice, until nothing does.

    Args:
        order: of the groups that may be taken.
        contents: of each group, its classes with their images.
        groups_of: groups of each class.
        wanted: images to take of each class.
        count: groups in all.

    Returns:
        Which groups are taken, (groups,), and how far off the choice is.
    """
    chosen = np.zeros(count, dtype=bool)
    taken, left = [0] * len(wanted), list(groups_of)
    for _ in range(ROUNDS):
        changed = False
        for number in order:
            content, sign = contents[number], -1 if chosen[number] else 1
            if sign > 0 and any(left[label] == 1 for label, _ in content):
                continue
            gain = 0.0
            for label, images in content:
                off, step = taken[label] - wanted[label], sign * images
                gain -= step * (2 * off + step) / wanted[label] ** 2
                gain += UNCOVERED * ((taken[label] == 0) - (taken[label] + step == 0))
            if gain <= 1e-12:
                continue
            chosen[number], changed = sign > 0, True
            for label, images in content:
                taken[label] += sign * images
                left[label] -= sign
        if not changed:
            break
    cost = sum(((got - aim) / aim) ** 2 + UNCOVERED * (got == 0) for got, aim in zip(taken, wanted, strict=True) if aim)
    return chosen, cost
