"""Nearest neighbours against brute force, and measures of retrieval by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score
from torch import Tensor

from vicreg_hf.metrics import retrieval
from vicreg_hf.metrics.retrieval import average_precision_at_k, nearest_neighbours, recall_at_k


def points(rows: int, *, seed: int) -> Tensor:
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed))


def brute_force(
    bank: Tensor, queries: Tensor, k: int, *, leave_out: bool = False
) -> NDArray[np.int64]:
    """All angles in float64, sorted."""
    a, b = (
        v.double().numpy() / np.linalg.norm(v.double().numpy(), axis=1, keepdims=True)
        for v in (queries, bank)
    )
    angles = np.arccos(np.clip(a @ b.T, -1, 1))
    if leave_out:
        np.fill_diagonal(angles, np.inf)
    return np.argsort(angles, axis=1)[:, :k]


def agree(found: Tensor, expected: NDArray[np.int64]) -> float:
    assert found.shape == expected.shape
    return float((found.numpy() == expected).mean())


# --- neighbours


@pytest.mark.parametrize("k", [1, 10, 300])
def test_neighbours_are_those_of_brute_force(k: int) -> None:
    bank, queries = points(300, seed=0), points(1500, seed=1)  # more than one chunk
    # but for pairs of neighbours that float32 cannot tell apart
    assert agree(nearest_neighbours(bank, queries, k), brute_force(bank, queries, k)) > 0.999


@pytest.mark.parametrize("rows", [1024, 1025, 2100])
def test_a_row_left_out_is_its_own_neighbour_in_no_chunk(rows: int) -> None:
    bank = points(rows, seed=0)
    found = nearest_neighbours(bank, bank, 5, leave_out=True)
    assert agree(found, brute_force(bank, bank, 5, leave_out=True)) > 0.999
    assert not (found == torch.arange(rows)[:, None]).any()


def test_a_row_not_left_out_is_its_own_nearest() -> None:
    bank = points(1500, seed=0)
    assert torch.equal(nearest_neighbours(bank, bank, 1)[:, 0], torch.arange(1500))


def test_the_twin_of_a_row_left_out_is_found() -> None:
    half = points(700, seed=0)
    found = nearest_neighbours(torch.cat([half, 3 * half]), torch.cat([half, half]), 1)
    assert set((found[:, 0] % 700 - torch.arange(1400) % 700).tolist()) == {0}
    found = nearest_neighbours(
        torch.cat([half, 3 * half]), torch.cat([half, half]), 1, leave_out=True
    )
    assert torch.equal(found[:, 0], (torch.arange(1400) + 700) % 1400)


def test_all_other_rows_can_be_asked_for() -> None:
    bank = points(20, seed=0)
    found = nearest_neighbours(bank, bank, 19, leave_out=True).sort(1).values
    expected = [[other for other in range(20) if other != row] for row in range(20)]
    assert found.tolist() == expected


@pytest.mark.parametrize("chunk", [1, 7, 50])
def test_work_in_chunks_gives_the_same_neighbours(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = points(50, seed=0)
    expected = nearest_neighbours(bank, bank, 5, leave_out=True)
    monkeypatch.setattr(retrieval, "CHUNK", chunk)
    assert torch.equal(nearest_neighbours(bank, bank, 5, leave_out=True), expected)


def test_length_of_features_does_not_matter_and_half_precision_is_worked_on_in_more() -> None:
    bank = points(200, seed=0).half()
    expected = nearest_neighbours(bank.float(), bank.float(), 5)
    assert torch.equal(nearest_neighbours(bank, bank, 5), expected)
    scaled = torch.logspace(-3, 3, 200)[:, None] * bank.float()
    assert agree(nearest_neighbours(scaled, bank, 5), expected.numpy()) > 0.99


@pytest.mark.parametrize(
    ("k", "leave_out", "most"), [(0, False, 10), (11, False, 10), (10, True, 9), (-1, True, 9)]
)
def test_k_outside_the_rows_is_refused(k: int, leave_out: bool, most: int) -> None:
    bank = points(10, seed=0)
    with pytest.raises(ValueError, match=f"between 1 and the {most} rows to search in, got {k}"):
        nearest_neighbours(bank, bank, k, leave_out=leave_out)


@pytest.mark.parametrize("queries", [9, 11])
def test_other_queries_than_the_rows_cannot_be_left_out(queries: int) -> None:
    with pytest.raises(ValueError, match=f"got 10 rows and {queries} queries"):
        nearest_neighbours(points(10, seed=0), points(queries, seed=0), 3, leave_out=True)


# --- average precision and recall


@pytest.mark.parametrize(
    ("relevant", "num_relevant", "expected"),
    [
        ([1, 1, 1, 1], 9, 1.0),
        ([1, 0, 1, 0], 9, (1 / 1 + 2 / 3) / 4),  # four could have been found
        ([1, 0, 1, 0], 2, (1 / 1 + 2 / 3) / 2),  # only two could
        ([1, 1, 0, 0], 2, 1.0),
        ([0, 0, 0, 1], 1, 1 / 4),
        ([0, 1, 1, 1], 3, (1 / 2 + 2 / 3 + 3 / 4) / 3),
        ([0, 0, 0, 0], 5, 0.0),
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


def test_average_precision_of_all_rows_is_scikit_learns() -> None:
    relevant = torch.rand(30, 50, generator=torch.Generator().manual_seed(0)) < 0.3
    scores = np.arange(50, 0, -1)
    expected = [average_precision_score(row, scores) for row in relevant.numpy()]
    actual = average_precision_at_k(relevant, relevant.sum(1))
    np.testing.assert_allclose(actual.numpy(), expected)


def test_queries_do_not_mix() -> None:
    relevant = torch.rand(6, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    how_many = torch.tensor([5, 1, 0, 3, 9, 2])
    each = [average_precision_at_k(relevant[i : i + 1], how_many[i : i + 1]) for i in range(6)]
    torch.testing.assert_close(average_precision_at_k(relevant, how_many), torch.cat(each))


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
