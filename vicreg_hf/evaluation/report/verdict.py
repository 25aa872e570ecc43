"""What an evaluation found in words: one number, and what it compares with.

Shapes: M test images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vicreg_hf.evaluation.measurements import Baseline, Measurement, Segmented
from vicreg_hf.evaluation.report.gallery import Gallery
from vicreg_hf.evaluation.report.maps import Maps
from vicreg_hf.metrics.intervals import RESAMPLES, bootstrap_interval

PREFERRED = (
    "knn", "segmentation", "linear", "linear-sgd", "finetune", "finetune-10", "finetune-1", "svm",
    "cross-retrieval", "retrieval",
)  # fmt: skip
"""Protocols whose number stands in the first line; the first of them that was measured."""
SUFFIX = " top-1 accuracy"
PIXELS, UNTRAINED = "raw pixels", "untrained"
"""Names of baselines."""


@dataclass(frozen=True, eq=False)
class Evaluated:
    """What the evaluation of one encoder found."""

    name: str
    """Unlike that of any other encoder in the report."""
    measurements: Sequence[Measurement]
    predictions: Mapping[str, Tensor]
    """(M,) classes of the test images, by name of the classifier such as "20-NN"."""
    train: Gallery
    """Images whose spectrum is shown, and which are searched for neighbours."""
    test: Gallery
    """Images that are mapped and looked up."""
    baselines: Mapping[str, Baseline] = field(default_factory=dict)
    segmented: Segmented | None = None
    """What segmentation has found in each class and image."""
    maps: Maps | None = None
    """Feature maps of some test images, if the encoder has any."""

    @property
    def headline(self) -> Measurement | None:
        """The share that says in one number how good the encoder is, if one was measured."""
        found = [m for m in self.measurements if m.percent and m.protocol in PREFERRED]
        return min(found, key=lambda m: PREFERRED.index(m.protocol), default=None)


def verdict(models: Sequence[Evaluated], *, seed: int = 0, resamples: int = RESAMPLES) -> list[str]:
    """Sentences on the encoders: the share each reaches, and whether others are beaten.

    Args:
        models: encoders that were measured on the same test images.
        seed: of the resampled images over which differences are compared.
    """
    ranked = sorted((m for m in models if m.headline is not None), key=_share, reverse=True)
    if not ranked:
        return [_without_labels(model) for model in models]
    best, *others = ranked
    head = best.headline
    assert head is not None
    subject = f"{head.num_images:,} held-out image{'' if head.num_images == 1 else 's'}"
    first = f"{best.name}: {short(head)} of {subject} {_recognised(head)}"
    if not head.name.endswith(SUFFIX):
        first = f"{best.name}: {head.name} {short(head)} on {subject}"
    beside = [f"{m.name} {short(m.headline)}" for m in others if m.headline]
    named = {name: name for name in best.baselines}
    if others and UNTRAINED in named:
        named[UNTRAINED] = f"{best.name} {UNTRAINED}"
    beside += [
        f"{named[name]} {100 * b.measurement.value:.1f} %" for name, b in best.baselines.items()
    ]
    sentences = [first + (f"; {', '.join(beside)}" if beside else "") + "."]
    found: dict[str, list[str]] = {"better than": [], "worse than": [], "not told apart from": []}
    own = _right(best, head)
    for other in others:
        assert other.headline is not None
        rows = None if own is None else _right(other, other.headline)
        found[_compare(head, other.headline, own, rows, seed, resamples)].append(other.name)
    labels = best.test.labels
    for name, baseline in best.baselines.items():
        rows = None
        if own is not None and baseline.predicted is not None and labels is not None:
            rows = (baseline.predicted == labels).numpy().astype(np.float64)
        word = "the untrained encoder" if name == UNTRAINED and not others else named[name]
        found[_compare(head, baseline.measurement, own, rows, seed, resamples)].append(word)
    parts = [f"{how} {_listed(names)}" for how, names in found.items() if names]
    if parts:
        who = "It is" if not others else f"{best.name} is"
        sentences.append(f"{who} {', but '.join(parts)} on these images.")
    return sentences


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def short(measurement: Measurement) -> str:
    """A share and its interval with one decimal."""
    text = f"{100 * measurement.value:.1f} %"
    if measurement.low is None or measurement.high is None:
        return text
    return f"{text} ({100 * measurement.low:.1f} to {100 * measurement.high:.1f})"


def differences(
    right: Mapping[str, NDArray[np.float64]], *, seed: int = 0, resamples: int = RESAMPLES
) -> list[dict[str, Any]]:
    """Between every two classifiers, the better one first, over the same resampled images.

    Args:
        right: (M,) 1 where a classifier is right and 0 where not, by its name.
    """
    order = sorted(right, key=lambda name: -right[name].mean())
    found = []
    for better, worse in combinations(order, 2):
        points = right[better] - right[worse]
        low, high = bootstrap_interval(points, seed=seed, resamples=resamples)
        found.append(
            {
                "better": better, "worse": worse, "points": 100 * float(points.mean()),
                "low": 100 * low, "high": 100 * high, "noise": low <= 0 <= high,
            }
        )  # fmt: skip
    return found


def right_answers(models: Sequence[Evaluated]) -> dict[str, NDArray[np.float64]]:
    """(M,) whether each classifier is right about a test image, by its name."""
    several, found = len(models) > 1, {}
    for model in models:
        if (labels := model.test.labels) is None:
            continue
        for name, rows in model.predictions.items():
            own = f"{model.name}, {name}" if several else name
            found[own] = (rows == labels).numpy().astype(np.float64)
    return found


def _share(model: Evaluated) -> float:
    return 0.0 if model.headline is None else model.headline.value


def _right(model: Evaluated, head: Measurement) -> NDArray[np.float64] | None:
    """(M,) whether the classifier of a measurement is right, if it is a classifier's."""
    rows, labels = model.predictions.get(head.name.removesuffix(SUFFIX)), model.test.labels
    return None if rows is None or labels is None else (rows == labels).double().numpy()


