"""Overlap of regions, against scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics

from vicreg_hf.metrics.intervals import ratio_intervals
from vicreg_hf.metrics.segmentation import VOID, Overlaps, pixel_confusion

METRICS: Any = metrics
CLASSES = 5


def regions(images: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Predicted and true classes; the last class is nowhere, and class 3 only predicted."""
    random = torch.Generator().manual_seed(seed)
    truth = torch.randint(3, (images, 8, 10), generator=random)
    guess = torch.randint(4, truth.shape, generator=random)
    predicted = torch.where(torch.rand(truth.shape, generator=random) < 0.6, truth, guess)
    truth[:, :2] = VOID
    truth[0] = VOID
    return predicted, truth


def overlaps_of(predicted: torch.Tensor, truth: torch.Tensor) -> Overlaps:
    each = [pixel_confusion(*pair, CLASSES) for pair in zip(predicted, truth, strict=True)]
    return Overlaps.of(torch.stack(each))


def test_overlap_is_that_of_scikit_learn() -> None:
    predicted, truth = regions()
    found, known = overlaps_of(predicted, truth), truth != VOID
    y, y_hat = truth[known].numpy(), predicted[known].numpy()
    expected = METRICS.jaccard_score(y, y_hat, labels=range(4), average=None, zero_division=0)
    np.testing.assert_allclose(found.iou()[:4], expected)
    assert expected[3] == 0  # what is nowhere but predicted lowers the mean
    assert np.isnan(found.iou()[4])
    assert found.mean_iou() == pytest.approx(float(np.mean(expected)))
    assert found.accuracy() == pytest.approx((y == y_hat).mean())
    images = found.image_iou()
    assert np.isnan(images[0])
    own = known[1]
    assert images[1] == pytest.approx(
        METRICS.jaccard_score(truth[1][own], predicted[1][own], average="macro", zero_division=0)
    )
    assert np.isnan(overlaps_of(predicted[:1], truth[:1]).mean_iou())


def test_intervals_are_those_of_resampled_images() -> None:
    found = overlaps_of(*regions(60))
    low, high = found.iou_intervals(seed=1, resamples=2000)
    assert np.isnan([low[4], high[4]]).all()
    random, means = np.random.default_rng(7), []
    for _ in range(2000):
        rows = random.integers(60, size=60)
        means.append(
            Overlaps(found.right[rows], found.true[rows], found.predicted[rows]).mean_iou()
        )
    expected = np.quantile(means, [0.025, 0.975])
    width = expected[1] - expected[0]
    assert width > 0
    np.testing.assert_allclose([low[-1], high[-1]], expected, atol=width / 8)
    assert low[-1] < found.mean_iou() < high[-1]
    again = found.iou_intervals(seed=1, resamples=2000)
    np.testing.assert_array_equal(again, (low, high))
    with pytest.raises(ValueError, match="one row an image"):
        ratio_intervals(np.ones((0, 2), int), np.ones((0, 2), int))
