"""Retrieval between two modalities: are a sample's own captions among its nearest neighbours?

Captions stand for whatever a sample is paired with; it may have several.

Shapes: N samples, M captions, D embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vicreg_hf.metrics.retrieval import nearest_neighbours


class CrossRecall(NamedTuple):
    """Whether each query found its counterpart, 0 or 1, by the number of neighbours."""

    forward: dict[int, Tensor]
    """(N,) whether a sample found any of its captions."""
    backward: dict[int, Tensor]
    """(M,) whether a caption found its sample."""


def cross_recall(z: Tensor, z_prime: Tensor, owner: Tensor, ks: Sequence[int]) -> CrossRecall:
    """Recall at k in both directions, by cosine similarity of embeddings.

    Args:
        z: (N, D) embeddings of samples.
        z_prime: (M, D) embeddings of captions.
        owner: (M,) the sample of each caption, as a row of z.
        ks: numbers of neighbours; more than there are count as all.

    Raises:
        ValueError: a sample without a caption.

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
    """Recall at k of candidates in random order.

    Args:
        num_right: (N,) how many candidates are right for each query.
    """
    k = min(k, num_candidates)
    found = [
        1 - math.comb(num_candidates - right, k) / math.comb(num_candidates, k)
        for right in num_right.tolist()
    ]
    return sum(found) / len(found)


def by_owner(scores: Tensor, owner: Tensor, num_owners: int) -> Tensor:
    """The mean score of each sample's captions: (M,) scores to (N,)."""
    sums = torch.zeros(num_owners, dtype=scores.dtype, device=scores.device)
    counts = torch.bincount(owner, minlength=num_owners)
    return sums.index_add_(0, owner, scores) / counts
