"""A sweep as its file has it: a base recipe, axes, seeds; how its result is shown, and the paper's numbers.

```yaml
title: the impact of beta                               # of the table and the figure
recipe: "{method}cifar100_lt_if{imbalance_factor}"      # an axis in braces is a part of the recipe's name:
axes:
  method: {ce: cifar_resnet32.ce_, bib: bib_resnet32.}  # what goes in, by the name of the value ...
  imbalance_factor: [100, 50, 10]                       # ... or the values themselves
  method.beta: [0, 1, 2, 3, 4, 5]                       # any other axis is an address, as `load_recipe` takes it ...
  width: {128: {model_kwargs.bottleneck_features: 128}, own: {}}    # ... or names for addresses and their values
seeds: [0, 1, 2]
set: {val_interval: 10}                                 # for all runs, by address
labels: {method.beta: beta}
figure: {kind: lines, x: method.beta, color: imbalance_factor, style: method}
paper: Table 1                                          # numbers of mbib_timm/results/paper.yaml to stand beside; or
# paper: {source: Somebody (2024), numbers: [{method: bib, imbalance_factor: 100, method.beta: 5, overall: 44.9}]}
```
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from mbib_timm.errors import MbibError, shown, unknown_name
from mbib_timm.files import from_plain, printable, read_yaml
from mbib_timm.options import is_number
from mbib_timm.recipe import KEYS, STAGES, check_key, find_recipe, list_recipes, list_sweeps, recipes_folder
from mbib_timm.results.columns import COLUMNS
from mbib_timm.results.paper import ABLATIONS, RESULTS

# Recipe keys that a sweep sets by itself.
PER_RUN = ("seed", "experiment", "resume")
FIGURE_ROLES = {"bars": ("x", "color"), "lines": ("x", "color", "style"), "heatmap": ("x", "y")}
FIGURE_NEEDS = {"bars": (), "lines": ("x",), "heatmap": ("x", "y")}
# The base recipe of a sweep over recipes that a command names.
OF_RECIPES = "{recipe}"
UNNAMED = "sweep"  # its name, where the command gives none: another one's rows give way to its own
# Axes of a table and a figure that no run has: its heads, and the shot groups of its classes.
HEAD, GROUP = "head", "group"


class Value(NamedTuple):
    """A value of an axis.

    Attributes:
        name: in tables, figures and folders' names.
        text: that it is in the recipe's name, where the axis is a part of that.
        settings: values that it sets, by address.
    """

    name: str
    text: str
    settings: dict[str, Any]


def key_of(address: str) -> str:
    """Return the recipe key that an address is in: ``method`` of ``stage2.method.tau``."""
    return re.sub(r"^stage\d+\.", "", address).partition(".")[0]


@dataclass(frozen=True)
class Paper:
    """What the paper has where a sweep is its table or its figure.

    Attributes:
        source: of the numbers, such as ``Table 4``.
        recipe: that the paper used, where it is not the sweep's base recipe.
        numbers: each a mapping from axes to values, and from ``overall``, ``many``, ``medium`` and ``few`` to top-1
            accuracies in percent. It holds for every run that agrees in the axes that it names.
    """

    source: str
    recipe: str | None = None
    numbers: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Sweep:
    """What to run: the base recipe with every combination of the axes' values and every seed.

    Attributes:
        name: of the sweep's folder.
        recipe: name or file of the base recipe; axes in braces stand for parts of it.
        axes: by name, a list of values, or a mapping from a value's name to what it is: of an axis that is a part of
            the recipe's name the text that goes in, of any other addresses and their values.
        seeds: a run each.
        set: values of all runs, by address.
        title: what the sweep shows.
        labels: how axes are called in tables and figures, where not by their names.
        heads: rows of the table for the heads of a run, by name, with their titles; the prediction alone when empty.
        figure: its kind, ``bars``, ``lines`` or ``heatmap``, and which axis plays which role in it.
        paper: the paper's numbers.
    """

    name: str
    recipe: str
    axes: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    set: dict[str, Any] = field(default_factory=dict)
    title: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)
    figure: dict[str, str] = field(default_factory=lambda: {"kind": "bars"})
    paper: Paper | None = None

    def __post_init__(self) -> None:
        for place in self.placeholders():
            if place not in self.axes:
                raise unknown_name(f"axis in the recipe of sweep {self.name}", place, self.axes)
        for name, values in self.axes.items():
            self._check_axis(name, values)
        for name in self.set:
            self._check_address("key in set", name)
        for name in self.labels:
            if name not in self.axes:
                raise unknown_name(f"axis in the labels of sweep {self.name}", name, self.axes)
        if self.name in ("", "..") or Path(self.name).name != self.name or printable(self.name) != self.name:
            raise MbibError(f"sweep {shown(self.name)}: expected a name that a folder can have")
        for seed in self.seeds:
            check_key("seed", seed)
        if not self.recipe or not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise MbibError(f"sweep {self.name} needs a recipe, and at least one seed, each once")
        self._check_figure()
        for number in self.paper.numbers if self.paper else ():
            for name, value in number.items():
                if name not in (*self.axes, *COLUMNS, HEAD):
                    raise unknown_name(f"axis in the paper's numbers of sweep {self.name}", name, self.axes)
                if name in COLUMNS and (isinstance(value, bool) or not isinstance(value, int | float)):
                    raise MbibError(f"sweep {self.name}: the paper's {name}: expected a number, got {shown(value)}")

    @property
    def of_recipes(self) -> bool:
        """True for a sweep over recipes that a command names, without a file of its own."""
        return self.recipe == OF_RECIPES

    def placeholders(self) -> list[str]:
        """Return the axes that are parts of the recipe's name."""
        return re.findall(r"{(.*?)}", self.recipe)

    def values(self, axis: str) -> list[Value]:
        """Return an axis's values."""
        values, is_place = self.axes[axis], axis in self.placeholders()
        if isinstance(values, Mapping):
            items = [(str(name), what) for name, what in values.items()]
            return [Value(n, str(what), {}) if is_place else Value(n, n, dict(what or {})) for n, what in items]
        return [Value(plain(value), plain(value), {} if is_place else {axis: value}) for value in values]

    def recipe_at(self, point: Mapping[str, Value]) -> str:
        """Return the base recipe where the axes that are parts of its name have values."""
        return re.sub(r"{(.*?)}", lambda place: point[place[1]].text, self.recipe)

    def label(self, axis: str) -> str:
        """Return how an axis is called in tables and figures."""
        return self.labels.get(axis, axis)

    def _check_axis(self, name: str, values: Any) -> None:
        if not isinstance(values, list | Mapping) or not values:
            raise MbibError(f"sweep {self.name}: axis {name!r} needs a list of values, got {shown(values)}")
        is_place = name in self.placeholders()
        if isinstance(values, Mapping):
            for value, what in values.items():
                if is_place and not isinstance(what, str):
                    raise MbibError(
                        f"sweep {self.name}: axis {name!r}: {shown(value)} needs a part of the recipe's name, got "
                        f"{shown(what)}"
                    )
                if not is_place:
                    self._check_settings(name, value, what or {})
        elif not is_place:
            self._check_address("axis", name)
        for value, times in Counter(value.name for value in self.values(name)).items():
            if times > 1:
                raise MbibError(f"sweep {self.name}: axis {name!r} has {shown(value)} twice")

    def _check_settings(self, axis: str, value: Any, settings: Any) -> None:
        if not isinstance(settings, Mapping):
            got, instead = shown(settings), ""
            if key_of(axis) in KEYS:
                instead = f"; such as {value}: {{{axis}: {got}}}, or a list of values without names: [{got}]"
            raise MbibError(
                f"sweep {self.name}: axis {axis!r}: {shown(value)} needs recipe keys and their values, got "
                f"{got}{instead}"
            )
        for address in settings:
            self._check_address(f"key in axis {axis}", address)

    def _check_address(self, kind: str, address: str) -> None:
        key = key_of(str(address))
        if key not in KEYS and address != STAGES:
            raise unknown_name(f"{kind} of sweep {self.name}", str(address), [*KEYS, STAGES])
        if key in PER_RUN:
            raise MbibError(f"sweep {self.name}: recipe key {address!r} is set by the sweep itself; see --seeds")

    def _check_figure(self) -> None:
        try:
            check_figure(self.figure, self.axes, self.heads)
        except ValueError as error:
            raise MbibError(f"sweep {self.name}: {error}") from None
        kind = self.figure["kind"]
        # Bars are named after the axes that have no role; lines and maps have no place for them.
        shown = self.figure.values()
        hidden = [axis for axis in self.axes if axis not in shown and len(self.axes[axis]) > 1]
        if kind != "bars" and (hidden or self.heads):
            raise MbibError(
                f"sweep {self.name}: a figure of kind {kind!r} does not show {', '.join(hidden) or 'heads'}"
            )
        if kind == "lines":
            for value in self.values(self.figure["x"]):
                if not is_number(value.name) or not math.isfinite(float(value.name)):
                    raise MbibError(f"sweep {self.name}: lines need numbers along x, got {value.name!r}")


