"""Files of a number for each class: class weights, and class frequencies; and the class weights of a loss.

Files hold numbers by class name, as a CSV of two columns, with a header or without one, as a CSV with the named columns
among others, or as a mapping in JSON or YAML; or a number for each class in label order, one per line or as a list in
JSON or YAML.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mbib_timm.data.long_tail import named
from mbib_timm.errors import DataError, few, unknown_name
from mbib_timm.files import composed, csv_rows, parse_json, parse_yaml, read_text
from mbib_timm.options import is_number
from mbib_timm.recipe.checks import parse_class_weights

DELIMITERS = ",;\t"
CLASS = "class"


@dataclass(frozen=True)
class ClassValues:
    """What the numbers of a file are.

    Attributes:
        file: what the file is called in messages, such as ``class weights``.
        number: what a number is called there and in a CSV's header, such as ``weight``.
        zero: whether a number may be 0.
        missing: what a message says to a class that is left out.
    """

    file: str
    number: str
    zero: bool
    missing: str


WEIGHTS = ClassValues("class weights", "weight", zero=False, missing="every class needs one")


def label_names(class_names: Sequence[str] | None, num_classes: int) -> tuple[str, ...]:
    """Return a name of its own for each class: its name, with its label where two share it; its label without one.

    Args:
        class_names: in label order, where they are known.
        num_classes: classes K.
    """
    names = named(class_names, num_classes)
    count = Counter(names)
    return tuple(name if count[name] == 1 else f"{name} [{label}]" for label, name in enumerate(names))


def read_class_values(file: Path, names: Sequence[str], of: ClassValues) -> np.ndarray:
    """Read a number for each class.

    Names are compared in Unicode's composed form.

    Args:
        file: see this module's beginning.
        names: of the classes, each one's own, in label order.
        of: what the numbers are.

    Returns:
        (K,), float64, finite, each above 0 or at least 0.

    Raises:
        DataError: a file that cannot be read, is of another format, leaves out a class, names one that is unknown or
            twice, or holds what is no such number; names the file and the class or line.
    """
    where = f"the {of.file} {file}"
    header, given = _parse(file, read_text(file, of.file, DataError), names, of)
    if not isinstance(given, Mapping):
        if len(given) != len(names):
            raise DataError(f"{where}: expected a {of.number} for each of the {len(names)} classes, got {len(given):,}")
        given = dict(zip(names, given, strict=True))
    known = {composed(name): label for label, name in enumerate(names)}
    values = np.full(len(names), math.nan)
    for name, number in given.items():
        key = composed(str(name))
        key = key if key in known else key.strip()
        if key not in known:
            raise DataError(f"{where}: {unknown_name('class', str(name), names)}")
        if not math.isnan(values[known[key]]):
            raise DataError(f"{where}: class {name!r} is listed twice")
        values[known[key]] = _number(number, of, f"{where}: class {name!r}")
    if missing := [repr(names[label]) for label in np.flatnonzero(np.isnan(values)).tolist()]:
        taken = f" (its first line, {header!r}, is taken for a header)" if header else ""
        raise DataError(f"{where} has no {of.number} for {few(missing)}; {of.missing}{taken}")
    return values


def _number(given: object, of: ClassValues, where: str) -> float:
    """Return a number, which JSON gives as such and everything else as text."""
    plain = isinstance(given, str | int | float) and not isinstance(given, bool)
    try:
        number = float(given) if plain else math.nan  # type: ignore[arg-type]
    except (ValueError, OverflowError):
        number = math.nan
    if not (0 <= number < math.inf and (of.zero or number > 0)):
        least = "of at least 0" if of.zero else "above 0"
        got = repr(str(given)[:40]) if plain else f"a {type(given).__name__}"
        raise DataError(f"{where}: expected a number {least}, got {got}")
    return number


def _parse(
    file: Path, text: str, names: Sequence[str], of: ClassValues
) -> tuple[str, Mapping[str, object] | Sequence[object]]:
    """Return a CSV's header, if it has one, and numbers by class name or in label order, not yet checked."""
    words, suffix = text.split(), file.suffix.lower()
    if words and "\t" not in text and all(map(is_number, words)):
        return "", words
    first = text.strip().partition("\n")[0]
    is_csv = suffix not in (".json", ".yaml", ".yml") and ":" not in first and first[:1] not in ("[", "{", "-")
    if suffix in (".csv", ".tsv") or (is_csv and any(each in first for each in DELIMITERS)):
        return _parse_csv(file, text, names, of)
    try:
        content = parse_json(text) if suffix == ".json" else parse_yaml(text, as_text=True)
    except ValueError as error:
        raise DataError(f"the {of.file} {file}: {str(error).partition(';')[0]}; {_expected(of)}") from None
    if not content or not isinstance(content, dict | list):
        raise DataError(f"the {of.file} {file}: {_expected(of)}")
    return "", content


