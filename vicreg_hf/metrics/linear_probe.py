"""Linear classification of stored features, with a sweep of settings at once.

Shapes: N training rows, M test rows, B rows of a batch, F features, K classes, S settings.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vicreg_hf.metrics.arrays import (
    Values,
    accuracy,
    as_features,
    as_labelled,
    as_labels,
    check_same_width,
)
from vicreg_hf.metrics.subsets import balanced_subset
from vicreg_hf.runtime.randomness import permutation

LEARNING_RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
WEIGHT_DECAYS = (0.0, 1e-5, 1e-4, 1e-3)
VALIDATION = 0.1
"""Part of the training rows that chooses the setting, before it too is learned from."""
MOMENTUM = 0.9
ROWS_AT_ONCE = 4096
"""Rows that are classified together."""
VALUES_AT_ONCE = 2**25
"""Values that are made float32 together, where features have another precision."""


@dataclass(frozen=True)
class LinearResult:
    """The test predictions of a sweep's best setting, and how each setting fared."""

    predictions: Tensor
    """(M,) classes."""
    learning_rate: float
    """Learning rate of the best setting; likewise weight_decay."""
    weight_decay: float
    validation: dict[tuple[float, float], float]
    """Accuracy on the rows held out of training, 0 to 1, by learning rate and weight decay."""
    validation_loss: dict[tuple[float, float], float]
    """Cross-entropy on them, by which the setting is chosen; NaN where training diverged."""
    batch_size: int

    def accuracy(self, labels: Values) -> float:
        """Share of test rows, 0 to 1, whose predicted class is their label.

        Raises:
            ValueError: labels that are not one integer for each row, or no rows.
        """
        return accuracy(self.predictions, as_labels("labels", labels))


