"""What an analysis says, as a few lines of text."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mbib_timm.analysis.posterior import mean_by_shot_group, posterior_difference
from mbib_timm.results.tables import Table

GROUPS = ("all", "many", "medium", "few")


def summary_text(analysis: Mapping[str, Any]) -> str:
    """Return rho and the posterior by shot group, where errors go, the trend, the calibration and the costs.

    Args:
        analysis: what `analyze_run` returns.
    """
    counts = np.array(analysis["class_counts"])
    rows = [["", *GROUPS], ["top-1, %", *_cells(_top1(analysis), "{:.2f}")]]
    for name, groups in analysis["distances"].items():
        rows.append([f"rho of {name}", *_cells({group: groups[group]["rho"] for group in GROUPS}, "{:.3f}")])
    posterior = as_array(analysis["positive_posterior"]["prediction"])
    rows.append(["mean positive posterior", *_cells(mean_by_shot_group(posterior, counts), "{:.3f}")])
    lines = [
        f"{analysis['name']} on {analysis['split']}: {analysis['images']} images",
        *Table(rows[0], rows[1:]).lines(),
    ]

    confusion = [
        ["of the true group, %", "correct", "wrong to many", "medium", "few", "(evenly: many", "medium", "few)"]
    ]
    for group, shares in analysis["confusion"]["shares"].items():
        if shares is not None:
            even = list(analysis["confusion"]["even"][group].values())[1:]
            confusion.append([group, *(f"{value:.1f}" for value in [*shares.values(), *even])])
    lines += ["", *Table(confusion[0], confusion[1:]).lines(), ""]

    trend = analysis["trend"]
    if trend["slope"] is not None:
        explained = "" if trend["r2"] is None else f" (R^2 {trend['r2']:.2f})"
        lines.append(f"accuracy: {trend['slope']:+.1f} points for ten times the training images{explained}")
    errors = [f"{head} {values['ece']:.2f}" for head, values in analysis["reliability"].items()]
    lines.append(f"calibration error, %: {', '.join(errors)}")
    costs = analysis["efficiency"]
    size = "x".join(map(str, costs["input_size"]))
    for name in ("inference", "all_heads"):
        cost = costs[name]
        lines.append(
            f"{name.replace('_', ' ')} at {size}: {cost['parameters'] / 1e3:.2f} k parameters, "
            f"{cost['macs'] / 1e9:.2f} GMACs, {cost['peak_memory'] / 2**20:.1f} MiB at the peak"
        )
    return "\n".join(lines) + "\n"


def comparison_text(first: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Return how the mean positive posterior of a run differs from the first run's, by shot group (figure 7).

    Args:
        first: what `analyze_run` returns; its training counts decide the shot groups.
        other: that of another run with as many classes.
    """
    posteriors = [as_array(run["positive_posterior"]["prediction"]) for run in (other, first)]
    difference = mean_by_shot_group(posterior_difference(*posteriors), np.array(first["class_counts"]))
    title = f"mean positive posterior, {run_title(other)} minus {run_title(first)}"
    return "\n".join([title, *Table(["", *GROUPS], [["difference", *_cells(difference, "{:+.3f}")]]).lines()]) + "\n"


def run_title(analysis: Mapping[str, Any]) -> str:
    """Return the name of an analyzed run, with its seed where that is known."""
    seed = "" if analysis["seed"] is None else f" (seed {analysis['seed']})"
    return f"{analysis['name']}{seed}"


def _top1(analysis: Mapping[str, Any]) -> dict[str, float | None]:
    metrics = analysis["heads"]["prediction"]
    return {"all": metrics["top1"], **{group: metrics[group] for group in GROUPS[1:]}}


def as_array(values: Sequence[float | None]) -> np.ndarray:
    """Return numbers as a JSON file has them, with nan for what could not be measured."""
    return np.array([np.nan if value is None else value for value in values])


def _cells(values: Mapping[str, float | None], form: str) -> list[str]:
    return ["-" if values[group] is None else form.format(values[group]) for group in GROUPS]
