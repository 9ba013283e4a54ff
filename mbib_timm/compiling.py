"""Compiling a function once for every model of one structure, and going on without where that fails."""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Generic, ParamSpec, TypeVar

import torch

from mbib_timm.errors import first_line

# Of one function: for each structure of model and loss, and for each batch size (the last batch of an epoch is short).
RECOMPILE_LIMIT = 64
# Of inductor, by kind of device. Small kernels that do not depend on one another become one.
OPTIONS: Mapping[str, Mapping[str, bool]] = {"cuda": {"combo_kernels": True}}

Inputs = ParamSpec("Inputs")
Output = TypeVar("Output")


class CompileOrEager(Generic[Inputs, Output]):
    """A function compiled by `torch.compile` for the shapes that it meets, or as it is where it cannot be compiled.

    Weights are inputs of the compiled code: another model of the same structure takes the code of the first. The
    backward pass is compiled with the forward pass, so that where it fails nothing has been computed yet. Torch
    before 2.10 compiles it when it is first taken, and a failure then ends the run.

    Args:
        function: of modules and tensors.
        what: what it computes, for the warning.
    """

    def __init__(self, function: Callable[Inputs, Output], what: str) -> None:
        self.function, self.what = function, what
        self.compiled: dict[str, Callable[Inputs, Output]] = {}
        self.failed = False

    def on(self, device: torch.device) -> Callable[Inputs, Output]:
        """Return the function for inputs on a device."""
        return partial(self._call, device.type)

    def _call(self, device_type: str, *arguments: Inputs.args, **named: Inputs.kwargs) -> Output:
        if self.failed:
            return self.function(*arguments, **named)
        if device_type not in self.compiled:
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
            self.compiled[device_type] = torch.compile(
                self.function, dynamic=False, options=dict(OPTIONS.get(device_type, {})) or None
            )
        try:
            with torch._functorch.config.patch(_with_backward()):
                return self.compiled[device_type](*arguments, **named)
        except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
            self.failed = True
            inner = getattr(error, "inner_exception", error)
            warnings.warn(f"{self.what} cannot be compiled, and runs eagerly: {first_line(inner)}", stacklevel=2)
            return self.function(*arguments, **named)


def _with_backward() -> dict[str, bool]:
    """Return functorch's settings that compile the backward pass with the forward pass; none before torch 2.10."""
    name = "force_non_lazy_backward_lowering"
    return {name: True} if hasattr(torch._functorch.config, name) else {}
