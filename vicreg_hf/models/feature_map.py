"""The feature map of a timm backbone: one vector for each cell of a grid over the image.

Shapes: B images, C channels of the map, h x w cells, P tokens.
"""

from __future__ import annotations

import itertools
from typing import Any

from torch import Tensor


def feature_map(backbone: Any, features: Any, image_size: tuple[int, int]) -> Tensor:
    """Lay out what a timm backbone's `forward_features` returns as a map (B, C, h, w).

    Maps with channels last are permuted. Of tokens (B, P, C), those of the class and registers,
    which come first, are left out, and the others are laid out by rows. Nothing is copied.

    Args:
        backbone: the model of timm that computed them.
        features: what its `forward_features` returned.
        image_size: height and width of its images in pixels.

    Raises:
        ValueError: a backbone without a map, as one that returns a class token alone.
    """
    channels = backbone.num_features
    if isinstance(features, Tensor):
        if features.ndim == 3 and (grid := _grid(backbone, features.shape[1], image_size)):
            cells = features[:, features.shape[1] - grid[0] * grid[1] :]
            return cells.transpose(1, 2).unflatten(2, grid)
        if features.ndim == 4:
            if getattr(backbone, "output_fmt", "NCHW") == "NHWC":
                features = features.permute(0, 3, 1, 2)
            if features.shape[1] == channels:
                return features
    name = (getattr(backbone, "pretrained_cfg", None) or {}).get("architecture", "this one")
    found = type(features).__name__
    if isinstance(features, Tensor):
        found = f"shape {tuple(features.shape)}"
    raise ValueError(
        f"the backbone must have a feature map of {channels} channels, but {name} returns {found} "
        f"for images of {image_size[0]} x {image_size[1]}; take one such as resnet50, "
        "convnext_tiny or vit_small_patch16_224."
    )


def _grid(backbone: Any, tokens: int, image_size: tuple[int, int]) -> tuple[int, int] | None:
    """Rows and columns of the cells that tokens stand for, None where they are no grid.

    Patches that do not fill the image are cut or padded, which depends on the backbone.
    """
    prefix = getattr(backbone, "num_prefix_tokens", None)
    info = getattr(backbone, "feature_info", None)
    if not isinstance(info, list) or not info:
        return None
    cell = info[-1]["reduction"]  # pixels along either side
    sides = ((side // cell, -(-side // cell)) for side in image_size)
    for rows, columns in itertools.product(*sides):
        before = tokens - rows * columns  # at most a class token where the backbone does not say
        if rows * columns and (before in (0, 1) if prefix is None else before == prefix):
            return rows, columns
    return None
