"""Signs of collapse: how far embeddings spread, and over how many dimensions."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from vicreg_hf.metrics.checks import Values, as_features, as_tensor, check_finite
from vicreg_hf.runtime.randomness import permutation

MOST_PAIRS = 4096
"""Rows of which every pair is compared, for uniformity."""


def embedding_std(z: Tensor) -> Tensor:
    """Mean over dimensions of the standard deviation over rows; 0 when all rows are equal.

    Args:
        z: (N, D) embeddings.
    """
    return z.float().std(0).mean()


def effective_rank(z: Tensor) -> Tensor:
    """Exponential of the entropy of the normalised singular values: between 1 and min(N, D).

    Args:
        z: (N, D) embeddings; they are not centred.

    Source: Garrido et al. 2023, "RankMe", arXiv:2210.02885, eq. 1.
    """
    singular = _singular_values(z)
    p = singular / singular.sum().clamp(min=1e-12) + 1e-7
    return torch.exp(-(p * p.log()).sum())


def _singular_values(z: Tensor) -> Tensor:
    """The least first, by way of the smaller Gram matrix, which squares the condition number."""
    z = (z.cpu() if z.device.type == "mps" else z).double()
    gram = z @ z.T if len(z) < z.shape[1] else z.T @ z
    try:
        values = torch.linalg.eigvalsh(gram)
    except torch.linalg.LinAlgError:  # of CUDA's solver, where ranks are low
        values = torch.linalg.eigvalsh(gram.cpu()).to(gram.device)
    return values.clamp(min=0).sqrt()


def alignment(z: Tensor, z_prime: Tensor) -> Tensor:
    """Mean squared distance of the two embeddings of an image, on the unit sphere: 0 to 4.

    Args:
        z: (N, D) embeddings of the first view; likewise z_prime of the second.

    Source: Wang and Isola 2020, arXiv:2005.10242, eq. 2 with alpha = 2.
    """
    z, z_prime = F.normalize(z.float(), dim=1), F.normalize(z_prime.float(), dim=1)
    return (z - z_prime).square().sum(1).mean()


def uniformity(z: Tensor) -> Tensor:
    """How evenly embeddings cover the unit sphere: 0 if they are equal, less the evener.

    The logarithm of the mean of exp(-2 d^2) over all pairs of rows a distance d apart. A row of
    zeros stays in the centre: from another it is 0 apart, from all others 1.

    Args:
        z: (N, D) embeddings, N > 1.

    Source: Wang and Isola 2020, arXiv:2005.10242, eq. 3 with t = 2.
    """
    z = F.normalize(z.float(), dim=1)
    length = z.any(1).to(z.dtype)
    squared = (length[:, None] + length - 2 * (z @ z.T)).clamp(min=0)
    pairs = torch.triu_indices(len(z), len(z), offset=1, device=z.device)
    return torch.logsumexp(-2 * squared[pairs[0], pairs[1]], 0) - math.log(pairs.shape[1])


@dataclass(frozen=True)
class CollapseReport:
    """What a set of features shows of collapse."""

    embedding_std: float
    """Mean over dimensions of the standard deviation of unit-length features, times sqrt(F): 1 is
    what points spread evenly over the sphere have, 0 what equal ones have."""
    std: Tensor = field(repr=False)
    """(F,) of each dimension, of the features as they are."""
    singular_values: Tensor = field(repr=False)
    """(min(N, F),) of the centred features, the largest first."""
    effective_rank: float
    """RankMe: between 1 and min(N, F)."""
    uniformity: float
    off_diagonal_correlation: float
    """Mean absolute correlation of two dimensions, 0 to 1."""
    alignment: float | None = None
    """Of two views of the same images, if they were given."""


def collapse_report(features: Values, views: tuple[Values, Values] | None = None) -> CollapseReport:
    """Measure how far features spread, and over how many dimensions.

    Args:
        features: (N, F), a row for every image; a tensor or an array.
        views: two (M, F), features of two views of some images; for alignment.

    Raises:
        ValueError: fewer than two rows, values that are not finite, or views that are not two of
            one shape.
    """
    given = as_tensor("features", features)
    if given.ndim != 2 or len(given) < 2 or not given.shape[1]:
        raise ValueError(
            f"features must be at least two rows of numbers, got shape {tuple(given.shape)}."
        )
    check_finite("features", given)
    x = given.float()
    centred = x - x.mean(0)
    # the first rows may all be of one class
    some = x[torch.from_numpy(permutation(len(x), seed=0, epoch=0)[:MOST_PAIRS]).to(x.device)]
    return CollapseReport(
        embedding_std=(F.normalize(x, dim=1).std(0).mean() * math.sqrt(x.shape[1])).item(),
        std=x.std(0).cpu(),
        singular_values=_singular_values(centred).flip(0).float().cpu(),
        effective_rank=effective_rank(x).item(),
        uniformity=uniformity(some).item(),
        off_diagonal_correlation=_off_diagonal(centred[:, _varies(x)]).item(),
        alignment=None if views is None else alignment(*_two_alike(views)).item(),
    )


def _two_alike(views: tuple[Values, Values]) -> tuple[Tensor, Tensor]:
    z, *others = (as_features("views", view) for view in views)
    if len(others) != 1 or z.shape != others[0].shape:
        shapes = ", ".join(str(tuple(view.shape)) for view in (z, *others))
        raise ValueError(f"views must be features of two views, of one shape, got {shapes}.")
    return z, others[0]


def _varies(x: Tensor) -> Tensor:
    """(F,) whether a dimension is more than a constant, of which centring leaves some rounding."""
    return x.std(0) > 1e-6 * x.abs().amax(0)


def _off_diagonal(centred: Tensor) -> Tensor:
    size = centred.shape[1]
    if size < 2:
        return centred.new_zeros(())
    unit = centred / centred.norm(dim=0)
    return ((unit.T @ unit).abs().sum() - size) / (size * (size - 1))
