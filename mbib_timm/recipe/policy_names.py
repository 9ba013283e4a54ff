"""The names of augmentation policies, as the recipe key ``aa`` has them, and the numbers that follow them."""

import re
from collections.abc import Mapping

from mbib_timm.errors import MbibError, shown

# Augmentation policies, ours and timm's, and the parts that may follow a name, as in rand-m9-n2: each with its least
# and largest number, whole where both are written whole. timm itself passes over parts that it does not know.
_DEVIATION = {"mstd": (0.0, 1000.0)}
POLICIES: Mapping[str, Mapping[str, tuple[float, float]]] = {
    "cifar10": {},
    "rand": {"m": (0, 30), "mmax": (1, 30), "n": (1, 20), "p": (0.0, 1.0), "inc": (0, 1), **_DEVIATION},
    "augmix": {"m": (0, 10), "w": (1, 20), "d": (1, 20), "a": (0.001, 1000.0), "b": (0, 1), **_DEVIATION},
    **dict.fromkeys(("original", "originalr", "v0", "v0r", "3a"), _DEVIATION),
}
# Sets of operations that RandAugment may draw from, after a t, as timm calls them; and how many operations it may draw
# for an image: by weights it draws each once at most.
OPERATIONS = {"weights": 15, "3a": 20, "3aw": 14}


def parse_policy(aa: str) -> tuple[str, dict[str, float], str | None]:
    """Return what a recipe's policy is: its name, of `POLICIES`; its numbers, by the letters before them; and the name
    in `OPERATIONS` of what RandAugment draws from, None for its own.

    Raises:
        MbibError: neither ours nor timm's, a part that it does not take or takes once, or a number out of range.
    """
    name, *parts = aa.split("-")
    unknown = f"recipe key 'aa': unknown policy {shown(aa)}"
    if name not in POLICIES:
        raise MbibError(
            f"{unknown}; expected cifar10, rand-m9-n2-mstd0.5-inc1, or one of timm's: original, originalr, v0, v0r, "
            "3a, augmix-m3-w3"
        )
    numbers: dict[str, float] = {}
    operations = None
    for part in parts:
        match = re.fullmatch(r"([a-z]+)(\d{1,9}(?:\.\d{1,9})?)", part)
        if name == "rand" and part[:1] == "t" and part[1:] in OPERATIONS and operations is None:
            operations = part[1:]
        elif match is None or match[1] not in POLICIES[name] or match[1] in numbers:
            raise MbibError(f"{unknown}: {name} takes no {shown(part)}{_parts_of(name)}")
        else:
            low, high = POLICIES[name][match[1]]
            if not low <= float(match[2]) <= high or (isinstance(low, int) and not match[2].isdecimal()):
                raise MbibError(f"{unknown}: expected {match[1]} from {low} to {high}, got {match[2]}")
            numbers[match[1]] = float(match[2])
    if name == "rand" and numbers.get("m", 0) > (most := numbers.get("mmax", 10)):
        raise MbibError(f"{unknown}: expected m from 0 to {most:g}, got {numbers['m']:g}; mmax allows more")
    if operations is not None and numbers.get("n", 1) > OPERATIONS[operations]:
        raise MbibError(
            f"{unknown}: expected n from 1 to {OPERATIONS[operations]} with t{operations}, got {numbers['n']:g}"
        )
    return name, numbers, operations


def _parts_of(name: str) -> str:
    said = f"; expected {', '.join(POLICIES[name])}, each with a number and once" if POLICIES[name] else ""
    return f"{said}, or t with {', '.join(OPERATIONS)}" if name == "rand" else said
