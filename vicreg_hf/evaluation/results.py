"""A measurement of an encoder, and how far chance alone may have moved it.

Shapes: M test images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 1000
"""Bootstrap resamples of the test images."""
MOST_VALUES = 64
"""Different scores up to which resamples are drawn by how often each occurs, which is quicker."""


@dataclass(frozen=True)
class Measurement:
    """One number, with all that is needed to read it."""

    protocol: str
    """knn, linear, ...: what `--protocols` calls it."""
    name: str
    """Such as "20-NN top-1 accuracy"."""
    value: float
    num_images: int
    """Test images it was measured on."""
    seed: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    low: float | None = None
    """Of the 95 % interval over resampled test images; None where nothing was resampled."""
    high: float | None = None
    percent: bool = True
    """Whether the value is a share, shown in percent."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What else was found, such as the value of each class."""

    @property
    def shown(self) -> str:
        """The value and its interval, as people read them."""
        if not self.percent:
            return f"{self.value:.4g}"
        if self.low is None or self.high is None:
            return f"{100 * self.value:.2f} %"
        return f"{100 * self.value:.2f} % ({100 * self.low:.2f} to {100 * self.high:.2f})"

    def to_dict(self) -> dict[str, Any]:
        """As results.json holds it."""
        return {**asdict(self), "settings": dict(self.settings), "details": dict(self.details)}


def bootstrap_interval(
    scores: ArrayLike, *, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """95 % percentile interval of the mean of per-image scores over resampled test images.

    It says how far the choice of test images moves a number; not how far another training run does.

    Args:
        scores: (M,), such as 1 where a prediction is right and 0 where not.

    Raises:
        ValueError: no scores.

    Source: Efron 1979, "Bootstrap methods: another look at the jackknife".
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 1 or len(scores) == 0:
        raise ValueError(f"scores must be one number an image, got shape {scores.shape}.")
    random = np.random.default_rng(seed)
    values, counts = np.unique(scores, return_counts=True)
    if len(values) <= MOST_VALUES:
        drawn = random.multinomial(len(scores), counts / len(scores), size=resamples)
        means = drawn @ values / len(scores)
    else:
        draws = (random.integers(len(scores), size=len(scores)) for _ in range(resamples))
        means = np.array([scores[rows].mean() for rows in draws])
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
