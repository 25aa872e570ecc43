"""Retrieval between two modalities, against worked examples and brute force."""

from __future__ import annotations

import itertools

import pytest
import torch

from vicreg_hf.metrics.cross_modal import by_owner, chance, cross_recall


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
