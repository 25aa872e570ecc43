"""Tensors on their way to a device."""

from __future__ import annotations

import torch
from torch import Tensor


def on_device(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on the device, which is not waited for.

    A copy from memory that is not pinned may wait for all that a GPU has still to do.
    """
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
