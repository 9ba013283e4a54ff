"""Methods and samplers that a recipe may name, and what they declare of themselves.

Those of this package are read from their source and not imported: their files import torch and timm, which takes
seconds, and a misspelt flag is to be answered at once. Of a method's file this module executes what needs no import:
constants, dataclasses of options, and what classes assign; never a function. `tests/test_declared.py` compares all
that is read with the classes themselves. Methods of plugins and of installed packages are imported.
"""

import ast
import contextlib
import dataclasses
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mbib_timm.errors import MbibError, shown, unknown_name
from mbib_timm.options import build_options, option

ENTRY_POINTS = "mbib_timm.methods"
_PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class DeclaredMethod:
    """What a recipe knows of a method: class attributes of `mbib_timm.methods.Method`, which describes them."""

    name: str
    title: str
    citation: str
    Settings: type
    sampler: str
    views: tuple[Mapping[str, Any], ...]
    part: str
    reset: str
    classifier_start: str
    frozen_bn: str | None
    soft_targets: bool
    takes_class_weights: bool
    needs_start: bool
    needs_images: bool
    post_hoc: bool

    @classmethod
    def of(cls, method: type) -> "DeclaredMethod":
        """Return what a class declares."""
        return cls(**{item.name: getattr(method, item.name) for item in dataclasses.fields(cls)})


@cache
def packaged_methods() -> Mapping[str, DeclaredMethod]:
    """Return the methods of this package by name, in the order in which they are registered."""
    reader = _Reader()
    for file in sorted((_PACKAGE / "methods").glob("*.py")):
        reader.names_in(file.stem)
    return {name: DeclaredMethod.of(method) for name, method in reader.registered.items()}


class _Reader:
    """Executes the declarations in the files of ``methods/``, each file once."""

    def __init__(self) -> None:
        self.registered: dict[str, type] = {}
        self._files: dict[str, dict[str, Any]] = {}

    def names_in(self, module: str) -> dict[str, Any]:
        """Return what a module of ``methods/`` declares, by name."""
        if module not in self._files:
            names = {"__name__": __name__, "dataclass": dataclass, "option": option, "register": self._register}
            self._files[module] = names
            file = _PACKAGE / "methods" / f"{module}.py"
            for statement in ast.parse(file.read_text(encoding="utf-8")).body:
                self._execute(statement, names)
        return self._files[module]

    def _register(self, name: str) -> Callable[[Any], Any]:
        def decorate(method: Any) -> Any:
            method.name = name
            self.registered[name] = method
            return method

        return decorate

    def _execute(self, statement: ast.stmt, names: dict[str, Any]) -> None:
        prefix = "mbib_timm.methods."
        if isinstance(statement, ast.ImportFrom) and (statement.module or "").startswith(prefix):
            there = self.names_in((statement.module or "").removeprefix(prefix))
            names.update({each.asname or each.name: there[each.name] for each in statement.names if each.name in there})
            return
        if isinstance(statement, ast.ClassDef):
            _reduce(statement, names)
        elif isinstance(statement, ast.AnnAssign | ast.Assign):
            statement = _without_type(statement)
        else:
            return
        module = ast.fix_missing_locations(ast.Module([statement], []))
        with contextlib.suppress(NameError):  # it needs what has not been imported, and so declares nothing
            exec(compile(module, "declarations", "exec"), names)


def _reduce(node: ast.ClassDef, names: Mapping[str, Any]) -> None:
    """Leave of a class what it assigns, and bases that are known; a dataclass stays as it is."""
    if any(ast.unparse(decorator).startswith("dataclass") for decorator in node.decorator_list):
        return
    assigned = [each for each in node.body if isinstance(each, ast.AnnAssign | ast.Assign)]
    node.body = [_without_type(each) for each in assigned] or [ast.Pass()]
    node.bases = [base for base in node.bases if isinstance(base, ast.Name) and base.id in names]


def _without_type(assignment: ast.AnnAssign | ast.Assign) -> ast.stmt:
    """Return an assignment without annotation, which may need an import; nothing where it assigns nothing."""
    if isinstance(assignment, ast.Assign):
        return assignment
    return ast.Pass() if assignment.value is None else ast.Assign([assignment.target], assignment.value)


