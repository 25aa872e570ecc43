"""The transforms of crops: each operation runs once over all images that it was drawn for.

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
from vicreg_hf.views import operations
from vicreg_hf.views.kernels import Kernels

JITTER = (
    operations.adjust_brightness,
    operations.adjust_contrast,
    operations.adjust_saturation,
    operations.adjust_hue,
)
Operation = Callable[..., Tensor]


class Transform(NamedTuple):
    """An operation on some of the images."""

    operation: Operation
    arrays: tuple[NDArray[Any], ...]
    """The rows of these images, and a row of each further argument for each of them."""


def plan_transforms(
    drawn: NDArray[Any], *, largest_sigma: float, in_colour: bool
) -> list[Transform]:
    """Flip, jitter, grayscale, blur and solarise, in the authors' order.

    Args:
        drawn: (B,) of `draw_transforms`.
        largest_sigma: the largest standard deviation of a blur, in pixels.
        in_colour: whether images have colours, which half of the operations need.
    """
    transforms: list[Transform] = []

    def add(operation: Operation, mask: NDArray[np.bool_], *values: NDArray[np.float32]) -> None:
        rows = np.flatnonzero(mask)
        if len(rows):
            transforms.append(Transform(operation, (rows, *(own[rows] for own in values))))

    add(operations.mirror, drawn["flip"])
    for slot in range(4):
        for number, operation in enumerate(JITTER):
            if in_colour or operation in JITTER[:2]:
                factor = drawn["factors"][:, number]
                # like torchvision's, a jitter without hue leaves the colours as they are
                wanted = factor != (0 if operation is operations.adjust_hue else 1)
                chosen = drawn["jitter"] & (drawn["order"][:, slot] == number) & wanted
                add(operation, chosen, factor)
    if in_colour:
        add(operations.grayscale, drawn["grayscale"])
    if drawn["blur"].any():
        sigma = torch.from_numpy(drawn["sigma"].copy())
        weights = operations.box_weights(sigma, largest_sigma).numpy()
        add(operations.gaussian_blur, drawn["blur"], weights)
    add(operations.solarize, drawn["solarize"])
    return transforms


def apply_transforms(
    x: Tensor, transforms: list[Transform], factors: NDArray[np.float32], kernels: Kernels
) -> Tensor:
    """Transform crops (B, C, S, S) uint8, which are overwritten, and normalise them.

    Args:
        factors: (2, C, 1, 1), as `normalise` takes them.

    Returns:
        (B, C, S, S) float32.
    """
    arrays = (array for transform in transforms for array in transform.arrays)
    tensors = iter(send_together([*arrays, *factors], x.device))
    for operation, own in transforms:
        rows, *values = islice(tensors, len(own))
        _write_rows(x, rows, kernels(operation, x.index_select(0, rows), *values))
    return kernels(operations.normalise, x, shared=tuple(tensors))


def _write_rows(x: Tensor, rows: Tensor, values: Tensor) -> None:
    """x[rows] = values, for contiguous uint8; eight levels at a time where that is possible."""
    x, values = x.flatten(1), values.reshape(len(rows), -1)
    if x.shape[1] % 8 == 0:
        x, values = x.view(torch.int64), values.view(torch.int64)
    x.index_copy_(0, rows, values)
