"""Plugins: files, and modules by name, that register methods and samplers. Which code of them has been imported."""

import hashlib
import importlib
import importlib.util
import io
import sys
import tokenize
import traceback
import zlib
from collections.abc import Collection, Iterable, Sequence
from functools import cache
from pathlib import Path

from mbib_timm.errors import MbibError, first_line, nearest
from mbib_timm.recipe.declared import packaged_methods
from mbib_timm.registry import IMPORTED, forget, is_inside

# What a plugin's code may differ in.
NO_CODE = (tokenize.COMMENT, tokenize.NL)


# The digest of each plugin's code that has been imported.
_loaded: dict[str, str] = {}


def load_plugin(plugin: str) -> str:
    """Import a file, or a module by name, that registers methods; once.

    Args:
        plugin: path of a ``.py`` file, or a module's name.

    Returns:
        The name by which the same plugin is found from anywhere.

    Raises:
        MbibError: there is no such file or module, it does not import, or it registers nothing.
    """
    where, module = _place(plugin)
    if where in _loaded:
        return where
    is_file = module != plugin
    if is_file and not Path(where).is_file():
        near = nearest(Path(where).name, [file.name for file in Path(where).parent.glob("*.py")], most=1)
        raise MbibError(f"plugin {plugin}: there is no such file{f'; did you mean {near[0]!r}?' if near else ''}")
    is_name = not plugin.startswith(".") and Path(plugin).name == plugin
    if not (Path(where).suffix == ".py" if is_file else is_name):
        raise MbibError(f"plugin {plugin}: expected a file whose name ends in .py, or the name of a module")
    if not is_file and module in sys.modules and _registers(module) and _changed_at(module) > IMPORTED:
        _forget(module)  # somebody has imported it before: perhaps from other code than is there now
    known = set(sys.modules)
    try:
        if is_file:
            code = _import_file(module, Path(where))
        else:
            importlib.import_module(module)
            code = code_of(module)
    except (Exception, SystemExit) as error:  # whatever somebody else's file does wrong
        line = _line_in(module, error)
        _forget(module, known)
        is_ours = isinstance(error, MbibError)  # and names the method at fault
        reason = first_line(error) if is_ours else f"{type(error).__name__}: {first_line(error)}{line}"
        if isinstance(error, ModuleNotFoundError) and error.name == plugin and Path(f"{plugin}.py").is_file():
            reason = f"{reason}; did you mean {f'{plugin}.py'!r}?"
        raise MbibError(f"plugin {plugin} cannot be imported: {reason}") from None
    if not _registers(module):
        _forget(module, known)
        raise MbibError(f"plugin {plugin} registers no method: expected a class under @register('name')")
    _loaded[where] = code
    return where


def _line_in(module: str, error: BaseException) -> str:
    """Return in which line of a module, or of one inside it, an error came up, in brackets; empty where in none."""
    frames = traceback.walk_tb(error.__traceback__)
    found = [(frame, line) for frame, line in frames if is_inside(frame.f_globals.get("__name__", ""), module)]
    return f" ({Path(found[-1][0].f_code.co_filename).name}, line {found[-1][1]})" if found else ""


def renew_plugin(plugin: str) -> None:
    """Import a plugin anew that has been imported, if its code has changed since; what it had registered is forgotten.

    Raises:
        MbibError: its code by now does not import.
    """
    where, module = _place(plugin)
    if _has_changed(where):
        _forget(module)
        load_plugin(plugin)


def outdated_plugins(plugins: Iterable[str]) -> list[str]:
    """Return the names of those plugins whose files hold other code by now than was imported."""
    return [Path(plugin).name for plugin in plugins if _has_changed(plugin)]


def moved_plugin(plugin: str) -> str:
    """Return where a plugin lies that a run names by a path of then.

    That is one of its name which has been imported, if the path holds the same code or nothing; else the path; else
    one of its name in the current folder; else the path as it is.
    """
    path = Path(plugin)
    if path.suffix != ".py" or str(path.resolve()) in _loaded:
        return plugin
    imported = next((where for where in _loaded if Path(where).name == path.name), None)
    if path.is_file():
        return plugin if imported is None or _loaded[imported] != _code_by_now(plugin) else imported
    return imported or (str(Path(path.name).resolve()) if Path(path.name).is_file() else plugin)


def imported_code(plugin: str) -> str:
    """Return the digest of a plugin's code as it was imported: what runs, whatever it holds by now. See `code_of`."""
    return _loaded[plugin] if plugin in _loaded else code_of(plugin)


