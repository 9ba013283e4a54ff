"""Long-tailed image classification with timm.

`import mbib_timm` registers the MBIB and BIB models (and the plain backbones that timm lacks) with timm, before or
after timm itself is imported:

    import timm, mbib_timm
    model = timm.create_model('mbib_resnet32', num_classes=100)

What the commands do, as functions, and the losses for a training loop of one's own (`mbib_timm.api`):

    from mbib_timm import create_loss, evaluate, load, predict, shot_groups, train
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.abc import Loader

    from mbib_timm.api import create_loss, evaluate, load, predict, shot_groups, train

__version__ = "0.2.0"

__all__ = ["__version__", "create_loss", "evaluate", "load", "predict", "shot_groups", "train"]


def __getattr__(name: str) -> Any:
    """Import what `__all__` names when it is first asked for: it needs torch and timm."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module("mbib_timm.api"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# Registering needs timm and so torch, which takes seconds to import, and `mbib --help` needs neither. Python runs this
# file before any other of the package, that of the command included; so it cannot import timm for those who will use
# models without importing it for those who have misspelt a flag. It registers the models when timm is there: now, or
# as soon as somebody imports it. Nobody can use timm in between, so nobody sees a difference. The alternatives are
# worse: a second top-level package for the command alone, a look at `sys.argv`, or a call that users have to make.


class _RegisteringLoader:
    """Loads timm as its own loader does, and then registers the models."""

    def __init__(self, own: "Loader") -> None:
        self._own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self._own
        self._own.exec_module(module)
        import_module("mbib_timm.models")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)


class _TimmFinder:
    """Finds timm where it is, and leaves everything else to the others."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "timm":
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in others if spec is not None), None)
        if spec is not None and spec.loader is not None:
            # Not a subclass of importlib.abc.Loader, which alone takes as long to import as all the rest of `--help`.
            spec.loader = _RegisteringLoader(spec.loader)  # type: ignore[assignment]
        return spec


if "timm" in sys.modules:
    import_module("mbib_timm.models")
else:
    sys.meta_path.insert(0, _TimmFinder())
