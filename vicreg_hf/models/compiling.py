"""Functions of modules, fused by torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._functorch import config as functorch_config

MAX_GRAPHS = 64
"""How many sizes of inputs, modes and modules a function is compiled for; torch's limit is 8."""


def call_directly(function: Callable[..., Any], *inputs: Any) -> Any:
    """Call a function without compiling it."""
    return function(*inputs)


def compiler_fault(device: torch.device) -> str | None:
    """Find out why nothing can be compiled for a device, such as a missing compiler, or None."""
    try:
        x = torch.ones(4, device=device, requires_grad=True)
        torch.compile(lambda x: (x.sin() * x).sum())(x).backward()
    except Exception as error:  # any of a compiler's
        return next(iter(str(error).strip().splitlines()), type(error).__name__)
    return None


class Compiled:
    """Call functions through torch.compile, each compiled for every size it is called with.

    A module that a function works on is one of its inputs and stays as it is: so do the keys of its
    state, and a copy works on its own weights. Dropout takes the random numbers that it takes when
    nothing is compiled. A part that turns out not to compile is run as it is, which torch logs.
    A copied or pickled `Compiled` has compiled nothing yet.
    """

    def __init__(self) -> None:
        self._functions: dict[Callable[..., Any], Callable[..., Any]] = {}

    def __call__(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """Return what the function returns for these inputs, but for rounding."""
        if function not in self._functions:
            self._functions[function] = torch.compile(
                function, dynamic=False, options={"fallback_random": True}
            )
        # the backward pass is compiled with the forward one, so that it, too, can be left as it is
        with (
            torch._dynamo.config.patch(suppress_errors=True, recompile_limit=MAX_GRAPHS),
            functorch_config.patch(force_non_lazy_backward_lowering=True),
        ):
            return self._functions[function](*inputs)

    def __getstate__(self) -> dict[str, Any]:
        return {"_functions": {}}
