"""How every figure looks: colours that anyone can tell apart, light and dark, and the formats that it is written in."""

import io
import re
import statistics
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mbib_timm.errors import MbibError, few
from mbib_timm.files import printable

# Okabe and Ito's palette: told apart with any kind of colour vision. Its black is the foreground of the theme.
ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILION, PURPLE, GREY = (
    "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#999999",
)  # fmt: skip
# Further ones, at least as far from those, and from one another, as those are.
BROWN, MINT, INDIGO = "#6B4226", "#B8E6C9", "#332288"
# And for bars with their names below: nearer to one of them each.
WINE, OLIVE, PINK, CYAN, VIOLET = "#882255", "#999933", "#FF9DA7", "#00C5D5", "#9D4EDD"
GROUP_COLORS = {"many": BLUE, "medium": GREEN, "few": VERMILION}
# The same method has the same colour in every figure, by its title.
METHOD_COLORS = {
    "CE": GREY,
    "Focal": YELLOW,
    "BSCE": SKY,
    "BSCE_MLP": PURPLE,
    "LDAM-DRW": BROWN,
    "cRT": MINT,
    "tau-norm": INDIGO,
    "Nearest class mean": VIOLET,
    "DiVE": WINE,
    "PaCo": OLIVE,
    "SADE": PINK,
    "SADE + MBIB (ours)": CYAN,
    "BIB": ORANGE,
    "MBIB": BLUE,
    "SE-MBIB": VERMILION,
    "ALL-MBIB": GREEN,
}
# For anything else; the colours of the best-known methods come last.
CYCLE = (GREEN, PURPLE, VERMILION, SKY, GREY, YELLOW, ORANGE, BLUE)
# Tell apart what has the same colour.
HATCHES = ("", "///", "...", "xxx")
LINE_STYLES = ("-", "--", ":", "-.")


def named_method(name: str) -> str | None:
    """Return the method with a colour of its own that a name begins with: ``BIB`` of ``BIB v``; None for any other."""
    return next((title for title in (name, name.partition(" ")[0]) if title in METHOD_COLORS), None)


def method_colors(names: Iterable[str]) -> dict[str, str]:
    """Return a colour for each name: that of the method which it names, the next free one of `CYCLE` for any other."""
    methods = {name: named_method(name) for name in names}
    own = {name: METHOD_COLORS[method] for name, method in methods.items() if method is not None}
    free = [color for color in CYCLE if color not in own.values()] or list(CYCLE)
    others = [name for name in methods if name not in own]
    return own | {name: free[i % len(free)] for i, name in enumerate(others)}


@dataclass(frozen=True)
class Theme:
    """Colours in front and behind.

    Attributes:
        foreground: of text, axes, and whatever the figure is about.
        background: behind it.
    """

    foreground: str
    background: str


LIGHT = Theme(foreground="#000000", background="#ffffff")
DARK = Theme(foreground="#e6e6e6", background="#16191d")

STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "figure.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.15,
    "legend.frameon": False,
    # The same numbers give the same bytes.
    "svg.hashsalt": "mbib_timm",
    # Letters stay letters: small files, which any zoom keeps sharp.
    "svg.fonttype": "none",
}
COORDINATES, FURTHER_DIGITS = re.compile(rb'\b(?:d|x|y)="[^"]*"'), re.compile(rb"(\.\d\d)\d+")  # in an SVG
# Fonts that matplotlib brings for formulas, and the one whose every letter is a box.
NOT_FOR_TEXT = ("cm", "STIX", "Last Resort")
_unreadable: set[str] = set()  # letters that no font has: each is said once


def render(
    draw: Callable[[], Any], formats: Sequence[str] = ("png",), theme: Theme = LIGHT, title: str | None = None
) -> dict[str, bytes]:
    """Draw a figure and return its files.

    Neither pyplot nor its backend is touched: a notebook that trains a model keeps its own.

    Args:
        draw: gives the figure, in the style that is set while it runs.
        formats: ``png``, ``pdf`` or ``svg``; the last has no background of its own.
        theme: colours in front and behind.
        title: what the files are, in letters that any of them can have, beside the picture; None for nothing.

    Returns:
        The content of a file in each format.

    Raises:
        MbibError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise MbibError("figures need matplotlib: pip install 'mbib-timm[train]'") from None
    with matplotlib.rc_context({**STYLE, **_colors(theme)}):
        files, missing = _draw(draw, formats, title)
        fonts = _fonts_with(missing)
        if fonts:
            with matplotlib.rc_context({"font.family": [*matplotlib.rcParams["font.family"], *fonts]}):
                files, missing = _draw(draw, formats, title)
        if new := sorted(missing - _unreadable):
            print(
                f"figures have boxes in place of {few(new)}, which no font of this machine has; install one, such as "
                "Noto Sans"
            )
            _unreadable.update(new)
        return files


def _draw(
    draw: Callable[[], Any], formats: Sequence[str], title: str | None
) -> tuple[dict[str, bytes], frozenset[str]]:
    """Draw a figure. Returns its files, and the letters that its fonts lack."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure = draw()
        files = {form: _encode(figure, form, title) for form in formats}
    missing = set()
    for warning in caught:
        glyph = re.match(r"Glyph (\d+) .*missing from", str(warning.message))
        if glyph:
            missing.add(chr(int(glyph[1])))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return files, frozenset(missing)


