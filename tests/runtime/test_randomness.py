"""Keyed random numbers: the published generator, and functions of their keys alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from vicreg_hf.runtime.randomness import (
    Stream,
    derive_seed,
    permutation,
    philox,
    uniforms,
    view_stream,
    words,
)

KEY: dict[str, Any] = {"seed": 7, "epoch": 3, "stream": Stream.VIEW}


def test_philox_gives_the_known_answers() -> None:
    # Random123's kat_vectors for philox4x32-10; key words are given low first
    for counter, key, expected in (
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([2**32 - 1] * 4, [2**32 - 1] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ):
        blocks = np.array([counter, counter], dtype=np.uint64).T
        answer = philox(blocks, key[0] | key[1] << 32)
        np.testing.assert_array_equal(answer.T, [expected, expected])


def test_a_row_depends_on_its_own_index_and_epoch_and_not_on_what_else_is_drawn() -> None:
    indices, epochs = [5, 2**32 - 1, 0, 5], [0, 1, 2, 3]
    together = words(indices, 10, seed=7, epoch=epochs, stream=Stream.VIEW)
    for row, index, epoch in zip(together, indices, epochs, strict=True):
        alone = words([index], 33, seed=7, epoch=epoch, stream=Stream.VIEW)[0]
        np.testing.assert_array_equal(row, alone[:10])


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
    assert max(streams) < 2**32  # a word of the counter


def test_uniforms_are_uniform_on_the_unit_interval() -> None:
    drawn = uniforms(np.arange(100_000), 1, **KEY)[:, 0]
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert stats.kstest(drawn, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("size", [1, 2, 1000])
def test_a_permutation_is_one_by_seed_and_epoch(size: int) -> None:
    first, *others = (
        permutation(size, seed=seed, epoch=epoch) for seed, epoch in [(0, 0), (0, 1), (1, 0)]
    )
    np.testing.assert_array_equal(np.sort(first), np.arange(size))
    assert size < 1000 or all((first == other).sum() < 10 for other in others)  # expected: one


def test_a_permutation_formed_in_parts_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = permutation(1000, seed=3, epoch=2)
    monkeypatch.setattr("vicreg_hf.runtime.randomness.ORDERED_AT_ONCE", 64)
    np.testing.assert_array_equal(permutation(1000, seed=3, epoch=2), whole)
    # runs of earlier versions go on in their order
    assert whole[:5].tolist() == [201, 725, 646, 277, 639]


def test_derived_seeds_differ_and_fit_a_torch_generator() -> None:
    key: dict[str, Any] = {"stream": Stream.MODEL}
    seeds = {derive_seed(0, epoch=e, index=i, **key) for e in range(20) for i in range(20)}
    assert len(seeds) == 400
    assert min(seeds) >= 0
    assert max(seeds) < 2**63
