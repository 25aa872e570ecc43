"""Retrieval between two modalities: is what belongs to a sample among its nearest neighbours?

Shapes: N samples, M of what belongs to them (captions, say, of which a sample may have several), D
embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vicreg_hf.metrics.retrieval import nearest_neighbours


class CrossRecall(NamedTuple):
    """Whether a query found its own, 0 or 1 for each, by the number of neighbours."""

    forward: dict[int, Tensor]
    """(N,): any of what belongs to the sample."""
    backward: dict[int, Tensor]
    """(M,): the sample it belongs to."""


def cross_recall(z: Tensor, z_prime: Tensor, owner: Tensor, ks: Sequence[int]) -> CrossRecall:
    """Recall at k in both directions, by cosine similarity of embeddings.

    Args:
        z: (N, D) of samples.
        z_prime: (M, D) of what belongs to them.
        owner: (M,) rows of z that each belongs to.
        ks: numbers of neighbours; more than there are count as all.

    Raises:
        ValueError: a sample to which nothing belongs.

    Source: recall as in Faghri et al. 2018, "VSE++", arXiv:1707.05612, which the paper's table 3
        follows.
    """
    if len(owner.unique()) != len(z):
        raise ValueError(
            f"every sample must have something that belongs to it, got {len(z)} samples and "
            f"{len(owner.unique())} that something belongs to."
        )
    most = max(ks)
    found = owner[nearest_neighbours(z_prime, z, min(most, len(z_prime)))]
    own = torch.arange(len(z), device=z.device)
    back = nearest_neighbours(z, z_prime, min(most, len(z)))
    return CrossRecall(
        {k: (found[:, :k] == own[:, None]).any(1).cpu().double() for k in ks},
        {k: (back[:, :k] == owner[:, None]).any(1).cpu().double() for k in ks},
    )


def chance(num_candidates: int, num_right: Tensor, k: int) -> float:
    """Recall at k of a random order: how likely any of what is right is among the first k.

    Args:
        num_right: (N,) candidates that are right, of each query.
    """
    k = min(k, num_candidates)
    found = [
        1 - math.comb(num_candidates - right, k) / math.comb(num_candidates, k)
        for right in num_right.tolist()
    ]
    return sum(found) / len(found)


def by_owner(scores: Tensor, owner: Tensor, num_owners: int) -> Tensor:
    """The mean score of what belongs to each sample: (M,) scores to (N,)."""
    sums = torch.zeros(num_owners, dtype=scores.dtype, device=scores.device)
    counts = torch.bincount(owner, minlength=num_owners)
    return sums.index_add_(0, owner, scores) / counts
