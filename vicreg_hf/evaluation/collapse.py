"""Signs of collapse: how far embeddings spread, and over how many dimensions."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


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
    z = (
        z.cpu() if z.device.type == "mps" else z
    ).double()  # the Gram matrix squares the condition number
    gram = z @ z.T if len(z) < z.shape[1] else z.T @ z
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    p = singular / singular.sum().clamp(min=1e-12) + 1e-7
    return torch.exp(-(p * p.log()).sum())


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

    The logarithm of the mean of exp(-2 d^2) over all pairs of rows a distance d apart.

    Args:
        z: (N, D) embeddings, N > 1.

    Source: Wang and Isola 2020, arXiv:2005.10242, eq. 3 with t = 2.
    """
    z = F.normalize(z.float(), dim=1)
    squared = (2 - 2 * (z @ z.T)).clamp(min=0)
    pairs = torch.triu_indices(len(z), len(z), offset=1, device=z.device)
    return torch.logsumexp(-2 * squared[pairs[0], pairs[1]], 0) - math.log(pairs.shape[1])
