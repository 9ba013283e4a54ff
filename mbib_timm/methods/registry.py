"""Methods by name: those of this package, of installed packages (entry points), and of files (plugins)."""

import dataclasses
import importlib
import importlib.util
import sys
import warnings
import zlib
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

from mbib_timm.errors import MbibError, unknown_name
from mbib_timm.methods.base import Method
from mbib_timm.options import build_options
from mbib_timm.registry import Registry

ENTRY_POINTS = "mbib_timm.methods"

METHODS: Registry[type[Method]] = Registry("method")

M = TypeVar("M", bound=type[Method])

_loaded_plugins: set[str] = set()


def register(name: str) -> Callable[[M], M]:
    """Decorator that files a `Method` under a name: that of the recipe key ``method``, and of models' tags.

    Raises:
        MbibError: the name is taken, or the class is no method.
    """

    def decorate(method: M) -> M:
        if not (isinstance(method, type) and issubclass(method, Method)):
            raise MbibError(f"method {name!r}: expected a subclass of mbib_timm.methods.Method, got {method!r}")
        if not dataclasses.is_dataclass(method.Settings):
            raise MbibError(f"method {name!r}: its Settings must be a frozen dataclass of option() fields")
        METHODS.register(name)(method)
        method.name = name
        return method

    return decorate


def resolve_method(method: Mapping[str, Any]) -> tuple[type[Method], dict[str, Any]]:
    """Return the class of a recipe's method and all of its settings, checked.

    Args:
        method: ``name``, and settings by name.

    Raises:
        MbibError: no name, an unknown one, or a setting that the method has not or does not take.
    """
    if not isinstance(method.get("name"), str):
        raise MbibError(f"recipe key 'method': expected a name, or a mapping with one, got {dict(method)!r}")
    name = method["name"]
    if name not in METHODS:
        load_entry_points()
    if name not in METHODS:
        raise MbibError(f"{unknown_name('method', name, METHODS)} One of your own comes with --plugin FILE.")
    kind = METHODS[name]
    given = {key: value for key, value in method.items() if key != "name"}
    return kind, dataclasses.asdict(build_options(kind.Settings, given, f"method {name!r}"))


def method_title(name: object) -> str:
    """Return what a method is called in tables; anything else as it is."""
    return METHODS[str(name)].title or str(name) if str(name) in METHODS else str(name)


@cache
def load_entry_points() -> None:
    """Import what installed packages offer under the group ``mbib_timm.methods``; a broken one is passed over."""
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
        except Exception as error:  # whatever somebody else's package does wrong
            warnings.warn(f"methods of {entry.value} cannot be loaded: {type(error).__name__}: {error}", stacklevel=2)


def load_plugin(plugin: str) -> str:
    """Import a file, or a module by name, that registers methods; once.

    Args:
        plugin: path of a ``.py`` file, or a module's name.

    Returns:
        The name by which the same plugin is found from anywhere.

    Raises:
        MbibError: there is no such file or module, it does not import, or it registers nothing.
    """
    path = Path(plugin)
    is_file = path.suffix == ".py" or path.is_file()
    where = str(path.resolve()) if is_file else plugin
    if where in _loaded_plugins:
        return where
    if is_file and not path.is_file():
        raise MbibError(f"plugin {plugin}: there is no such file")
    before = set(METHODS)
    try:
        if is_file:
            _import_file(path.resolve())
        else:
            importlib.import_module(plugin)
    except (Exception, SystemExit) as error:  # whatever somebody else's file does wrong
        for name in set(METHODS) - before:
            METHODS.remove(name)
        text = next(iter(str(error).splitlines()), "")
        reason = text if isinstance(error, MbibError) else f"{type(error).__name__}: {text}"
        raise MbibError(f"plugin {plugin} does not import: {reason}") from None
    module = _module_name(path.resolve()) if is_file else plugin
    if not any(METHODS[name].__module__.startswith(module) for name in METHODS):
        raise MbibError(f"plugin {plugin} registers no method: expected a class under @register('name')")
    _loaded_plugins.add(where)
    return where


def _module_name(path: Path) -> str:
    return f"mbib_timm_plugin_{path.stem}_{zlib.crc32(str(path).encode()):08x}"


def _import_file(path: Path) -> None:
    name = _module_name(path)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
