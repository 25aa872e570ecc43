"""Measures of collapse on matrices whose answers are known."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from vicreg_hf.evaluation import alignment, effective_rank, embedding_std, uniformity


def random(rows: int, dim: int, *, rank: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if rank is None:
        return torch.randn(rows, dim, generator=generator)
    left = torch.randn(rows, rank, generator=generator)
    return left @ torch.randn(rank, dim, generator=generator)


def rankme(z: Tensor) -> float:
    """Garrido et al. 2023, eq. 1, from numpy's singular values in float64."""
    singular = np.linalg.svd(z.double().numpy(), compute_uv=False)
    p = singular / singular.sum() + 1e-7
    return float(np.exp(-(p * np.log(p)).sum()))


@pytest.mark.parametrize(
    ("z", "expected"),
    [
        (torch.eye(6), 6.0),
        (torch.eye(6)[:, :4], 4.0),
        (torch.eye(6)[:4], 4.0),
        (3 * torch.eye(6), 6.0),
        (torch.ones(5, 3), 1.0),
        (torch.diag(torch.tensor([2.0, 1.0])), 3 / 4 ** (1 / 3)),  # p = 2/3, 1/3
    ],
)
def test_effective_rank_matches_values_worked_by_hand(z: Tensor, expected: float) -> None:
    assert effective_rank(z).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("rows", "dim"), [(40, 8), (8, 40), (20, 20)])
def test_effective_rank_is_rankme(rows: int, dim: int) -> None:
    z = random(rows, dim)
    assert effective_rank(z).item() == pytest.approx(rankme(z), rel=1e-4)


@pytest.mark.parametrize("rank", [1, 2, 8])
def test_effective_rank_sees_that_large_embeddings_have_collapsed(rank: int) -> None:
    z = random(256, 512, rank=rank)
    assert effective_rank(z).item() == pytest.approx(rankme(z), rel=0.02)


def test_effective_rank_of_zeros_is_finite() -> None:
    assert math.isfinite(effective_rank(torch.zeros(4, 3)).item())


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[1.0, 2.0], [1.0, 2.0]], 0.0),
        ([[0.0, 0.0], [2.0, 4.0]], (math.sqrt(2) + math.sqrt(8)) / 2),
        ([[0.0, 5.0], [1.0, 5.0], [2.0, 5.0]], 0.5),
    ],
)
def test_embedding_std_matches_values_worked_by_hand(
    rows: list[list[float]], expected: float
) -> None:
    assert embedding_std(torch.tensor(rows)).item() == pytest.approx(expected)


@pytest.mark.parametrize("measure", [embedding_std, effective_rank])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_measured_in_more(
    measure: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    z = (random(64, 8) * 1e3).to(dtype)
    assert torch.equal(measure(z), measure(z.float()))


# --- alignment and uniformity


@pytest.mark.parametrize(
    ("z", "z_prime", "expected"),
    [
        ([[3.0, 0.0]], [[0.5, 0.0]], 0.0),  # length does not matter
        ([[1.0, 0.0], [0.0, 2.0]], [[0.0, 1.0], [0.0, 1.0]], 1.0),  # distances sqrt(2) and 0
        ([[1.0, 0.0]], [[-4.0, 0.0]], 4.0),
    ],
)
def test_alignment_of_points_worked_by_hand(
    z: list[list[float]], z_prime: list[list[float]], expected: float
) -> None:
    assert alignment(torch.tensor(z), torch.tensor(z_prime)).item() == pytest.approx(expected)


def test_uniformity_of_points_worked_by_hand() -> None:
    assert uniformity(torch.ones(5, 3)).item() == pytest.approx(0.0, abs=1e-6)
    opposite = torch.tensor([[1.0, 0.0], [-2.0, 0.0]])
    assert uniformity(opposite).item() == pytest.approx(-8.0)  # one pair, 2 apart
    square = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    expected = math.log((4 * math.exp(-4) + 2 * math.exp(-8)) / 6)
    assert uniformity(square).item() == pytest.approx(expected)


def test_uniformity_is_that_of_the_pairs_distances() -> None:
    z = random(40, 7)
    squared = torch.pdist(torch.nn.functional.normalize(z)).square()
    expected = (-2 * squared).exp().mean().log()
    torch.testing.assert_close(uniformity(z), expected)
    assert uniformity(z) < uniformity(random(40, 7, rank=1))
