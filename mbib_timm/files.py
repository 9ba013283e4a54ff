"""Files that are written whole or not at all, the plain values of JSON as typed objects, and text for a terminal."""

import csv
import dataclasses
import errno
import io
import json
import mmap
import os
import re
import stat
import types
import typing
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, TypeVar

import yaml

from mbib_timm.errors import DataError, MbibError, first_line, shown
from mbib_timm.options import is_number

T = TypeVar("T")
LONGEST_PLACE = 200  # characters of a place in a message
LARGEST_NUMBER, LARGEST_FLOAT = 2**63, 10**308  # beyond what numpy and Python hold
LONG_LIST = 1000  # plain values; longer ones stand in one line of JSON
LARGEST = 64 * 2**20  # bytes of a text file that is read whole


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file so that `path` holds either its old content or all of the new. A link stays one, and so do rights.

    Raises:
        MbibError: no space left on the device, or nothing to be written there.
    """
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            if path.exists():
                beside.chmod(stat.S_IMODE(path.stat().st_mode))
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise MbibError(f"no space left to write {path}; what was there before is untouched") from None
        raise MbibError(f"cannot write {path}: {error.strerror}; what was there before is untouched") from None
    finally:
        beside.unlink(missing_ok=True)
    if hasattr(os, "O_DIRECTORY"):
        # The rename itself must reach the disk too.
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_debris(folder: Path) -> None:
    """Remove from a folder what `write_atomically` has left there of processes that were killed."""
    for path in folder.glob(".*.tmp"):
        name = re.fullmatch(r"\..+\.(\d+)\.tmp", path.name, re.DOTALL)
        if name and not _is_another(int(name[1])):
            path.unlink(missing_ok=True)


def _is_another(pid: int) -> bool:
    """Return whether another process of this machine has a number; True too where the system does not say."""
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it is somebody else's
        return True
    return pid != os.getpid()


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file's content atomically."""
    write_atomically(path, lambda file: file.write(content))


def check_place(file: Path) -> None:
    """Raise MbibError where no file can be made: a folder, a device or a pipe has its name, or a file that of a folder
    above it, or no file can have it."""
    try:
        mode = os.stat(file).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return check_folder(file.parent)
    except (OSError, ValueError) as error:  # a name that is too long, or one with a NUL
        # Python 3.13 words the latter in its own way.
        reason = "embedded null byte" if "\0" in str(file) else getattr(error, "strerror", error)
        raise MbibError(f"cannot write {printable(str(file))[:LONGEST_PLACE]}: {reason}") from None
    if stat.S_ISDIR(mode):
        raise MbibError(f"{file} is a folder; expected the name of a file")
    if not stat.S_ISREG(mode):
        raise MbibError(f"{file} is a pipe or a device; expected the name of a file")


def require_own(flag: str, file: Path, is_own: Callable[[Path], bool], otherwise: str) -> None:
    """Raise MbibError for a file that a command would replace, and that it does not write itself: it would be lost.

    And where no file can be made; see `check_place`.

    Args:
        flag: that names the file.
        file: to write; where there is none, or an empty one, nothing is lost.
        is_own: whether a file looks like what the command writes.
        otherwise: what one is that does not, such as ``holds no predictions``.
    """
    check_place(file)
    if file.exists() and file.stat().st_size and not is_own(file):
        raise MbibError(
            f"{flag} {file}: the existing file {otherwise}, and is not replaced; choose another name, or remove it"
        )


def begins_with(*beginnings: bytes) -> Callable[[Path], bool]:
    """Return what tells `require_own` whether a file begins with one of several texts."""

    def begins(file: Path) -> bool:
        with file.open("rb") as opened:
            return opened.read(max(map(len, beginnings))).startswith(beginnings)

    return begins


def contains(text: bytes) -> Callable[[Path], bool]:
    """Return what tells `require_own` whether a file has a text somewhere in it."""

    def is_in(file: Path) -> bool:
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(text) >= 0

    return is_in


def has_fields(*names: str) -> Callable[[Path], bool]:
    """Return what tells `require_own` whether a file is JSON whose fields include several."""

    def has(file: Path) -> bool:
        try:
            found = parse_json(read_content(file, "results"))
        except (MbibError, ValueError):
            return False
        return isinstance(found, Mapping) and found.keys() >= {*names}

    return has


