"""The authors' loss and its extension to V views, written out, and embeddings to compare on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vicreg_hf import covariance_term, multi_view_loss, variance_term, vicreg_loss

SHAPES = [(6, 4), (5, 5), (4, 9)]  # N > D, N = D, N < D: both forms of the covariance term
LARGER_SHAPES = [(64, 32), (16, 16), (32, 64)]


class Terms(NamedTuple):
    """The reference's loss and its terms."""

    loss: Tensor
    invariance: Tensor
    variance: Tensor
    covariance: Tensor


DEFAULTS: dict[str, Any] = {
    "sim_coeff": 25.0, "std_coeff": 25.0, "cov_coeff": 1.0, "gamma": 1.0, "eps": 1e-4,
    "variance_reduction": "mean",
}  # fmt: skip


def authors_loss(x: Tensor, y: Tensor, **settings: Any) -> Terms:
    """vicreg@4e12602, main_vicreg.py, VICReg.forward, written out; autograd differentiates it."""
    args = SimpleNamespace(**DEFAULTS | settings)
    num_rows, dim = x.shape
    invariance = F.mse_loss(x, y)
    hinges, squares = [], []
    for branch in (x, y):
        centred = branch - branch.mean(dim=0)
        deviation = torch.sqrt(centred.var(dim=0) + args.eps)
        hinges.append(torch.mean(F.relu(args.gamma - deviation)))
        covariance = (centred.T @ centred) / (num_rows - 1)
        off_diagonal = covariance[~torch.eye(dim, dtype=torch.bool)]
        squares.append(off_diagonal.pow(2).sum() / dim)
    variance = hinges[0] + hinges[1]
    if args.variance_reduction == "mean":
        variance = variance / 2
    covariance = squares[0] + squares[1]
    total = args.sim_coeff * invariance + args.std_coeff * variance + args.cov_coeff * covariance
    return Terms(total, invariance, variance, covariance)


def plain_loss(views: Sequence[Tensor], num_global: int, **settings: Any) -> Terms:
    """The definition for V views, pair by pair and view by view; autograd differentiates it."""
    args = SimpleNamespace(**DEFAULTS | settings)
    numbered = combinations(enumerate(views), 2)
    errors = [F.mse_loss(a, b) for (i, a), (_, b) in numbered if i < num_global]
    hinges, squares = [], []
    for z in views:
        hinges.append(F.relu(args.gamma - torch.sqrt(z.var(dim=0) + args.eps)).mean())
        matrix = torch.cov(z.T).reshape(z.shape[1], z.shape[1])
        squares.append((matrix - matrix.diag().diag()).square().sum() / z.shape[1])
    invariance = torch.stack(errors).mean() if errors else hinges[0] * 0
    variance = torch.stack(hinges).mean() * (1 if args.variance_reduction == "mean" else 2)
    covariance = torch.stack(squares).mean() * 2
    total = args.sim_coeff * invariance + args.std_coeff * variance + args.cov_coeff * covariance
    return Terms(total, invariance, variance, covariance)


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


def assert_exact(
    value: Tensor,
    views: Sequence[Tensor],
    definition: Callable[..., Tensor],
    *,
    rtol: float = 1e-5,
    atol: float = 0.0,
    grad_tolerance: float = 1e-5,
) -> None:
    """Compare a loss and its gradients with the definition in float64, at the views' very values.

    Args:
        value: the loss of these views.
        grad_tolerance: how far a gradient may be off, as a share of the largest entry.
    """
    exact = [x.detach().double().requires_grad_() for x in views]
    expected = definition(*exact)
    torch.testing.assert_close(value.double(), expected, rtol=rtol, atol=atol)
    triples = zip(gradients(value, *views), gradients(expected, *exact), views, strict=True)
    for grad, right, x in triples:
        assert grad.dtype == x.dtype
        limits = torch.finfo(x.dtype)
        right = right.clamp(limits.min, limits.max)  # beyond the largest it is that, not infinite
        # a gradient is rounded once more, to half a unit in the last place of its dtype
        rounding = 0.51 * limits.eps if x.dtype.itemsize == 2 else 0
        largest = grad_tolerance * float(right.abs().max())
        torch.testing.assert_close(grad.double(), right, rtol=rounding, atol=largest)
