"""Measures of collapse on matrices whose answers are known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vicreg_hf.metrics import collapse
from vicreg_hf.metrics.collapse import (
    alignment,
    collapse_report,
    effective_rank,
    mean_std,
    uniformity,
)


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


@pytest.mark.parametrize(("rows", "dim", "rank"), [(40, 8, None), (8, 40, None), (256, 512, 2)])
def test_effective_rank_is_rankme(rows: int, dim: int, rank: int | None) -> None:
    z = random(rows, dim, rank=rank).double()  # of a low rank, float32 leaves another rounding
    assert effective_rank(z).item() == pytest.approx(rankme(z), rel=1e-4)
    assert effective_rank(torch.eye(6)[:4]).item() == pytest.approx(4, rel=1e-4)
    assert math.isfinite(effective_rank(torch.zeros(4, 3)).item())


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[1.0, 2.0], [1.0, 2.0]], 0.0),
        ([[0.0, 0.0], [2.0, 4.0]], (math.sqrt(2) + math.sqrt(8)) / 2),
        ([[0.0, 5.0], [1.0, 5.0], [2.0, 5.0]], 0.5),
    ],
)
def test_mean_std_matches_values_worked_by_hand(rows: list[list[float]], expected: float) -> None:
    assert mean_std(torch.tensor(rows)).item() == pytest.approx(expected)


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
    zeros = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 2.0]])  # one pair 0 apart, two pairs 1
    assert uniformity(zeros).item() == pytest.approx(math.log((1 + 2 * math.exp(-2)) / 3))


# --- the report


def correlated(rows: int, dim: int) -> Tensor:
    """Features far from the origin, of dimensions that share something and differ in scale."""
    x = random(rows, dim) + 0.7 * random(rows, 1)
    return 5 + x * torch.logspace(-2, 2, dim)


@pytest.mark.parametrize(("rows", "dim"), [(200, 16), (16, 40), (20, 20)])
def test_reported_singular_values_are_those_of_centred_features(rows: int, dim: int) -> None:
    x = correlated(rows, dim).double()
    expected = torch.linalg.svdvals(x - x.mean(0))
    actual = collapse_report(x.float()).singular_values
    assert actual.shape == (min(rows, dim),)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-6 * expected[0].item())


@pytest.mark.parametrize(("rows", "dim"), [(200, 16), (16, 40), (50, 2)])
def test_reported_correlation_is_numpys(rows: int, dim: int) -> None:
    x = correlated(rows, dim)
    matrix = np.corrcoef(x.double().numpy(), rowvar=False)
    expected = np.abs(matrix[~np.eye(dim, dtype=bool)]).mean()
    actual = collapse_report(x).off_diagonal_correlation
    assert actual == pytest.approx(expected, abs=1e-5)
    assert 0.1 < actual < 0.9


def test_constant_dimensions_have_no_correlation() -> None:
    x = correlated(1200, 6)
    constants = torch.tensor([0.0, 0.1, 0.3, 1 / 3, 123.456, -1e4]).expand(1200, -1)
    report = collapse_report(torch.cat([x, constants], dim=1))
    expected = collapse_report(x).off_diagonal_correlation
    assert report.off_diagonal_correlation == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(report.std[:6], x.std(0))
    torch.testing.assert_close(report.std[6:] / constants[0].abs().clamp(min=1), torch.zeros(6))
    alone = collapse_report(torch.cat([x[:, :1], constants], dim=1))
    assert alone.off_diagonal_correlation == 0.0


@pytest.mark.parametrize("dim", [16, 64])
def test_unit_std_is_one_for_points_spread_evenly_and_less_in_fewer_dimensions(dim: int) -> None:
    spread = random(2000, dim) * torch.logspace(-3, 3, 2000)[:, None]
    assert collapse_report(spread).unit_std == pytest.approx(1.0, abs=0.02)
    quarter = torch.cat([random(2000, dim), torch.zeros(2000, 3 * dim)], dim=1)
    report = collapse_report(quarter)
    assert report.unit_std == pytest.approx(0.5, abs=0.02)  # sqrt(1 / 4)
    assert report.embedding_std == report.unit_std  # its former name


def test_equal_rows_are_reported_as_collapsed() -> None:
    report = collapse_report(random(1, 12).expand(100, -1))
    assert report.unit_std == pytest.approx(0.0, abs=1e-6)
    assert report.effective_rank == pytest.approx(1.0, rel=1e-3)
    assert report.uniformity == pytest.approx(0.0, abs=1e-5)
    assert report.off_diagonal_correlation == 0.0
    torch.testing.assert_close(report.singular_values, torch.zeros(12), rtol=0, atol=1e-4)
    torch.testing.assert_close(report.std, torch.zeros(12))


def test_reported_alignment_is_that_of_the_views_and_not_of_the_features() -> None:
    x, noise = random(50, 12), random(30, 12)
    views = (x[20:], x[20:] + noise)
    report = collapse_report(x.numpy(), views)
    expected = np.mean([
        np.square(a / np.linalg.norm(a) - b / np.linalg.norm(b)).sum()
        for a, b in zip(views[0].numpy(), views[1].numpy(), strict=True)
    ])  # fmt: skip
    assert report.alignment == pytest.approx(expected, rel=1e-5)
    equal = collapse_report(x, (views[0], 3 * views[0])).alignment
    assert equal == pytest.approx(0.0, abs=1e-6)


def test_uniformity_of_many_rows_is_that_of_some_from_everywhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    centres = 5 * random(10, 12)
    x = centres.repeat_interleave(100, dim=0) + random(1000, 12)  # sorted by class
    expected = collapse_report(x).uniformity
    monkeypatch.setattr(collapse, "MOST_PAIRS", 200)
    assert collapse_report(x).uniformity == pytest.approx(expected, rel=0.1)
    assert uniformity(x[:200]) > 0.5 * expected  # the first 200 are of two classes


@pytest.mark.parametrize(
    ("features", "views", "message"),
    [
        (torch.ones(1, 5), None, r"at least two rows of numbers, got shape \(1, 5\)"),
        (torch.ones(5), None, "at least two rows of numbers, got shape"),
        (torch.ones(3, 0), None, "at least two rows of numbers, got shape"),
        (torch.tensor([[1.0], [math.nan]]), None, "must be finite numbers, and some are not"),
        (torch.eye(3), [torch.ones(3, 4)], r"of two views, of one shape, got \(3, 4\)"),
        (torch.eye(3), [torch.ones(3, 4), torch.ones(2, 4)], r"one shape, got \(3, 4\), \(2, 4\)"),
    ],
)
def test_features_without_a_report_are_refused(features: Tensor, views: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collapse_report(features, views)