def linear_probe(
    train_features: Values,
    train_labels: Values,
    test_features: Values,
    *,
    num_classes: int | None = None,
    learning_rates: Sequence[float] = LEARNING_RATES,
    weight_decays: Sequence[float] = WEIGHT_DECAYS,
    epochs: int = 30,
    batch_size: int | None = None,
    seed: int = 0,
) -> LinearResult:
    """Train a linear classifier for every setting in one pass, and classify by the best.

    Features are standardised by the training rows. All classifiers see the same batches, as the
    columns of one matrix; SGD with momentum, its rate falling along a cosine to zero. The setting
    of least cross-entropy on a tenth of the training rows is trained again on all of them: where
    rows are few, accuracy on a tenth of them is too coarse to choose by. Test labels are never
    seen.

    Args:
        train_features: (N, F), a tensor of any float dtype or an array.
        train_labels: (N,) classes from 0.
        test_features: (M, F).
        num_classes: K; by default as many as the labels show.
        batch_size: by default a fortieth of the training rows, from 32 to 1024.

    Raises:
        FloatingPointError: no setting trains.
        ValueError: rows and labels that differ in number, features of two widths, fewer than two
            classes, labels that are no integers from 0, one that is not below num_classes, or no
            settings.
    """
    train, labels = as_labelled("train", train_features, train_labels)
    test = as_features("test_features", test_features)
    check_same_width(train, test)
    if (present := len(labels.unique())) < 2:
        raise ValueError(f"a classifier needs rows of at least two classes, got {present}.")
    largest = int(labels.max())
    classes = largest + 1 if num_classes is None else num_classes
    if largest >= classes:
        raise ValueError(f"every label must be below num_classes={classes}, got {largest}.")
    settings = list(itertools.product(learning_rates, weight_decays))
    if not settings:
        raise ValueError("a sweep needs at least one learning rate and one weight decay, got none.")
    mean, std = _moments(train)
    x, x_test = _Standardised(train, mean, std), _Standardised(test, mean, std)
    held_out = torch.from_numpy(balanced_subset(labels.cpu(), VALIDATION, seed))
    kept = torch.ones(len(x), dtype=torch.bool)
    if len(held_out) < len(x):  # else each class has one row, and is chosen on what it learns
        kept[held_out] = False
    every = torch.arange(len(x), device=train.device)
    kept, held_out = every[kept.to(train.device)], held_out.to(train.device)
    batch_size = batch_size or min(max(len(x) // 40, 32), 1024)
    options = {"epochs": epochs, "batch_size": batch_size, "seed": seed}
    weight, bias = _train(x, labels, kept, classes, settings, **options)
    found, losses = _classify(x, held_out, weight, bias, classes, labels)
    scores = (found == labels[held_out, None]).float().mean(0).tolist()
    if not bool(losses.isfinite().any()):
        raise FloatingPointError(
            "every linear classifier diverged; are the features finite numbers?"
        )
    best = settings[int(losses.nan_to_num(nan=math.inf).argmin())]
    weight, bias = _train(x, labels, every, classes, [best], **options)
    rows = torch.arange(len(test), device=train.device)
    predictions = _classify(x_test, rows, weight, bias, classes)[0][:, 0]
    accuracies = dict(zip(settings, scores, strict=True))
    loss_of = dict(zip(settings, losses.tolist(), strict=True))
    return LinearResult(predictions, *best, accuracies, loss_of, batch_size)


class _Standardised:
    """Rows of features, standardised when they are asked for: a copy of ImageNet's takes 10 GB.

    Args:
        x: (N, F), on any device.
        mean: (F,), on the device of the results; likewise std.
    """

    def __init__(self, x: Tensor, mean: Tensor, std: Tensor) -> None:
        self.x, self.mean, self.std = x.to(mean.device), mean, std

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: Tensor) -> Tensor:
        return (self.x[rows].float() - self.mean) / self.std


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (F,) and standard deviation (F,) of features; 1 in place of a constant's."""
    columns = x.split(max(1, VALUES_AT_ONCE // len(x)), dim=1)
    means, stds = zip(*(_moments_of(part.float()) for part in columns), strict=True)
    return torch.cat(means), torch.cat(stds)


def _moments_of(x: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = x.mean(0), x.std(0)
    # a constant's std is not 0 but some rounding of its size; the size of others says nothing
    largest = torch.maximum(x.amax(0), -x.amin(0))
    return mean, torch.where(std > 1e-6 * largest, std, torch.ones_like(std))


def _train(
    x: _Standardised,
    labels: Tensor,
    learned: Tensor,
    num_classes: int,
    settings: Sequence[tuple[float, float]],
    *,
    epochs: int,
    batch_size: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Weights (F, S K) and biases (S K) of a classifier for each setting; gradients by hand.

    Args:
        learned: numbers of the rows that are learned from.
    """
    device = learned.device
    rates, decays = torch.tensor(settings, device=device).T
    columns = (len(settings), num_classes)
    rate, decay = (v[:, None].expand(columns).reshape(-1) for v in (rates, decays))
    weight = x.mean.new_zeros(len(x.mean), rate.numel())
    bias = x.mean.new_zeros(rate.numel())
    momentum, bias_momentum = torch.zeros_like(weight), torch.zeros_like(bias)
    total = epochs * math.ceil(len(learned) / batch_size)
    step = 0
    for epoch in range(epochs):
        order = torch.from_numpy(permutation(len(learned), seed=seed, epoch=epoch)).to(device)
        for rows in learned[order].split(batch_size):
            share = 0.5 * (1 + math.cos(math.pi * step / total))
            batch = x[rows]
            logits = torch.addmm(bias, batch, weight).view(len(rows), *columns)
            error = logits.softmax(2)
            error[torch.arange(len(rows), device=device), :, labels[rows]] -= 1
            error = error.flatten(1).div_(len(rows))
            momentum.mul_(MOMENTUM).addmm_(batch.T, error).addcmul_(weight, decay)
            bias_momentum.mul_(MOMENTUM).add_(error.sum(0))
            weight.addcmul_(momentum, rate, value=-share)
            bias.addcmul_(bias_momentum, rate, value=-share)
            step += 1
    return weight, bias


def _classify(
    x: _Standardised,
    wanted: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_classes: int,
    labels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Classes (rows, S), and the mean cross-entropy (S,) with labels.

    A classifier that has diverged gives class -1, and a cross-entropy of NaN.

    Args:
        wanted: numbers of the rows that are classified.
        labels: of all rows of x.
    """
    parts, total = [], bias.new_zeros(bias.numel() // num_classes)
    for rows in wanted.split(ROWS_AT_ONCE):
        logits = torch.addmm(bias, x[rows], weight).view(len(rows), -1, num_classes)
        classes = logits.nan_to_num(nan=-math.inf).argmax(2)
        parts.append(torch.where(logits.isfinite().all(2), classes, -1))
        if labels is not None:
            right = labels[rows, None, None].expand(-1, logits.shape[1], 1)
            chosen = logits.gather(2, right)[..., 0]
            total += (logits.logsumexp(2) - chosen).sum(0)
    return torch.cat(parts), total / len(wanted)
