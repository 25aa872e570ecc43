"""Which samples each step sees: an order that is a function of (seed, step)."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from vicreg_hf.runtime.randomness import permutation

EpochRows = tuple[int, NDArray[np.int64]]
"""An epoch, and the numbers of some samples in it."""


class GlobalBatches:
    """Which samples each step sees: a pure function of (seed, step).

    Every epoch is a new order of all samples, its last incomplete batch left out. A process takes
    a run of consecutive rows of every micro-batch, so that the micro-batches are the same rows on
    any number of processes. Without micro-batches, gathering by rank restores the batch.

    Args:
        num_samples: N.
        batch_size: global; rank and world_size say which part is this process's.
        micro_batch_size: global; None is the whole batch.

    Raises:
        ValueError: fewer samples than a batch, or a batch that processes cannot share evenly.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        micro_batch_size: int | None = None,
    ) -> None:
        least, most = 2 * world_size, num_samples // world_size * world_size
        if most < least:
            raise ValueError(
                f"a data set must hold at least 2 images per process, got {num_samples} images and "
                f"num_processes={world_size}."
            )
        if num_samples < batch_size:
            raise ValueError(
                f"batch_size must not exceed the number of images, got batch_size={batch_size} "
                f"and {num_samples} images; use at most {most}."
            )
        micro_batch_size = min(micro_batch_size or batch_size, batch_size)
        _check_shares("batch_size", batch_size, world_size, least, most)
        if batch_size < least:
            raise ValueError(
                f"batch_size must give every process at least 2 images, got batch_size={batch_size}"
                f" and num_processes={world_size}; use at least {least}."
            )
        _check_shares("micro_batch_size", micro_batch_size, world_size, world_size, most)
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.steps_per_epoch = num_samples // batch_size
        self.micro_batch_size = micro_batch_size
        self.rank, self.world_size = rank, world_size
        self._order = lru_cache(maxsize=2)(self._permutation)

    @property
    def rows_per_process(self) -> int:
        """How many rows of a batch are this process's."""
        return self.batch_size // self.world_size

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        return permutation(self.num_samples, seed=self.seed, epoch=epoch)

    def batch(self, step: int) -> EpochRows:
        """This process's rows at a step, from 0."""
        epoch, rows = self.whole_batch(step)
        parts = np.split(rows, range(self.micro_batch_size, len(rows), self.micro_batch_size))
        own = [np.split(part, self.world_size)[self.rank] for part in parts]
        return epoch, np.concatenate(own)

    def whole_batch(self, step: int) -> EpochRows:
        """The rows of all processes at a step, in the order of the epoch."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.batch_size
        return epoch, self._order(epoch)[start : start + self.batch_size]


def _check_shares(name: str, size: int, world_size: int, least: int, most: int) -> None:
    if size % world_size:
        nearest = min(max(round(size / world_size) * world_size, least), most)
        raise ValueError(
            f"{name} must divide evenly over processes, got {name}={size} and "
            f"num_processes={world_size}; the nearest that does is {nearest}."
        )
