"""Named factories: a method, sampler or data source is added by one decorated function and found by its name."""

from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from mbib_timm.errors import MbibError, unknown_name

T = TypeVar("T")

_registries: list["Registry[Any]"] = []


def registered() -> set[tuple["Registry[Any]", str]]:
    """Return all that is registered anywhere: the registry and the name of each entry."""
    return {(registry, name) for registry in _registries for name in registry}


class Registry(Generic[T]):
    """A mapping from names to entries that answers an unknown name with the nearest valid ones.

    Args:
        kind: what the entries are, for error messages, e.g. ``"method"``.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}
        _registries.append(self)

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that files an entry under `name`. Raises MbibError if the name is taken."""

        def decorate(entry: T) -> T:
            if name in self._entries:
                other = getattr(self._entries[name], "__module__", "another module")
                raise MbibError(f"{self.kind} {name!r} is registered already, by {other}")
            self._entries[name] = entry
            return entry

        return decorate

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            raise unknown_name(self.kind, name, self._entries)
        return self._entries[name]

    def remove(self, name: str) -> None:
        """Take an entry out."""
        del self._entries[name]

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)
