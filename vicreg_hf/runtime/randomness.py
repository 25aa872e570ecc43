"""Keyed random numbers: every draw is a pure function of what it is for.

Nothing here has a state. The same (seed, epoch, index, view) gives the same numbers in any process,
in any worker and after any resume, so the only thing a training run must remember is its step.

Shapes: B samples, C columns.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)


class Stream(IntEnum):
    """The purposes of random numbers, of which no two share one."""

    VIEW = 0
    VIEW_PRIME = 1
    ORDER = 2
    MODEL = 3
    DEMO = 4
    SPLIT = 5
    DROPOUT = 6
    REPLACEMENT = 7


ORDERED_AT_ONCE = 2**20
"""Elements of a permutation that get their random numbers at once, which takes 120 MiB."""
FIRST_FURTHER_VIEW = 2**16
"""The stream of the third view; those below are left to future purposes."""


def view_stream(view: int) -> int:
    """The stream of one of an image's views, counted from 0, however many there are.

    Raises:
        ValueError: a negative number.
    """
    if view < 0:
        raise ValueError(f"view must be at least 0, got {view}.")
    return view if view < 2 else FIRST_FURTHER_VIEW + view - 2


def philox(counter: NDArray[np.uint64], key: int) -> NDArray[np.uint64]:
    """Philox4x32 with ten rounds: 128 counter bits and 64 key bits to 128 random bits.

    Args:
        counter: (4, ...) words below 2**32.
        key: integer whose low 64 bits are used.

    Returns:
        (4, ...) words below 2**32.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF
    for _ in range(10):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> _SHIFT) ^ c1 ^ np.uint64(k0),
            product1 & _MASK,
            (product0 >> _SHIFT) ^ c3 ^ np.uint64(k1),
            product0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3])


def words(
    indices: ArrayLike, num_columns: int, *, seed: int, epoch: ArrayLike = 0, stream: int
) -> NDArray[np.uint64]:
    """Random 32-bit words, one row per index.

    Args:
        indices: (B,) sample indices, 0 <= index < 2**32.
        num_columns: C.
        seed: any integer; its low 64 bits count.
        epoch: scalar or (B,), below 2**32.
        stream: a `Stream`, or the `view_stream` of a view.

    Returns:
        (B, C) words below 2**32.
    """
    rows = np.asarray(indices, dtype=np.uint64).reshape(-1)
    blocks = np.arange(-(-num_columns // 4), dtype=np.uint64)
    shape = (len(rows), len(blocks))
    epochs = np.broadcast_to(np.asarray(epoch, dtype=np.uint64).reshape(-1, 1), shape)
    counter = np.stack(
        [
            np.broadcast_to(rows[:, None], shape),
            epochs,
            np.full(shape, int(stream), dtype=np.uint64),
            np.broadcast_to(blocks, shape),
        ]
    )
    return philox(counter, seed).transpose(1, 2, 0).reshape(len(rows), -1)[:, :num_columns]


def uniforms(
    indices: ArrayLike, num_columns: int, *, seed: int, epoch: ArrayLike = 0, stream: int
) -> NDArray[np.float32]:
    """Uniform numbers in [0, 1), one row per index; arguments as for `words`.

    Returns:
        (B, C) float32 with 24 random bits each.
    """
    bits = words(indices, num_columns, seed=seed, epoch=epoch, stream=stream)
    return (bits >> np.uint64(8)).astype(np.float32) * np.float32(2**-24)


def permutation(
    size: int, *, seed: int, epoch: int, stream: Stream = Stream.ORDER
) -> NDArray[np.int64]:
    """A permutation of range(size), such as the order in which an epoch visits its samples.

    Elements are sorted by random numbers of 64 bits, which takes a third of a microsecond and 25
    bytes for each.

    Args:
        size: at most 2**32.
    """
    keys = np.empty(size, np.uint64)
    for start in range(0, size, ORDERED_AT_ONCE):
        part = keys[start : start + ORDERED_AT_ONCE]
        elements = np.arange(start, start + len(part))
        high, low = words(elements, 2, seed=seed, epoch=epoch, stream=stream).T
        part[:] = (high << _SHIFT) | low
    return np.argsort(keys, kind="stable")


def derive_seed(seed: int, *, epoch: int, index: int, stream: Stream) -> int:
    """A 63-bit seed for a library's own generator (torch's, for dropout and drop-path)."""
    high, low = words([index], 2, seed=seed, epoch=epoch, stream=stream)[0]
    return int((int(high) << 32 | int(low)) & (2**63 - 1))
