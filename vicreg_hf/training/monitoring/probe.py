"""A linear classifier that learns beside the encoder, to measure which classes it separates so far.

It detaches representations and draws no random numbers, so that the encoder is the same, bit for
bit, with the probe and without.

Shapes: B rows per process, N = B * world size, M images, F representation, C classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from vicreg_hf.data.splits import ImageSplit
from vicreg_hf.data.streams import ImageStream
from vicreg_hf.runtime.distributed import sum_over_processes, world_size
from vicreg_hf.runtime.transfer import on_device
from vicreg_hf.training.monitoring.knn import missing_for_probe

LEARNING_RATE, MOMENTUM = 5.0, 0.9
"""Settings of gradient descent; the learning rate is divided by F. The mean square norm of
standardised representations is F, so the loss curves by F / 2 at most, and learning rates below
2 (1 + MOMENTUM) over that converge."""
LEAST_SHARE = 0.01
"""Least weight of a batch in the running mean and variance; the first 100 batches weigh alike."""
LEAST_VARIANCE, EPS = 1e-6, 1e-12
"""Added to the variance of a dimension, as a share of the mean over all and as such: a dimension
that hardly varies is not blown up."""


class OnlineProbe(nn.Module):
    """Softmax regression on standardised representations, starting from zero.

    All processes hold the same probe: statistics and gradients are those of the global batch.

    Args:
        labels: (rows of the training split,) classes from 0; -1 where an image has none.
        names: the C classes.
        num_features: F.
    """

    mean: Tensor
    variance: Tensor
    weight: Tensor
    momentum: Tensor
    steps: Tensor

    def __init__(self, labels: Tensor, names: tuple[str, ...], num_features: int) -> None:
        super().__init__()
        self.labels = labels.clone()
        digest = hashlib.sha256("\n".join(names).encode())
        digest.update(labels.numpy().tobytes())
        self.labels_sha256 = digest.hexdigest()
        """Tells one set of labels from another."""
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("variance", torch.zeros(num_features))
        # the last column is the bias
        self.register_buffer("weight", torch.zeros(len(names), num_features + 1))
        self.register_buffer("momentum", torch.zeros(len(names), num_features + 1))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.loss = torch.tensor(torch.nan)
        """Mean cross-entropy of the latest global batch, before its step; NaN without classes."""

    @torch.no_grad()
    def learn(self, y: Tensor, rows: NDArray[np.int64]) -> None:
        """Take one step; every process must.

        Args:
            y: (B, F) representations.
            rows: (B,) rows of their images in the training split.
        """
        y = y.detach().float()
        labels = on_device(self.labels[torch.from_numpy(rows)], y.device)
        self._update_statistics(y)
        x = self._standardise(y)
        logits = x @ self.weight.T
        known = labels >= 0
        residual = logits.softmax(1)
        residual[torch.arange(len(y), device=y.device), labels.clamp(min=0)] -= 1
        gradient = (residual * known[:, None]).T @ x
        loss = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
        sums = torch.cat([gradient.flatten(), loss[None], known.sum()[None]])
        sums = sum_over_processes(sums)
        number = sums[-1]
        means = sums[:-1] / number.clamp(min=1)
        self.momentum.mul_(MOMENTUM).add_(means[:-1].view_as(self.weight))
        self.weight.sub_(LEARNING_RATE / y.shape[1] * self.momentum)
        self.loss = torch.where(number > 0, means[-1], torch.nan)

    def leave_out(self, rows: Iterable[int | None]) -> None:
        """Learn no more from these rows, whose images were replaced by others."""
        self.labels[[row for row in rows if row is not None]] = -1

    @torch.no_grad()
    def predict(self, y: Tensor) -> Tensor:
        """The likeliest class of each of (M, F) representations: (M,)."""
        return (self._standardise(y.float()) @ self.weight.T).argmax(1)

    def _update_statistics(self, y: Tensor) -> None:
        """Add a batch to the running mean and variance."""
        self.steps += 1
        share = (1 / self.steps).clamp(min=LEAST_SHARE)
        # centred before squaring, as sums of squares cancel in float32
        off = y - self.mean
        sums = torch.cat([off.mean(0), off.square().mean(0)])
        shift, square = (sum_over_processes(sums) / world_size()).chunk(2)
        self.variance.lerp_(square, share).sub_((share * shift).square()).clamp_(min=0)
        self.mean.add_(share * shift)

    def _standardise(self, y: Tensor) -> Tensor:
        """(M, F) to (M, F + 1), whose last column is 1."""
        least = LEAST_VARIANCE * self.variance.mean() + EPS
        x = (y - self.mean) * (self.variance + least).rsqrt()
        return F.pad(x, (0, 1), value=1.0)


def create_probe(
    train: ImageSplit | ImageStream, held_out: ImageSplit | None, num_features: int
) -> OnlineProbe:
    """A probe for a run's data and F features, on the CPU.

    Raises:
        ValueError: labels or a held-out split are missing.
    """
    missing = missing_for_probe(train, held_out)
    if missing is not None:
        raise ValueError(
            f"online_probe needs labels and a held-out split, but {missing}, or --online_probe "
            "false."
        )
    assert isinstance(train, ImageSplit)
    assert train.labels is not None
    return OnlineProbe(train.labels, train.label_names, num_features)
