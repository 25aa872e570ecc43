"""What happens to crops: each operation once over all images that it was drawn for.

Shapes: B images, C channels, S side of a view.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vicreg_hf.runtime.transfer import send_together
from vicreg_hf.views.draws import ColourParameters
from vicreg_hf.views.kernels import Kernels
from vicreg_hf.views.operations import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    box_weights,
    gaussian_blur,
    grayscale,
    mirror,
    normalise,
    solarize,
)

JITTER = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
Operation = Callable[..., Tensor]


class Change(NamedTuple):
    """An operation on some of the images."""

    operation: Operation
    arrays: tuple[NDArray[Any], ...]
    """Which images, and then a row for each of them of what the operation takes besides."""


def plan(p: ColourParameters, *, largest_sigma: float, in_colour: bool) -> list[Change]:
    """Flip, jitter, grayscale, blur and solarise, in the authors' order.

    Args:
        largest_sigma: that a blur may have, in pixels.
        in_colour: whether images have colours, which half of the operations need.
    """
    changes: list[Change] = []

    def change(operation: Operation, mask: NDArray[np.bool_], *values: NDArray[np.float32]) -> None:
        rows = np.flatnonzero(mask)
        if len(rows):
            changes.append(Change(operation, (rows, *(own[rows] for own in values))))

    change(mirror, p.flip)
    for slot in range(4):
        for number, operation in enumerate(JITTER):
            if in_colour or operation in JITTER[:2]:
                factor = p.factors[:, number]
                # like torchvision's, a jitter without hue leaves the colours as they are
                wanted = factor != (0 if operation is adjust_hue else 1)
                change(operation, p.jitter & (p.order[:, slot] == number) & wanted, factor)
    if in_colour:
        change(grayscale, p.grayscale)
    if p.blur.any():
        change(gaussian_blur, p.blur, box_weights(torch.from_numpy(p.sigma), largest_sigma).numpy())
    change(solarize, p.solarize)
    return changes


def finish(
    x: Tensor, changes: list[Change], factors: NDArray[np.float32], kernels: Kernels
) -> Tensor:
    """Change crops (B, C, S, S) uint8, which are overwritten, and normalise them.

    Args:
        changes: as `plan` gives them.
        factors: (2, C, 1, 1), as `normalise` takes them.

    Returns:
        (B, C, S, S) float32.
    """
    arrays = (array for change in changes for array in change.arrays)
    tensors = iter(send_together([*arrays, *factors], x.device))
    for operation, own in changes:
        rows, *values = islice(tensors, len(own))
        _write_rows(x, rows, kernels(operation, x.index_select(0, rows), *values))
    return kernels(normalise, x, shared=tuple(tensors))


def _write_rows(x: Tensor, rows: Tensor, values: Tensor) -> None:
    """x[rows] = values, of contiguous uint8; eight at a time where that is possible."""
    x, values = x.flatten(1), values.reshape(len(rows), -1)
    if x.shape[1] % 8 == 0:
        x, values = x.view(torch.int64), values.view(torch.int64)
    x.index_copy_(0, rows, values)
