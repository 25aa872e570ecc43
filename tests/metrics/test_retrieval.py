"""Nearest neighbours against brute force, and measures of retrieval by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from vicreg_hf.metrics.retrieval import (
    average_precision_at_k,
    most_similar,
    nearest_neighbours,
    recall_at_k,
)


def points(rows: int, *, seed: int) -> Tensor:
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed))


def brute_force(bank: Tensor, queries: Tensor, k: int) -> NDArray[np.int64]:
    """All angles in float64, sorted."""
    a, b = (
        v.double().numpy() / np.linalg.norm(v.double().numpy(), axis=1, keepdims=True)
        for v in (queries, bank)
    )
    return np.argsort(np.arccos(np.clip(a @ b.T, -1, 1)), axis=1)[:, :k]


# --- neighbours


@pytest.mark.parametrize(("queries", "k"), [(1500, 10), (10, 300)])  # more than one chunk; all
def test_neighbours_are_those_of_brute_force(queries: int, k: int) -> None:
    x, y = points(300, seed=0), points(queries, seed=1)
    similarity, rows = most_similar(x, y, k)
    # but for pairs of neighbours that float32 cannot tell apart
    assert (rows.numpy() == brute_force(x, y, k)).mean() > 0.999
    assert torch.equal(nearest_neighbours(x, y, k), rows)
    cosines = torch.nn.functional.cosine_similarity(y[:, None].double(), x[rows].double(), dim=2)
    torch.testing.assert_close(similarity.double(), cosines, rtol=0, atol=1e-6)
    lengths = 2.0 ** (torch.arange(300) % 9)[:, None]  # which do not matter
    assert torch.equal(nearest_neighbours(x * lengths, y, k), rows)
    with pytest.raises(ValueError, match="between 1 and the 300 rows to search in, got 301"):
        nearest_neighbours(x, y, 301)


# --- average precision and recall


@pytest.mark.parametrize(
    ("relevant", "num_relevant", "expected"),
    [
        ([1, 0, 1, 0], 9, (1 / 1 + 2 / 3) / 4),  # four could have been found
        ([1, 0, 1, 0], 2, (1 / 1 + 2 / 3) / 2),  # only two could
        ([0, 1, 1, 1], 3, (1 / 2 + 2 / 3 + 3 / 4) / 3),
        ([0, 0, 0, 0], 0, 0.0),  # nothing is sought
    ],
)
def test_average_precision_at_k_matches_values_worked_by_hand(
    relevant: list[int], num_relevant: int, expected: float
) -> None:
    rows = torch.tensor([relevant]).bool()
    assert average_precision_at_k(rows, torch.tensor([num_relevant])).item() == pytest.approx(
        expected
    )


@pytest.mark.parametrize(
    ("k", "expected"), [(1, [0, 1, 0]), (2, [0, 1, 0]), (3, [1, 1, 0]), (4, [1, 1, 0])]
)
def test_recall_at_k_asks_whether_anything_relevant_is_among_the_first(
    k: int, expected: list[float]
) -> None:
    relevant = torch.tensor([[0, 0, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]]).bool()
    found = recall_at_k(relevant, k)
    assert found.tolist() == expected
    assert found.dtype == torch.float64
