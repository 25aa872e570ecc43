"""The kNN monitor of a run: accuracy of the encoder on labelled images, without training anything.

Shapes: N rows, F features, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
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
from vicreg_hf.metrics.retrieval import QUERIES_AT_ONCE
from vicreg_hf.runtime.distributed import (
    agree,
    failing_together,
    gather_objects,
    gather_shares,
    rank,
    share_out,
)
from vicreg_hf.runtime.randomness import Stream, permutation
from vicreg_hf.runtime.signals import Stopped

K = 20
AT_ONCE = 512
"""Images that are encoded together."""
MAX_TRAIN, MAX_TEST = 50_000, 10_000
"""Images the monitor uses at most; of larger splits it takes a fixed random part."""


class LabelledImages:
    """Images of a split that have a class, at most so many, and their representations.

    Args:
        source: where the split's images are read from: its files, or (N, C, S, S) uint8 in memory.
        known_bad: images that are known to be unusable already.
        budget: bytes in which small images of one size are kept when they are first read.
    """

    def __init__(
        self,
        split: ImageSplit,
        most: int,
        source: ImageSplit | Tensor,
        *,
        known_bad: BadImages | None = None,
        budget: int = 0,
    ) -> None:
        self.rows = _labelled_rows(split)
        if len(self.rows) > most:
            some = permutation(len(self.rows), seed=0, epoch=0, stream=Stream.SPLIT)[:most]
            self.rows = self.rows[np.sort(some)]
        assert split.labels is not None
        self.split, self.labels = split, split.labels[torch.from_numpy(self.rows)]
        self.source, self.source_rows = source, self.rows
        self.bad, self.known_bad, self.budget = BadImages(None, 1.0, None), known_bad, budget

    def usable(self) -> NDArray[np.int64]:
        """Places among the rows whose images can be used, as far as is known."""
        self.bad.agree(say=lambda _: None)
        bad = [*self.bad.found, *(self.known_bad.found if self.known_bad else [])]
        bad_rows = np.array([image.row for image in bad], dtype=np.int64)
        return np.flatnonzero(~np.isin(self.rows, bad_rows))

    def features(
        self, encoder: nn.Module, views: dict[str, Any], **settings: Any
    ) -> tuple[Tensor, Tensor]:
        """Representations (N, F) and classes (N,) of the images that can be used.

        Every process must call this. Each encodes a share of the batches, and all get the same.

        Args:
            views: further arguments of `evaluation_batches`; likewise settings, of
                `extract_features`.

        Raises:
            Stopped: settings raise it, in this process or in another one.
        """
        if self.budget > 0 and common_side(self.split) is not None:
            images = load_in_memory(self.split, self.budget, self.bad, rows=self.rows)
            if images is not None:
                self.source, self.source_rows = images, np.arange(len(images))
        self.budget = 0
        shares, device = share_out(len(self.rows), AT_ONCE), torch.device(settings["device"])
        own, stopped = shares[rank()], None
        y = torch.empty(0, 0, device=device)
        with failing_together(device):
            rows = self.source_rows[own.start : own.stop]
            views = views | {"bad": self.bad, "batch_size": AT_ONCE}
            try:
                if len(own):
                    batches = evaluation_batches(self.source, rows, **views)
                    y = extract_features(encoder, batches, **settings)
            except Stopped as error:
                stopped = error
        if agree(stopped is not None)[0]:
            raise stopped or Stopped("The measurement was not finished.")
        self.bad.agree(gather_objects, say=lambda _: None)
        width = max(gather_objects([y.shape[1]]))
        y = gather_shares(y if len(own) else y.new_empty(0, width), shares)
        usable = torch.from_numpy(self.usable())
        labels = self.labels[usable].to(y.device)
        return (y if len(usable) == len(y) else y[usable.to(y.device)]), labels


@dataclass
class KNNMonitor:
    """20-NN accuracy on a held-out split, or by leave-one-out where there is none.

    Only this and the online probe see labels; none reaches the encoder.
    """

    train: LabelledImages
    """The neighbours."""
    held_out: LabelledImages
    """The queries; the same object as `train` for leave-one-out."""
    views: dict[str, Any]
    """Further arguments of `evaluation_batches`."""
    normalisation: dict[str, Sequence[float]]
    """Mean and std per channel, of the encoder's preprocessing."""
    trained_on: bool = True
    """Whether the neighbours are the images that the run trains on."""

    @classmethod
    def create(
        cls,
        train: ImageSplit | ImageStream,
        train_images: Any,
        held_out: ImageSplit | None,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        bad: BadImages | None = None,
        trained_on: bool = True,
        taken: int = 0,
        **views: Any,
    ) -> KNNMonitor | None:
        """A monitor, or None where labels are missing.

        Args:
            train: the neighbours.
            train_images: where these are read from: their split, or (N, C, S, S) uint8 in memory.
            held_out: the queries; None for leave-one-out among the neighbours.
            bad: neighbours that are known to be unusable.
            trained_on: whether the neighbours are the images that the run trains on.
            taken: bytes of pixels that are in memory beside those of train_images.
            views: image_size and other arguments of `evaluation_batches`.

        Raises:
            ValueError: the held-out split has classes that the other has not.
        """
        if isinstance(train, ImageStream) or missing_for_knn(train, held_out) is not None:
            return None
        normalisation = {"mean": mean, "std": std}
        budget = MEMORY_BUDGET - taken
        if isinstance(train_images, Tensor):
            budget -= train_images.nbytes
        own = 0 if trained_on else budget // 2
        neighbours = LabelledImages(train, MAX_TRAIN, train_images, known_bad=bad, budget=own)
        if held_out is None:
            return cls(neighbours, neighbours, views, normalisation, trained_on)
        if train.label_names != held_out.label_names:
            assert held_out.labels is not None
            names, others = train.label_names, held_out.label_names
            check_class_names(names, others, (train.name, held_out.name), declared=False)
            labels = renumber_classes(held_out.labels, others, names)
            held_out = replace(held_out, labels=labels, label_names=train.label_names)
        queries = LabelledImages(held_out, MAX_TEST, held_out, budget=budget - own)
        return cls(neighbours, queries, views, normalisation, trained_on)

    @property
    def leaves_one_out(self) -> bool:
        """Whether each image is classified by all others, as there is no held-out split."""
        return self.held_out is self.train

    @property
    def name(self) -> str:
        """The measure, as a card names it."""
        return f"{K}-NN {'leave-one-out' if self.leaves_one_out else 'top-1'} accuracy"

    @property
    def description(self) -> str:
        """A phrase that says how the accuracy is measured."""
        parts = (self.train,) if self.leaves_one_out else (self.held_out, self.train)
        used = [len(part.usable()) for part in parts]
        left_out = sum(len(part.rows) for part in parts) - sum(used)
        name = self.held_out.split.name
        how = f"{K}-NN accuracy on {used[0]} images of {name}, neighbours from {used[-1]}"
        if self.leaves_one_out:
            how = (
                f"{K}-NN accuracy of {min(used[0], MAX_TEST)} images of {name}{self._kind}, "
                f"neighbours from {used[0] - 1} others"
            )
        return how + (f", without {left_out} that cannot be used" if left_out else "")

    @property
    def _kind(self) -> str:
        """What is added to the name of a split that is measured by leave-one-out."""
        if self.trained_on:
            return " by leave-one-out on training images, whose labels never reach the encoder"
        return " by leave-one-out"

    @property
    def subject(self) -> str:
        """The names of the splits that are measured."""
        if self.leaves_one_out:
            return f"{self.train.split.name}{self._kind}"
        return f"{self.held_out.split.name}, neighbours from {self.train.split.name}"

    @property
    def unlearnt(self) -> str | None:
        """A sentence on images of classes that no neighbour can have, if there are any."""
        if self.leaves_one_out:
            labels = self.train.labels
            alone = int((labels.bincount() == 1).sum())
            return None if not alone else (
                f"{alone} of {len(labels)} images of {self.train.split.name} are alone in their "
                "class, so that leave-one-out counts them as wrong."
            )  # fmt: skip
        splits = (self.train.split, self.held_out.split)
        train, test = (split.labels[split.labels >= 0] for split in splits)  # pyright: ignore
        return describe_missing_classes(
            train, test, splits[0].label_names, (splits[0].name, splits[1].name)
        )

    def measure(
        self,
        encoder: nn.Module,
        device: torch.device,
        classify: Callable[[Tensor], Tensor] | None = None,
        *,
        autocast: Callable[..., AbstractContextManager[object]] = nullcontext,
    ) -> dict[str, float]:
        """Share of the queries, 0 to 1, that are classified rightly.

        Every process must call this: each encodes and classifies a part, and all get the result.

        Args:
            classify: gives classes (N,) for representations (N, F), as the online probe does; it
                must not wait for other processes.
            autocast: the context that encoders compute in, to measure in the precision of the run;
                neighbours and classes are found in single precision.

        Returns:
            `knn`, by their neighbours, and `probe`, by `classify` if there is one.

        Raises:
            Stopped: autocast raises it, in this process or in another one.
        """
        settings: dict[str, Any] = self.normalisation | {"device": device, "autocast": autocast}
        y, labels = self.held_out.features(encoder, self.views, **settings)
        if self.leaves_one_out:
            x, train_labels, own_rows = y, labels, _query_rows(len(y)).to(y.device)
            y, labels, most = x[own_rows], labels[own_rows], len(x) - 1
        else:
            x, train_labels = self.train.features(encoder, self.views, **settings)
            own_rows, most = None, len(x)
        shares = share_out(len(y), QUERIES_AT_ONCE)
        own = slice(shares[rank()].start, shares[rank()].stop)
        own_rows = None if own_rows is None else own_rows[own]
        predicted = {}
        with failing_together(device):
            # `vote`, as `knn_predict` would end the run over a feature that is not finite
            found = vote(x, train_labels, y[own], k=min(K, most), own_rows=own_rows)
            if classify is not None:
                predicted["probe"] = classify(y)
        predicted["knn"] = gather_shares(found, shares)
        return {name: (p == labels).float().mean().item() for name, p in predicted.items()}

    def pixels(self, device: torch.device) -> float | None:
        """The accuracy of small images themselves, which an encoder has to beat; else None."""
        if self.views["image_size"] > SMALL_IMAGE:
            return None
        return self.measure(nn.Flatten(), device)["knn"]


