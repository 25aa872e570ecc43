"""Copies from the host to a device, which the host does not wait for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNMENT = 16
"""Compiled kernels want tensors to start at a multiple of so many bytes; others they copy first."""


def on_device(x: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device, copied by way of pinned memory.

    From other memory a copy may wait for all that a GPU has still to do.
    """
    pinned = device.type == "cuda" and x.device.type == "cpu"
    return (x.pin_memory() if pinned else x).to(device, non_blocking=True)


def send_together(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """Arrays on a device, in one copy that nobody waits for.

    To ask a GPU for a copy takes longer than to make it, where arrays are as small as those that
    decide the views of a batch. Every call has a buffer of its own, so that none is written to
    before it is copied; torch keeps the pinned memory for the next. On a CPU there is nothing to
    copy, and tensors share the memory of their arrays.
    """
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    return _send_packed(arrays, device)


def _send_packed(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    sizes = [-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays]
    buffer = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=device.type == "cuda")
    start = 0
    for array, size in zip(arrays, sizes, strict=True):
        part = buffer.numpy()[start : start + array.nbytes]
        part.view(array.dtype).reshape(array.shape)[...] = array
        start += size
    parts = buffer.to(device, non_blocking=True).split(sizes)
    return [
        part[: array.nbytes].view(torch.from_numpy(array).dtype).view(array.shape)
        for part, array in zip(parts, arrays, strict=True)
    ]
