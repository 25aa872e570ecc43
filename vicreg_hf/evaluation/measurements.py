"""A measurement of an encoder, and how far chance alone may have moved it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from vicreg_hf.metrics.intervals import share_interval


@dataclass(frozen=True)
class Measurement:
    """One number, with all that is needed to read it."""

    protocol: str
    """Its name in `--protocols`, such as knn."""
    name: str
    """Such as "20-NN top-1 accuracy"."""
    value: float
    num_images: int
    """Test images it was measured on."""
    seed: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    low: float | None = None
    """Lower end of the 95 % interval over the choice of test images; None where there is none."""
    high: float | None = None
    percent: bool = True
    """Whether the value is a share, shown in percent."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Further findings, such as the value of each class."""

    @property
    def shown(self) -> str:
        """The value and its interval, as people read them."""
        if not self.percent:
            return f"{self.value:.4g}"
        if self.low is None or self.high is None:
            return f"{100 * self.value:.2f} %"
        return f"{100 * self.value:.2f} % ({100 * self.low:.2f} to {100 * self.high:.2f})"

    def to_dict(self) -> dict[str, Any]:
        """The entry in results.json."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Case:
    """A test image, and the class of each of its pixels."""

    row: int
    score: float
    """Mean IoU of this image alone."""
    image: Tensor = field(repr=False)
    """(C, H, W) uint8."""
    truth: Tensor = field(repr=False)
    """(H, W) classes from 0, -1 where they count for nothing; likewise predicted, without -1."""
    predicted: Tensor = field(repr=False)


@dataclass(frozen=True, eq=False)
class Segmented:
    """How the pixels of test images were told apart."""

    names: Sequence[str]
    """The measures of each class."""
    classes: Mapping[str, Mapping[str, Any]]
    """IoU, interval and number of images of each class by its name."""
    cases: Sequence[Case]
    """The worst images first, then as many of the best."""


@dataclass(frozen=True)
class Baseline:
    """How well others do in the encoder's place, by the same measure."""

    measurement: Measurement
    predicted: Tensor | None = field(default=None, repr=False)
    """(M,) classes on the CPU; None where only the share of right ones is known."""


def scored(
    protocol: str,
    name: str,
    scores: Tensor,
    seed: int,
    settings: Mapping[str, Any],
    details: Mapping[str, Any] | None = None,
) -> Measurement:
    """The mean of a score from 0 to 1 for each test image, with its interval.

    Args:
        scores: (M,).
    """
    values = scores.cpu().double().numpy()
    low, high = share_interval(values)
    return Measurement(
        protocol, name, float(values.mean()), len(values), seed, dict(settings), low, high,
        details=dict(details or {}),
    )  # fmt: skip
