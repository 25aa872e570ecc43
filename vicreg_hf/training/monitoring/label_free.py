"""What a run measures without a label, on the same few training images each time.

Shapes: N images of the sample, M of these in two views, C channels, S side in pixels, F
representation, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vicreg_hf.data.batches import centre_crop
from vicreg_hf.data.samples import Sample
from vicreg_hf.data.splits import ImageSplit
from vicreg_hf.data.streams import ImageStream
from vicreg_hf.data.workers import loading, loading_errors
from vicreg_hf.features.encode import extract_features
from vicreg_hf.metrics.collapse import alignment, effective_rank, uniformity
from vicreg_hf.modeling_vicreg import VICRegModel
from vicreg_hf.runtime.randomness import Stream, permutation
from vicreg_hf.training.building.data import TrainingData
from vicreg_hf.views.two_views import Preset, TwoViews

MOST, MOST_PAIRED = 2048, 512
"""Images of the sample at most, and those of them that are seen in two views."""
BUDGET = 2**29
"""Bytes of pixels of the sample that stay in memory; of larger images the sample has fewer."""
EPOCH = 2**32 - 1
"""The epoch that keys the two views; training does not reach it."""
AT_ONCE = 128
"""Images that are read, and encoded, together."""


class FixedSample:
    """Training images that are measured without labels, and kept in memory once they were read.

    Rank and uniformity are those of evaluation views, without augmentation; alignment is that of
    two keyed views. All are of the first branch. Another session measures the same pixels.

    Args:
        model: its configuration says how images are prepared.
        preset: the recipes of the two views.
        seed: of the run, which keys them.
    """

    def __init__(
        self, data: TrainingData, model: VICRegModel, *, preset: Preset, seed: int, num_workers: int
    ) -> None:
        cfg: Any = model.config.pretrained_cfg
        self.data, self.seed, self.num_workers = data, seed, num_workers
        self.views = TwoViews.for_model(model, preset, seed=seed)
        self.side, self.crop_pct = cfg["input_size"][-1], cfg["crop_pct"]
        self.normalisation = {"mean": cfg["mean"], "std": cfg["std"]}
        pixels = cfg["input_size"][0] * self.side**2
        self.most = max(2, min(MOST, BUDGET * MOST // (pixels * (MOST + 2 * MOST_PAIRED))))
        self.most_paired = max(1, self.most * MOST_PAIRED // MOST)
        self._read: tuple[Tensor, tuple[Tensor, ...]] | None = None

    @property
    def description(self) -> str:
        """A phrase that names the images."""
        number = self.most if self._read is None else len(self._read[0])
        return f"{number:,} images of {self.data.train.name} without augmentation"

    def measure(
        self,
        model: VICRegModel,
        device: torch.device,
        *,
        autocast: Callable[..., AbstractContextManager[object]] = nullcontext,
    ) -> dict[str, float]:
        """RankMe, alignment and uniformity, of representations and of embeddings.

        Args:
            autocast: the context that encoders compute in, to measure in the precision of the run.

        Returns:
            Columns of metrics.jsonl; NaN where features are not finite.
        """
        if self._read is None:
            self._read = self._read_images()
        images, crops = self._read
        settings: Any = self.normalisation | {"device": device, "autocast": autocast}
        y = extract_features(model.encoder, images.split(AT_ONCE), **settings)
        both = extract_features(model.encoder, self._views_on(crops, device), **settings)
        found = _signs(y, both, "sample_")
        z, z_both = (
            extract_features(model.expander, rows.split(2 * AT_ONCE), **settings)
            for rows in (y, both)
        )
        return found | _signs(z, z_both, "sample_embedding_")

    def _views_on(self, crops: tuple[Tensor, ...], device: torch.device) -> Iterator[Tensor]:
        """Batches of the first views of some images, and below them their second views."""
        x, x_prime = (view.split(AT_ONCE) for view in crops)
        for number, pair in enumerate(zip(x, x_prime, strict=True)):
            keys = np.arange(number * AT_ONCE, number * AT_ONCE + len(pair[0]))
            first, second = (view.to(device) for view in pair)
            yield torch.cat(self.views.transform_crops((first, second), keys, EPOCH))

    def _read_images(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(N, C, S, S) evaluation views, and (M, C, S, S) crops of both views, all uint8."""
        with loading_errors():
            parts = list(self._parts())
        crops = [pair for _, pair in parts if pair is not None]
        return (
            torch.cat([images for images, _ in parts]),
            tuple(torch.cat(own)[: self.most_paired] for own in zip(*crops, strict=True)),
        )

    def _parts(self) -> Iterator[tuple[Tensor, tuple[Tensor, ...] | None]]:
        """The same, part by part; the first ones have the crops."""
        train, images = self.data.train, self.data.images
        prepare = partial(_prepare, self.views, self.crop_pct, self.most_paired)
        if isinstance(train, ImageStream):
            yield from map(prepare, _first_of_stream(train, self.most, self.seed))
            return
        chosen = permutation(len(train), seed=0, epoch=0, stream=Stream.SPLIT)[: self.most]
        order = [*np.sort(chosen[: self.most_paired]), *np.sort(chosen[self.most_paired :])]
        rows = [
            (start, np.array(order[start : start + AT_ONCE]))
            for start in range(0, len(order), AT_ONCE)
        ]
        source = images if isinstance(images, Tensor) else train
        make = partial(_read_part, source, prepare)
        workers = 0 if isinstance(images, Tensor) else self.num_workers
        size = 3 * AT_ONCE * self.views.in_chans * self.side**2
        with loading(rows, make, workers, item_bytes=lambda: size) as parts:
            yield from parts


def _first_of_stream(
    stream: ImageStream, most: int, seed: int
) -> Iterator[tuple[int, list[Tensor]]]:
    """The first usable images of the first pass, in parts."""
    own, part, start = stream.share(0, 1, seed=seed), [], 0
    for sample in own.read(0):
        if isinstance(sample, Sample):
            part.append(sample.content)
        if len(part) == AT_ONCE or start + len(part) == most:
            yield start, part
            start, part = start + len(part), []
        if start == most:
            return
    if part:
        yield start, part


def _read_part(
    source: ImageSplit | Tensor, prepare: Callable[..., Any], part: tuple[int, Any]
) -> Any:
    start, rows = part
    if isinstance(source, Tensor):
        return prepare((start, list(source[torch.from_numpy(rows)])))
    return prepare((start, list(source.each_or_replaced(rows.tolist(), []))))


def _prepare(
    views: TwoViews, crop_pct: float, paired: int, part: tuple[int, list[Tensor]]
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """Evaluation views of some images, and crops of both views, of which the first are used."""
    start, images = part
    side = views.image_sizes[0]
    seen = torch.stack([centre_crop(image, side, crop_pct) for image in images])
    if start >= paired:
        return seen, None
    return seen, views.crop(images, np.arange(start, start + len(images)), EPOCH)


def _signs(x: Tensor, both: Tensor, prefix: str) -> dict[str, float]:
    """Signs of collapse of N features, and of those of two views in the order of `_views_on`."""
    names = ("effective_rank", "alignment", "uniformity")
    if len(x) < 2 or not bool(x.isfinite().all() & both.isfinite().all()):
        return {prefix + name: torch.nan for name in names}
    first, second = zip(*(part.chunk(2) for part in both.split(2 * AT_ONCE)), strict=True)
    values = (effective_rank(x), alignment(torch.cat(first), torch.cat(second)), uniformity(x))
    return {prefix + name: value.item() for name, value in zip(names, values, strict=True)}
