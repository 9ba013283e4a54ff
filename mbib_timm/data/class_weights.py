"""Class weights of a loss: from the training counts, or from a file by class name."""

import csv
import difflib
import json
import math
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mbib_timm.data.long_tail import named
from mbib_timm.errors import DataError, few, first_line
from mbib_timm.options import is_number
from mbib_timm.recipe.checks import parse_class_weights


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
        DataError: a file that cannot be read, or that leaves out a class, names an unknown one, or holds what is no
            positive number.
    """
    kind, number = parse_class_weights(given)
    counts = class_counts.astype(np.float64)
    if kind == "none":
        return None
    if kind == "file":
        weights = _in_order(_read(Path(given)), named(class_names, len(counts)), given)
    elif kind == "effective":
        weights = (1 - number) / (1 - number**counts)
    else:
        weights = counts**-number
    return weights * counts.sum() / (weights * counts).sum()


def _in_order(given: Mapping[str, Any], names: Sequence[str], file: str) -> np.ndarray:
    """Return weights by name in the order of the labels, (K,)."""
    known = {unicodedata.normalize("NFC", name): name for name in names}
    weights: dict[str, float] = {}
    for name, text in given.items():
        key = unicodedata.normalize("NFC", name)
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise DataError(f"class weights {file}: unknown class {name!r}{hint}")
        try:
            weights[known[key]] = float(text)
        except (TypeError, ValueError):
            weights[known[key]] = math.nan
        if not 0 < weights[known[key]] < math.inf:
            raise DataError(f"class weights {file}: class {name!r}: expected a number above 0, got {text!r}")
    if missing := [name for name in names if name not in weights]:
        raise DataError(f"class weights {file}: no weight for {few([*map(repr, missing)])}; every class needs one")
    return np.array([weights[name] for name in names])


def _read(file: Path) -> dict[str, Any]:
    """Read weights by class name, as text or numbers. Names stay text: YAML would make a class ``no`` false."""
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix.lower() == ".csv":
            return _of_rows(list(csv.reader(text.splitlines())), file)
        content = json.loads(text) if file.suffix.lower() == ".json" else yaml.load(text, Loader=yaml.BaseLoader)
    except OSError as error:
        raise DataError(f"cannot read class weights {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"class weights {file}: no text file in UTF-8; save it as 'CSV UTF-8'") from None
    except (ValueError, yaml.YAMLError, csv.Error) as error:
        raise DataError(f"class weights {file}: {first_line(error)}") from None
    if not isinstance(content, Mapping):
        raise DataError(f"class weights {file}: expected a mapping from class names to weights")
    return {str(name): weight for name, weight in content.items()}


def _of_rows(rows: list[list[str]], file: Path) -> dict[str, Any]:
    """Return weights by name from the rows of a CSV file, whose first may be a header."""
    found: dict[str, Any] = {}
    for number, row in enumerate(rows, start=1):
        if not row:
            continue
        if len(row) != 2:
            raise DataError(f"class weights {file}, line {number}: expected 'class,weight', got {','.join(row)!r}")
        name, weight = row[0], row[1].strip()
        if number == 1 and not is_number(weight):
            continue
        if name in found:
            raise DataError(f"class weights {file}, line {number}: class {name!r} for the second time")
        found[name] = weight
    return found
