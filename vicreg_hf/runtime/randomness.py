"""Keyed random numbers: every draw is a pure function of what it is for.

Nothing here has a state. The same (seed, epoch, index, view) gives the same numbers in any process,
in any worker and after any resume, so the only thing a training run must remember is its step.

Shapes: B samples, C columns.
"""

from __future__ import annotations

import math
from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)


class Stream(IntEnum):
    """What a random number is for; two purposes never share one."""

    VIEW = 0
    VIEW_PRIME = 1
    ORDER = 2
    MODEL = 3
    DEMO = 4
    SPLIT = 5
    DROPOUT = 6
    REPLACEMENT = 7


FEISTEL_ROUNDS = 8
SORTED_BELOW = 2**20
"""Elements whose order is formed whole, by sorting, in a fifth of a second and 120 MiB at most."""
FIRST_FURTHER_VIEW = 2**16
"""Stream of the third view; those below are left to purposes yet to come."""


def view_stream(view: int) -> int:
    """The stream of one of an image's views, counted from 0, however many there are.

    Raises:
        ValueError: a negative number.
    """
    if view < 0:
        raise ValueError(f"view must be at least 0, got {view}.")
    further = FIRST_FURTHER_VIEW + view - 2
    return (Stream.VIEW, Stream.VIEW_PRIME)[view] if view < 2 else further


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
        stream: the purpose: a `Stream`, or of a view what `view_stream` gives.

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
    """A permutation of range(size), such as the order in which an epoch visits its samples."""
    bits = words(np.arange(size), 2, seed=seed, epoch=epoch, stream=stream)
    return np.argsort((bits[:, 0] << _SHIFT) | bits[:, 1], kind="stable")


def permuted(
    positions: ArrayLike, size: int, *, seed: int, epoch: int, stream: Stream = Stream.ORDER
) -> NDArray[np.int64]:
    """What stands at some positions of a permutation of range(size), without forming the rest.

    A Feistel network over a rectangle of at least `size` cells, whose sides are alike; what falls
    outside of range(size) is sent on until it does not. It is another order than `permutation`'s.

    Args:
        positions: (B,) below size; size is at most 2**61.

    Source: Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002.
    """
    width = math.isqrt(max(size - 1, 0)) + 1
    height = -(-size // width)

    def word(half: NDArray[np.uint64], number: int) -> NDArray[np.uint64]:
        block, column = divmod(number, 4)  # a block of words has four; halves are below 2**31
        keys = half + np.uint64(block << 31)
        return words(keys, 4, seed=seed, epoch=epoch, stream=stream)[:, column]

    values = np.array(positions, dtype=np.uint64).reshape(-1)
    outside = np.arange(len(values))
    while len(outside):
        left, right = np.divmod(values[outside], np.uint64(height))
        for number in range(0, FEISTEL_ROUNDS, 2):
            left = (left + word(right, number)) % np.uint64(width)
            right = (right + word(left, number + 1)) % np.uint64(height)
        values[outside] = left * np.uint64(height) + right
        outside = outside[values[outside] >= size]
    return values.astype(np.int64)


def drawn(count: int, size: int, *, seed: int, epoch: int, stream: Stream) -> NDArray[np.int64]:
    """Some of range(size), no two alike: the first `count` of a permutation, or all."""
    if size < SORTED_BELOW:
        return permutation(size, seed=seed, epoch=epoch, stream=stream)[:count]
    return permuted(np.arange(min(count, size)), size, seed=seed, epoch=epoch, stream=stream)


def derive_seed(seed: int, *, epoch: int, index: int, stream: Stream) -> int:
    """A 63-bit seed for a library's own generator (torch's, for dropout and drop-path)."""
    high, low = words([index], 2, seed=seed, epoch=epoch, stream=stream)[0]
    return int((int(high) << 32 | int(low)) & (2**63 - 1))
