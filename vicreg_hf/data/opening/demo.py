"""The embedded data set `demo`: handwritten digits that wander, as an ordinary DatasetDict.

scikit-learn bundles 1,797 scans of handwritten digits, 8 x 8 pixels each. Every image here is one
of them, drawn at a random position, size and angle, so that two images of one class share few
pixels and only a representation that ignores where and how large a digit is can tell them apart.
The digits of the test images appear in no training image.
"""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from vicreg_hf.runtime.randomness import Stream, permutation, uniforms

SIDE = 32
NUM_IMAGES = {"train": 20_000, "test": 4_000}
TRAIN_SHARE = 0.8
SIZE_RANGE = (12.0, 30.0)
"""Side of the digit's square, in pixels."""
MAX_ANGLE = 25.0
"""Degrees, to either side."""


def load_demo() -> DatasetDict:
    """Splits `train` and `test` with columns `image` and `label`; the same in every process."""
    from sklearn.datasets import load_digits  # scikit-learn takes a quarter of a second

    bundle: Any = load_digits()
    scans, labels = torch.from_numpy(bundle.images).float() / 16, bundle.target
    order = permutation(len(labels), seed=0, epoch=0)
    cut = int(len(order) * TRAIN_SHARE)
    names = [str(digit) for digit in range(10)]
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=names)})
    splits = {}
    for epoch, (split, chosen) in enumerate({"train": order[:cut], "test": order[cut:]}.items()):
        count = NUM_IMAGES[split]
        u = uniforms(np.arange(count), 5, seed=0, epoch=epoch, stream=Stream.DEMO)
        picked = chosen[(u[:, 0] * len(chosen)).astype(np.int64)]
        images = _place(scans[picked], torch.from_numpy(u[:, 1:]))
        rows = {"image": [_png(image) for image in images.numpy()], "label": labels[picked]}
        splits[split] = Dataset.from_dict(rows, features=features)
    return DatasetDict(splits)


def _place(scans: Tensor, u: Tensor) -> Tensor:
    """Draw (B, 8, 8) scans in [0, 1] onto (B, SIDE, SIDE) uint8, by uniforms (B, 4)."""
    size = SIZE_RANGE[0] + (SIZE_RANGE[1] - SIZE_RANGE[0]) * u[:, 0]
    angle = (2 * u[:, 1] - 1) * math.radians(MAX_ANGLE)
    scale = size / SIDE
    room = 1 - 0.75 * scale  # strokes stay inside; a scan's margin may leave the image
    x, y = (2 * u[:, 2] - 1) * room, (2 * u[:, 3] - 1) * room
    cos, sin = angle.cos() / scale, angle.sin() / scale
    rows = [[cos, sin, -(cos * x + sin * y)], [-sin, cos, sin * x - cos * y]]
    theta = torch.stack([torch.stack(row, 1) for row in rows], 1)
    grid = F.affine_grid(theta, [len(scans), 1, SIDE, SIDE], align_corners=False)
    drawn = F.grid_sample(scans[:, None], grid, mode="bicubic", align_corners=False)
    return (drawn[:, 0].clamp(0, 1) * 255).round().to(torch.uint8)


def _png(pixels: np.ndarray) -> dict[str, bytes | None]:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": None}
