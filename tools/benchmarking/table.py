"""The table: what is measured, its targets, and what a results file says about each."""

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mbib_timm.errors import MbibError

DEVICES = {"cpu": "CPU", "cuda": "CUDA"}
# A row keeps its figures only beside others that were measured under the same of these.
SAME = ("hardware", "cpu_count", "threads", "torch", "timm")


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        measurement: what to ask `--only` for.
        what: is measured, with its unit where it is no ratio.
        targets: by type of device; none for a row that is there for information.
        at_least: the target is a lower bound, else an upper one.
        flags: that the measurement needs besides, by type of device.
        cuda_only: other devices do not measure it.
    """

    measurement: str
    what: str
    targets: Mapping[str, float]
    at_least: bool = False
    flags: Mapping[str, str] | None = None
    cuda_only: bool = False

    def target(self, device: str) -> float | None:
        """Return the target on a type of device."""
        return self.targets.get("cuda" if self.cuda_only else device)

    def command(self, device: str) -> str:
        """Return the command that measures the row."""
        chosen = "cuda" if self.cuda_only else device
        command = f"python tools/benchmark.py --device {chosen} --only {self.measurement}"
        return " ".join([command, *filter(None, [(self.flags or {}).get(chosen)])])


def both(cpu: float, cuda: float) -> dict[str, float]:
    """Return targets by device."""
    return {"cpu": cpu, "cuda": cuda}


# Methods whose step is measured against that of cross-entropy: the name of each one's row, and its recipe.
METHOD_RECIPES = {
    "BSCE": "cifar_resnet32.bsce_cifar100_lt_if100",
    "LDAM-DRW": "cifar_resnet32.ldam_drw_cifar100_lt_if100",
    "MBIB": "mbib_resnet32.cifar100_lt_if100",
    "DiVE": "cifar_resnet32.dive_cifar100_lt_if100",
    "PaCo": "cifar_resnet32.paco_cifar100_lt_if100",
    "SADE": "experts_resnet32.sade_cifar100_lt_if100",
    "SADE + MBIB": "mbib_experts_resnet32.sade_mbib_cifar100_lt_if100",
}

ROWS = {
    "pipeline": Row(
        "pipeline",
        "ResNet32, CIFAR-100-LT IF100: training images/s over timm's loader and loop",
        both(1.6, 10),
        at_least=True,
    ),
    "pipeline-mbib": Row("pipeline", "MBIB-ResNet32's training images/s over the same", {}),
    "pipeline-convolutions": Row("pipeline", "ResNet32's convolutions alone over the same: the ceiling", {}),
    "step-resnet32": Row("step-resnet32", "MBIB step / plain step, ResNet32, compiled", both(1.05, 1.15)),
    "step-resnet32-eager": Row("step-resnet32", "the same, eager", {}),
    **{
        f"step-methods-{title}": Row("step-methods", f"{title} step / CE step, ResNet32; on the CPU eager", {})
        for title in METHOD_RECIPES
    },
    "augmentation": Row(
        "augmentation",
        "ResNet32, cross-entropy: an epoch with AutoAugment and Cutout / one with crop and flip alone",
        both(1.1, 1.1),
    ),
    "augmentation-views": Row("augmentation", "batches of PaCo's two views / of crop and flip alone, no training", {}),
    "step-resnext50": Row(
        "step-resnext50",
        "MBIB step / plain step, ResNeXt50 at 224 px, compiled",
        both(1.03, 1.03),
        flags={"cpu": "--torchcompile-large"},
    ),
    "step-resnext50-eager": Row("step-resnext50", "the same, eager", {"cpu": 1.03}),
    "memory-resnet32": Row("memory-resnet32", "peak memory MBIB / plain, ResNet32", both(1.05, 1.05)),
    "memory-resnext50": Row("memory-resnext50", "peak memory MBIB / plain, ResNeXt50", both(1.05, 1.05)),
    "evaluate-resnet32": Row("evaluate-resnet32", "MBIB evaluation / plain evaluation, ResNet32", both(1.02, 1.02)),
    "evaluate-resnet32-forward": Row("evaluate-resnet32", "MBIB evaluation / plain forward pass alone, ResNet32", {}),
    "evaluate-resnext50": Row(
        "evaluate-resnext50", "MBIB evaluation / plain evaluation, ResNeXt50", {"cuda": 1.02}, cuda_only=True
    ),
    "evaluate-resnext50-forward": Row(
        "evaluate-resnext50", "MBIB evaluation / plain forward pass alone, ResNeXt50", {}, cuda_only=True
    ),
    "epochs-200": Row(
        "epochs-200",
        "200 epochs CIFAR-100-LT IF100 MBIB-ResNet32, evaluation included, compiling excluded: seconds",
        {"cuda": 18},
        cuda_only=True,
    ),
    "epochs-200-whole": Row("epochs-200", "the same with start, checkpoints and figures: seconds", {}, cuda_only=True),
    "throughput-resnext50": Row(
        "throughput-resnext50",
        "MBIB-ResNeXt50 at 224 px, bf16, resident images: training images/s",
        {"cuda": 4400},
        at_least=True,
        cuda_only=True,
    ),
    "start": Row(
        "start", "`mbib train` until the first step begins, after importing torch and timm: seconds", both(1, 2)
    ),
    "start-step": Row("start", "the same until the first step is done: seconds", {}),
    "start-large": Row(
        "start-large",
        "the same until the first step begins, 437,513 images in 8,142 classes by list: seconds",
        {"cpu": 10},
    ),
}
MEASUREMENTS = tuple(dict.fromkeys(row.measurement for row in ROWS.values()))


def summarize(values: list[float]) -> dict[str, float]:
    """Return median, minimum, maximum and number."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def ratios(numerators: list[float], denominators: list[float]) -> list[float]:
    """Return the ratio within each repeat."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def verdict(row: Row, median: float | None, device: str) -> str:
    """Return whether a row meets its target, by how much it does not, or what would measure it."""
    if median is None:
        return f"not measured: `{row.command(device)}`"
    target = row.target(device)
    if target is None:
        return "for information"
    missed = 1 - median / target if row.at_least else median / target - 1
    return "met" if missed <= 0 else f"missed by {100 * missed:.1f} %"


def build_rows(measured: Mapping[str, Mapping[str, Any]], device: str) -> list[dict[str, Any]]:
    """Return the table.

    Args:
        measured: for each row that was, its ``values`` (one a repeat) and the ``commit`` that they belong to.
        device: type of the device.
    """
    table = []
    for name, row in ROWS.items():
        figures: dict[str, Any] = {}
        if name in measured:
            values = list(measured[name]["values"])
            figures = {"values": values, **summarize(values), "commit": measured[name]["commit"]}
        table.append(
            {
                "row": name,
                "what": row.what,
                "target": row.target(device),
                "bound": "at least" if row.at_least else "at most",
                "verdict": verdict(row, figures.get("median"), device),
                **figures,
            }
        )
    return table


def read_results(file: Path) -> dict[str, Any]:
    """Read a results file. Raises MbibError for one of another kind."""
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if not {"environment", "records", "rows"} <= results.keys():
        raise MbibError(f"{file} is no results file of this tools/benchmark.py: remove it, and measure again")
    return results


def require_same_machine(results: Mapping[str, Any], environment: Mapping[str, Any], file: Path) -> None:
    """Raise MbibError where a file's figures cannot stand beside those that would be measured now."""
    for key in SAME:
        before, now = results["environment"].get(key), environment[key]
        if before != now:
            raise MbibError(
                f"{file} was measured with {key} {before}, this is {now}: measure into another --results, or remove it"
            )


