"""The authors' loss and its extension to V views, written out, and embeddings to compare on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vicreg_hf import covariance_term, multi_view_loss, variance_term, vicreg_loss
from vicreg_hf.loss.checks import VarianceReduction

SHAPES = [(6, 4), (5, 5), (4, 9)]  # N > D, N = D, N < D: both forms of the covariance term
LARGER_SHAPES = [(64, 32), (16, 16), (32, 64)]


class Terms(NamedTuple):
    """The reference's loss and its terms."""

    loss: Tensor
    invariance: Tensor
    variance: Tensor
    covariance: Tensor


def weighted(
    invariance: Tensor, variance: Tensor, covariance: Tensor, *,
    sim_coeff: float = 25.0, std_coeff: float = 25.0, cov_coeff: float = 1.0,
) -> Terms:  # fmt: skip
    total = sim_coeff * invariance + std_coeff * variance + cov_coeff * covariance
    return Terms(total, invariance, variance, covariance)


def authors_loss(
    x: Tensor, y: Tensor, *, gamma: float = 1.0, eps: float = 1e-4,
    variance_reduction: VarianceReduction = "mean", **coefficients: float,
) -> Terms:  # fmt: skip
    """vicreg@4e12602, main_vicreg.py, VICReg.forward, written out; autograd differentiates it."""
    num_rows, dim = x.shape
    invariance = F.mse_loss(x, y)
    hinges, squares = [], []
    for branch in (x, y):
        centred = branch - branch.mean(dim=0)
        deviation = torch.sqrt(centred.var(dim=0) + eps)
        hinges.append(torch.mean(F.relu(gamma - deviation)))
        covariance = (centred.T @ centred) / (num_rows - 1)
        off_diagonal = covariance[~torch.eye(dim, dtype=torch.bool)]
        squares.append(off_diagonal.pow(2).sum() / dim)
    variance = (hinges[0] + hinges[1]) / (2 if variance_reduction == "mean" else 1)
    return weighted(invariance, variance, squares[0] + squares[1], **coefficients)


def plain_loss(
    views: Sequence[Tensor], num_global: int, *, gamma: float = 1.0, eps: float = 1e-4,
    variance_reduction: VarianceReduction = "mean", **coefficients: float,
) -> Terms:  # fmt: skip
    """The definition for V views, pair by pair and view by view; autograd differentiates it."""
    numbered = combinations(enumerate(views), 2)
    errors = [F.mse_loss(a, b) for (i, a), (_, b) in numbered if i < num_global]
    hinges, squares = [], []
    for z in views:
        hinges.append(F.relu(gamma - torch.sqrt(z.var(dim=0) + eps)).mean())
        matrix = torch.cov(z.T).reshape(z.shape[1], z.shape[1])
        squares.append((matrix - matrix.diag().diag()).square().sum() / z.shape[1])
    invariance = torch.stack(errors).mean() if errors else hinges[0] * 0
    variance = torch.stack(hinges).mean() * (1 if variance_reduction == "mean" else 2)
    return weighted(invariance, variance, torch.stack(squares).mean() * 2, **coefficients)


LOSSES: dict[str, tuple[int, Callable[..., Tensor], Callable[..., Tensor]]] = {
    "two views": (2, lambda *z: vicreg_loss(*z).loss, lambda *z: authors_loss(*z).loss),
    "global and local views": (
        5, lambda *z: multi_view_loss(z[:2], z[2:]).loss, lambda *z: plain_loss(z, 2).loss
    ),
    "variance": (1, variance_term, lambda z: plain_loss([z], 1).variance),
    "covariance": (1, covariance_term, lambda z: plain_loss([z], 1).covariance / 2),
}  # fmt: skip
"""By name: how many views a loss takes, our function, and the definition."""


def embeddings(
    rows: int, dim: int, *, seed: int = 0, scale: float = 1.0, count: int = 2
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(count, rows, dim, generator=generator, dtype=torch.float64) * scale
    return tuple(z)


def views_of(
    count: int, rows: int, dim: int, *, dtype: torch.dtype = torch.float64, mean: float = 0.3
) -> list[Tensor]:
    """Views that resemble each other, not centred, with a spread around the hinge."""
    shared, *noise = embeddings(rows, dim, count=1 + count)
    return [(0.8 * shared + 0.5 * x + mean).to(dtype).requires_grad_() for x in noise]


def gradients(value: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, inputs)


def exact_gradients(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Of the authors' formula in float64, at the very values of the inputs."""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    return gradients(authors_loss(*exact).loss, *exact)
