"""Test images beside the training images nearest to them, as the report shows them.

Shapes: N training images, M test images, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vicreg_hf.evaluation.report.gallery import Gallery, Inline, finite_rows, take, thumbnail
from vicreg_hf.metrics.knn import knn_predict
from vicreg_hf.metrics.retrieval import most_similar

CASES = 6
"""Test images, of either kind, that are shown beside their neighbours."""
NEIGHBOURS = 6
CANDIDATES = 2000
"""Test images among which cases are looked for."""
K = 20


@dataclass(frozen=True)
class Shown:
    """An image of a case."""

    picture: Inline
    label: int | None
    similarity: float | None = None
    """Cosine similarity to the case's test image."""


@dataclass(frozen=True)
class Case:
    """A test image beside its nearest training images."""

    query: Shown
    voted: int | None
    near: Sequence[Shown]


def neighbours(
    train: Gallery, test: Gallery, labels: NDArray[np.int64] | None, *, seed: int
) -> dict[str, Any] | None:
    """Test images beside their nearest training images; None if either split has none.

    Args:
        labels: (M,) of the test images; without them, or those of training images, cases are
            not told apart.

    Returns:
        What the page's section shows: k, and groups of cases.
    """
    bank, rows = finite_rows(train.features), finite_rows(test.features)
    if not len(bank) or not len(rows):
        return None
    candidates = np.random.default_rng(seed).permutation(rows)[:CANDIDATES]
    features, k = take(train.features, bank), min(K, len(bank))
    groups: dict[str, NDArray[np.int64]] = {"": candidates}
    votes: dict[int, int] = {}
    if labels is not None and train.labels is not None:
        voted = knn_predict(
            features, train.labels[torch.from_numpy(bank)].long().to(features.device),
            take(test.features, candidates).to(features), k=k,
        ).cpu().numpy()  # fmt: skip
        votes = dict(zip(candidates.tolist(), voted.tolist(), strict=True))
        right = voted == labels[candidates]
        groups = {"right": candidates[right], "wrong": candidates[~right]}
    shown = []
    for kind, members in groups.items():
        chosen = members[:CASES]
        found, similarity = _nearest(features, take(test.features, chosen).to(features))
        cases = _cases(train, test, labels, chosen, bank[found], similarity, votes)
        shown.append({"kind": kind, "of": len(members), "cases": cases})
    return {
        "k": k, "images": len(bank), "candidates": len(candidates), "of": len(rows),
        "groups": shown,
    }  # fmt: skip


def _cases(
    train: Gallery,
    test: Gallery,
    labels: NDArray[np.int64] | None,
    chosen: NDArray[np.int64],
    found: NDArray[np.int64],
    similarity: NDArray[np.float32],
    votes: dict[int, int],
) -> list[Case]:
    if not len(chosen):
        return []
    queries = test.read(chosen.tolist())
    images = iter(train.read(found.flatten().tolist()))
    cases = []
    for row, image, near, close in zip(chosen.tolist(), queries, found, similarity, strict=True):
        query = Shown(thumbnail(image), None if labels is None else int(labels[row]))
        shown = [
            Shown(
                thumbnail(next(images)),
                None if train.labels is None else int(train.labels[index]),
                float(value),
            )
            for index, value in zip(near.tolist(), close, strict=True)
        ]
        cases.append(Case(query, votes.get(row), shown))
    return cases


def _nearest(bank: Tensor, queries: Tensor) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Rows of the bank nearest in cosine similarity, and the similarity."""
    similarity, rows = most_similar(bank, queries, min(NEIGHBOURS, len(bank)))
    return rows.cpu().numpy(), similarity.cpu().numpy()
