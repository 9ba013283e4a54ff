#!/usr/bin/env python
"""Draw the figures of docs/method.md, which redraw figures 1, 2 and 5 of the paper.

    python docs/figures/draw.py

Each is one SVG on a background of its own, light or dark as the reader's system is, so that it can be read on any page.
"""

import re
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent
STYLE = """
  svg { --front: #1a1a1a; --back: #ffffff; --muted: #5f6368; --predict: #0072b2; --train: #b84e00; --fill: #eef4f8;
        font: 14px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
  @media (prefers-color-scheme: dark) {
    svg { --front: #e6e6e6; --back: #16191d; --muted: #a8adb3; --predict: #56b4e9; --train: #f0994a;
          --fill: #1f2a33; } }
  text { fill: var(--front); text-anchor: middle; dominant-baseline: central; }
  .small { font-size: 12px; fill: var(--muted); }
  .left { text-anchor: start; }
  .title { font-weight: 600; }
  .node { fill: var(--fill); stroke: var(--predict); stroke-width: 1.6; }
  .line { fill: none; stroke: var(--predict); stroke-width: 1.6; }
  .train { stroke: var(--train); stroke-dasharray: 5 3; }
  text.train { fill: var(--train); stroke: none; font-size: 12px; }
  .head { fill: var(--predict); }
  .head-train { fill: var(--train); }
"""
ARROWS = "".join(
    f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
    f'orient="auto-start-reverse"><path d="M0 0 8 4 0 8z" class="{name}"/></marker>'
    for name in ("head", "head-train")
)
# Of the networks: where a row of nodes is, and half the size of one.
PARTS, VECTORS, CLASSIFIERS, MEAN = 60, 150, 240, 320
HALF_WIDTH, HALF_HEIGHT, RADIUS = 44, 18, 20


def picture(width: int, height: int, title: str, marks: Sequence[str]) -> str:
    """Return an SVG of a size in pixels; the title is for who cannot see it."""
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    parts = (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
        f"<title>{title}</title>",
        f"<style>{STYLE}</style>",
        f"<defs>{ARROWS}</defs>",
        f'<rect width="{width}" height="{height}" rx="8" style="fill: var(--back)"/>',
        *marks,
        "</svg>\n",
    )
    return "\n".join(parts)


def text(x: float, y: float, content: str, kind: str = "") -> str:
    """Return a line of text in the middle of a place."""
    return f'<text x="{x}" y="{y}" class="{kind}">{content}</text>'


def box(x: float, y: float, content: str, train: bool = False) -> str:
    """Return a labelled box around a place; `train` for what serves training only."""
    kind = "node train" if train else "node"
    return (
        f'<rect x="{x - HALF_WIDTH}" y="{y - HALF_HEIGHT}" width="{2 * HALF_WIDTH}" height="{2 * HALF_HEIGHT}" rx="4" '
        f'class="{kind}"/>{text(x, y, content)}'
    )


def circle(x: float, y: float, name: str, train: bool = False) -> str:
    """Return a vector: a circle with its name."""
    kind = "node train" if train else "node"
    return f'<circle cx="{x}" cy="{y}" r="{RADIUS}" class="{kind}"/>{text(x, y, indexed(name))}'


def indexed(name: str) -> str:
    """Return a name whose digits are indices, as SVG has it."""
    return re.sub(r"(\d)", r'<tspan font-size="10" dy="4">\1</tspan><tspan dy="-4">&#8203;</tspan>', name)


def arrow(*points: tuple[float, float], train: bool = False) -> str:
    """Return an arrow along points."""
    path = "M" + " L".join(f"{x} {y}" for x, y in points)
    return _arrow(path, train)


def arc(start: tuple[float, float], end: tuple[float, float], rise: float, train: bool = True) -> str:
    """Return an arrow along a curve that rises by so much."""
    (x, y), (to_x, to_y) = start, end
    return _arrow(f"M{x} {y} Q{(x + to_x) / 2} {y - 2 * rise} {to_x} {to_y}", train)


def _arrow(path: str, train: bool) -> str:
    kind, head = ("line train", "head-train") if train else ("line", "head")
    return f'<path d="{path}" class="{kind}" marker-end="url(#{head})"/>'


def key(x: float, y: float) -> list[str]:
    """Return what solid and dashed lines mean."""
    return [
        f'<path d="M{x} {y} h28" class="line"/>',
        text(x + 36, y, "prediction", "small left"),
        f'<path d="M{x} {y + 20} h28" class="line train"/>',
        text(x + 36, y + 20, "training only", "small left"),
    ]


