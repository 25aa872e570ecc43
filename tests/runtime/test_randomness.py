"""Keyed random numbers: the published generator, and functions of their keys alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy import stats

from vicreg_hf.runtime.randomness import (
    Stream,
    derive_seed,
    permutation,
    permuted,
    philox,
    uniforms,
    view_stream,
    words,
)

KEY: dict[str, Any] = {"seed": 7, "epoch": 3, "stream": Stream.VIEW}


# Random123's kat_vectors for philox4x32-10; key words are given low first.
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        (
            [0, 0, 0, 0],
            [0, 0],
            [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
        ),
        (
            [0xFFFFFFFF] * 4,
            [0xFFFFFFFF] * 2,
            [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        ),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_known_answers(
    counter: Sequence[int], key: Sequence[int], expected: Sequence[int]
) -> None:
    blocks = np.array([counter, counter], dtype=np.uint64).T
    answer = philox(blocks, key[0] | key[1] << 32)
    np.testing.assert_array_equal(answer.T, [expected, expected])


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    together = words([5, 2**32 - 1, 0], 10, **KEY)
    alone = [words([index], 10, **KEY)[0] for index in (5, 2**32 - 1, 0)]
    np.testing.assert_array_equal(together, alone)


def test_a_column_does_not_depend_on_how_many_are_drawn() -> None:
    np.testing.assert_array_equal(words([5], 33, **KEY)[:, :3], words([5], 3, **KEY))


def test_every_row_may_have_its_own_epoch() -> None:
    together = words([5, 5, 8], 6, seed=7, epoch=[0, 1, 2], stream=Stream.VIEW)
    alone = [
        words([index], 6, seed=7, epoch=epoch, stream=Stream.VIEW)[0]
        for index, epoch in [(5, 0), (5, 1), (8, 2)]
    ]
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize(
    "change",
    [{"seed": 8}, {"seed": 7 + 2**32}, {"seed": -7}, {"epoch": 4}]
    + [{"stream": stream} for stream in Stream if stream != KEY["stream"]]
    + [{"stream": view_stream(view)} for view in (2, 3, 50)],
)
def test_every_part_of_the_key_changes_every_word(change: dict[str, Any]) -> None:
    # a word survives by chance with probability 2**-32
    assert (words(np.arange(100), 8, **KEY) != words(np.arange(100), 8, **{**KEY, **change})).all()


def test_views_beyond_the_second_share_a_stream_with_nothing() -> None:
    streams = [view_stream(view) for view in range(1000)]
    assert streams[:2] == [Stream.VIEW, Stream.VIEW_PRIME]
    assert len({*streams[2:], *Stream}) == 998 + len(Stream)
    assert min(streams[2:]) > 256  # room for purposes to come
    assert max(streams) < 2**32  # a word of the counter


def test_a_view_before_the_first_is_refused() -> None:
    with pytest.raises(ValueError, match="view must be at least 0, got -1"):
        view_stream(-1)


def test_uniforms_are_uniform_on_the_unit_interval() -> None:
    drawn = uniforms(np.arange(100_000), 1, **KEY)[:, 0]
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert stats.kstest(drawn, "uniform").pvalue > 1e-3


def test_uniforms_keep_the_upper_24_bits_of_the_words() -> None:
    exact = words(np.arange(1000), 3, **KEY) // 256 / 2**24
    np.testing.assert_array_equal(uniforms(np.arange(1000), 3, **KEY), exact)


def test_columns_views_and_epochs_are_uncorrelated() -> None:
    indices = np.arange(50_000)
    drawn = [
        uniforms(indices, 6, seed=0, epoch=epoch, stream=stream)
        for epoch in (0, 1)
        for stream in (Stream.VIEW, Stream.VIEW_PRIME)
    ]
    correlation = np.corrcoef(np.concatenate(drawn, axis=1), rowvar=False)
    off_diagonal = correlation - np.eye(24)
    assert np.abs(off_diagonal).max() < 5 / np.sqrt(len(indices))  # five standard errors


@pytest.mark.parametrize("size", [1, 2, 1000])
def test_the_order_of_an_epoch_is_a_permutation(size: int) -> None:
    np.testing.assert_array_equal(np.sort(permutation(size, seed=0, epoch=0)), np.arange(size))


@pytest.mark.parametrize(("seed", "epoch"), [(0, 1), (1, 0)])
def test_another_epoch_or_seed_has_another_order(seed: int, epoch: int) -> None:
    unmoved = permutation(1000, seed=0, epoch=0) == permutation(1000, seed=seed, epoch=epoch)
    assert unmoved.sum() < 10  # one is expected; ten have probability 1e-7


def test_an_image_comes_anywhere_in_an_epoch() -> None:
    places = [int(np.argmin(permutation(50, seed=0, epoch=epoch))) for epoch in range(2000)]
    assert stats.chisquare(np.bincount(places, minlength=50)).pvalue > 1e-3


def test_derived_seeds_differ_and_fit_a_torch_generator() -> None:
    seeds = {
        derive_seed(0, epoch=epoch, index=index, stream=Stream.MODEL)
        for epoch in range(20)
        for index in range(20)
    }
    assert len(seeds) == 400
    assert min(seeds) >= 0
    assert max(seeds) < 2**63


@pytest.mark.parametrize("size", [1, 2, 3, 5, 17, 64, 65, 1000, 4097])
def test_a_permutation_by_parts_is_one(size: int) -> None:
    whole = permuted(np.arange(size), size, seed=5, epoch=3)
    np.testing.assert_array_equal(np.sort(whole), np.arange(size))
    few = np.arange(size)[::-3]
    np.testing.assert_array_equal(permuted(few, size, seed=5, epoch=3), whole[few])


@pytest.mark.parametrize(("seed", "epoch"), [(1, 0), (0, 1), (2**63 + 1, 0), (0, 2**32 - 1)])
def test_seed_and_epoch_change_a_permutation_by_parts(seed: int, epoch: int) -> None:
    first, other = (
        permuted(np.arange(1000), 1000, seed=s, epoch=e) for s, e in [(0, 0), (seed, epoch)]
    )
    assert (first == other).sum() < 10


def test_a_permutation_by_parts_is_uniform() -> None:
    """Every place is as likely for an element, and every pair of elements for two places."""
    orders = np.array([permuted(np.arange(7), 7, seed=0, epoch=e) for e in range(6000)])
    for place in range(7):
        assert stats.chisquare(np.bincount(orders[:, place], minlength=7)).pvalue > 1e-4
    for other in range(1, 7):
        pairs = np.bincount(orders[:, 0] * 7 + orders[:, other], minlength=49)
        assert stats.chisquare(pairs[pairs > 0]).pvalue > 1e-4
        assert (pairs > 0).sum() == 42


def test_neighbours_in_a_large_permutation_are_strangers() -> None:
    size = 10**9
    start = 123_456_789
    rows = permuted(np.arange(start, start + 20_000), size, seed=0, epoch=0)
    assert len(np.unique(rows)) == len(rows)
    assert stats.kstest(rows / size, "uniform").pvalue > 1e-4
    assert stats.kstest((np.diff(rows) % size) / size, "uniform").pvalue > 1e-4