def _expected(of: ClassValues) -> str:
    return f"expected a {of.number} for each class: a CSV of {CLASS},{of.number}, or a mapping or list in JSON or YAML"


def _parse_csv(file: Path, text: str, names: Sequence[str], of: ClassValues) -> tuple[str, dict[str, object]]:
    where = f"the {of.file} {file}"
    first = next((line for line in text.splitlines() if line.strip()), "")
    separator = max(DELIMITERS, key=first.count)
    rows = list(csv_rows(text, separator, where))
    if not rows:
        raise DataError(f"{where} is empty; {_expected(of)}")
    columns, header = _columns(rows[0][1], names, of, where)
    found: dict[str, object] = {}
    for line, row in rows[bool(header) :]:
        if len(row) <= max(columns):
            raise DataError(f"{where}, line {line}: expected {CLASS} and {of.number}, got {separator.join(row)[:40]!r}")
        name = row[columns[0]]
        if name in found:
            raise DataError(f"{where}, line {line}: class {name!r} is listed twice")
        found[name] = row[columns[1]]
    return header, found


def _columns(first: Sequence[str], names: Sequence[str], of: ClassValues, where: str) -> tuple[tuple[int, int], str]:
    """Return the places of class and number in a CSV's rows; and its first row where that is a header, else nothing."""
    lower = [cell.lower() for cell in first]
    if CLASS in lower and of.number in lower:
        return (lower.index(CLASS), lower.index(of.number)), ",".join(first)
    if len(first) != 2:
        raise DataError(
            f"{where}: expected two columns, or columns {CLASS!r} and {of.number!r}, got {few(first)[:80]!r}"
        )
    is_class = composed(first[0]) in {composed(name) for name in names}
    return (0, 1), "" if is_class or is_number(first[1]) else ",".join(first)


def require_weights_file(given: str) -> None:
    """Raise DataError where the recipe key ``class_weights`` names a file that is missing or cannot be read."""
    if parse_class_weights(given)[0] == "file":
        read_text(Path(given), WEIGHTS.file, DataError)


def loss_weights(given: str, class_counts: np.ndarray, class_names: Sequence[str] | None) -> np.ndarray | None:
    """Return the class weights that a recipe asks for, scaled so that their mean over the training images is 1.

    Of n_k images ``balanced`` gives 1 / n_k, ``power:p`` n_k^-p, and ``effective:b`` (1 - b) / (1 - b^n_k) (Cui et al.
    2019). With the mean at 1 a loss keeps its scale, and with it the learning rate its meaning.

    Args:
        given: recipe key ``class_weights``: none, balanced, effective[:beta], power[:p], or a file.
        class_counts: training images of each class, (K,), at least 1.
        class_names: in label order; numbers where there are none.

    Returns:
        (K,), float64; None for none.

    Raises:
        MbibError: a value that is none of these.
        DataError: a file that is none of weights for these classes; see `read_class_values`.
    """
    kind, number = parse_class_weights(given)
    counts = class_counts.astype(np.float64)
    if kind == "none":
        return None
    if kind == "file":
        weights = read_class_values(Path(given), label_names(class_names, len(counts)), WEIGHTS)
        weights /= weights.max()
    elif kind == "effective":
        weights = (1 - number) / (1 - number**counts)
    else:
        weights = (counts / counts.min()) ** -number  # the rarest class has 1, whatever the exponent
    return weights * counts.sum() / (weights * counts).sum()