def check_folder(folder: Path) -> None:
    """Raise MbibError where a folder cannot be made, for a file has its name or that of a folder above it."""
    if folder.parts[:1] == ("~",):
        raise MbibError(f"cannot make the folder {folder}: ~ is not expanded here; write the full path")
    above = next(place for place in (folder, *folder.parents) if place.exists())
    if not above.is_dir():
        raise MbibError(f"cannot make the folder {folder}: {above} is a file")


def make_folder(folder: Path) -> None:
    """Make a folder, with those above it. Raises MbibError where none can be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MbibError(f"cannot make the folder {folder}: {error.strerror}") from None


def printable(text: str) -> str:
    """Return text in one line without what a terminal obeys or cannot show, for names that somebody else has given.

    Control characters, line breaks, marks that turn the direction of writing and bytes that are no text become escapes
    such as ``\\x1b``. What joins letters of a script, and the signs of an emoji, stays.
    """
    return "".join(
        char if char.isprintable() or char in _JOINERS else char.encode("unicode_escape").decode() for char in text
    )


def printable_lines(text: str) -> str:
    """Return text of several lines with each `printable`."""
    return "\n".join(map(printable, text.split("\n")))


_JOINERS = "\u200c\u200d"


def composed(name: str) -> str:
    """Return a name in Unicode's composed form, as names are compared; macOS writes those of folders decomposed."""
    return unicodedata.normalize("NFC", name)


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: ``1 image``, ``1,200 classes``."""
    return f"{number:,} {noun}{'' if number == 1 else 'es' if noun.endswith('s') else 's'}"


def in_words(left_out: Mapping[str, Sequence[str]]) -> str:
    """Return in a line what was left out: reasons, numbers and the first names."""
    return "; ".join(
        f"{why}: {len(names):,} ({', '.join(map(printable, names[:3]))}{', ...' if len(names) > 3 else ''})"
        for why, names in left_out.items()
    )


def to_json(content: Any, indent: int = 2) -> bytes:
    """Return a dataclass or plain values as JSON; NaN and infinity are refused."""
    plain = dataclasses.asdict(content) if dataclasses.is_dataclass(content) else content  # type: ignore[arg-type]
    return (_to_lines(plain, indent, "\n") + "\n").encode()


def _to_lines(value: Any, indent: int, line: str) -> str:
    """Return plain values as JSON, indented but for long lists of numbers or names, which stand in one line.

    `line` is a line break with the spaces of this level.
    """
    inner = line + " " * indent
    if isinstance(value, dict) and value:
        items = (f"{json.dumps(str(key))}: {_to_lines(item, indent, inner)}" for key, item in value.items())
        return f"{{{inner}{f',{inner}'.join(items)}{line}}}"
    if isinstance(value, list | tuple) and value:
        is_long = len(value) > LONG_LIST and not any(isinstance(item, dict | list | tuple) for item in value)
        if not is_long:
            return f"[{inner}{f',{inner}'.join(_to_lines(item, indent, inner) for item in value)}{line}]"
    return json.dumps(value, allow_nan=False)


# What a spreadsheet takes for the beginning of a formula (OWASP, "CSV Injection"); tabs and line breaks are escaped.
_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")


def to_cell(text: str) -> str:
    """Return text of somebody else's for a CSV that people open in spreadsheets: in one line, and no formula.

    A ``'`` goes before what would be one; a number is none.
    """
    shown = printable(text)
    return f"'{shown}" if _is_formula(shown) and not is_number(shown) else shown


def from_cell(cell: str) -> str:
    """Return a cell of `to_cell` without the ``'``."""
    return cell[1:] if cell[:1] == "'" and _is_formula(cell[1:]) else cell


def _is_formula(text: str) -> bool:
    return text.lstrip("'").startswith(_FORMULA)


