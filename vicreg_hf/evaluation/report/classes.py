"""Accuracy and confusions of every class.

Shapes: M test images, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.metrics import confusion_matrix

from vicreg_hf.evaluation.report.gallery import encoded
from vicreg_hf.metrics.intervals import wilson_interval

MAX_BARS = 50
"""Classes up to which all are shown; of more, the worst and the best."""
WORST, BEST = 20, 10
MAX_NUMBERED = 15
"""Classes up to which the confusion matrix holds numbers."""
MAX_MATRIX = 1000
"""Classes above which no confusion matrix is drawn."""
PAIRS = 10
SHADE = (0, 114, 178)
"""Colour of a cell of the confusion matrix, Okabe and Ito's blue."""


def classes(
    predicted: Mapping[str, NDArray[np.int64]], truth: NDArray[np.int64], names: Sequence[str]
) -> dict[str, Any] | None:
    """How the most accurate classifier does on each class; None without a test image.

    Args:
        predicted: (M,) classes by the name of the classifier.
        truth: (M,) classes.
        names: of the K classes.

    Returns:
        The contents of the page's sections.
    """
    if not len(truth) or not predicted:
        return None
    best = max(predicted, key=lambda name: (predicted[name] == truth).mean())
    return {
        "classifier": best,
        "of": len(predicted),
        **_accuracies(predicted[best], truth, names),
        "pairs": _confused_pairs(predicted[best], truth, names),
        "matrix": _matrix(predicted[best], truth, names),
    }


def _accuracies(
    predicted: NDArray[np.int64], truth: NDArray[np.int64], names: Sequence[str]
) -> dict[str, Any]:
    images = np.bincount(truth, minlength=len(names))
    right = np.bincount(truth[predicted == truth], minlength=len(names))
    tested = np.flatnonzero(images)
    order = tested[np.argsort(right[tested] / images[tested], kind="stable")].tolist()
    shown, left_out = few_of(order)
    bars = []
    for index in shown:
        low, high = wilson_interval(int(right[index]), int(images[index]))
        share = float(right[index] / images[index])
        bar = {"images": int(images[index]), "share": share, "low": low, "high": high}
        bars.append({"name": names[index], **bar})
    return {"bars": bars, "left_out": left_out, "untested": len(names) - len(tested)}


def few_of(bars: list[Any]) -> tuple[list[Any], int]:
    """All of some bars, the worst first, or of many the worst and the best; and how many not."""
    if len(bars) <= MAX_BARS:
        return bars, 0
    return bars[:WORST] + bars[-BEST:], len(bars) - WORST - BEST


def _confused_pairs(
    predicted: NDArray[np.int64], truth: NDArray[np.int64], names: Sequence[str]
) -> list[dict[str, Any]]:
    both = np.stack([truth, predicted])[:, predicted != truth]
    confused, counts = np.unique(both, axis=1, return_counts=True)
    images = np.bincount(truth, minlength=len(names))
    return [
        {
            "true": names[confused[0, place]], "predicted": names[confused[1, place]],
            "count": int(counts[place]), "images": int(images[confused[0, place]]),
        }
        for place in np.argsort(-counts, kind="stable")[:PAIRS]
    ]  # fmt: skip


def _matrix(
    predicted: NDArray[np.int64], truth: NDArray[np.int64], names: Sequence[str]
) -> dict[str, Any] | None:
    """Shares by true class, as cells of a table or as a picture; of the classes that occur."""
    occurring = np.union1d(truth, predicted)
    if len(occurring) > MAX_MATRIX:
        return None
    matrix = confusion_matrix(truth, predicted, labels=occurring)
    shares = matrix / np.maximum(1, matrix.sum(1, keepdims=True))
    own = [names[index] for index in occurring]
    if len(occurring) <= MAX_NUMBERED:
        images = matrix.sum(1).tolist()
        return {"names": own, "images": images, "shares": shares.tolist(), "picture": None}
    # one colour, the more opaque the larger the share, looks right on light and on dark
    picture = Image.fromarray((255 * np.sqrt(shares)).round().astype(np.uint8))
    picture.putpalette(SHADE * 256)
    opacity = bytes(range(256))
    return {"names": own, "picture": encoded(picture, "png", optimize=True, transparency=opacity)}
