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


def random(rows: int, dim: int) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(0))


def rankme(z: Tensor) -> float:
    """Garrido et al. 2023, eq. 1, from numpy's singular values in float64."""
    singular = np.linalg.svd(z.double().numpy(), compute_uv=False)
    p = singular / singular.sum() + 1e-7
    return float(np.exp(-(p * np.log(p)).sum()))


@pytest.mark.parametrize(
    "z", [random(40, 8), random(8, 40), random(256, 2).double() @ random(2, 512).double()]
)
def test_effective_rank_is_rankme(z: Tensor) -> None:
    # of a low rank, float32 leaves another rounding
    assert effective_rank(z).item() == pytest.approx(rankme(z), rel=1e-4)
    assert effective_rank(torch.eye(6)[:4]).item() == pytest.approx(4, rel=1e-4)
    assert math.isfinite(effective_rank(torch.zeros(4, 3)).item())


UNIT_SQUARE = [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]
ONE_PAIR_APART = [[0.0, 0.0], [0.0, 0.0], [0.0, 2.0]]  # one pair 0 apart, two pairs 1


@pytest.mark.parametrize(
    ("measure", "points", "expected"),
    [
        (mean_std, [[[1.0, 2.0], [1.0, 2.0]]], 0.0),
        (mean_std, [[[0.0, 0.0], [2.0, 4.0]]], (math.sqrt(2) + math.sqrt(8)) / 2),
        (mean_std, [[[0.0, 5.0], [1.0, 5.0], [2.0, 5.0]]], 0.5),
        (alignment, [[[3.0, 0.0]], [[0.5, 0.0]]], 0.0),  # length does not matter
        # distances sqrt(2) and 0
        (alignment, [[[1.0, 0.0], [0.0, 2.0]], [[0.0, 1.0], [0.0, 1.0]]], 1.0),
        (alignment, [[[1.0, 0.0]], [[-4.0, 0.0]]], 4.0),
        (uniformity, [[[1.0, 1.0, 1.0]] * 5], 0.0),
        (uniformity, [[[1.0, 0.0], [-2.0, 0.0]]], -8.0),  # one pair, 2 apart
        (uniformity, [UNIT_SQUARE], math.log((4 * math.exp(-4) + 2 * math.exp(-8)) / 6)),
        (uniformity, [ONE_PAIR_APART], math.log((1 + 2 * math.exp(-2)) / 3)),
    ],
)
def test_measures_match_values_worked_by_hand(
    measure: Any, points: list[list[list[float]]], expected: float
) -> None:
    found = measure(*(torch.tensor(z) for z in points)).item()
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)


def correlated(rows: int, dim: int) -> Tensor:
    """Features far from the origin, of dimensions that share something and differ in scale."""
    x = random(rows, dim) + 0.7 * random(rows, 1)
    return 5 + x * torch.logspace(-2, 2, dim)


@pytest.mark.parametrize(("rows", "dim"), [(200, 16), (16, 40), (50, 2)])
def test_reported_singular_values_and_correlation_are_numpys(rows: int, dim: int) -> None:
    x = correlated(rows, dim)
    centred = x.double().numpy() - x.double().numpy().mean(0)
    singular, report = np.linalg.svd(centred, compute_uv=False), collapse_report(x)
    np.testing.assert_allclose(report.singular_values, singular, 1e-4, 1e-6 * singular[0])
    matrix = np.corrcoef(centred, rowvar=False)
    expected = np.abs(matrix[~np.eye(dim, dtype=bool)]).mean()
    assert report.off_diagonal_correlation == pytest.approx(expected, abs=1e-5)
    assert 0.1 < report.off_diagonal_correlation < 0.9


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


def test_reported_alignment_is_that_of_the_views_and_not_of_the_features() -> None:
    x, noise = random(50, 12), random(30, 12)
    views = (x[20:], x[20:] + noise)
    report = collapse_report(x.numpy(), views)
    expected = alignment(*views).item()
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
        (torch.tensor([[1.0], [math.nan]]), None, "must be finite numbers, and some are not"),
        (torch.eye(3), [torch.ones(3, 4)], r"of two views, of one shape, got \(3, 4\)"),
        (torch.eye(3), [torch.ones(3, 4), torch.ones(2, 4)], r"one shape, got \(3, 4\), \(2, 4\)"),
    ],
)
def test_features_without_a_report_are_refused(features: Tensor, views: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collapse_report(features, views)
