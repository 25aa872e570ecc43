"""Calls of the operations, eager or compiled: the same results, at another speed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PIXELS_AT_ONCE = 2**19
"""Pixels, times channels, of one call on CPU, so that intermediate results stay in its cache."""


class Kernels:
    """Call an operation on a batch.

    A compiled operation is one pass over memory, for any number of images; it is compiled when it
    is first needed. An eager one is a dozen passes, so that a CPU takes few images at a time.

    Args:
        compiled: use torch.compile, unless that turns out to be impossible.
    """

    def __init__(self, *, compiled: bool = False) -> None:
        self.compiled = compiled
        self._functions: dict[str, Callable[..., Tensor]] = {}

    def __call__(
        self, function: Callable[..., Tensor], *batch: Tensor, shared: tuple[Any, ...] = ()
    ) -> Tensor:
        """The result of an operation for the images of a batch.

        Args:
            function: takes `batch` and then `shared`; without state.
            *batch: tensors whose first dimension is that of the images.
            shared: arguments that all images have in common.
        """
        if self.compiled:
            try:
                return self._call_compiled(function, batch, shared)
            except (torch.OutOfMemoryError, torch.AcceleratorError):
                raise  # eager operations take more memory
            except Exception as error:  # the compiler's, whatever it is; eager operations must work
                self.compiled = False
                reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
                warnings.warn(
                    f"views are made without torch.compile, which failed: {reason}", stacklevel=2
                )
        first = batch[0]
        count = max(1, PIXELS_AT_ONCE // max(1, first[:1].numel()))
        if first.is_cuda or len(first) <= count:
            return function(*batch, *shared)
        parts = zip(*(tensor.split(count) for tensor in batch), strict=True)
        return torch.cat([function(*part, *shared) for part in parts])

    def _call_compiled(
        self, function: Callable[..., Tensor], batch: tuple[Tensor, ...], shared: tuple[Any, ...]
    ) -> Tensor:
        name = function.__name__
        if name not in self._functions:
            self._functions[name] = torch.compile(function, options=_rounding_as_eager())
        count = len(batch[0])
        if count == 1:  # to the compiler one image is a case of its own; two of it are not
            batch = tuple(torch.cat([tensor, tensor]) for tensor in batch)
        for tensor in batch:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return self._functions[name](*batch, *shared)[:count]


def _rounding_as_eager() -> dict[str, Any]:
    """Settings with which GPUs round as eager operations do, where torch has them."""
    wanted = ("eager_numerics.division_rounding", "emulate_precision_casts")
    known = torch._inductor.list_options()
    return dict.fromkeys((name for name in wanted if name in known), True)
