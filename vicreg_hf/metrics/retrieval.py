"""Retrieval by cosine similarity: are an image's nearest neighbours of its class?

Shapes: N rows to search in, M queries, F features, k neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 1024


def nearest_neighbours(
    bank_features: Tensor, query_features: Tensor, k: int, *, leave_out: bool = False
) -> Tensor:
    """The rows nearest to each query in cosine similarity, the nearest first.

    Args:
        bank_features: (N, F).
        query_features: (M, F).
        k: neighbours, at most N.
        leave_out: the queries are the rows themselves, and none is its own neighbour.

    Returns:
        (M, k) row numbers.

    Raises:
        ValueError: fewer than k rows to search in, or leave_out of queries that are not the rows.
    """
    if leave_out and len(query_features) != len(bank_features):
        raise ValueError(
            "leave_out needs the rows themselves as queries, got "
            f"{len(bank_features)} rows and {len(query_features)} queries."
        )
    most = len(bank_features) - leave_out
    if not 1 <= k <= most:
        raise ValueError(f"k must lie between 1 and the {most} rows to search in, got {k}.")
    bank = F.normalize(bank_features.float(), dim=1)
    found, start = [], 0
    for chunk in F.normalize(query_features.float(), dim=1).split(CHUNK):
        similarity = chunk @ bank.T
        if leave_out:
            own = torch.arange(len(chunk), device=chunk.device)
            similarity[own, start + own] = -torch.inf
        found.append(similarity.topk(k, dim=1).indices)
        start += len(chunk)
    return torch.cat(found)


def average_precision_at_k(relevant: Tensor, num_relevant: Tensor) -> Tensor:
    """How early what is sought comes among k neighbours: 1 where nothing else comes before it.

    The mean, over places that hold something relevant, of the share of relevant ones up to there;
    of those that could be found, min(k, all there are).

    Args:
        relevant: (M, k) bool, the nearest neighbour first.
        num_relevant: (M,) relevant rows in all; queries of none give 0.

    Returns:
        (M,) between 0 and 1, on CPU; their mean is the mean average precision at k.
    """
    k = relevant.shape[1]
    hits = relevant.cpu().double()  # some GPUs have no float64
    precision = hits.cumsum(1) / torch.arange(1, k + 1)
    possible = num_relevant.cpu().clamp(min=1, max=k)
    return (precision * hits).sum(1) / possible


def recall_at_k(relevant: Tensor, k: int) -> Tensor:
    """Whether anything relevant is among the first k neighbours, (M,) 0 or 1, on CPU."""
    return relevant[:, :k].any(1).cpu().double()
