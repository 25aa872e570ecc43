"""A measurement of an encoder, and how far chance alone may have moved it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


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
    """Lower end of the 95 % interval over resampled test images; None where none were resampled."""
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
