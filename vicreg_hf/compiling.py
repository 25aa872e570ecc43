"""Functions of modules, fused by torch.compile or, where that cannot be, as they are."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException


def plainly(function: Callable[..., Any], *inputs: Any) -> Any:
    """What a function gives."""
    return function(*inputs)


class Compiled:
    """Call functions through torch.compile, each compiled when it is first called.

    A module that a function works on is one of its inputs and stays as it is: so do the keys of its
    state, and copies of it are of themselves. Dropout takes the random numbers that it takes when
    nothing is compiled. What cannot be compiled is said once, and from then on all is called
    plainly. Copied or pickled, it is a `Compiled` that has compiled nothing yet.
    """

    def __init__(self) -> None:
        self.works = True
        self._functions: dict[Callable[..., Any], Callable[..., Any]] = {}

    def __call__(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """What the function gives for these inputs, but for rounding."""
        if self.works:
            if function not in self._functions:
                self._functions[function] = torch.compile(
                    function, options={"fallback_random": True}
                )
            try:
                return self._functions[function](*inputs)
            except TorchDynamoException as error:  # of compiling; errors in computing are others
                self.works = False
                reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
                warnings.warn(
                    f"the model is trained without torch.compile, which failed: {reason}",
                    stacklevel=2,
                )
        return function(*inputs)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_functions": {}}