def merge(old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> dict[str, Any]:
    """Return new results with what an earlier file holds besides.

    Args:
        old: content of the file, or None.
        new: ``environment``, ``records`` by name, and under ``measured`` the values of each row.
    """
    commit, device = new["environment"]["commit"], new["environment"]["device"]
    measured = {name: {"values": values, "commit": commit} for name, values in new["measured"].items()}
    records = {name: {"commit": commit, **record} for name, record in new["records"].items()}
    return {
        "environment": dict(new["environment"]),
        "records": {**(old or {}).get("records", {}), **records},
        "rows": build_rows({**_measured(old), **measured}, device),
    }


def _measured(results: Mapping[str, Any] | None) -> dict[str, Mapping[str, Any]]:
    return {row["row"]: row for row in (results or {}).get("rows", ()) if "values" in row}


def cells(row: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Return what a row shows: what, measured, target, verdict."""
    measured = f"{number(row['median'])} ({number(row['min'])}–{number(row['max'])})" if "median" in row else "–"
    sign = "≥" if row["bound"] == "at least" else "≤"
    target = "–" if row["target"] is None else f"{sign} {row['target']:,g}"
    return row["what"], measured, target, row["verdict"]


def number(value: float) -> str:
    """Return a number with as many digits as it is worth."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3f}"


def plain_text(results: Mapping[str, Any]) -> str:
    """Return the table for a terminal."""
    lines = [("what", "median (min–max)", "target", "verdict"), *map(cells, results["rows"])]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def markdown(files: Mapping[str, Mapping[str, Any]]) -> str:
    """Return one table of all devices for the README, above a line on where each one's figures come from.

    Args:
        files: contents of the results files, by their links. Without one of a CPU or of a CUDA device, its targets
            stand there as not measured.
    """
    columns: list[tuple[str, Mapping[str, Any] | None]] = [
        (results["environment"]["device"], results) for results in files.values()
    ]
    columns += [(device, None) for device in ("cpu", "cuda") if device not in dict(columns)]
    head = " | ".join(f"{DEVICES.get(device, device)} target | measured" for device, _ in columns)
    lines = [f"| what | `--only` | {head} |", f"|---|---|{'---|---|' * len(columns)}"]
    tables = [build_rows(_measured(results), device) for device, results in columns]
    for name, *entries in zip(ROWS, *tables, strict=True):
        shown: list[str] = []
        for (device, _), entry in zip(columns, entries, strict=True):
            elsewhere = ROWS[name].cuda_only and device != "cuda"
            shown += ["–", "–"] if elsewhere else [cells(entry)[2], _measured_cell(entry)]
        lines.append(f"| {ROWS[name].what} | {ROWS[name].measurement} | {' | '.join(shown)} |")
    return "\n".join([*lines, "", *(_origin(results, link) for link, results in files.items())]) + "\n"


def _measured_cell(entry: Mapping[str, Any]) -> str:
    if "median" not in entry:
        return "not measured"
    return cells(entry)[1] + ("" if entry["target"] is None else f": {entry['verdict']}")


def _origin(results: Mapping[str, Any], link: str) -> str:
    environment = results["environment"]
    commits = sorted({row["commit"] or "none" for row in results["rows"] if "commit" in row})
    repeats = sorted({row["n"] for row in results["rows"] if "n" in row})
    return (
        f"[{DEVICES.get(environment['device'], environment['device'])}]({link}): {environment['hardware']}, "
        f"{environment['threads']} of {environment['cpu_count']} CPU cores, torch {environment['torch']}, timm "
        f"{environment['timm']}; median (min–max) of {', '.join(map(str, repeats))} repeats; "
        f"commit {', '.join(commits)}."
    )
