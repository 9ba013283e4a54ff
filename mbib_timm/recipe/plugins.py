"""Plugins: files, and modules by name, that register methods and samplers. Which code of them has been imported."""

import hashlib
import importlib
import importlib.util
import io
import sys
import tokenize
import zlib
from functools import cache
from pathlib import Path

from mbib_timm.errors import MbibError, first_line
from mbib_timm.recipe.declared import packaged_methods
from mbib_timm.registry import forget

# What a plugin's code may differ in.
NO_CODE = (tokenize.COMMENT, tokenize.NL)


# The digest of each plugin's code that has been imported.
_loaded: dict[str, str] = {}


def load_plugin(plugin: str, renew: bool = False) -> str:
    """Import a file, or a module by name, that registers methods; once.

    Args:
        plugin: path of a ``.py`` file, or a module's name.
        renew: import it anew where its code has changed since; what it had registered is forgotten.

    Returns:
        The name by which the same plugin is found from anywhere.

    Raises:
        MbibError: there is no such file or module, it does not import, or it registers nothing.
    """
    path = Path(plugin)
    is_file = path.suffix == ".py" or path.is_file()
    where = str(path.resolve()) if is_file else plugin
    module = _module_name(Path(where)) if is_file else plugin
    if where in _loaded:
        if not renew or _readable_code(where) in (None, _loaded[where]):
            return where
        _forget(where, module)
    elif not is_file and plugin in sys.modules and _registers(module):
        _forget(where, module)  # somebody has imported it before: from which code nobody knows
    if is_file and not path.is_file():
        raise MbibError(f"plugin {plugin}: there is no such file")
    if is_file and path.suffix != ".py":
        raise MbibError(f"plugin {plugin}: expected a file whose name ends in .py, or the name of a module")
    try:
        if is_file:
            code = _import_file(module, Path(where))
        else:
            importlib.import_module(plugin)
            code = code_of(plugin)
    except (Exception, SystemExit) as error:  # whatever somebody else's file does wrong
        forget(module)
        reason = first_line(error) if isinstance(error, MbibError) else f"{type(error).__name__}: {first_line(error)}"
        raise MbibError(f"plugin {plugin} cannot be imported: {reason}") from None
    if not _registers(module):
        raise MbibError(f"plugin {plugin} registers no method: expected a class under @register('name')")
    _loaded[where] = code
    return where


def moved_plugin(plugin: str) -> str:
    """Return where a plugin lies that a run names by a path of then: there; else one of its name that has been
    imported, or lies in the current folder; else the path as it is."""
    path = Path(plugin)
    if path.suffix != ".py" or path.is_file():
        return plugin
    imported = next((where for where in _loaded if Path(where).name == path.name), None)
    return imported or (str(Path(path.name).resolve()) if Path(path.name).is_file() else plugin)


def imported_code(plugin: str) -> str:
    """Return the digest of a plugin's code as it was imported: what runs, whatever its file holds by now.

    Args:
        plugin: as recipes have it: the path of a file, or the name of a module.
    """
    return _loaded[plugin] if plugin in _loaded else code_of(plugin)


def code_of(plugin: str) -> str:
    """Return a digest of a plugin's code, without comments and blank lines; what it imports is not looked at.

    Args:
        plugin: as recipes have it: the path of a file, or the name of a module.
    """
    path = Path(plugin)
    if path.suffix != ".py":
        spec = importlib.util.find_spec(plugin)
        path = Path((spec.origin if spec else None) or "")
    try:
        state = path.stat()
        return _digest_of_file(path, state.st_size, state.st_mtime_ns)
    except (OSError, SyntaxError, ValueError, tokenize.TokenError) as error:
        raise MbibError(f"plugin {plugin} cannot be read: {error}") from None


@cache
def _digest_of_file(path: Path, size: int, changed: int) -> str:
    """Return the digest of the code in a file, which has a size and a time of change."""
    return _digest(path.read_bytes())


def _digest(source: bytes) -> str:
    tokens = [token.string for token in tokenize.tokenize(io.BytesIO(source).readline) if token.type not in NO_CODE]
    return hashlib.sha256("\0".join(tokens).encode()).hexdigest()


def _readable_code(plugin: str) -> str | None:
    """Return the digest of a plugin's code; None where there is none to read."""
    try:
        return code_of(plugin)
    except (MbibError, ImportError, ValueError):
        return None


def _registers(module: str) -> bool:
    """Return whether a module from outside, or one inside it, has registered a method."""
    methods = getattr(sys.modules.get("mbib_timm.methods.base"), "METHODS", None)
    return methods is not None and not packaged_methods().keys() >= {*methods.names_from(module)}


def _forget(where: str, module: str) -> None:
    """Take out what a plugin has registered, and its module."""
    _loaded.pop(where, None)
    forget(module)
    for name in [name for name in sys.modules if f"{name}.".startswith(f"{module}.")]:
        del sys.modules[name]
    importlib.invalidate_caches()


def _module_name(path: Path) -> str:
    return f"mbib_timm_plugin_{path.stem}_{zlib.crc32(str(path).encode()):08x}"


def _import_file(name: str, path: Path) -> str:
    """Import a file as a module, and return the digest of the code that ran.

    Python's own cache of compiled code would miss a change within the same second.
    """
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    module, source = importlib.util.module_from_spec(spec), path.read_bytes()
    sys.modules[name] = module  # dataclasses look their module up
    try:
        exec(compile(source, path, "exec"), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    return _digest(source)
