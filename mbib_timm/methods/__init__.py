"""Methods of training: one file each.

A method of one's own is a class in a file of one's own, brought in by ``mbib train RECIPE --plugin my_method.py``:

    from mbib_timm.methods import Method, register

    @register("my_method")
    class MyMethod(Method):
        title = "Mine"

        def head_loss(self, logits, targets):
            return torch.nn.functional.cross_entropy(logits, targets, label_smoothing=0.1)

docs/methods.md shows all that a method may say.
"""

import importlib
import pkgutil

from mbib_timm.data.batch import Batch
from mbib_timm.data.create import Passes
from mbib_timm.methods.base import (
    METHODS,
    Facts,
    Method,
    head_names,
    method_title,
    register,
    resolve_method,
)
from mbib_timm.models.parts import part_of
from mbib_timm.options import option

# A file in this folder is enough: it registers its method.
for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "METHODS",
    "Batch",
    "Facts",
    "Method",
    "Passes",
    "head_names",
    "method_title",
    "option",
    "part_of",
    "register",
    "resolve_method",
]
