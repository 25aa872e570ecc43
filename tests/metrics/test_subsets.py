"""Balanced subsets of labelled rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vicreg_hf.metrics.subsets import balanced_subset

SIZES = (1000, 150, 40, 3)
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(4), SIZES))


def test_every_class_gives_its_share_and_at_least_one_row() -> None:
    for fraction, expected in (
        (0.01, [10, 2, 1, 1]),  # 1.5 rounds to 2; 0.4 and 0.03 to none, but one is the least
        (0.1, [100, 15, 4, 1]),
        (1.0, list(SIZES)),
    ):
        rows = balanced_subset(LABELS, fraction, seed=0)
        assert np.bincount(LABELS[rows]).tolist() == expected
        assert (np.diff(rows) > 0).all()  # ascending, none twice


def test_every_class_gives_so_many_rows_or_all_of_its_own() -> None:
    rows = balanced_subset(LABELS, number=10, seed=0)
    assert np.bincount(LABELS[rows]).tolist() == [10, 10, 10, 3]
    assert set(balanced_subset(LABELS, number=2, seed=0)) < set(rows)


def test_a_subset_is_a_function_of_labels_fraction_and_seed() -> None:
    first = balanced_subset(LABELS, 0.1, seed=3)
    with torch.random.fork_rng():
        torch.manual_seed(9)
        state = torch.get_rng_state()
        again = balanced_subset(torch.from_numpy(LABELS), 0.1, seed=3)
        assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(again, first)
    assert len(np.intersect1d(balanced_subset(LABELS, 0.1, seed=4), first)) < len(first) / 2
    assert set(balanced_subset(LABELS, 0.01, seed=3)) < set(first)


def test_the_rows_of_a_class_are_drawn_from_all_of_it() -> None:
    drawn = [balanced_subset(np.zeros(20, np.int64), 0.05, seed=seed)[0] for seed in range(400)]
    assert np.bincount(drawn, minlength=20).min() > 4  # of 20 expected


def test_what_cannot_be_shared_is_refused() -> None:
    for labels, fraction, message in (
        ([0, 1], 0.0, "above 0 and be at most 1, got 0.0"),
        ([[0, 1]], 0.1, r"of shape \(1, 2\)"),
        ([0, -1], 0.1, "class from 0, got -1 in row 1"),
    ):
        with pytest.raises(ValueError, match=message):
            balanced_subset(labels, fraction)