def to_csv(rows: Iterable[Sequence[object]], exact: bool = False) -> bytes:
    """Return rows as CSV in UTF-8, text as `to_cell` gives it; `exact` leaves it as it is, for programs that read it.

    Bytes of names that are no text in UTF-8 become escapes in either.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in rows:
        writer.writerow(row if exact else [to_cell(cell) if isinstance(cell, str) else cell for cell in row])
    return text.getvalue().encode(errors="backslashreplace")


def mappings_to_csv(rows: Sequence[Mapping[str, object]], first: Iterable[str] = ()) -> bytes:
    """Return rows by column as CSV, for programs: columns that are said to be first, then all others of any row."""
    columns = list(dict.fromkeys([*first, *(name for row in rows for name in row)]))
    return to_csv([columns, *([row.get(name) for name in columns] for row in rows)], exact=True)


def csv_rows(text: str, separator: str, where: str) -> Iterator[tuple[int, list[str]]]:
    """Give the rows of a CSV that are not empty, each with its line, and no cell with spaces at its ends.

    Raises:
        DataError: quotes that are not closed and the like; names the line, behind `where`.
    """
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        for row in reader:
            if any(cells := [cell.strip() for cell in row]):
                yield reader.line_num, cells
    except csv.Error as error:
        raise DataError(f"{where}, line {reader.line_num}: {error}; see whether quotes are closed") from None


def read_content(file: Path, what: str, error: type[MbibError] = MbibError, most: int | None = LARGEST) -> bytes:
    """Return the content of a regular file; a pipe or a device would keep a reader waiting.

    Args:
        file: to read.
        what: the file is, for messages, such as ``list file``.
        error: kind of error to raise.
        most: bytes that it may have; None for any number.

    Raises:
        MbibError: it is not there, no regular file, too large, or cannot be read.
    """
    try:
        with open(file, "rb", opener=_without_waiting) as opened:
            if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
                raise error(f"cannot read the {what} {file}: it is not a regular file")
            content = opened.read(-1 if most is None else most + 1)
    except OSError as problem:
        raise error(f"cannot read the {what} {printable(str(file))}: {problem.strerror}") from None
    except ValueError as problem:  # a name with a NUL
        raise error(f"cannot read the {what} {printable(str(file))}: {problem}") from None
    if most is not None and len(content) > most:
        raise error(f"the {what} {file} is larger than {most / 2**20:,.0f} MB")
    return content


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_text(file: Path, what: str, error: type[MbibError] = MbibError) -> str:
    """Return the text of a file in UTF-8, without a byte-order mark. Raises as `read_content` does."""
    try:
        return read_content(file, what, error).decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise error(
            f"cannot read the {what} {file}: byte {problem.start:,} is not UTF-8; save it in that encoding"
        ) from None


def parse_json(text: str | bytes) -> Any:
    """Return the plain values of JSON.

    Raises:
        ValueError: no JSON, NaN or infinity, a key that stands twice in one mapping, or nesting that is too deep; in
            one line.
    """
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        repeated = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise ValueError(f"key {repeated!r} occurs twice")
    return found


def parse_yaml(text: str, as_text: bool = False) -> Any:
    """Return the plain values of YAML.

    Args:
        text: a document.
        as_text: leave every value the text that it is; a class that is called ``no`` would become False.

    Raises:
        ValueError: no YAML, a key that stands twice in one mapping, or nesting that is too deep; in one line.
    """
    try:
        return yaml.load(text, _TextsOnce if as_text else _ValuesOnce)
    except yaml.MarkedYAMLError as error:
        place = f"line {error.problem_mark.line + 1}: " if error.problem_mark is not None else ""
        raise ValueError(f"{place}{error.problem}") from None
    except yaml.YAMLError as error:
        raise ValueError(first_line(error)) from None
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except ValueError as error:  # such as a number of too many digits, or a date that is none
        raise ValueError(first_line(error).partition(";")[0]) from None
    except Exception as error:  # PyYAML's constructors raise of all kinds at values that do not fit their tags
        raise ValueError(f"a value does not fit its tag ({type(error).__name__})") from None


def read_yaml(file: Path, what: str) -> Any:
    """Return the plain values of a YAML file. Raises MbibError as `read_text` does, and for what is no YAML."""
    text = read_text(file, what)
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise MbibError(f"{file}: not a YAML file ({error})") from None


# libyaml's loader is twenty times as fast, and limits nesting.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _ValuesOnce(_LOADER):
    """Loads plain values, and refuses keys that stand twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key.value!r} occurs twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _plain_number(loader: Any, node: yaml.ScalarNode) -> float:
    """Return a number, but for those that YAML 1.1 takes for others than they look: octal 010, and 1:30 for 90."""
    text = str(node.value)
    if ":" in text or re.fullmatch("[-+]?0[0-9_]+", text):
        raise yaml.constructor.ConstructorError(
            None, None, f"{text} is not a plain number; write one without leading zeros or colons", node.start_mark
        )
    is_whole = node.tag.endswith(":int")
    number: float = loader.construct_yaml_int(node) if is_whole else loader.construct_yaml_float(node)
    return number


