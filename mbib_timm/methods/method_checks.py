"""What a method's class is asked when it is registered: whether it can be called as it will be, and slips in its names.

Nothing is built, and nothing of a method is called.
"""

import dataclasses
import inspect
import sys
import traceback
from collections.abc import Iterable, Mapping
from inspect import Parameter, Signature
from types import FunctionType
from typing import Any

from mbib_timm.errors import MbibError, nearest, shown
from mbib_timm.options import check_declared, check_option, without_none
from mbib_timm.recipe.checks import check_part, check_view_keys
from mbib_timm.recipe.keys import KEYS, TYPES
from mbib_timm.registry import is_inside

# Names that are as alike as start_epoch and start_epochs.
NEAR_MISS = 0.85
# Attributes that are defaults of recipe keys, and those keys.
DEFAULTS = {
    "sampler": "sampler",
    "part": "train",
    "reset": "reset",
    "classifier_start": "classifier_start",
    "frozen_bn": "frozen_bn",
}
# What a step computes: a method that trains defines one of these.
STEPS = ("head_loss", "loss", "forward")
KINDS = FunctionType | classmethod | staticmethod


def require_fitting(name: str, method: Any, base: type) -> None:
    """Raise MbibError where a class cannot be used as a method.

    Args:
        name: of the method.
        method: the class.
        base: `Method`: what the class overrides is called as that is.
    """
    settings: Any = getattr(method, "Settings", None)
    dataclass = getattr(settings, "__dataclass_params__", None)
    if not (
        isinstance(settings, type)
        and dataclass is not None
        and dataclass.frozen
        and all("help" in item.metadata for item in dataclasses.fields(settings))
    ):
        raise MbibError(f"method {name!r}: its Settings must be a frozen dataclass of option() fields")
    if any(item.name == "name" for item in dataclasses.fields(settings)):
        raise MbibError(f"method {name!r}: a setting cannot be called 'name': in a recipe, that is the method's name")
    check_declared(settings, f"method {name!r}: setting {{!r}}")
    try:
        _check_attributes(method)
    except MbibError as error:
        raise MbibError(f"method {name!r}: {error}") from None
    for hook, expected in vars(base).items():
        if isinstance(expected, KINDS) and (hook == "__init__" or not hook.startswith("_")):
            own = inspect.getattr_static(method, hook)
            if own is not expected and (problem := _misfit(hook, own, expected)):
                raise MbibError(f"method {name!r}: {problem}")
    if not method.post_hoc and all(inspect.getattr_static(method, hook) is vars(base)[hook] for hook in STEPS):
        slips = [(own, near[0]) for own in vars(method) if (near := nearest(own, STEPS, 1, NEAR_MISS))]
        instead = f", but {slips[0][0]}: did you mean {slips[0][1]}?" if slips else ""
        raise MbibError(f"method {name!r}: defines none of head_loss, loss and forward{instead}")


def _check_attributes(method: Any) -> None:
    """Raise MbibError for class attributes that are no defaults of recipe keys, and for a title that is no text.

    Which samplers there are is not known yet: a plugin may register its own after the method.
    """
    if not isinstance(method.title, str):
        raise MbibError(f"title: expected a text, got {shown(method.title)}")
    for attribute, key in DEFAULTS.items():
        value, expected = getattr(method, attribute), TYPES[key]
        check_option(KEYS[key], expected if attribute == "frozen_bn" else without_none(expected), value, attribute)
        if attribute in ("part", "reset"):
            check_part(attribute, value)
    views: Any = method.views
    if not (isinstance(views, tuple | list) and views and all(isinstance(view, Mapping) for view in views)):
        raise MbibError(
            f"views: expected a tuple with a mapping for each view of an image, as in ({{}}, {{}}), got {shown(views)}"
        )
    for number, view in enumerate(views, start=1):
        check_view_keys(number, view, KEYS.values())
        for key, value in view.items():
            check_option(KEYS[key], TYPES[key], value, f"views: {key}")


def _misfit(hook: str, own: Any, expected: Any) -> str | None:
    """Return why a hook cannot be called as it will be; None where it can, or where Python does not know."""
    on_class = isinstance(expected, classmethod)
    if not isinstance(own, classmethod) and not callable(own):
        return f"{hook}: expected a function, got {shown(own)}"
    try:
        taken = inspect.signature(_function(own))
    except (TypeError, ValueError):
        return None
    called = inspect.signature(_function(expected))
    bound = isinstance(own, classmethod) or (isinstance(own, FunctionType) and not on_class)
    if _fits(taken, int(bound), [*called.parameters.values()][1:]):
        return None
    return f"{hook}{_plain(taken)}: expected {'a classmethod ' if on_class else ''}{hook}{_plain(called)}"


def _function(attribute: Any) -> Any:
    return attribute.__func__ if isinstance(attribute, classmethod | staticmethod) else attribute


def _fits(taken: Signature, first: int, called: Iterable[Parameter]) -> bool:
    """Return whether a function takes what a hook is called with: what it must be given, and all that it may be.

    Args:
        taken: what the function takes.
        first: 1 where Python passes ``self`` or ``cls`` before the rest.
        called: the parameters of the hook.
    """
    parameters = [each for each in called if each.kind is not Parameter.VAR_KEYWORD]
    if any(each.kind is Parameter.VAR_POSITIONAL for each in parameters):  # forward: one batch, or two
        return any(_binds(taken, first + number) for number in (1, 2))
    optional = [each.name for each in parameters if each.default is not Parameter.empty]
    most = first + len(parameters)
    required = most - len(optional)
    return _binds(taken, required) and (_binds(taken, most) or _binds(taken, required, optional))


def _binds(signature: Signature, number: int, named: Iterable[str] = ()) -> bool:
    """Return whether a function takes a number of arguments by position, and others by name."""
    try:
        signature.bind(*[None] * number, **dict.fromkeys(named))
    except TypeError:
        return False
    return True


def _plain(signature: Signature) -> str:
    """Return the parameters of a function as they are written, without types."""
    return str(Signature([each.replace(annotation=Parameter.empty) for each in signature.parameters.values()]))


def name_error_in(method: type, error: NameError) -> str | None:
    """Return what an error says of a name that a method from outside the package uses and nothing defines, and where.

    None where it comes from elsewhere than a file that the method's class, or one that it inherits from, is in.
    """
    modules = (each.__module__ for each in method.__mro__ if not is_inside(each.__module__, "mbib_timm"))
    files = {getattr(sys.modules.get(module), "__file__", None) for module in modules}
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{error} ({place.filename}, line {place.lineno})" if place.filename in files else None


def misspelt(method: type, base: type) -> list[str]:
    """Return a line for each attribute of a method's class that looks like a slip of one that the package uses.

    Args:
        method: the class; what it inherits is not looked at.
        base: `Method`, whose attributes the package uses. Those that the class defines too are meant as they are.
    """
    lines = []
    meant = {each for each in vars(base) if not each.startswith("_")} - {"name"} - vars(method).keys()
    for own, value in vars(method).items():
        near = [] if own.startswith("_") or hasattr(base, own) else nearest(own, meant, 1, NEAR_MISS)
        if near:
            unused = "calls" if isinstance(value, KINDS) else "reads"
            lines.append(f"defines {own}, which the package never {unused}: did you mean {near[0]}?")
    return lines
