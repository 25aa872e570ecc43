"""The kNN monitor of a run: held-out accuracy of the encoder, without training anything.

Shapes: N rows, F features, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vicreg_hf.data.bad_images import BadImages
from vicreg_hf.data.batches import evaluation_batches
from vicreg_hf.data.classes import (
    check_class_names,
    describe_missing_classes,
    renumber_classes,
)
from vicreg_hf.data.memory import MEMORY_BUDGET, SMALL_IMAGE, common_side, load_in_memory
from vicreg_hf.data.splits import ImageSplit
from vicreg_hf.data.streams import ImageStream
from vicreg_hf.features.encode import extract_features
from vicreg_hf.metrics.knn import vote
from vicreg_hf.runtime.randomness import Stream, permutation

K = 20
MAX_TRAIN, MAX_TEST = 50_000, 10_000
"""Images the monitor uses at most; of larger splits it takes a fixed random part."""


@dataclass
class KNNMonitor:
    """20-NN accuracy on a held-out split. Labels are used here and by the online probe alone."""

    train: ImageSplit
    train_images: ImageSplit | Tensor
    held_out: ImageSplit
    image_size: int
    settings: dict[str, Any] = field(repr=False)
    """Arguments of `evaluation_batches`."""
    mean: Sequence[float]
    std: Sequence[float]
    bad: BadImages | None = None
    """Training images that are known to be unusable, as where they lie in memory."""
    _unusable: dict[str, BadImages] = field(default_factory=dict, repr=False)
    """Found while measuring, by the name of the split."""

    @classmethod
    def create(
        cls,
        train: ImageSplit,
        train_images: ImageSplit | Tensor,
        held_out: ImageSplit | None,
        *,
        image_size: int,
        crop_pct: float,
        mean: Sequence[float],
        std: Sequence[float],
        num_workers: int,
        bad: BadImages | None = None,
    ) -> KNNMonitor | None:
        """A monitor, or None where labels or a held-out split are missing.

        Raises:
            ValueError: the held-out split has classes that the other has not.
        """
        if missing_for_knn(train, held_out) is not None:
            return None
        assert held_out is not None
        if train.label_names != held_out.label_names:
            assert held_out.labels is not None
            names, own = train.label_names, held_out.label_names
            check_class_names(names, own, (train.name, held_out.name), declared=False)
            labels = renumber_classes(held_out.labels, own, names)
            held_out = replace(held_out, labels=labels, label_names=train.label_names)
        settings = {"crop_pct": crop_pct, "num_workers": num_workers}
        return cls(train, train_images, held_out, image_size, settings, mean, std, bad)

    @property
    def description(self) -> str:
        """What the accuracy is of."""
        sides = ((self.held_out, MAX_TEST), (self.train, MAX_TRAIN))
        rows = [self._rows(split, most) for split, most in sides]
        used = [self._usable(split, of) for (split, _), of in zip(sides, rows, strict=True)]
        left_out = sum(map(len, rows)) - sum(map(len, used))
        return (
            f"{K}-NN accuracy on {len(used[0])} images of {self.held_out.name}, neighbours from "
            f"{len(used[1])}" + (f", without {left_out} that cannot be used" if left_out else "")
        )

    @property
    def subject(self) -> str:
        """Which images are measured, by their names."""
        return f"{self.held_out.name}, neighbours from {self.train.name}"

    @property
    def unlearnt(self) -> str | None:
        """A sentence on held-out images of classes without a training image, if there are any."""
        train, test = (_labels_of(part, _labelled(part)) for part in (self.train, self.held_out))
        return describe_missing_classes(
            train, test, self.train.label_names, (self.train.name, self.held_out.name)
        )

    def measure(
        self,
        encoder: nn.Module,
        device: torch.device,
        classify: Callable[[Tensor], Tensor] | None = None,
        *,
        autocast: Callable[..., AbstractContextManager[object]] = nullcontext,
    ) -> dict[str, float]:
        """Share of held-out images, 0 to 1, that are classified rightly.

        Args:
            classify: gives classes (N,) for representations (N, F), as the online probe does.
            autocast: the context that encoders compute in, to measure in the precision of the run;
                neighbours and classes are found in single precision.

        Returns:
            `knn`, by their neighbours, and `probe`, by `classify` if it is given.
        """
        train_rows = self._rows(self.train, MAX_TRAIN)
        test_rows = self._rows(self.held_out, MAX_TEST)
        settings = {"device": device, "autocast": autocast}
        kept = self._kept
        if kept is None:
            y = self._features(encoder, self.held_out, test_rows, **settings)
        else:
            y = self._features(encoder, kept, np.arange(len(kept)), **settings)
        x = self._features(encoder, self.train_images, train_rows, **settings)
        x, train_labels = self._with_labels(self.train, train_rows, x)
        y, labels = self._with_labels(self.held_out, test_rows, y)
        # which ends no run over a feature that is not finite
        voted = vote(x, train_labels, y, k=min(K, len(x)))
        knn = (voted == labels).float().mean().item()
        if classify is None:
            return {"knn": knn}
        return {"knn": knn, "probe": (classify(y) == labels).float().mean().item()}

    def pixels(self, device: torch.device) -> float | None:
        """The same of the images themselves, which an encoder has to beat; None for large ones."""
        if self.image_size > SMALL_IMAGE:
            return None
        return self.measure(nn.Flatten(), device)["knn"]

    def _with_labels(
        self, split: ImageSplit, rows: NDArray[np.int64], features: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Features and classes of the rows that could be used; in the others' places are others."""
        usable = torch.from_numpy(self._usable(split, rows))
        labels = _labels_of(split, rows)[usable].to(features.device)
        if len(usable) < len(rows):
            features = features[usable.to(features.device)]
        return features, labels

    def _usable(self, split: ImageSplit, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Places among rows whose images could be used, as far as is known."""
        known = self._unusable.get(split.name)
        lists = [known, self.bad if split is self.train else None]
        bad = [image.row for each in lists if each is not None for image in each.found]
        return np.flatnonzero(~np.isin(rows, np.array(bad, dtype=np.int64)))

    @cached_property
    def _kept(self) -> Tensor | None:
        """Held-out images that are measured on, decoded once, if small enough to stay in memory."""
        if common_side(self.held_out) is None:
            return None
        taken = self.train_images.nbytes if isinstance(self.train_images, Tensor) else 0
        rows = self._rows(self.held_out, MAX_TEST)
        with self._noting(self.held_out) as bad:
            return load_in_memory(self.held_out, MEMORY_BUDGET - taken, bad, rows=rows)

    @contextmanager
    def _noting(self, split: ImageSplit) -> Iterator[BadImages]:
        """For what is found of a split."""
        bad = self._unusable.setdefault(split.name, BadImages(None, 1.0, None))
        yield bad
        bad.agree(say=lambda _: None)

    def _rows(self, split: ImageSplit, most: int) -> NDArray[np.int64]:
        rows = _labelled(split)
        if len(rows) <= most:
            return rows
        order = permutation(len(rows), seed=0, epoch=0, stream=Stream.SPLIT)
        return rows[np.sort(order[:most])]

    def _features(
        self,
        encoder: nn.Module,
        images: ImageSplit | Tensor,
        rows: NDArray[np.int64],
        **settings: Any,
    ) -> Tensor:
        split = images if isinstance(images, ImageSplit) else self.train
        with self._noting(split) as bad:
            batches = evaluation_batches(images, rows, self.image_size, bad=bad, **self.settings)
            return extract_features(encoder, batches, mean=self.mean, std=self.std, **settings)


def missing_for_knn(train: ImageSplit | ImageStream, held_out: ImageSplit | None) -> str | None:
    """What kNN and the online probe need and these data lack, and the remedy."""
    if isinstance(train, ImageStream):
        return "streams have neither; use --streaming false"
    if train.labels is None:
        return (
            f"{train.name} has no labels; if it has classes, name their column with "
            "--label_column, or put the files of each into a folder"
        )
    if held_out is None:
        return (
            "there is no labelled split beside the one trained on; hold some images out, as in a "
            "folder called test, or name a split with --eval_split"
        )
    if held_out.labels is None:
        return f"{held_out.name} has no labels; choose another --eval_split"
    if (number := len(_labelled(train))) < K:
        return f"{train.name} has {number} labelled images, fewer than the {K} of the kNN monitor"
    return None


def _labelled(split: ImageSplit) -> NDArray[np.int64]:
    """Rows that have a class."""
    assert split.labels is not None
    return np.flatnonzero(split.labels.numpy() >= 0)


def _labels_of(split: ImageSplit, rows: NDArray[np.int64]) -> Tensor:
    assert split.labels is not None
    return split.labels[torch.from_numpy(rows)]
