"""A hook of mkdocs.yml: parts of the pages that repeat code or results, written when mkdocs builds the site.

A line that ends with ``<!-- generated: NAME -->`` becomes what the function `NAME` of `PARTS` returns. Text before is
for readers of the source. A link that leads out of docs/ becomes one into the repository, and an image out there comes
into the site. What is missing there ends the build.
"""

import argparse
import dataclasses
import html
import itertools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from posixpath import normpath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import results  # noqa: E402
from mbib_timm.cli import COMMANDS, build_parser  # noqa: E402
from mbib_timm.flags import flag, type_name  # noqa: E402
from mbib_timm.methods import METHODS  # noqa: E402
from mbib_timm.options import default_of, option_types  # noqa: E402
from mbib_timm.recipe import KEYS, TYPES, list_sweeps  # noqa: E402
from mbib_timm.results.catalogue import catalogue, markdown_table  # noqa: E402
from mbib_timm.results.tables import NOTHING, Table, markdown_text  # noqa: E402
from mbib_timm.sweeps.sweep import find_sweep  # noqa: E402
from mbib_timm.sweeps.sweep_results import read_results as read_sweep  # noqa: E402

RESULTS = ROOT / "results"
PART = re.compile(r"^(?:.* )?<!-- generated: (\w+) -->$", re.MULTILINE)
LINK = re.compile(r"(!?)(\[(?:[^\[\]]|\[[^\]]*\])*\])\(((?:\.\./)+[^)#\s]+)(#[^)\s]*)?\)")


