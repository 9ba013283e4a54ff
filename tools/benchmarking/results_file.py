"""The results file: every figure, the rows of the table, and where they were measured; and the table as text."""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarking.targets import ROWS, Machine, verdict
from benchmarking.turns import Conditions, Record
from mbib_timm.environment import Environment
from mbib_timm.errors import MbibError
from mbib_timm.files import read_json
from mbib_timm.results.tables import NOTHING, Table

# A row keeps its figures only beside others that were measured under the same of these.
SAME = ("hardware", "cpu_count", "threads", "torch", "timm")
DEVICES = {"cpu": "CPU", "cuda": "CUDA"}


@dataclass(frozen=True)
class Figures:
    """A contestant's figures: one per repeat, their median, minimum, maximum and number."""

    repeats: list[float]
    median: float
    min: float
    max: float
    n: int

    @classmethod
    def of(cls, values: list[float]) -> "Figures":
        """Summarize values, one per repeat."""
        return cls(values, statistics.median(values), min(values), max(values), len(values))


@dataclass(frozen=True)
class KeptRecord:
    """A `Record` in the file.

    Attributes:
        commit: that it was measured at; None outside a checkout.
        settings: what was measured, exactly.
        unit: of the figures.
        contestants: their figures, by name.
    """

    commit: str | None
    settings: Conditions
    unit: str
    contestants: dict[str, Figures]


@dataclass(frozen=True)
class MeasuredRow:
    """A row of the table on one device; what comes after the verdict is None where it was not measured.

    Attributes:
        row: its name in `ROWS`.
        what: is measured, with its unit where it is no ratio.
        target: on the device; None for a row that is there for information.
        bound: ``at least`` or ``at most``.
        verdict: on the median, or the command that would measure the row.
        values: one per repeat.
        median: of the values.
        min: smallest value.
        max: largest value.
        n: number of values.
        commit: that they were measured at; None also outside a checkout.
    """

    row: str
    what: str
    target: float | None
    bound: str
    verdict: str
    values: list[float] | None = None
    median: float | None = None
    min: float | None = None
    max: float | None = None
    n: int | None = None
    commit: str | None = None


@dataclass(frozen=True)
class Results:
    """What the file holds.

    Attributes:
        environment: of the latest measurement.
        records: by name.
        rows: of the table, in the order of `ROWS`.
    """

    environment: Environment
    records: dict[str, KeptRecord]
    rows: list[MeasuredRow]

    def measured(self) -> dict[str, MeasuredRow]:
        """Return the rows that were measured, by name."""
        return {row.row: row for row in self.rows if row.values is not None}


def build_row(name: str, machine: Machine, values: list[float] | None = None, commit: str | None = None) -> MeasuredRow:
    """Return a row of `ROWS` on a machine; without values where it was not measured."""
    row = ROWS[name]
    target, bound = row.target(machine), "at least" if row.at_least else "at most"
    if values is None:
        return MeasuredRow(name, row.what, target, bound, verdict(row, None, machine))
    told = Figures.of(values)
    measured = (values, told.median, told.min, told.max, told.n, commit)
    return MeasuredRow(name, row.what, target, bound, verdict(row, told.median, machine), *measured)


def build_rows(measured: Mapping[str, MeasuredRow], machine: Machine) -> list[MeasuredRow]:
    """Return every row of `ROWS`, those that were measured with the targets of today."""
    kept = {name: (row.values, row.commit) for name, row in measured.items()}
    return [build_row(name, machine, *kept.get(name, ())) for name in ROWS]


def read_results(file: Path) -> Results:
    """Read a results file. Raises MbibError for one of another kind."""
    try:
        return read_json(Results, file, "results of this tools/benchmark.py")
    except MbibError as error:
        raise MbibError(f"{error}; remove it, and measure again") from None


def require_same_machine(results: Results, environment: Environment, file: Path) -> None:
    """Raise MbibError where a file's figures cannot stand beside those that would be measured now."""
    for key in SAME:
        before, now = getattr(results.environment, key), getattr(environment, key)
        if before != now:
            raise MbibError(
                f"{file} was measured with {key} {before}, this is {now}: measure into another --results, or remove it"
            )


def merge(old: Results | None, environment: Environment, records: Iterable[Record]) -> Results:
    """Return new results with what an earlier file holds besides."""
    commit, machine = environment.commit, Machine(environment.device, environment.hardware)
    kept = dict(old.records) if old else {}
    rows = old.measured() if old else {}
    for record in records:
        contestants = {who: Figures.of(values) for who, values in record.figures.items()}
        kept[record.name] = KeptRecord(commit, record.settings, record.unit, contestants)
        rows |= {name: build_row(name, machine, values, commit) for name, values in record.rows.items()}
    return Results(environment, kept, build_rows(rows, machine))


def plain_text(results: Results) -> str:
    """Return the table for a terminal."""
    rows = [[row.what, _median(row), _target(row), row.verdict] for row in results.rows]
    return Table(["what", "median (min–max)", "target", "verdict"], rows).text()


def markdown(files: Mapping[str, Results]) -> str:
    """Return one table of all devices for docs/, above a line on where each one's figures come from.

    Args:
        files: contents of the results files, by their links. Without one of a CPU or of a CUDA device, its targets
            stand there as not measured.
    """
    machines = [Machine(each.environment.device, each.environment.hardware) for each in files.values()]
    tables = [build_rows(each.measured(), machine) for each, machine in zip(files.values(), machines, strict=True)]
    absent = [Machine(device) for device in DEVICES if device not in {machine.device for machine in machines}]
    machines += absent
    tables += [build_rows({}, machine) for machine in absent]
    header = ["what", "`--only`"]
    for machine in machines:
        header += [f"{DEVICES.get(machine.device, machine.device)} target", "measured"]
    rows = []
    for entries in zip(*tables, strict=True):
        row = ROWS[entries[0].row]
        shown = [row.what, row.measurement]
        for machine, entry in zip(machines, entries, strict=True):
            here = row.is_measured_on(machine.device)
            shown += [_target(entry), _measured(entry)] if here else [NOTHING, NOTHING]
        rows.append(shown)
    origins = [_origin(results, link) for link, results in files.items()]
    return "\n".join([Table(header, rows).markdown(), "", *origins]) + "\n"


def _median(row: MeasuredRow) -> str:
    if row.median is None or row.min is None or row.max is None:
        return NOTHING
    return f"{_number(row.median)} ({_number(row.min)}–{_number(row.max)})"


def _target(row: MeasuredRow) -> str:
    return NOTHING if row.target is None else f"{'≥' if row.bound == 'at least' else '≤'} {row.target:,g}"


def _measured(row: MeasuredRow) -> str:
    if row.median is None:
        return "not measured"
    return _median(row) + ("" if row.target is None else f": {row.verdict}")


def _number(value: float) -> str:
    """Return a number with as many digits as it is worth."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3f}"


def _origin(results: Results, link: str) -> str:
    environment = results.environment
    measured = results.measured().values()
    commits = sorted({row.commit or "none" for row in measured})
    repeats = sorted({row.n for row in measured if row.n is not None})
    return (
        f"[{DEVICES.get(environment.device, environment.device)}]({link}): {environment.hardware}, "
        f"{environment.threads} of {environment.cpu_count} CPU cores, torch {environment.torch}, timm "
        f"{environment.timm}; median (min–max) of {', '.join(map(str, repeats))} repeats; "
        f"commit {', '.join(commits)}."
    )
