"""Signs of collapse: how far embeddings spread, and over how many dimensions."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from vicreg_hf.metrics.arrays import Values, as_features, as_tensor, check_finite
from vicreg_hf.runtime.randomness import permutation

MOST_PAIRS = 4096
"""Rows all of whose pairs are compared for uniformity."""


def mean_std(z: Tensor) -> Tensor:
    """Standard deviation over rows, averaged over dimensions; 0 when all rows are equal.

    The metric log has it as `embedding_std`.

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
    singular = singular_values(z)
    p = singular / singular.sum().clamp(min=1e-12) + 1e-7
    return torch.exp(-(p * p.log()).sum())


def singular_values(z: Tensor) -> Tensor:
    """Singular values of z (N, D) in float64, (min(N, D),), the smallest first.

    They come from the smaller Gram matrix: fast, but below 1e-8 of the largest they are rounding.
    """
    z = (z.cpu() if z.device.type == "mps" else z).double()
    gram = z @ z.T if len(z) < z.shape[1] else z.T @ z
    try:
        values = torch.linalg.eigvalsh(gram)
    except torch.linalg.LinAlgError:  # CUDA's solver fails where ranks are low
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
    """Signs of collapse in a set of features."""

    unit_std: float
    """Standard deviation of the unit-length features, averaged over dimensions, times sqrt(F):
    1 for points spread evenly over the sphere, 0 for equal ones."""
    std: Tensor = field(repr=False)
    """(F,) standard deviation of each dimension of the features as they are."""
    singular_values: Tensor = field(repr=False)
    """(min(N, F),) singular values of the centred features, the largest first."""
    effective_rank: float
    """RankMe: between 1 and min(N, F)."""
    uniformity: float
    off_diagonal_correlation: float
    """Mean absolute correlation of two dimensions, 0 to 1."""
    alignment: float | None = None
    """None where no views of the same images were given."""

    @property
    def embedding_std(self) -> float:
        """The former name of `unit_std`."""
        return self.unit_std


def collapse_report(features: Values, views: tuple[Values, Values] | None = None) -> CollapseReport:
    """Measure how far features spread, and over how many dimensions.

    Args:
        features: (N, F), a row for every image; a tensor or an array.
        views: two (M, F), features of two views of some images; for alignment.

    Raises:
        ValueError: fewer than two rows, values that are not finite, or views that are not two of
            one shape.
    """
    x = as_tensor("features", features)
    if x.ndim != 2 or len(x) < 2 or not x.shape[1]:
        raise ValueError(
            f"features must be at least two rows of numbers, got shape {tuple(x.shape)}."
        )
    check_finite("features", x)
    x = x.float()
    centred = x - x.mean(0)
    # the first rows may all be of one class
    some = x[torch.from_numpy(permutation(len(x), seed=0, epoch=0)[:MOST_PAIRS]).to(x.device)]
    return CollapseReport(
        unit_std=(F.normalize(x, dim=1).std(0).mean() * math.sqrt(x.shape[1])).item(),
        std=x.std(0).cpu(),
        singular_values=singular_values(centred).flip(0).float().cpu(),
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
