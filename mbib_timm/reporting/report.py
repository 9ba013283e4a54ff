"""`mbib report`: runs and sweeps in one HTML file, with their figures as PNG and PDF beside it."""

from collections.abc import Sequence
from pathlib import Path

import mbib_timm
from mbib_timm.errors import MbibError
from mbib_timm.reporting.inputs import read_inputs
from mbib_timm.reporting.page import Section, render_page, unique_anchors
from mbib_timm.reporting.sections import comparison_section, run_section, sweep_section
from mbib_timm.training.checkpoint import write_atomically


def report(names: Sequence[str], output: Path, title: str | None = None) -> Path:
    """Write a report, and print where it is.

    Args:
        names: folders of runs, of kept results and of sweeps' results; names of published models.
        output: HTML file to write; its figures go into a folder ``<stem>_figures`` beside it.
        title: of the page; what it holds by default.

    Returns:
        The file.

    Raises:
        MbibError: something that is no result, no matplotlib, or a file that cannot be written.
    """
    if output.suffix.lower() not in (".html", ".htm"):
        raise MbibError(f"--output {output}: expected the name of an HTML file, such as report.html")
    groups, sweeps = read_inputs(names)
    sections = [comparison_section(groups)] if len(groups) > 1 else []
    sections += [run_section(group) for group in groups]
    sections += [sweep_section(results) for results in sweeps]
    titles = [*(group.title for group in groups), *(results.name for results in sweeps)]
    page = render_page(title or "Report: " + ", ".join(titles), _lead(), sections)
    folder = output.with_name(f"{output.stem}_figures")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _write_figures(folder, sections)
        write_atomically(output, lambda file: file.write(page.encode()))
    except OSError as error:
        raise MbibError(f"cannot write {error.filename or output}: {error.strerror}") from None
    figures = sum(len(section.figures) for section in sections)
    print(f"{output}: {len(sections)} section{'s' * (len(sections) != 1)}, {figures} figures, {len(page) / 1e6:.1f} MB")
    print(f"{folder}: the figures as PNG and PDF")
    return output


def _lead() -> list[str]:
    return [
        f"Written by `mbib report` of mbib_timm {mbib_timm.__version__} from the files that the runs left. Results are "
        "those of the last epoch, or of what a method makes of a trained model. "
        "Many-shot classes have more than 100 training images, medium-shot 20 to 100, and "
        "few-shot fewer than 20; a group's accuracy is the mean of its classes' accuracies."
    ]


def _write_figures(folder: Path, sections: Sequence[Section]) -> None:
    for anchor, section in zip(unique_anchors(sections), sections, strict=True):
        for name, files in section.figures.items():
            folder.mkdir(parents=True, exist_ok=True)
            for form, content in files.items():
                (folder / f"{anchor}-{name}.{form}").write_bytes(content)
