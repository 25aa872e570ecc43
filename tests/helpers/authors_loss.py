"""The authors' loss, written out, and embeddings to compare ours with it on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vicreg_hf.loss.checks import VarianceReduction

SHAPES = [(6, 4), (5, 5), (4, 9)]  # N > D, N = D, N < D: both forms of the covariance term
LARGER_SHAPES = [(64, 32), (16, 16), (32, 64)]


class Terms(NamedTuple):
    """The reference's loss and its terms."""

    loss: Tensor
    invariance: Tensor
    variance: Tensor
    covariance: Tensor


def authors_loss(
    x: Tensor,
    y: Tensor,
    *,
    sim_coeff: float = 25.0,
    std_coeff: float = 25.0,
    cov_coeff: float = 1.0,
    gamma: float = 1.0,
    eps: float = 1e-4,
    variance_reduction: VarianceReduction = "mean",
) -> Terms:
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
    variance = hinges[0] + hinges[1]
    if variance_reduction == "mean":
        variance = variance / 2
    covariance = squares[0] + squares[1]
    total = sim_coeff * invariance + std_coeff * variance + cov_coeff * covariance
    return Terms(total, invariance, variance, covariance)


def embeddings(rows: int, dim: int, *, seed: int = 0, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z, z_prime = torch.randn(2, rows, dim, generator=generator, dtype=torch.float64) * scale
    return z, z_prime


def gradients(value: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, inputs)


def exact_gradients(inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Of the authors' formula in float64, at the very values of the inputs."""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    return gradients(authors_loss(*exact).loss, *exact)
