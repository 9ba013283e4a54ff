"""Compiling a function once for every model of one structure, and going on without where that fails."""

import warnings
from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

import torch

# Of one function: for each structure of model and loss, and for each batch size (the last batch of an epoch is short).
RECOMPILE_LIMIT = 64

Inputs = ParamSpec("Inputs")
Output = TypeVar("Output")


class CompileOrEager(Generic[Inputs, Output]):
    """A function compiled by `torch.compile` for the shapes that it meets, or as it is where it cannot be compiled.

    Weights are inputs of the compiled code: another model of the same structure takes the code of the first.

    Args:
        function: of modules and tensors.
        what: what it computes, for the warning.
    """

    def __init__(self, function: Callable[Inputs, Output], what: str) -> None:
        self.function, self.what = function, what
        self.compiled: Callable[Inputs, Output] | None = None
        self.failed = False

    def __call__(self, *arguments: Inputs.args, **named: Inputs.kwargs) -> Output:
        """Call the function."""
        if self.failed:
            return self.function(*arguments, **named)
        if self.compiled is None:
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
            self.compiled = torch.compile(self.function, dynamic=False)
        try:
            return self.compiled(*arguments, **named)
        except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
            self.failed = True
            inner = getattr(error, "inner_exception", error)
            reason = next((line for line in str(inner).splitlines() if line.strip()), type(inner).__name__)
            warnings.warn(f"{self.what} cannot be compiled, and runs eagerly: {reason}", stacklevel=2)
            return self.function(*arguments, **named)
