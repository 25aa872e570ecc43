"""Training a linear classifier on an encoder, frozen or fine-tuned, as the authors evaluate theirs.

What differs from the authors' evaluate.py: crops and test images are resized bicubically, as in
pretraining; the last incomplete batch of an epoch is left out; batch normalisation that is trained
sees the rows of all processes; and the classifier of the last epoch is measured, where they give
the best epoch on the test images.

Shapes: N training and M test images, B images per process, C channels, S side in pixels,
F features, K classes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from tqdm import tqdm

from vicreg_hf.data.bad_images import BadImages
from vicreg_hf.data.batches import channels_last, evaluation_batches, training_views
from vicreg_hf.data.columns.base import BadImage
from vicreg_hf.data.sampler import EpochRows, GlobalBatches
from vicreg_hf.data.splits import ImageSplit
from vicreg_hf.evaluation.classifier import Classifier, create_head, freeze_unused
from vicreg_hf.features.encode import Autocast, encoding_precision, extract_features
from vicreg_hf.models.batch_norm import synchronize
from vicreg_hf.runtime.distributed import gather_objects, gather_rows, sum_over_processes
from vicreg_hf.runtime.randomness import Stream, derive_seed
from vicreg_hf.runtime.transfer import on_device
from vicreg_hf.settings.finetuning import FinetuneSettings
from vicreg_hf.views.random_views import RandomViews

MOMENTUM = 0.9
NO_CLASS = -100
"""A label that leaves an image out of the loss."""


@dataclass(frozen=True)
class FinetuneResult:
    """A trained classifier and its answers, the same in every process."""

    logits: Tensor
    """(M, K) float32 on the CPU, a row for every test image in order."""
    losses: list[float]
    """Mean training loss of every epoch."""
    batch_size: int
    """Images per step, which are no more than there were rows."""
    seconds: float
    """Duration of training and testing."""
    model: nn.Module = field(repr=False)
    """Logits (B, K) of images (B, C, S, S), in eval mode on the device."""

    @property
    def predictions(self) -> Tensor:
        """(M,) classes."""
        return self.logits.argmax(1)


def finetune(
    encoder: nn.Module,
    train: ImageSplit | Tensor,
    train_labels: Tensor,
    test: ImageSplit | Tensor,
    *,
    num_classes: int,
    num_features: int,
    image_size: int,
    crop_pct: float,
    mean: Sequence[float],
    std: Sequence[float],
    settings: FinetuneSettings,
    accelerator: Accelerator,
    rows: ArrayLike | None = None,
    num_workers: int = 0,
    in_chans: int = 3,
    bf16: bool = False,
) -> FinetuneResult:
    """Train a classifier on an encoder's copy, and classify test images by it.

    The order of images and their crops are functions of (seed, epoch, row), so that one process and
    several train on the same batches, and agree to rounding. Every process must call this.
    What was prepared with the accelerator before is forgotten by it.

    Args:
        encoder: gives (B, F) for (B, C, S, S); it is not changed.
        train: a split, of which images that cannot be decoded are left out of the loss; or
            (N, C, H, W) uint8.
        train_labels: (N,) classes below num_classes.
        test: likewise; an image that cannot be decoded is replaced by another.
        num_classes: K; likewise num_features: F, and in_chans: C.
        image_size: S.
        crop_pct: of test images, the part of the shorter side that is seen.
        mean: per channel, of the encoder's preprocessing; likewise std.
        settings: the authors' are `LINEAR`, `ONE_PERCENT` and `TEN_PERCENT`.
        rows: numbers of the training images to learn from; by default all.
        num_workers: loading processes per process, for splits.
        bf16: encode in bfloat16, unless the accelerator has a mixed precision of its own.

    Raises:
        ValueError: labels, rows or features that do not fit; a batch that processes cannot share.
        FloatingPointError: a loss is not finite.
        ImageError, LoadingError: as `training_views`.
    """
    started = time.perf_counter()
    device, world_size = accelerator.device, accelerator.num_processes
    chosen = _checked_rows(train, train_labels, num_classes, rows)
    batches = _SubsetBatches(
        chosen, min(settings.batch_size, len(chosen) // world_size * world_size),
        seed=settings.seed, rank=accelerator.process_index, world_size=world_size,
    )  # fmt: skip
    copy: Any = deepcopy(encoder).to(device)
    copy = copy.to(memory_format=torch.channels_last)
    head = create_head(num_features, num_classes, seed=settings.seed)
    model = Classifier(copy, head, frozen=settings.frozen).to(device)
    freeze_unused(model, torch.zeros(2, in_chans, image_size, image_size, device=device))
    if world_size > 1 and not settings.frozen:
        synchronize(model)
    views: RandomViews[tuple[Tensor, ...]] = RandomViews(
        image_size, (settings.recipe,), mean=mean, std=std, seed=settings.seed, in_chans=in_chans
    )
    bad = _LeftOutImages(len(train))
    steps = range(settings.epochs * batches.steps_per_epoch)
    crops = training_views(
        train, batches, views, steps=steps, device=device, num_workers=num_workers, bad=bad
    )
    autocast = partial(encoding_precision, accelerator, bf16)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        losses = _fit(model, crops, train_labels, batches, bad, settings, accelerator, autocast)
        logits = _classify(
            model, test, num_classes, accelerator, autocast, mean=mean, std=std,
            image_size=image_size, crop_pct=crop_pct, num_workers=num_workers,
            batch_size=max(1, settings.batch_size // world_size),
        )  # fmt: skip
    seconds = time.perf_counter() - started
    return FinetuneResult(logits, losses, batches.batch_size, seconds, model)


class _SubsetBatches(GlobalBatches):
    """Batches of some rows, which keep the numbers they have among all."""

    def __init__(self, rows: NDArray[np.int64], batch_size: int, **settings: Any) -> None:
        super().__init__(len(rows), batch_size, **settings)
        self.rows = rows

    def whole_batch(self, step: int) -> EpochRows:
        epoch, places = super().whole_batch(step)
        return epoch, self.rows[places]


class _LeftOutImages(BadImages):
    """Images that this process could not decode. They are left out of the loss, as the images that
    are shown in their place have other classes.
    """

    def __init__(self, num_images: int) -> None:
        super().__init__(num_images, 1.0, None, fate="left out of the loss")
        self.rows: set[int | None] = set()

    def add(self, images: Iterable[BadImage]) -> None:
        images = [BadImage(*image) for image in images]
        self.rows.update(image.row for image in images)
        super().add(images)

    def labels(self, labels: Tensor, rows: NDArray[np.int64]) -> Tensor:
        """The labels of some rows, with `NO_CLASS` for those that are left out."""
        chosen = labels[torch.from_numpy(rows)]
        return chosen.masked_fill(
            torch.tensor([row in self.rows for row in rows.tolist()]), NO_CLASS
        )


def _checked_rows(
    train: ImageSplit | Tensor, labels: Tensor, num_classes: int, rows: ArrayLike | None
) -> NDArray[np.int64]:
    if len(labels) != len(train):
        raise ValueError(
            "every training image needs one label, got "
            f"{len(train)} images and {len(labels)} labels."
        )
    chosen = np.arange(len(train)) if rows is None else np.asarray(rows, dtype=np.int64)
    if chosen.ndim != 1 or len(chosen) == 0:
        raise ValueError(f"rows must be a list of numbers, got shape {chosen.shape}.")
    if len(outside := chosen[(chosen < 0) | (chosen >= len(train))]):
        raise ValueError(f"rows must be from 0 to {len(train) - 1}, got {outside[0]}.")
    used = labels[torch.from_numpy(chosen)]
    if len(unknown := used[(used < 0) | (used >= num_classes)]):
        raise ValueError(
            f"labels must be from 0 to {num_classes - 1}, got {unknown[0]}; leave such rows out, "
            "or raise num_classes."
        )
    return chosen


def _fit(
    model: Classifier,
    crops: Iterator[tuple[Tensor, ...]],
    labels: Tensor,
    batches: GlobalBatches,
    bad: _LeftOutImages,
    settings: FinetuneSettings,
    accelerator: Accelerator,
    autocast: Autocast,
) -> list[float]:
    """Train the classifier in place, and return the mean loss of every epoch."""
    device, per_epoch = accelerator.device, batches.steps_per_epoch
    trained = [p for p in model.encoder.parameters() if p.requires_grad]
    groups = [{"params": list(model.head.parameters())}, {"params": trained}]
    optimizer = SGD(groups, lr=0.0, momentum=MOMENTUM, weight_decay=settings.weight_decay)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    bar = tqdm(
        total=settings.epochs * per_epoch, desc="linear" if settings.frozen else "fine-tuning",
        unit="step", disable=not accelerator.is_local_main_process,
    )  # fmt: skip
    losses: list[float] = []
    total = torch.zeros((), device=device)
    with bar:
        for step, (x,) in enumerate(crops):
            epoch, rows = batches.batch(step)
            rates = settings.learning_rates(epoch)
            for group, lr in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = lr
            own = {"epoch": step, "index": accelerator.process_index}
            torch.manual_seed(derive_seed(settings.seed, **own, stream=Stream.DROPOUT))
            wanted = bad.labels(labels, rows)
            with autocast():
                logits = wrapped(x.to(memory_format=torch.channels_last))
            # over all rows, so that those left out weigh the same on any number of processes
            loss = F.cross_entropy(logits, on_device(wanted, device), reduction="sum") / len(rows)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            total += loss.detach()
            bar.update()
            if (step + 1) % per_epoch == 0:
                mean = sum_over_processes(total) / (per_epoch * accelerator.num_processes)
                losses.append(_finite(mean.item(), epoch, settings))
                bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
                total.zero_()
    bad.agree(gather_objects, write=False, say=accelerator.print)
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    accelerator.free_memory()
    return losses


def _finite(loss: float, epoch: int, settings: FinetuneSettings) -> float:
    if math.isfinite(loss):
        return loss
    remedy = "" if settings.frozen else f" or lr_backbone={settings.lr_backbone}"
    raise FloatingPointError(
        f"the training loss must be finite, got {loss} in epoch {epoch + 1} of {settings.epochs}; "
        f"lower lr_head={settings.lr_head}{remedy}."
    )


def _classify(
    model: Classifier,
    test: ImageSplit | Tensor,
    num_classes: int,
    accelerator: Accelerator,
    autocast: Autocast,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    **settings: Any,
) -> Tensor:
    """(M, K) float32 logits of test images, each process computing an equal part of them."""
    model.eval()
    share = -(-len(test) // accelerator.num_processes)
    start = accelerator.process_index * share
    own = np.arange(start, min(start + share, len(test)))
    logits = torch.zeros(share, num_classes, device=accelerator.device)
    if len(own):
        batches = map(channels_last, evaluation_batches(test, own, **settings))
        logits[: len(own)] = extract_features(
            model, batches, mean=mean, std=std, device=accelerator.device, autocast=autocast
        )
    return gather_rows(logits)[: len(test)].cpu()
