"""`mbib report`: runs and sweeps in one HTML file, with their figures as PNG and PDF beside it."""

from collections.abc import Sequence
from pathlib import Path

import mbib_timm
from mbib_timm.errors import MbibError, few
from mbib_timm.files import contains, counted, require_own, write_bytes
from mbib_timm.models.zoo import ZOO
from mbib_timm.reporting.comparison import comparison_section
from mbib_timm.reporting.findings import outcome
from mbib_timm.reporting.sections import (
    FIGURE_TITLE,
    Section,
    give_unique_anchors,
    render_page,
    run_section,
    sweep_section,
)
from mbib_timm.reporting.short_titles import short_titles
from mbib_timm.reporting.terms import WORDS, terms_section
from mbib_timm.results.record import RECORD, is_finished
from mbib_timm.results.runs import FinishedRun, RunGroup, group_runs, read_run
from mbib_timm.sweeps.sweep_results import FILE, SweepResults, read_results


def report(names: Sequence[str], output: Path, title: str | None = None) -> Path:
    """Write a report, print where it is, and return the file. It opens with what was found.

    Args:
        names: folders of runs, of kept results and of sweeps' results; names of published models.
        output: HTML file to write; its figures go into a folder ``<stem>_figures`` beside it.
        title: of the page; what it holds by default.

    Raises:
        MbibError: something that is no result, no matplotlib, or a file that cannot be written, or would be replaced
            and is none of a report.
    """
    if output.suffix.lower() not in (".html", ".htm"):
        raise MbibError(f"--output {output}: expected the name of an HTML file, such as report.html")
    require_own("--output", output, contains(b"Written by <code>mbib report</code>"), "is not a report")
    groups, sweeps = read_inputs(names)
    sections = [comparison_section(groups, sweeps)] if len(groups) > 1 else []
    sections += [terms_section(groups)] if groups else []
    if len(groups) > 1:
        sections += [
            run_section(group, title, alone=False) for group, title in zip(groups, short_titles(groups), strict=True)
        ]
    else:
        sections += [run_section(group, sweeps=sweeps) for group in groups]
    sections += [sweep_section(results) for results in sweeps]
    give_unique_anchors(sections)
    titles = [*(group.title for group in groups), *(results.name for results in sweeps)]
    others = f" and {len(titles) - 2} others" if len(titles) > 3 else ""
    named = ", ".join(titles[:2] if others else titles)
    page = render_page(title or f"Report: {named}{others}", _lead(bool(groups)), sections, outcome(groups))
    folder = output.with_name(f"{output.stem}_figures")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _write_figures(folder, sections)
        write_bytes(output, page.encode())
    except OSError as error:
        raise MbibError(f"cannot write {error.filename or output}: {error.strerror}") from None
    figures = sum(len(section.figures) for section in sections)
    print(f"{output}: {counted(len(sections), 'section')}, {figures} figures, {len(page) / 1e6:.1f} MB")
    print(f"{folder}: the figures as PNG and PDF")
    return output


def read_inputs(names: Sequence[str]) -> tuple[list[RunGroup], list[SweepResults]]:
    """Read runs and sweeps by their folders or names.

    Args:
        names: folders of runs, or of kept results; folders of sweeps' results, or the sweep's name where they lie in
            ``results``; names of published models.

    Raises:
        MbibError: something that is none of these, or a run that is not finished.
    """
    runs: list[FinishedRun] = []
    sweeps: list[SweepResults] = []
    for name in names:
        folder = _folder(name)
        if (folder / FILE).is_file():
            sweeps.append(read_results(folder))
        else:
            runs.append(read_run(folder))
    return group_runs(runs), sweeps


def _folder(name: str) -> Path:
    published = [model.folder for model in ZOO if model.name == name and model.is_trained]
    for folder in (Path(name), Path("results") / name, *published):
        if (folder / FILE).is_file() or is_finished(folder):
            return folder
    if Path(name).is_dir():
        inside = sorted({str(file.parent) for kind in (RECORD, FILE) for file in Path(name).glob(f"*/{kind}")})
        there = f"; there are {few(inside)}" if inside else ""
        raise MbibError(
            f"{name} holds neither {RECORD} nor {FILE}: it is not a finished run or a sweep's results{there}"
        )
    if Path(name).exists():
        raise MbibError(f"{name} is a file: expected the folder of a run, of kept results or of a sweep's results")
    raise MbibError(
        f"there is no {name}: expected the folder of a run, of kept results or of a sweep's results, or a published "
        "name"
    )


def _lead(explains: bool) -> str:
    explained = f" Terms are explained under “{WORDS}”." * explains
    return (
        f"Written by `mbib report` of mbib_timm {mbib_timm.__version__} from the files of the runs. Results are those "
        f"of the last epoch, or of what a post-hoc method makes of a trained model.{explained}"
    )


def _write_figures(folder: Path, sections: Sequence[Section]) -> None:
    files = {
        folder / f"{section.anchor}-{name}.{form}": content
        for section in sections
        for name, drawn in section.figures.items()
        for form, content in drawn.items()
    }
    for file in files:  # before any is written
        require_own("--output", file, contains(FIGURE_TITLE.encode()), "is not a figure of this command")
    for file, content in files.items():
        folder.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
