"""The numbers that the paper reports, from ``paper.yaml``: of runs by their names, of ablations by their tables."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import yaml

_NUMBERS: dict[str, Any] = yaml.safe_load((files("mbib_timm.results") / "paper.yaml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class PaperResult:
    """A result that the paper reports.

    Attributes:
        source: the table.
        accuracies: of ``overall``, ``many``, ``medium`` and ``few`` what the table has, in percent.
        setting: where it differs from the recipe's.
    """

    source: str
    accuracies: dict[str, float]
    setting: str = ""


@dataclass(frozen=True)
class Ablation:
    """A table of the paper that a sweep repeats.

    Attributes:
        recipe: what the paper varies.
        numbers: each with values of the sweep's axes and accuracies in percent.
    """

    recipe: str
    numbers: list[dict[str, Any]]


def _result(source: str, setting: str = "", **accuracies: float) -> PaperResult:
    return PaperResult(source, accuracies, setting)


RESULTS: Mapping[str, tuple[PaperResult, ...]] = {
    name: tuple(_result(**number) for number in numbers) for name, numbers in _NUMBERS["runs"].items()
}
ABLATIONS: Mapping[str, Ablation] = {name: Ablation(**table) for name, table in _NUMBERS["ablations"].items()}
# Table 5: the ratio rho by run, embedding and shot group. Table 6: parameters and MACs by model.
TABLE_5_EPOCHS: int = _NUMBERS["distances"]["epochs"]
TABLE_5: Mapping[str, Mapping[str, Mapping[str, float]]] = _NUMBERS["distances"]["runs"]
TABLE_6: Mapping[str, Mapping[str, int]] = _NUMBERS["costs"]
