"""Functions of modules, fused by torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

SIZES = 64
"""Of inputs, modes and modules that a function is compiled for; torch's own limit is 8."""


def plainly(function: Callable[..., Any], *inputs: Any) -> Any:
    """What a function gives."""
    return function(*inputs)


def why_not(device: torch.device) -> str | None:
    """Why nothing can be compiled for a device, such as a compiler that is not there, or None."""
    try:
        x = torch.ones(4, device=device, requires_grad=True)
        torch.compile(_smallest)(x).backward()
    except Exception as error:  # any of a compiler's
        return next(iter(str(error).strip().splitlines()), type(error).__name__)
    return None


def _smallest(x: Tensor) -> Tensor:
    return (x.sin() * x).sum()


class Compiled:
    """Call functions through torch.compile, each compiled for every size it is called with.

    A module that a function works on is one of its inputs and stays as it is: so do the keys of its
    state, and copies of it are of themselves. Dropout takes the random numbers that it takes when
    nothing is compiled. A part that turns out not to compile is run as it is, which torch logs.
    Copied or pickled, it is a `Compiled` that has compiled nothing yet.
    """

    def __init__(self) -> None:
        self._functions: dict[Callable[..., Any], Callable[..., Any]] = {}

    def __call__(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """What the function gives for these inputs, but for rounding."""
        if function not in self._functions:
            self._functions[function] = torch.compile(
                function, dynamic=False, options={"fallback_random": True}
            )
        # the backward pass is compiled with the forward one, so that it, too, can be left as it is
        with (
            torch._dynamo.config.patch(suppress_errors=True, recompile_limit=SIZES),
            functorch_config.patch(force_non_lazy_backward_lowering=True),
        ):
            return self._functions[function](*inputs)

    def __getstate__(self) -> dict[str, Any]:
        return {"_functions": {}}