def _compare(
    head: Measurement, other: Measurement, own: NDArray[np.float64] | None,
    rows: NDArray[np.float64] | None, seed: int, resamples: int,
) -> str:  # fmt: skip
    """How one measurement compares: by the same resampled images, or else by both intervals."""
    if own is not None and rows is not None:
        low, high = bootstrap_interval(own - rows, seed=seed, resamples=resamples)
    elif None in (head.low, head.high, other.low, other.high):
        return "not told apart from"
    else:
        low, high = head.low - other.high, head.high - other.low  # pyright: ignore
    if low > 0:
        return "better than"
    return "worse than" if high < 0 else "not told apart from"


def _recognised(head: Measurement) -> str:
    """How the images were recognised, as the first line says it."""
    if head.protocol == "knn":
        k = head.settings.get("k", 1)
        near = "nearest neighbour" if k == 1 else f"{k} nearest neighbours"
        return f"recognised by their {near}"
    if head.protocol.startswith("linear"):
        return "recognised by a linear classifier of their features"
    return f"recognised after {head.name.removesuffix(SUFFIX)}"


def _without_labels(model: Evaluated) -> str:
    """The sentence where no share was measured."""
    if not model.measurements:
        return f"{model.name}: nothing was measured."
    found = {m.name: m for m in model.measurements}
    chosen = found.get("effective rank of features", model.measurements[0])
    width = model.test.features.shape[1] if model.test.features.ndim == 2 else 0
    of = f" of at most {min(chosen.num_images, width):,}" if "rank" in chosen.name else ""
    return (
        f"{model.name}: {chosen.name} {chosen.value:.3g}{of} on {chosen.num_images:,} held-out "
        "images; without classes nothing says how many are recognised."
    )
