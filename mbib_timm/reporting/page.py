"""A page of text, tables and figures as one HTML file: no network, no script, light and dark."""

import base64
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files

from mbib_timm.drawing import DARK, Illustration, render


@dataclass
class Section:
    """A part of the page, and what it shows.

    Attributes:
        title: above it, and in the table of contents.
        blocks: HTML, one after another.
        figures: that were added, with the files that were drawn of them.
    """

    title: str
    blocks: list[str] = field(default_factory=list)
    figures: dict[str, dict[str, bytes]] = field(default_factory=dict)

    @property
    def anchor(self) -> str:
        """Name for links, and of the section's figures' files."""
        return re.sub(r"[^\w.]+", "-", self.title).strip("-")

    def heading(self, text: str) -> None:
        """Add a heading within the section."""
        self.blocks.append(f"<h3>{inline(text)}</h3>")

    def paragraphs(self, texts: Iterable[str]) -> None:
        """Add paragraphs of plain text, with code in back quotes."""
        self.blocks.extend(f"<p>{inline(text)}</p>" for text in texts)

    def command(self, text: str) -> None:
        """Add a command line."""
        self.blocks.append(f"<pre><code>{escape(text)}</code></pre>")

    def facts(self, facts: Sequence[tuple[str, str]]) -> None:
        """Add terms and what they stand for."""
        rows = "".join(f"<dt>{inline(term)}</dt><dd>{inline(text)}</dd>" for term, text in facts)
        self.blocks.append(f"<dl>{rows}</dl>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]], kinds: Sequence[str] = ()) -> None:
        """Add a table that slides where the page is narrow.

        Args:
            header: names of the columns.
            rows: cells.
            kinds: of each row ``""``, ``"paper"`` or ``"difference"``; all plain when empty.
        """
        head = "".join(f'<th scope="col">{inline(name)}</th>' for name in header)
        body = "".join(
            f'<tr class="{kind}">{"".join(f"<td>{inline(cell)}</td>" for cell in row)}</tr>'
            for row, kind in zip(rows, kinds or [""] * len(rows), strict=True)
        )
        self.blocks.append(
            f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        )

    def figure(self, illustration: Illustration) -> None:
        """Draw a figure, in light and in dark, and add it with how to read it.

        Raises:
            MbibError: matplotlib is not installed.
        """
        drawn = render(illustration.draw, ("png", "pdf", "svg"))
        dark = render(illustration.draw, ("svg",), DARK)["svg"]
        self.figures[illustration.name] = {form: drawn[form] for form in ("png", "pdf")}
        alternative = escape(f"{illustration.title}: {illustration.reading}", quote=True)
        self.blocks.append(
            "<figure><picture>"
            f'<source media="(prefers-color-scheme: dark)" srcset="{_data(dark)}">'
            f'<img src="{_data(drawn["svg"])}" alt="{alternative}"></picture>'
            f"<figcaption><strong>{inline(illustration.title)}.</strong> {inline(illustration.reading)}</figcaption>"
            "</figure>"
        )


def _data(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


def inline(text: str) -> str:
    """Return text as HTML: escaped, and with ``<code>`` for what stands in back quotes."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(str(text), quote=False))


def _title(text: str) -> str:
    """Return a title as HTML that may break after the underscores and dots of names."""
    return re.sub(r"([_.])(?=\w)", r"\1<wbr>", escape(text, quote=False))


def render_page(title: str, lead: Sequence[str], sections: Sequence[Section]) -> str:
    """Return the whole page.

    Args:
        title: of the page.
        lead: paragraphs under it.
        sections: its parts, which the table of contents lists.
    """
    style = (files("mbib_timm.reporting") / "page.css").read_text(encoding="utf-8")
    anchors = unique_anchors(sections)
    contents = "".join(
        f'<li><a href="#{anchor}">{_title(section.title)}</a></li>'
        for anchor, section in zip(anchors, sections, strict=True)
    )
    body = "\n".join(
        f'<section id="{anchor}">\n<h2>{_title(section.title)}</h2>\n{chr(10).join(section.blocks)}\n</section>'
        for anchor, section in zip(anchors, sections, strict=True)
    )
    introduction = "\n".join(f"<p>{inline(text)}</p>" for text in lead)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<header>
<h1>{_title(title)}</h1>
{introduction}
</header>
<nav aria-label="Contents"><ul>{contents}</ul></nav>
<main>
{body}
</main>
</body>
</html>
"""


def unique_anchors(sections: Sequence[Section]) -> list[str]:
    """Return the sections' anchors; those that are alike end in the section's place."""
    names = [section.anchor for section in sections]
    return [name if names.count(name) == 1 else f"{name}-{place}" for place, name in enumerate(names, start=1)]