def check_figure(figure: Mapping[str, str], axes: Mapping[str, Any], heads: Mapping[str, str]) -> None:
    """Raise ValueError for a figure of no known kind, and for roles that are none or whose axes there are not."""
    kind = figure.get("kind", "")
    if kind not in FIGURE_ROLES:
        raise ValueError(unknown_name("kind of figure", kind, FIGURE_ROLES))
    for role in FIGURE_NEEDS[kind]:
        if role not in figure:
            raise ValueError(f"a figure of kind {kind!r} needs the role {role!r}")
    # Groups and heads are drawn as bars alone; heads, where there are any.
    extra = [] if kind != "bars" else [GROUP, *([HEAD] if heads else [])]
    for role, axis in figure.items():
        if role == "kind":
            continue
        if role not in FIGURE_ROLES[kind]:
            raise ValueError(unknown_name("role in the figure", role, FIGURE_ROLES[kind]))
        if axis not in (*axes, *extra):
            raise ValueError(unknown_name("axis in the figure", axis, [*axes, *extra]))


def plain(value: Any) -> str:
    """Return a value as a table, and a folder's name, has it."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def find_sweep(names: Sequence[str]) -> Sweep:
    """Return the sweep of a packaged name or a sweep file, or one over the recipes named.

    Raises:
        MbibError: a sweep file that is none, or a name of neither a sweep nor a recipe.
    """
    packaged = recipes_folder() / "sweeps" / f"{names[0]}.yaml"
    for path in (Path(names[0]), packaged):
        if len(names) == 1 and path.is_file() and (path == packaged or _is_sweep(path)):
            return load_sweep(path)
    for name in names:
        if len(names) > 1 and name in list_sweeps():
            raise MbibError(f"{name} is a sweep, which has to run alone: mbib sweep {name}")
        path = Path(name)
        if path.suffix in (".yaml", ".yml") and not path.is_file() and str(path.with_suffix("")) not in list_recipes():
            raise MbibError(f"there is no file {name}: expected the name or the file of a sweep or a recipe")
        try:
            find_recipe(name)
        except MbibError:
            raise unknown_name("sweep or recipe", name, [*list_sweeps(), *list_recipes()]) from None
    return Sweep(UNNAMED, OF_RECIPES, {"recipe": list(names)})


def _is_sweep(path: Path) -> bool:
    content = read_yaml(path, "sweep or recipe")
    return isinstance(content, dict) and {"recipe", "axes"} & content.keys() != set()


def load_sweep(path: Path) -> Sweep:
    """Read a sweep file; its keys are the fields of `Sweep`.

    Raises:
        MbibError: an unknown key, or a value of another kind.
    """
    kinds: dict[str, type | tuple[type, ...]] = dict(
        title=str, recipe=str, axes=dict, seeds=list, set=dict, labels=dict, heads=dict, figure=dict, paper=(str, dict)
    )
    content = _checked(read_yaml(path, "sweep or recipe"), kinds, str(path))
    if "recipe" not in content:
        raise MbibError(f"{path}: a sweep needs the key 'recipe'")
    paper = content.pop("paper", None)
    if isinstance(paper, dict):
        content["paper"] = _checked(paper, dict(source=str, recipe=str, numbers=list), str(path))
    try:
        sweep: Sweep = from_plain(Sweep, {"name": path.stem, **content})
    except ValueError as error:
        raise MbibError(f"{path}: {error}") from None
    if not Path(sweep.recipe).is_file() and (path.parent / sweep.recipe).is_file():
        sweep = replace(sweep, recipe=str(path.parent / sweep.recipe))
    return replace(sweep, paper=_published(paper, sweep)) if isinstance(paper, str) else sweep


def _published(table: str, sweep: Sweep) -> Paper:
    """Return the numbers of a table of the paper: those of an ablation, or of the runs that a sweep's axes name."""
    if table in ABLATIONS:
        return Paper(table, ABLATIONS[table].recipe, ABLATIONS[table].numbers)
    axes = sweep.placeholders()
    numbers = []
    for values in itertools.product(*(sweep.values(axis) for axis in axes)):
        point = dict(zip(axes, values, strict=True))
        for result in RESULTS.get(sweep.recipe_at(point), ()):
            if result.source == table:
                numbers.append({axis: value.name for axis, value in point.items()} | result.accuracies)
    if not numbers:
        sources = {result.source for results in RESULTS.values() for result in results}
        raise unknown_name(f"table of the paper with numbers for sweep {sweep.name}", table, {*ABLATIONS, *sources})
    return Paper(table, None, numbers)


def _checked(content: Any, kinds: Mapping[str, type | tuple[type, ...]], where: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise MbibError(f"{where}: expected 'key: value' lines, got a {type(content).__name__}")
    for key, value in content.items():
        if key not in kinds:
            raise MbibError(f"{Path(where).name}: {unknown_name('key of a sweep', str(key), kinds)}")
        if not isinstance(value, kinds[key]):
            kind = kinds[key]
            expected = " or a ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))
            raise MbibError(f"{where}: key {key!r}: expected a {expected}, got {shown(value)}")
    return content
