"""Named factories: a method, sampler or data source is added by one decorated function and found by its name."""

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from mbib_timm.errors import MbibError, unknown_name

T = TypeVar("T")

# Seconds since the epoch: whatever registers something has been imported since, or is about to be.
IMPORTED = time.time()
_registries: list["Registry[Any]"] = []


def is_inside(name: str, module: str) -> bool:
    """Return whether a module's name is that of a module, or of one inside it."""
    return f"{name}.".startswith(f"{module}.")


def forget(module: str) -> None:
    """Take out of every registry what a module, or one inside it, has registered."""
    for registry in _registries:
        for name in registry.names_from(module):
            registry.remove(name)


class Registry(Generic[T]):
    """A mapping from names to entries that answers an unknown name with the nearest valid ones.

    Args:
        kind: what the entries are, for error messages, e.g. ``"method"``.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}
        self._modules: dict[str, str] = {}
        _registries.append(self)

    def register(self, name: str, module: str | None = None) -> Callable[[T], T]:
        """Decorator that files an entry under `name`. Raises MbibError if the name is taken.

        Args:
            name: to find it by.
            module: that registers it; the entry's own when not given.
        """

        def decorate(entry: T) -> T:
            if name in self._entries:
                raise self._taken(name)
            self._entries[name] = entry
            self._modules[name] = str(module or getattr(entry, "__module__", "another module"))
            return entry

        return decorate

    def _taken(self, name: str) -> MbibError:
        """Build the error for a name that has an entry: the file that it came from, and what can be done."""
        where = self._modules[name]
        taken = f"{self.kind} {name!r} is registered already, by"
        if is_inside(where, __package__):
            return MbibError(f"{taken} {where}: choose another name")
        file = getattr(sys.modules.get(where), "__file__", None)
        return MbibError(f"{taken} {file or where}: give one of them another name, or restart Python")

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            raise unknown_name(self.kind, name, self._entries)
        return self._entries[name]

    def remove(self, name: str) -> None:
        """Take an entry out."""
        del self._entries[name], self._modules[name]

    def module_of(self, name: str) -> str:
        """Return the module that has registered a name."""
        return self._modules[name]

    def names_from(self, module: str) -> list[str]:
        """Return the names that a module, or one inside it, has registered."""
        return [name for name, where in self._modules.items() if is_inside(where, module)]

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)
