"""Errors a user can mend: one short sentence each, naming the file, key or class at fault."""

import difflib
import re
import reprlib
from collections.abc import Iterable, Sequence


class MbibError(Exception):
    """A mistake in the input. The command line prints it without a traceback and exits with status 2."""

    exit_status = 2


class DataError(MbibError):
    """The data do not fit: a missing folder, a broken image, a malformed list line, a class without images."""


class CheckpointError(MbibError):
    """A checkpoint that is truncated, foreign, or does not fit the model."""


class BusyFolderError(MbibError):
    """Another process trains in the run's folder."""


class LostProcessError(MbibError):
    """Another process of a run has ended, and this one cannot go on without it."""

    exit_status = 1


class LostDeviceError(MbibError):
    """A device has failed or is gone, and its process cannot use it again."""

    exit_status = 1


class NonFiniteLossError(MbibError):
    """The training loss, or a weight, became infinite or not a number."""

    exit_status = 1


def first_line(error: BaseException) -> str:
    """Return what an error says first; libraries add paragraphs."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class _Shown(reprlib.Repr):
    """Shows the beginning of what is long or nested."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxdict = 3, 8, 8, 8
        self.maxstring, self.maxlong, self.maxother = 100, 40, 100

    def repr_int(self, value: int, level: int) -> str:
        """Show a number; Python writes none of thousands of digits."""
        return f"a number of {value.bit_length():,} bits" if value.bit_length() > 256 else repr(value)


def shown(value: object) -> str:
    """Return a value as Python writes it, cut where it is long or deep: what a message says of somebody's input."""
    return _Shown().repr(value)


def few(names: Sequence[object], most: int = 5) -> str:
    """Return the first of some names in a line, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return f"{', '.join(map(str, names[:most]))}{more}"


# Share of letters by which a name is behind the nearest one that is not named beside it.
FAR_BEHIND = 0.15


def nearest(name: str, valid: Iterable[str], most: int = 3, alike: float = 0.65) -> list[str]:
    """Return the valid names that a name may be a slip of, the nearest first, whatever the case of their letters.

    Args:
        name: that is not known.
        valid: the names that are.
        most: names to return.
        alike: share of the letters of both names together that stand in the same order.
    """
    own, folded = name.casefold(), {each.casefold(): each for each in valid}
    near = difflib.get_close_matches(own, folded, n=most, cutoff=alike)
    how_alike = {each: difflib.SequenceMatcher(None, each, own).ratio() for each in near}
    return [folded[each] for each in near if how_alike[each] > how_alike[near[0]] - FAR_BEHIND]


def _whole_of(part: str, names: Iterable[str], most: int = 3) -> list[str]:
    """Return the names that begin or end with a name, as words: ``class_means`` of ``means``."""
    word = re.escape(part)
    whole = re.compile(rf"{word}[^a-z].*|.*[^a-z]{word}", re.IGNORECASE | re.DOTALL)
    return [each for each in names if part and whole.fullmatch(each)][:most]


# What lists the valid names of some kind.
LISTED = {
    "recipe": "mbib recipes lists them",
    "sweep or recipe": "mbib recipes lists them",
    "method": "mbib methods lists them",
    "model": "mbib models --all lists this package's",
    "model or folder": "mbib models --all lists this package's",
    "recipe key": "mbib train --help lists them",
    "key": "mbib train --help lists them",
}


def unknown_name(kind: str, name: str, valid: Iterable[str]) -> MbibError:
    """Build the error for an unknown name, with the nearest valid names.

    Args:
        kind: what was asked for, e.g. ``"loss"``.
        name: the name that is not known.
        valid: the names that are.
    """
    names = sorted(valid)
    if near := nearest(name, names) or _whole_of(name, names):
        hint = f"did you mean {' or '.join(map(repr, near))}?"
    elif not names:
        hint = "there are none."
    elif len(names) <= 20:
        hint = f"choose from {', '.join(names)}."
    else:
        listed = f"; {LISTED[kind]}" if kind in LISTED else ""
        hint = f"there are {len(names)} valid names, e.g. {', '.join(names[:3])}{listed}."
    return MbibError(f"unknown {kind} {shown(name)}: {hint}")