def repository() -> str:
    """Return the address of the repository, which pyproject.toml has."""
    found = re.search(r'^Repository = "(\S+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise PluginError("pyproject.toml: [project.urls] has no Repository")
    return found[1]


# Parts


def methods() -> str:
    """Return the table of all methods."""
    rows = []
    for name in METHODS:
        method = METHODS[name]
        needs = "trains nothing" if method.post_hoc else "a trained model" if method.needs_start else ""
        rows.append([f"`{name}`", method.title, _first_sentence(method), needs, method.citation or NOTHING])
    return Table(["name", "title", "what it does", "needs", "source"], rows).markdown()


def _first_sentence(documented: object) -> str:
    text = " ".join((documented.__doc__ or "").split("\n\n")[0].split())
    sentence = re.split(r"(?<=\.) (?=[A-Z])", text)[0]
    # A bar within back quotes would end a cell.
    return re.sub(r"`+(.+?)`+", lambda found: f"<code>{html.escape(found[1]).replace('|', '&#124;')}</code>", sentence)


def settings() -> str:
    """Return the settings of every method that has any; methods with the same ones share a table."""
    shared: dict[type, list[str]] = {}
    for name in METHODS:
        shared.setdefault(METHODS[name].Settings, []).append(name)
    parts = []
    for declared, names in shared.items():
        if dataclasses.fields(declared):
            kinds = option_types(declared)
            rows = [_option(f"method.{item.name}", item, kinds[item.name]) for item in dataclasses.fields(declared)]
            titles = ", ".join(f"`{name}`" for name in names)
            parts.append(f"{titles}:\n\n{Table(['key', 'type', 'default', 'what'], rows).markdown()}")
    return "\n\n".join(parts)


def _option(key: str, item: dataclasses.Field, kind: Any) -> list[str]:
    default = default_of(item)
    items = [f"{each:.4g}" if isinstance(each, float) else str(each) for each in default] if kind == list[float] else []
    shown = NOTHING if default is None else f"`[{', '.join(items)}]`" if items else f"`{default}`"
    text = markdown_text(item.metadata["help"])
    if item.metadata["choices"]:
        text += f" ({', '.join(f'`{choice}`' for choice in item.metadata['choices'])})"
    if limits := _limits(item.metadata):
        text += f"; {limits}"
    return [f"`{key}`", type_name(kind).lower(), shown, text]


def _limits(metadata: Any) -> str:
    words = {"minimum": "at least {:g}", "above": "above {:g}", "maximum": "at most {:g}", "below": "below {:g}"}
    # Limits against slips of the finger are not worth a reader's time.
    told = {name: metadata[name] for name in words if metadata[name] is not None and abs(metadata[name]) < 1000}
    return ", ".join(words[name].format(value) for name, value in told.items())


def keys() -> str:
    """Return a table of recipe keys for each group."""
    parts = []
    for group, names in itertools.groupby(KEYS, key=lambda name: KEYS[name].metadata["group"]):
        rows = [_option(name, KEYS[name], TYPES[name]) for name in names]
        parts.append(f"## {group.capitalize()}\n\n{Table(['key', 'type', 'default', 'what'], rows).markdown()}")
    return "\n\n".join(parts)


def commands() -> str:
    """Return a section for each command: usage, its own flags, and which recipe keys are flags of it."""
    parts = []
    for name, command in COMMANDS.items():
        parser = next(
            action for action in build_parser(name)._actions if isinstance(action, argparse._SubParsersAction)
        ).choices[name]
        actions = [action for action in parser._actions if action.dest != "help"]
        of_recipe = {action.dest for action in actions if _is_recipe_flag(action)}
        own = [action for action in actions if not _is_recipe_flag(action)]
        usage = command.usage or " ".join(parser.format_usage().removeprefix(f"usage: mbib {name}").split())
        usage = usage.removeprefix("[-h] ").strip()
        lines = [f"## mbib {name}", f"{(command.add_flags.__doc__ or '').strip()}"]
        lines.append(f"```text\nmbib {name} {usage}".rstrip() + "\n```")
        if own:
            lines.append(Table(["argument", "what"], [_argument(action) for action in own]).markdown())
        if of_recipe:
            lines.append(_recipe_flags(of_recipe))
        parts.append("\n\n".join(lines))
    return "\n\n".join(parts)


def _is_recipe_flag(action: argparse.Action) -> bool:
    return action.dest in KEYS and flag(action.dest) in action.option_strings


def _argument(action: argparse.Action) -> list[str]:
    names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.metavar or action.dest.upper()}`"
    if action.option_strings and action.metavar is not None and action.nargs != 0:
        names += f" {action.metavar}"
    choices = f" ({', '.join(f'`{choice}`' for choice in action.choices)})" if action.choices else ""
    return [names, markdown_text((action.help or "").replace("%%", "%")) + choices]


def _recipe_flags(given: set[str]) -> str:
    others = [name for name in KEYS if name not in given]
    said = "[Recipe keys](keys.md) that are flags: "
    if not others:
        return f"{said}all."
    if len(others) < len(given):
        return f"{said}all but {', '.join(f'`{flag(name)}`' for name in others)}."
    return f"{said}{', '.join(f'`{flag(name)}`' for name in KEYS if name in given)}."


def zoo() -> str:
    """Return the models that have weights in the tables of `mbib models`, and the names of the others."""
    entries = catalogue()
    trained = markdown_table([entry for entry in entries if entry.model.is_trained])
    rows = [
        [f"`{entry.model.name}`", entry.model.dataset.title, f"{entry.parameters / 1e6:.2f}"]
        for entry in entries
        if not entry.model.is_trained
    ]
    others = Table(["model", "data", "params, M"], rows).markdown()
    return f"{trained}\n\n### Names without weights\n\nTrain these with `mbib train NAME`.\n\n{others}"


def recipes() -> str:
    """Return the tables of packaged recipes."""
    return results.recipes_table(RESULTS)


def runs() -> str:
    """Return the tables of kept runs."""
    return results.table(RESULTS)


def sweeps() -> str:
    """Return the table of packaged sweeps."""
    rows = []
    for name in list_sweeps():
        sweep = find_sweep([name])
        axes = ", ".join(f"{sweep.label(axis)} ({len(values)})" for axis, values in sweep.axes.items())
        paper = sweep.paper.source if sweep.paper else NOTHING
        rows.append([f"`{name}`", sweep.title, markdown_text(axes), str(len(sweep.seeds)), f"`{sweep.recipe}`", paper])
    return Table(["sweep", "what", "axes (values)", "seeds", "recipe", "paper"], rows).markdown()


def measured_sweeps() -> str:
    """Return the table of the sweeps that were run, and of each its table and its figure."""
    parts = [results.sweeps_table(RESULTS)]
    for file in sorted(RESULTS.glob("*/sweep.json")):
        sweep = read_sweep(file)
        text = results.sweep_table(sweep)
        figure = f"![{markdown_text(sweep.title)}](../results/{file.parent.name}/figure.png)"
        parts.append(f"### {markdown_text(sweep.name)}\n\n{text}\n{figure}")
    return "\n\n".join(parts)


def benchmark() -> str:
    """Return the table of the benchmark."""
    return results.speed_table(RESULTS)


PARTS: dict[str, Callable[[], str]] = {
    part.__name__: part
    for part in (methods, settings, keys, commands, zoo, recipes, runs, sweeps, measured_sweeps, benchmark)
}


# Events of mkdocs


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Link the repository at the foot of each page; the theme's own link would ask GitHub for numbers."""
    config.extra["social"] = [{"icon": "fontawesome/brands/github", "link": repository(), "name": "The repository"}]
    return config


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Write the generated parts of a page, and resolve its links that lead out of docs/."""

    def part(found: re.Match[str]) -> str:
        if found[1] not in PARTS:
            raise PluginError(f"{page.file.src_uri}: no part {found[1]!r}; there are {', '.join(PARTS)}")
        return PARTS[found[1]]()

    def link(found: re.Match[str]) -> str:
        place = normpath(f"docs/{Path(page.file.src_uri).parent.as_posix()}/{found[3]}")
        if not (ROOT / place).exists():
            raise PluginError(f"{page.file.src_uri}: link to {found[3]}, and there is no {place}")
        if found[1]:
            if files.get_file_from_path(place) is None:
                files.append(File.generated(config, place, abs_src_path=str(ROOT / place)))
            return f"![{found[2][1:-1]}]({place})"
        kind = "tree" if (ROOT / place).is_dir() else "blob"
        return f"{found[2]}({repository()}/{kind}/main/{place}{found[4] or ''})"

    return LINK.sub(link, PART.sub(part, markdown))
