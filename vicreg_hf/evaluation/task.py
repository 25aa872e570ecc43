"""An encoder, the data it is measured on, and what has been measured so far.

Shapes: N training and M test images, F features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from vicreg_hf.data.labelled import Labelled, LabelledData
from vicreg_hf.evaluation.dense.masks import Masks
from vicreg_hf.evaluation.measurements import Baseline, Measurement, Segmented, scored
from vicreg_hf.evaluation.pair_embeddings import Pairs
from vicreg_hf.features.cache import Features
from vicreg_hf.features.encoders import Encoder
from vicreg_hf.settings.evaluation import EvaluationArguments


@dataclass
class Task:
    """The inputs of every protocol, and what they have found."""

    args: EvaluationArguments
    accelerator: Accelerator
    encoder: Encoder
    data: LabelledData
    pairs: Pairs | None = None
    """Both branches and the test pairs, for cross-retrieval."""
    masks: Masks | None = None
    """Those of both splits, for segmentation."""
    usable: dict[str, Features] = field(default_factory=dict)
    """Features of "train" and "test", of all images that can be used."""
    features: dict[str, Features] = field(default_factory=dict)
    """The same; where there are classes, only of the images that have one."""
    measurements: list[Measurement] = field(default_factory=list)
    predictions: dict[str, Tensor] = field(default_factory=dict)
    """(M,) classes on the CPU by the name of the classifier."""
    baselines: dict[str, Baseline] = field(default_factory=dict)
    """Others in the encoder's place, by name, such as "raw pixels"."""
    segmented: Segmented | None = None
    """What segmentation has found in each class and image."""

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def part(self, name: str) -> Labelled:
        """The split "train" or "test"."""
        return self.data.train if name == "train" else self.data.test

    def x(self, name: str) -> Tensor:
        """(N, F) of "train" or (M, F) of "test", on the device."""
        return self.features[name].x.to(self.device)

    def classes(self, name: str) -> Tensor | None:
        """(N,) or (M,) classes of the images in `features`, if there are any."""
        classes = self.part(name).classes
        return None if classes is None else classes[self.features[name].rows]

    def labels(self, name: str) -> Tensor:
        """`classes` on the device, for protocols that need them."""
        classes = self.classes(name)
        assert classes is not None
        return classes.to(self.device)

    def add_scores(
        self,
        protocol: str,
        name: str,
        scores: Tensor,
        settings: Mapping[str, Any],
        details: Mapping[str, Any] | None = None,
    ) -> None:
        """Add the mean of a score from 0 to 1 for each test image, with its interval."""
        self.measurements.append(scored(protocol, name, scores, self.args.seed, settings, details))

    def add_predictions(
        self,
        protocol: str,
        name: str,
        predicted: Tensor,
        settings: Mapping[str, Any],
        details: Mapping[str, Any] | None = None,
    ) -> None:
        """Add a classifier's (M,) predictions and their top-1 accuracy."""
        self.predictions[name] = predicted.cpu()
        right = predicted.to(self.device) == self.labels("test")
        self.add_scores(protocol, f"{name} top-1 accuracy", right, settings, details)
