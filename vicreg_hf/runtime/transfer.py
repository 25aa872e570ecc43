"""From the host to a device, which is not waited for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNMENT = 16
"""Bytes at a multiple of which compiled kernels want a tensor to start; others they copy first."""


def on_device(x: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device.

    A copy from memory that is not pinned may wait for all that a GPU has still to do.
    """
    pinned = device.type == "cuda" and x.device.type == "cpu"
    return (x.pin_memory() if pinned else x).to(device, non_blocking=True)


def send_together(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """Arrays on a device, in one copy for each dtype, for none of which anybody waits.

    To ask a GPU for a copy takes longer than to make it, where arrays are as small as what decides
    the views of a batch. Every call has a buffer of its own, so that none is written to before it
    is copied; torch keeps the pinned memory for the next. On a CPU there is nothing to copy, and
    tensors share the memory of their arrays.
    """
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    return _packed(arrays, device)


def _packed(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    sent: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(array.dtype for array in arrays):
        places = [place for place, array in enumerate(arrays) if array.dtype == dtype]
        own = _packed_alike([arrays[place] for place in places], device)
        sent.update(zip(places, own, strict=True))
    return [sent[place] for place in range(len(arrays))]


def _packed_alike(arrays: list[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """Those of one dtype."""
    aligned = max(1, ALIGNMENT // arrays[0].itemsize)
    parts = [
        part
        for array in arrays
        for part in (array.reshape(-1), np.zeros(-array.size % aligned, array.dtype))
    ]
    sizes = [part.size for part in parts]
    dtype = torch.from_numpy(parts[0]).dtype
    buffer = torch.empty(sum(sizes), dtype=dtype, pin_memory=device.type == "cuda")
    np.concatenate(parts, out=buffer.numpy())
    pieces = buffer.to(device, non_blocking=True).split(sizes)[::2]
    return [piece.view(array.shape) for piece, array in zip(pieces, arrays, strict=True)]
