#!/usr/bin/env python
"""Draw the figures of docs/method.md, which redraw figures 1, 2 and 5 of the paper.

    python docs/figures/draw.py

Each is one SVG on a background of its own, light or dark as the reader's system is, so that it can be read on any page.
"""

from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent
STYLE = """
  svg { --front: #1a1a1a; --back: #ffffff; --muted: #5f6368; --predict: #0072b2; --train: #b84e00; --fill: #eef4f8;
        font: 14px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
  @media (prefers-color-scheme: dark) {
    svg { --front: #e6e6e6; --back: #16191d; --muted: #a8adb3; --predict: #56b4e9; --train: #f0994a; --fill: #1f2a33; } }
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
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img">\n<title>{title}</title>\n<style>{STYLE}</style>\n<defs>{ARROWS}</defs>\n'
        f'<rect width="{width}" height="{height}" rx="8" style="fill: var(--back)"/>\n' + "\n".join(marks) + "\n</svg>\n"
    )


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
    """Return a vector: a circle with its name, whose digits are an index."""
    letter, index = name[0], name[1:]
    label = f'{letter}<tspan font-size="10" dy="4">{index}</tspan>' if index else letter
    return f'<circle cx="{x}" cy="{y}" r="{RADIUS}" class="{"node train" if train else "node"}"/>{text(x, y, label)}'


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
        text(x + 36, y, "computes the prediction", "small left"),
        f'<path d="M{x} {y + 20} h28" class="line train"/>',
        text(x + 36, y + 20, "in training only", "small left"),
    ]


def network(parts: Sequence[str], vectors: Sequence[str], classifiers: Sequence[str], weights: Sequence[str]) -> str:
    """Return the picture of a network: parts of a backbone, an observation behind each, z, and a classifier on each.

    Args:
        parts: of the backbone, in order.
        vectors: the observations, in order, and z.
        classifiers: on each of these.
        weights: of each observation's self-distillation.
    """
    places = [190 + 150 * number for number in range(len(parts) + 1)]
    last, z = places[-2:]
    marks = [box(60, PARTS, "image x"), text(last, 18, "backbone", "small") if len(parts) == 1 else ""]
    for number, (x, part, vector, classifier) in enumerate(zip(places, parts, vectors, classifiers, strict=False)):
        shallow = number < len(parts) - 1
        before = 60 if number == 0 else places[number - 1]
        marks += [
            arrow((before + HALF_WIDTH, PARTS), (x - HALF_WIDTH, PARTS)),
            box(x, PARTS, part),
            arrow((x, PARTS + HALF_HEIGHT), (x, VECTORS - RADIUS), train=shallow),
            text(x + 8, (PARTS + VECTORS) / 2, "pool, norm", "small left"),
            circle(x, VECTORS, vector, shallow),
            arrow((x, VECTORS + RADIUS), (x, CLASSIFIERS - HALF_HEIGHT), train=shallow),
            box(x, CLASSIFIERS, classifier, shallow),
            text(x, CLASSIFIERS + HALF_HEIGHT + 12, "BSC", "train"),
        ]
    marks += [
        arrow((last + RADIUS, VECTORS), (z - RADIUS, VECTORS)),
        text((last + z) / 2, VECTORS - 12, "FC, norm, ReLU", "small"),
        circle(z, VECTORS, vectors[-1]),
        arrow((z, VECTORS + RADIUS), (z, CLASSIFIERS - HALF_HEIGHT)),
        box(z, CLASSIFIERS, classifiers[-1]),
        text(z, CLASSIFIERS + HALF_HEIGHT + 12, "BSC", "train"),
        arrow((last + HALF_WIDTH, CLASSIFIERS), (z - HALF_WIDTH, CLASSIFIERS), train=True),
        text((last + z) / 2, CLASSIFIERS - 14, f"{weights[-1]} VSD", "train"),
        *(
            arrow((x + side * 26, CLASSIFIERS + HALF_HEIGHT), (x + side * 26, MEAN), ((last + z) / 2 - side * HALF_WIDTH, MEAN))
            for x, side in ((last, 1), (z, -1))
        ),
        box((last + z) / 2, MEAN, "mean"),
        arrow(((last + z) / 2, MEAN + HALF_HEIGHT), ((last + z) / 2, MEAN + 42)),
        text((last + z) / 2, MEAN + 54, "prediction", "title"),
    ]
    bottom = MEAN + 54
    for number, (x, weight) in enumerate(zip(places[:-2], weights, strict=False)):
        # From below the classifier round the prediction to z's.
        level, right = bottom + 54 - 26 * number, z + HALF_WIDTH + 44 - 18 * number
        enters = CLASSIFIERS - 8 + 16 * number
        marks += [
            arrow((x - 26, CLASSIFIERS + HALF_HEIGHT), (x - 26, level), (right, level), (right, enters), (z + HALF_WIDTH, enters), train=True),
            text(x + 24, level - 10, f"{weight} VSD", "train"),
        ]
    width = z + HALF_WIDTH + (66 if len(parts) > 1 else 26)
    height = bottom + (76 if len(parts) > 1 else 26)
    name = "MBIB" if len(parts) > 1 else "BIB"
    return picture(width, height, f"The network of {name}", [*marks, *key(16, CLASSIFIERS - 70)] if len(parts) == 1 else [*marks, *key(z + 70 - 60, 50)])


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
        left, y = 30 + 380 * (number % 2), 130 + 180 * (number // 2)
        place = {head: left + 30 + 95 * at for at, head in enumerate(heads)}
        marks.append(text(left, y - 104, name, "title left"))
        for (teacher, student), weight in edges.items():
            start, end = place[teacher], place[student]
            if end - start < 100:
                marks += [arrow((start + RADIUS, y), (end - RADIUS, y), train=True), text((start + end) / 2, y - 10, weight, "train")]
            else:
                rise = 0.22 * (end - start)
                marks += [arc((start, y - RADIUS), (end - 4, y - RADIUS), rise), text((start + end) / 2, y - RADIUS - rise - 9, weight, "train")]
        used = {head for edge in edges for head in edge}
        marks += [circle(place[head], y, head, train=head in ("v1", "v2")) for head in heads if head in used]
    return picture(750, 350, "Which head teaches which in BIB, MBIB, SE-MBIB and ALL-MBIB", marks)


FIGURES = {
    "bib.svg": network(["CNN"], ["v", "z"], ["f(v)", "g(z)"], ["β"]),
    "mbib.svg": network(
        ["CNN 1", "CNN 2", "CNN 3"], ["v1", "v2", "v3", "z"], ["h(v1)", "u(v2)", "f(v3)", "g(z)"], ["a β", "b β", "β"]
    ),
    "structures.svg": structures(),
}

if __name__ == "__main__":
    for name, content in FIGURES.items():
        (FOLDER / name).write_text(content, encoding="utf-8")