def missing_for_knn(train: ImageSplit | ImageStream, held_out: ImageSplit | None) -> str | None:
    """The first thing that kNN needs and these data lack, with the remedy.

    Args:
        held_out: None for leave-one-out.
    """
    if isinstance(train, ImageStream):
        return "those of streams are not read; use --streaming false"
    if train.labels is None:
        return (
            f"{train.name} has no labels; if it has classes, name their column with "
            "--label_column, or put the files of each into a folder"
        )
    if held_out is not None and held_out.labels is None:
        return f"{held_out.name} has no labels; choose another --eval_split"
    rows = _labelled_rows(train)
    if (number := len(rows)) < (least := K + (held_out is None)):
        return (
            f"{train.name} has {number} labelled images, fewer than the {least} of the kNN monitor"
        )
    if held_out is None and len(train.labels[torch.from_numpy(rows)].unique()) == 1:
        return f"all labelled images of {train.name} are of one class"
    return None


def missing_for_probe(train: ImageSplit | ImageStream, held_out: ImageSplit | None) -> str | None:
    """The first thing that the online probe needs and these data lack, with the remedy.

    It is not measured on images that it learns from, on which it would look better than it is.
    """
    if isinstance(train, ImageStream):
        return "streams have neither; use --streaming false"
    if train.labels is not None and held_out is None:
        return (
            "there is no labelled split beside the one trained on; hold some images out, as in a "
            "folder called test, or name a split with --eval_split"
        )
    return missing_for_knn(train, held_out)


def _query_rows(count: int) -> Tensor:
    """The rows among so many that leave-one-out classifies: all, or a fixed random part."""
    if count <= MAX_TEST:
        return torch.arange(count)
    some = permutation(count, seed=0, epoch=0, stream=Stream.SPLIT)[:MAX_TEST]
    return torch.from_numpy(np.sort(some))


def _labelled_rows(split: ImageSplit) -> NDArray[np.int64]:
    assert split.labels is not None
    return np.flatnonzero(split.labels.numpy() >= 0)