def network(
    title: str, parts: Sequence[str], vectors: Sequence[str], classifiers: Sequence[str], weights: Sequence[str]
) -> str:
    """Return the picture of a network: parts of a backbone, an observation behind each, z, and a classifier on each.

    Args:
        title: for who cannot see it.
        parts: of the backbone, in order.
        vectors: the observations, in order, and z.
        classifiers: on each of these.
        weights: of the losses of each, with a space at the end.
    """
    places = [190 + 150 * number for number in range(len(vectors))]
    last, z = places[-2:]
    between = (last + z) / 2
    marks = [box(60, PARTS, "image x"), *key(16, CLASSIFIERS)]
    for x, part, vector in zip(places, parts, vectors, strict=False):
        shallow = x < last
        marks += [
            arrow((x - 150 + (HALF_WIDTH if x > 190 else 20 + HALF_WIDTH), PARTS), (x - HALF_WIDTH, PARTS)),
            box(x, PARTS, part),
            arrow((x, PARTS + HALF_HEIGHT), (x, VECTORS - RADIUS), train=shallow),
            text(x + 8, (PARTS + VECTORS) / 2, "pool, norm", "small left"),
            circle(x, VECTORS, vector, shallow),
        ]
    marks += [
        arrow((last + RADIUS, VECTORS), (z - RADIUS, VECTORS)),
        text(between, VECTORS - 12, "FC, norm, ReLU", "small"),
        circle(z, VECTORS, vectors[-1]),
    ]
    for x, classifier, weight in zip(places, classifiers, weights, strict=True):
        shallow = x < last
        marks += [
            arrow((x, VECTORS + RADIUS), (x, CLASSIFIERS - HALF_HEIGHT), train=shallow),
            box(x, CLASSIFIERS, indexed(classifier), shallow),
            text(x + 8 * (x >= last), CLASSIFIERS + HALF_HEIGHT + 12, f"{weight}BSC", "train" + " left" * (x >= last)),
        ]
    bottom = MEAN + 54
    marks += [
        arrow((last + HALF_WIDTH, CLASSIFIERS), (z - HALF_WIDTH, CLASSIFIERS), train=True),
        text(between, CLASSIFIERS - 14, "β VSD", "train"),
        arrow((last, CLASSIFIERS + HALF_HEIGHT), (last, MEAN), (between - HALF_WIDTH, MEAN)),
        arrow((z, CLASSIFIERS + HALF_HEIGHT), (z, MEAN), (between + HALF_WIDTH, MEAN)),
        box(between, MEAN, "mean"),
        arrow((between, MEAN + HALF_HEIGHT), (between, MEAN + 42)),
        text(between, bottom, "prediction", "title"),
    ]
    for number, (x, weight) in enumerate(zip(places[:-2], weights, strict=False)):
        # From below the classifier round the prediction to z's.
        level, right, enters = bottom + 54 - 26 * number, z + 138 - 18 * number, CLASSIFIERS - 8 + 16 * number
        turns = ((x, level), (right, level), (right, enters))
        marks += [
            arrow((x, CLASSIFIERS + HALF_HEIGHT + 22), *turns, (z + HALF_WIDTH, enters), train=True),
            text(x + 50, level - 10, f"{weight}β VSD", "train"),
        ]
    shallow = len(parts) > 1
    return picture(z + (154 if shallow else 70), bottom + (76 if shallow else 26), title, marks)


def structures() -> str:
    """Return the picture of the structures: which head teaches which, and what that weighs."""
    panels = {
        "BIB": {("v3", "z"): "1"},
        "MBIB": {("v1", "z"): "a", ("v2", "z"): "b", ("v3", "z"): "1"},
        "SE-MBIB": {("v1", "v2"): "1", ("v2", "v3"): "1", ("v3", "z"): "1"},
        "ALL-MBIB": {("v1", "v2"): "1", ("v2", "v3"): "1", ("v3", "z"): "1", ("v1", "z"): "a", ("v2", "z"): "b"},
    }
    heads, marks = ("v1", "v2", "v3", "z"), []
    for number, (name, edges) in enumerate(panels.items()):
        left, y = 30 + 380 * (number % 2), 130 + 170 * (number // 2)
        place = {head: left + 30 + 95 * at for at, head in enumerate(heads)}
        marks.append(text(left, y - 104, name, "title left"))
        for (teacher, student), weight in edges.items():
            start, end = place[teacher], place[student]
            if end - start < 100:
                marks += [
                    arrow((start + RADIUS, y), (end - RADIUS, y), train=True),
                    text((start + end) / 2, y - 10, weight, "train"),
                ]
            else:
                rise = 0.4 * (end - start) - 40
                to = end + 6 if student == "z" and teacher == "v1" else end - 8
                marks += [
                    arc((start, y - RADIUS), (to, y - RADIUS), rise),
                    text((start + end) / 2, y - RADIUS - rise - 9, weight, "train"),
                ]
        used = {head for edge in edges for head in edge}
        marks += [circle(place[head], y, head, train=head in ("v1", "v2")) for head in heads if head in used]
    return picture(780, 340, "Which head teaches which in BIB, MBIB, SE-MBIB and ALL-MBIB", marks)


FIGURES = {
    "bib.svg": network("The network of BIB", ["CNN"], ["v", "z"], ["f(v)", "g(z)"], ["", ""]),
    "mbib.svg": network(
        "The network of MBIB",
        ["CNN 1", "CNN 2", "CNN 3"],
        ["v1", "v2", "v3", "z"],
        ["h(v1)", "u(v2)", "f(v3)", "g(z)"],
        ["a ", "b ", "", "(a + b + 1) "],
    ),
    "structures.svg": structures(),
}

if __name__ == "__main__":
    for name, content in FIGURES.items():
        (FOLDER / name).write_text(content, encoding="utf-8")
