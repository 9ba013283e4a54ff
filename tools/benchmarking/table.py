"""The table of a results file, for a terminal and for docs/."""

from collections.abc import Mapping

from benchmarking.results_file import MeasuredRow, Results, build_rows
from benchmarking.targets import ROWS, Machine
from mbib_timm.results.tables import NOTHING, Table

DEVICES = {"cpu": "CPU", "cuda": "CUDA"}


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