def known_methods() -> dict[str, DeclaredMethod]:
    """Return the methods that there are by name: the package's, then those from outside that have been imported."""
    return {**packaged_methods(), **{name: DeclaredMethod.of(method) for name, method in _outside().items()}}


def _outside() -> dict[str, type]:
    """Return the methods that plugins and installed packages have registered; whoever does imports the registry."""
    registry = getattr(sys.modules.get("mbib_timm.methods.base"), "METHODS", ())
    return {name: registry[name] for name in registry if name not in packaged_methods()}


def find_method(name: str) -> DeclaredMethod:
    """Return the method of a name; installed packages are imported where none is known.

    Raises:
        MbibError: there is none.
    """
    if name in packaged_methods():
        return packaged_methods()[name]
    if name not in known_methods():
        load_entry_points()
    known = known_methods()
    if name not in known:
        raise MbibError(f"{unknown_name('method', name, known)} Add one of your own with --plugin FILE.")
    return known[name]


def resolve_settings(method: Mapping[str, Any]) -> tuple[DeclaredMethod, dict[str, Any]]:
    """Return a recipe's method and all of its settings, checked.

    Raises:
        MbibError: no name, an unknown one, or a setting that the method has not or does not take.
    """
    if not isinstance(method.get("name"), str):
        raise MbibError(f"recipe key 'method': expected a name, or a mapping with one, got {shown(dict(method))}")
    declared = find_method(method["name"])
    given = {key: value for key, value in method.items() if key != "name"}
    return declared, dataclasses.asdict(build_options(declared.Settings, given, f"method {declared.name!r}"))


def named_models(method: Mapping[str, Any]) -> list[str]:
    """Return the trained models that a recipe's method names: the values of its settings with ``place=True``."""
    fields = dataclasses.fields(find_method(method["name"]).Settings)
    values = [method.get(item.name) for item in fields if item.metadata.get("place")]
    return [each for value in values if value for each in (value if isinstance(value, list) else [value])]


# Entries of registries


@cache
def packaged_names(file: str, register: str) -> tuple[str, ...]:
    """Return the names under which a file of this package registers entries, in order, without importing it.

    Args:
        file: such as ``data/samplers.py``.
        register: the call or decorator that registers them, such as ``SOURCES.register``; their name comes first in it.
    """
    calls = [
        node
        for node in ast.walk(ast.parse((_PACKAGE / file).read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == register
    ]
    return tuple(ast.literal_eval(call.args[0]) for call in sorted(calls, key=lambda call: call.lineno))


def packaged_samplers() -> tuple[str, ...]:
    """Return the names of this package's samplers."""
    return packaged_names("data/samplers.py", "sampler")


def packaged_sources() -> tuple[str, ...]:
    """Return the names of this package's data sources."""
    return packaged_names("data/sources.py", "SOURCES.register")


def export_formats() -> tuple[str, ...]:
    """Return the names of the formats that models are exported to."""
    return packaged_names("inference/export.py", "FORMATS.register")


def stream_names(sampler: str) -> tuple[str, ...]:
    """Return the names of the streams that a recipe's sampler asks for: one, or two joined by ``+``.

    The number that a name may have behind a colon is for the sampler to check: `mbib_timm.data.samplers`.

    Args:
        sampler: e.g. ``balanced``, ``effective:0.999``, ``instance+reverse``.

    Raises:
        MbibError: an unknown sampler, or more than two streams.
    """
    names = tuple(name.strip() for name in sampler.split("+"))
    if len(names) > 2:
        raise MbibError(f"sampler {shown(sampler)}: expected one sampler, or two side by side, got {len(names)}")
    # Plugins may have registered others; whoever does imports the registry.
    registered = getattr(sys.modules.get("mbib_timm.data.samplers"), "SAMPLERS", ())
    known = dict.fromkeys([*packaged_samplers(), *registered])
    for name in names:
        if name.partition(":")[0] not in known:
            raise unknown_name("sampler", name.partition(":")[0], known)
    return names


# Methods of installed packages


@cache
def load_entry_points() -> None:
    """Import what installed packages offer under the group ``mbib_timm.methods``; a broken one is passed over."""
    from importlib.metadata import entry_points  # reads what is installed, and is seldom asked

    for entry in entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
        except Exception as error:  # whatever somebody else's package does wrong
            warnings.warn(f"methods of {entry.value} cannot be loaded: {type(error).__name__}: {error}", stacklevel=2)