@cache
def _fonts_with(letters: frozenset[str]) -> tuple[str, ...]:
    """Return installed fonts that together have as many of the letters as there are fonts for; sans serif first."""
    from matplotlib.font_manager import fontManager
    from matplotlib.ft2font import FT2Font

    fonts, missing = [], set(letters)
    for entry in sorted(fontManager.ttflist, key=lambda entry: ("Sans" not in entry.name, entry.name)):
        if not missing:
            break
        if entry.style != "normal" or entry.weight not in (400, "normal") or entry.name.startswith(NOT_FOR_TEXT):
            continue
        try:
            font = FT2Font(entry.fname)
        except (OSError, RuntimeError):  # no longer there, or broken
            continue
        found = missing & set(map(chr, font.get_charmap()))
        if found and font.scalable:  # fonts of coloured pictures are not
            fonts.append(entry.name)
            missing -= found
    return tuple(fonts)


def _colors(theme: Theme) -> dict[str, str]:
    in_front = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
    behind = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")
    return dict.fromkeys(in_front, theme.foreground) | dict.fromkeys(behind, theme.background)


def _encode(figure: Any, form: str, title: str | None) -> bytes:
    # Without dates: a figure that is drawn again is the same file.
    undated = {"png": {}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}[form]
    metadata = undated if title is None else {**undated, "Title": title}
    content = io.BytesIO()
    figure.savefig(content, format=form, dpi=150, metadata=metadata, transparent=form == "svg")
    if form != "svg":
        return content.getvalue()
    # A hundredth of a point is enough for the eye, and half the bytes of what matplotlib writes.
    return COORDINATES.sub(lambda found: FURTHER_DIGITS.sub(rb"\1", found[0]), content.getvalue())


def canvas(width: float, height: float, columns: int = 1, rows: int = 1) -> tuple[Any, Any]:
    """Return a figure of a size in inches, and its axes."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    return figure, figure.subplots(rows, columns)


def foreground() -> str:
    """Return the colour of text and axes in the theme that is being drawn in."""
    import matplotlib

    return str(matplotlib.rcParams["text.color"])


def background() -> str:
    """Return the colour behind the figure in the theme that is being drawn in."""
    import matplotlib

    return str(matplotlib.rcParams["figure.facecolor"])


def text_on(color: str) -> str:
    """Return black or white, whichever stands out more from a colour behind it (contrast of WCAG 2)."""
    from matplotlib.colors import to_rgb

    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in to_rgb(color)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if (luminance + 0.05) ** 2 > 1.05 * 0.05 else "#ffffff"


def outline(width: float = 2.5) -> list[Any]:
    """Return the effect that sets off lines and letters from what is behind by a rim, both of a width in points."""
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=width, foreground=background())]


def mean_bar(
    axes: Any,
    at: float,
    values: Sequence[float | None],
    width: float,
    color: str,
    hatch: str,
    marked: float | None,
    lying: bool,
) -> tuple[Any, Any]:
    """Draw the mean of percentages as a bar with its number, its standard deviation, and a diamond beside it.

    Args:
        axes: where to draw.
        at: place along x, or along y for a bar that lies.
        values: of the seeds; None for what was not measured.
        width: of the bar.
        color: of the bar.
        hatch: of the bar.
        marked: height of the diamond, a published number; None for none.
        lying: the bar grows to the right.

    Returns:
        The bar and the diamond, for a legend; None for what was not drawn.
    """
    measured = [value for value in values if value is not None]
    if not measured:
        return None, None
    mean = statistics.mean(measured)
    deviation = statistics.stdev(measured) if len(measured) > 1 else None
    draw, error = (axes.barh, "xerr") if lying else (axes.bar, "yerr")
    bar = draw(
        at, mean, width, color=color, hatch=hatch, edgecolor=background(), linewidth=0,
        ecolor=foreground(), capsize=2, **{error: deviation},
    )  # fmt: skip
    mark = None
    if marked is not None:
        place = (marked, at) if lying else (at, marked)
        (mark,) = axes.plot(
            *place, marker="D", linestyle="", color=foreground(), markerfacecolor=background(), markersize=4.5
        )
    _write_number(axes, at, mean, deviation or 0.0, marked, color, lying)
    return bar, mark


def _write_number(
    axes: Any, at: float, mean: float, deviation: float, marked: float | None, color: str, lying: bool
) -> None:
    """Write a bar's mean past its end; into it where the paper's mark is in the way. See `mean_bar`."""
    inside = marked is not None and -2 < marked - mean - deviation < 6
    height = min(mean - deviation, marked) if inside and marked is not None else mean + deviation
    style = dict(color=text_on(color), bbox=dict(facecolor=color, linewidth=0, pad=0.5)) if inside else {}
    if lying:
        place, offset = (height, at), (-5 if inside else 3, 0)
        style |= dict(ha="right" if inside else "left", va="center_baseline")
    else:
        place, offset = (at, height), (0, -5 if inside else 2)
        style |= dict(ha="center", va="top" if inside else "bottom")
    axes.annotate(f"{mean:.1f}", place, offset, textcoords="offset points", fontsize=7, **style)


def figure_text(name: str) -> str:
    """Return a name that somebody else has given as a figure shows it: printable, and its dollars begin no formula."""
    return printable(name).replace("$", r"\$")


@dataclass(frozen=True)
class Illustration:
    """A figure that can be drawn, and what its reader has to know.

    Attributes:
        name: of its files, without the ending.
        title: above it.
        reading: how to read it, in a sentence.
        draw: gives the figure; called inside `render`.
    """

    name: str
    title: str
    reading: str
    draw: Callable[[], Any]


def write_illustrations(folder: Path, illustrations: Iterable[Illustration]) -> None:
    """Write figures as PNG and PDF into a folder.

    Raises:
        MbibError: matplotlib is not installed.
    """
    for illustration in illustrations:
        files = render(illustration.draw, ("png", "pdf"))
        folder.mkdir(parents=True, exist_ok=True)
        for form, content in files.items():
            (folder / f"{illustration.name}.{form}").write_bytes(content)
