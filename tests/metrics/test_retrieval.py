"""Nearest neighbours against brute force, and measures of retrieval worked by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vicreg_hf.metrics.cross_modal import by_owner, chance, cross_recall
from vicreg_hf.metrics.retrieval import (
    average_precision_at_k,
    most_similar,
    nearest_neighbours,
    recall_at_k,
)


def points(rows: int, *, seed: int) -> Tensor:
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("queries", "k"), [(1500, 10), (10, 300)])  # more than one chunk; all
def test_neighbours_are_those_of_brute_force(queries: int, k: int) -> None:
    x, y = points(300, seed=0), points(queries, seed=1)
    similarity, rows = most_similar(x, y, k)
    cosines = cosine_similarity(y[:, None].double(), x[None].double(), dim=2)
    nearest = cosines.argsort(1, descending=True)[:, :k]
    assert (rows == nearest).double().mean() > 0.999  # float32 cannot tell all neighbours apart
    torch.testing.assert_close(similarity.double(), cosines.gather(1, rows), rtol=0, atol=1e-6)
    assert torch.equal(nearest_neighbours(x, y, k), rows)
    lengths = 2.0 ** (torch.arange(300) % 9)[:, None]  # which do not matter
    assert torch.equal(nearest_neighbours(x * lengths, y, k), rows)
    with pytest.raises(ValueError, match="between 1 and the 300 rows to search in, got 301"):
        nearest_neighbours(x, y, 301)


def test_average_precision_at_k_matches_values_worked_by_hand() -> None:
    relevant = torch.tensor([[1, 0, 1, 0], [1, 0, 1, 0], [0, 1, 1, 1], [0, 0, 0, 0]]).bool()
    found = average_precision_at_k(relevant, torch.tensor([9, 2, 3, 0]))
    # four could have been found, only two could, and three; nothing is sought
    expected = [(1 + 2 / 3) / 4, (1 + 2 / 3) / 2, (1 / 2 + 2 / 3 + 3 / 4) / 3, 0.0]
    assert found.tolist() == pytest.approx(expected)


def test_recall_at_k_asks_whether_anything_relevant_is_among_the_first() -> None:
    relevant = torch.tensor([[0, 0, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]]).bool()
    for k, expected in enumerate([[0, 1, 0], [0, 1, 0], [1, 1, 0], [1, 1, 0]], start=1):
        assert recall_at_k(relevant, k).tolist() == expected


def test_a_sample_is_found_by_any_of_its_captions() -> None:
    z = torch.eye(3)
    # caption 0 and 1 are of sample 0, one near it and one near sample 1; the others are swapped
    z_prime = torch.tensor([[1.0, 0.1, 0], [0.1, 1, 0], [0, 0.1, 1], [0, 1, 0.1]])
    owner = torch.tensor([0, 0, 1, 2])
    found = cross_recall(z, z_prime, owner, [1, 2, 9])
    assert found.forward[1].tolist() == [1, 0, 0]
    assert found.backward[1].tolist() == [1, 0, 0, 0]
    assert found.forward[9].tolist() == [1, 1, 1]  # more neighbours than there are count as all
    assert found.backward[2].tolist() == [1, 1, 1, 1]
    assert by_owner(found.backward[1], owner, 3).tolist() == [0.5, 0, 0]


def test_a_sample_without_anything_is_refused() -> None:
    with pytest.raises(ValueError, match="got 3 samples and 2 that something belongs to"):
        cross_recall(torch.eye(3), torch.eye(3), torch.tensor([0, 0, 1]), [1])


@pytest.mark.parametrize(("candidates", "right", "k"), [(5, 1, 1), (6, 2, 3), (4, 3, 2), (4, 1, 9)])
def test_chance_is_that_of_every_order(candidates: int, right: int, k: int) -> None:
    orders = list(itertools.permutations(range(candidates)))
    hits = sum(any(place < right for place in order[:k]) for order in orders)
    assert chance(candidates, torch.tensor([right]), k) == pytest.approx(hits / len(orders))
