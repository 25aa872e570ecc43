"""Retrieval by cosine similarity: are an image's nearest neighbours of its class?

Shapes: N rows to search in, M queries, F features, k neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

QUERIES_AT_ONCE = 1024
"""Queries whose similarities to all rows are in memory together."""


def most_similar(
    bank_features: Tensor, query_features: Tensor, k: int, *, own_rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The rows of largest cosine similarity to each query, the nearest first, in float32.

    Args:
        bank_features: (N, F).
        query_features: (M, F).
        k: neighbours, at most N, or N - 1 with own_rows.
        own_rows: (M,) row of the bank that is the query itself, and no neighbour of it.

    Returns:
        (M, k) similarities and (M, k) row numbers.

    Raises:
        ValueError: fewer than k rows to search in.
    """
    most = len(bank_features) - (own_rows is not None)
    if not 1 <= k <= most:
        raise ValueError(f"k must lie between 1 and the {most} rows to search in, got {k}.")
    bank = F.normalize(bank_features.float(), dim=1)
    queries = F.normalize(query_features.float(), dim=1)
    found = []
    for start, part in enumerate(queries.split(QUERIES_AT_ONCE)):
        similarity = part @ bank.T
        if own_rows is not None:
            own = own_rows[start * QUERIES_AT_ONCE :][: len(part), None]
            similarity.scatter_(1, own.to(similarity.device), -torch.inf)
        found.append(similarity.topk(k, dim=1))
    similarities, rows = zip(*found, strict=True)
    return torch.cat(similarities), torch.cat(rows)


def nearest_neighbours(bank_features: Tensor, query_features: Tensor, k: int) -> Tensor:
    """The row numbers (M, k) of `most_similar`."""
    return most_similar(bank_features, query_features, k)[1]


def average_precision_at_k(relevant: Tensor, num_relevant: Tensor) -> Tensor:
    """Average precision at k: 1 where no irrelevant neighbour comes before a relevant one.

    The share of relevant neighbours up to each relevant one, averaged over as many as could be
    found: k, or all relevant rows where they are fewer.

    Args:
        relevant: (M, k) bool, the nearest neighbour first.
        num_relevant: (M,) relevant rows in the whole bank; a query without any gets 0.

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
