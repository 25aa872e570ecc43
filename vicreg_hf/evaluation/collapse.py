"""Signs of collapse: how far embeddings spread, and over how many dimensions."""

from __future__ import annotations

import torch
from torch import Tensor


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
