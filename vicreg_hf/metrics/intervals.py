"""Confidence intervals of measured values."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

Z = 1.959963984540054
"""Standard deviations within which a normal variable lies with a probability of 95 %."""


def wilson_interval(right: float, images: float) -> tuple[float, float]:
    """95 % interval of the share of images that are classified rightly.

    It is never empty, also where all images are classified rightly or none is.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    share, shrink = right / images, 1 + Z**2 / images
    middle = (share + Z**2 / (2 * images)) / shrink
    half = Z * math.sqrt(share * (1 - share) / images + (Z / (2 * images)) ** 2) / shrink
    return max(0.0, middle - half), min(1.0, middle + half)


def share_interval(scores: ArrayLike) -> tuple[float, float]:
    """95 % interval of the mean of per-image scores from 0 to 1, over the choice of test images.

    Scores of 0 and 1 give `wilson_interval`. Others, such as average precisions, vary less: they
    weigh as much as the number of zeros and ones whose mean varied as much. One score of 0 or 1 is
    added to the variance, so that equal scores do not seem certain.

    Args:
        scores: (M,), such as 1 where a prediction is right and 0 where not.

    Raises:
        ValueError: no scores, or some outside 0 to 1.

    Source: Franco et al. 2019, "Comparative study of confidence intervals for proportions in
        complex sample surveys", Journal of Survey Statistics and Methodology 7(3).
    """
    scores = _one_each(scores)
    if scores.min() < 0 or scores.max() > 1:
        raise ValueError(
            f"scores must be from 0 to 1, got {scores.min():g} to {scores.max():g}; "
            "bootstrap_interval takes any."
        )
    number, share = len(scores), float(scores.mean())
    binary = share * (1 - share)
    if binary > 0:
        number *= binary * (number + 1) / (np.square(scores - share).sum() + binary)
    return wilson_interval(share * number, number)


RESAMPLES = 1000
"""Bootstrap resamples of the test images."""
MOST_VALUES = 64
"""Up to so many different scores, resamples are drawn by how often each occurs: it is quicker."""


def bootstrap_interval(
    scores: ArrayLike, *, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """95 % percentile interval of the mean of per-image scores over resampled test images.

    It says how far the choice of test images moves a number, not how far another run does.

    Args:
        scores: (M,), such as 1 where a prediction is right and 0 where not.

    Raises:
        ValueError: no scores.

    Source: Efron 1979, "Bootstrap methods: another look at the jackknife".
    """
    scores = _one_each(scores)
    random = np.random.default_rng(seed)
    values, counts = np.unique(scores, return_counts=True)
    if len(values) <= MOST_VALUES:
        occurrences = random.multinomial(len(scores), counts / len(scores), size=resamples)
        means = occurrences @ values / len(scores)
    else:
        draws = (random.integers(len(scores), size=len(scores)) for _ in range(resamples))
        means = np.array([scores[rows].mean() for rows in draws])
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def ratio_intervals(
    parts: NDArray[np.integer],
    wholes: NDArray[np.integer],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """95 % percentile intervals of ratios of sums over resampled test images, and of their mean.

    A class that no resampled image has counts for nothing in that resample.

    Args:
        parts: (M, K), such as an image's pixels of each class that are found.
        wholes: (M, K), such as those that are of the class or are taken for it.

    Returns:
        Lower and upper ends, (K + 1,) each; the last is that of the mean of the K ratios. NaN for
        a column without any whole.

    Raises:
        ValueError: no images, or shapes that differ.
    """
    if parts.shape != wholes.shape or parts.ndim != 2 or len(parts) == 0:
        raise ValueError(
            "parts and wholes must be one row an image, got shapes "
            f"{parts.shape} and {wholes.shape}."
        )
    random, number = np.random.default_rng(seed), len(parts)
    ratios = np.full((resamples, parts.shape[1] + 1), np.nan)
    for row in ratios:
        times = np.bincount(random.integers(number, size=number), minlength=number)
        part, whole = times @ parts, times @ wholes
        if (some := whole > 0).any():
            row[:-1][some] = part[some] / whole[some]
            row[-1] = row[:-1][some].mean()
    ends = np.full((2, ratios.shape[1]), np.nan)
    known = ~np.isnan(ratios).all(0)
    ends[:, known] = np.nanquantile(ratios[:, known], [0.025, 0.975], axis=0)
    return ends[0], ends[1]


def _one_each(scores: ArrayLike) -> NDArray[np.float64]:
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 1 or len(scores) == 0:
        raise ValueError(f"scores must be one number an image, got shape {scores.shape}.")
    return scores