for _kind in ("int", "float"):
    _ValuesOnce.add_constructor(f"tag:yaml.org,2002:{_kind}", _plain_number)


class _TextsOnce(_ValuesOnce):
    """Leaves every value the text that it is."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}


def read_json(kind: type[T], file: Path, what: str) -> T:
    """Read a dataclass that `to_json` has written.

    Args:
        kind: the dataclass.
        file: to read.
        what: the file should hold, for messages, such as ``results of a run``.

    Raises:
        MbibError: the file cannot be read, or holds something else; names the field.
    """
    try:
        return from_plain(kind, parse_json(read_content(file, what.removeprefix("the "))))
    except ValueError as error:  # of JSON, of UTF-8, or ours
        raise MbibError(f"{file} does not hold {what}: {error}") from None


def from_plain(kind: Any, value: Any, place: str = "") -> Any:
    """Return plain values as an instance of a type: a dataclass, a container of one, or a plain type.

    Fields of a dataclass that are missing take their default.

    Args:
        kind: a dataclass; ``str``, ``int``, ``float``, ``bool``; ``list``, ``tuple`` or ``dict`` of such; a union with
            None.
        value: as JSON or YAML gives it.
        place: of the value, for messages.

    Raises:
        ValueError: a value of another type, an unknown field, or one that is missing; names it.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        return None if value is None else from_plain(arguments[0], value, place)
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        return _from_mapping(kind, value, place)
    if origin is dict and isinstance(value, Mapping):
        if odd := [key for key in value if not isinstance(key, str)]:
            raise ValueError(f"{_said(place)}: expected names, got {shown(odd[0])} for one")
        return {key: from_plain(arguments[1], item, f"{place}.{key}") for key, item in value.items()}
    if origin in (list, tuple) and isinstance(value, list | tuple):
        if origin is tuple and Ellipsis not in arguments and len(value) != len(arguments):
            raise ValueError(f"{_said(place)}: expected {len(arguments)} values, got {len(value)}")
        return origin(from_plain(arguments[0], item, f"{place}[{i}]") for i, item in enumerate(value))
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and kind is int and abs(value) >= LARGEST_NUMBER:
        raise ValueError(f"{_said(place)}: expected a number of at most 64 bits, got {shown(value)}")
    if kind is float and is_number and abs(value) < LARGEST_FLOAT:  # nan is none
        return float(value)
    if kind in (str, bool) and isinstance(value, kind):
        return value
    if kind is int and is_number and isinstance(value, int):
        return value
    expected = getattr(kind, "__name__", str(kind))
    raise ValueError(f"{_said(place)}: expected {expected}, got {shown(value)}")


def _said(place: str) -> str:
    """Return a place in plain values for a message; names in it may be somebody else's."""
    text = printable(place.lstrip(".")) or "content"
    return text if len(text) <= LONGEST_PLACE else f"{text[:LONGEST_PLACE]}..."


def _from_mapping(kind: Any, content: Mapping[str, Any], place: str) -> Any:
    hints = typing.get_type_hints(kind)
    fields = {item.name: item for item in dataclasses.fields(kind) if item.init}
    if unknown := [name for name in content if name not in fields]:
        raise ValueError(f"{_said(f'{place}.{unknown[0]}')}: unknown field")
    missing = [name for name, item in fields.items() if name not in content and not _has_default(item)]
    if missing:
        raise ValueError(f"{_said(f'{place}.{missing[0]}')}: missing")
    return kind(**{name: from_plain(hints[name], value, f"{place}.{name}") for name, value in content.items()})


def _has_default(item: "dataclasses.Field[Any]") -> bool:
    return item.default is not dataclasses.MISSING or item.default_factory is not dataclasses.MISSING