def code_behind(plugins: Sequence[str], module: str, others: Iterable[str] = ()) -> dict[str, str]:
    """Return the digests of the code that a method comes from, by file or module.

    That is the code of those plugins that the method uses, and its own module's where that is in none of them and not
    in this package: an installed package's. What a notebook or a script defines has no digest.

    Args:
        plugins: as recipes have them; those that none of the modules is in are for other stages.
        module: that defines the method.
        others: modules that define what it trains with: its base classes, samplers, the network.
    """
    modules = {module, *others}
    used = [each for each in plugins if any(is_inside(name, _place(each)[1]) for name in modules)]
    found = {Path(each).name: imported_code(each) for each in used}
    told = ("mbib_timm", "__main__", *(_place(each)[1] for each in plugins))
    if not any(is_inside(module, each) for each in told):
        code = _loaded.get(module) or _code_by_now(module)
        found |= {} if code is None else {module: code}
    return found


def code_of(plugin: str) -> str:
    """Return a digest of a plugin's code, without comments and blank lines; what it imports is not looked at.

    Of a package that is the code of all files in it.

    Args:
        plugin: as recipes have it: the path of a file, or the name of a module.

    Raises:
        MbibError: there is no code, or none that Python can read.
    """
    first, *others = _files_of(plugin)
    try:
        if not others:
            return _digest_of(first)
        parts = [f"{file.relative_to(first.parent)} {_digest_of(file)}" for file in (first, *others)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()
    except (OSError, SyntaxError, ValueError, tokenize.TokenError) as error:
        raise MbibError(f"plugin {plugin} cannot be read: {error}") from None


def _files_of(plugin: str) -> list[Path]:
    """Return the files of a plugin's code, a package's own first; one that is not there where nothing says which."""
    if Path(plugin).suffix == ".py":
        return [Path(plugin)]
    try:
        spec = importlib.util.find_spec(plugin)
    except (ImportError, ValueError):
        spec = None
    file = Path((spec.origin if spec else None) or f"{plugin}.py")
    inside = sorted(file.parent.rglob("*.py")) if file.name == "__init__.py" else []
    return [file, *(other for other in inside if other != file)]


def _digest_of(file: Path) -> str:
    state = file.stat()
    return _digest_of_file(file, state.st_size, state.st_mtime_ns)


@cache
def _digest_of_file(path: Path, size: int, changed: int) -> str:
    """Return the digest of the code in a file, which has a size and a time of change."""
    return _digest(path.read_bytes())


def _digest(source: bytes) -> str:
    tokens = [token.string for token in tokenize.tokenize(io.BytesIO(source).readline) if token.type not in NO_CODE]
    return hashlib.sha256("\0".join(tokens).encode()).hexdigest()


def _code_by_now(plugin: str) -> str | None:
    """Return the digest of a plugin's code; None where Python cannot read it."""
    try:
        return code_of(plugin)
    except MbibError:
        return None


def _has_changed(where: str) -> bool:
    """Return whether the file of an imported plugin holds other code by now; one that is gone does not."""
    return where in _loaded and _files_of(where)[0].is_file() and _code_by_now(where) != _loaded[where]


def _changed_at(module: str) -> float:
    return max((file.stat().st_mtime for file in _files_of(module) if file.is_file()), default=0.0)


def _registers(module: str) -> bool:
    """Return whether a module from outside, or one inside it, has registered a method."""
    methods = getattr(sys.modules.get("mbib_timm.methods.base"), "METHODS", None)
    return methods is not None and not packaged_methods().keys() >= {*methods.names_from(module)}


def _forget(module: str, known: Collection[str] = ()) -> None:
    """Take out what a module, or one inside it, has registered, and those of these modules that are not in `known`."""
    forget(module)
    for where in [where for where in _loaded if is_inside(_place(where)[1], module)]:
        del _loaded[where]
    for name in [name for name in sys.modules if name not in known and is_inside(name, module)]:
        del sys.modules[name]
    importlib.invalidate_caches()


def _place(plugin: str) -> tuple[str, str]:
    """Return the name by which a plugin is found from anywhere, and that of its module."""
    path = Path(plugin)
    if path.suffix == ".py" or path.is_file():
        where = str(path.resolve())
        return where, f"mbib_timm_plugin_{Path(where).stem}_{zlib.crc32(where.encode()):08x}"
    return plugin, plugin


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
