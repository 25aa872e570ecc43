"""How far predicted regions overlap with true ones, by class.

Shapes: M images, K classes, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vicreg_hf.metrics.intervals import RESAMPLES, ratio_intervals

VOID = -1
"""The class of pixels that count for nothing."""


def pixel_confusion(predicted: Tensor, truth: Tensor, num_classes: int) -> Tensor:
    """Count the pixels of each true class (row) that are taken for each class (column).

    Args:
        predicted: classes from 0 below num_classes, of any shape.
        truth: likewise of the same shape; pixels of `VOID` are left out.

    Returns:
        (K, K) int64.
    """
    known = truth != VOID
    pairs = truth[known].long() * num_classes + predicted[known].long()
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


@dataclass(frozen=True)
class Overlaps:
    """Pixels of each image by class, from which every measure of overlap follows."""

    right: NDArray[np.int64]
    """(M, K) pixels of a class that are taken for it."""
    true: NDArray[np.int64]
    """(M, K) pixels of a class."""
    predicted: NDArray[np.int64]
    """(M, K) pixels that are taken for a class, without those whose true class is void."""

    @classmethod
    def of(cls, confusions: Iterable[Tensor]) -> Overlaps:
        """The overlaps of images, from the confusion (K, K) of each, of which none is kept."""
        counts = [(each.diagonal().clone(), each.sum(1), each.sum(0)) for each in confusions]
        return cls(*(torch.stack(parts).cpu().numpy() for parts in zip(*counts, strict=True)))

    @property
    def union(self) -> NDArray[np.int64]:
        """(M, K) pixels that are of a class, or are taken for it."""
        return self.true + self.predicted - self.right

    def iou(self) -> NDArray[np.float64]:
        """(K,) intersection over union of each class over all images; NaN where it is nowhere."""
        return _ratios(self.right.sum(0), self.union.sum(0))

    def mean_iou(self) -> float:
        """The mean over the classes that some image shows or is taken to show, as in torchmetrics.

        NaN where every pixel is void.
        """
        found = self.iou()
        return float(np.nanmean(found)) if not np.isnan(found).all() else float("nan")

    def image_iou(self) -> NDArray[np.float64]:
        """(M,) mean of the classes of each image alone; NaN where an image is all void."""
        each = _ratios(self.right, self.union)
        counted = (~np.isnan(each)).sum(1)
        return _ratios(np.nansum(each, 1), counted)

    def accuracy(self) -> float:
        """Share of the pixels of all images whose class is found, void ones left out."""
        return float(_ratios(self.right.sum(keepdims=True), self.true.sum(keepdims=True)).item())

    def accuracy_interval(
        self, *, seed: int = 0, resamples: int = RESAMPLES
    ) -> tuple[float, float]:
        """The 95 % interval of `accuracy`, over resampled images."""
        sums = self.right.sum(1, keepdims=True), self.true.sum(1, keepdims=True)
        low, high = ratio_intervals(*sums, seed=seed, resamples=resamples)
        return float(low[0]), float(high[0])

    def iou_intervals(
        self, *, seed: int = 0, resamples: int = RESAMPLES
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Lower and upper ends (K + 1,) of 95 % intervals of each class; the mean is last."""
        return ratio_intervals(self.right, self.union, seed=seed, resamples=resamples)


def _ratios(parts: NDArray[np.generic], wholes: NDArray[np.generic]) -> NDArray[np.float64]:
    return np.divide(parts, wholes, out=np.full(wholes.shape, np.nan), where=wholes > 0)  # pyright: ignore
