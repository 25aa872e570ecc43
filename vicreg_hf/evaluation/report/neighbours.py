"""Test images beside the training images nearest to them, as the report shows them.

Shapes: N training images, M test images, F features.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vicreg_hf.evaluation.report.gallery import Gallery, finite_rows, take, thumbnail
from vicreg_hf.metrics.knn import knn_predict
from vicreg_hf.metrics.retrieval import most_similar

QUERIES = 6
"""Test images, of either kind, that are shown beside their neighbours."""
NEIGHBOURS = 6
CANDIDATES = 2000
"""Test images among which queries are looked for."""
K = 20


def neighbours(
    train: Gallery, test: Gallery, *, seed: int, grouped: bool = True
) -> dict[str, Any] | None:
    """Test images beside their nearest training images; None if either split has none.

    With labels of both, those that kNN classifies rightly and wrongly are groups of their own.

    Args:
        grouped: false for the same test images whatever kNN says, to compare encoders.

    Returns:
        The contents of the page's section: k, and groups of queries.
    """
    bank, rows = finite_rows(train.features), finite_rows(test.features)
    if not len(bank) or not len(rows):
        return None
    candidates = np.random.default_rng(seed).permutation(rows)[:CANDIDATES]
    features, k = take(train.features, bank), min(K, len(bank))
    groups: dict[str, NDArray[np.int64]] = {"": candidates}
    votes: dict[int, int] = {}
    if test.labels is not None and train.labels is not None:
        voted = knn_predict(
            features, train.labels[torch.from_numpy(bank)].long().to(features.device),
            take(test.features, candidates).to(features), k=k,
        ).cpu().numpy()  # fmt: skip
        votes = dict(zip(candidates.tolist(), voted.tolist(), strict=True))
        right = voted == test.labels.numpy()[candidates]
        if grouped:
            groups = {"right": candidates[right], "wrong": candidates[~right]}
    shown = []
    for kind, members in groups.items():
        chosen = members[:QUERIES]
        similarity, found = most_similar(
            features, take(test.features, chosen).to(features), min(NEIGHBOURS, len(bank))
        )
        queries = _queries(train, test, chosen, bank[found.cpu().numpy()], similarity, votes)
        shown.append({"kind": kind, "of": len(members), "queries": queries})
    return {
        "k": k, "images": len(bank), "candidates": len(candidates), "of": len(rows),
        "groups": shown, "labelled": bool(votes),
    }  # fmt: skip


def _queries(
    train: Gallery,
    test: Gallery,
    chosen: NDArray[np.int64],
    found: NDArray[np.int64],
    similarity: Tensor,
    votes: dict[int, int],
) -> list[dict[str, Any]]:
    """Each chosen test image, with its class, the vote on it, and the training images found."""
    images = iter(train.read(found.flatten().tolist()))
    queries = []
    for row, image, near, close in zip(
        chosen.tolist(), test.read(chosen.tolist()), found.tolist(), similarity.tolist(),
        strict=True,
    ):  # fmt: skip
        pictures = [
            {
                "picture": thumbnail(next(images)), "label": train.label(index),
                "similarity": value,
            }
            for index, value in zip(near, close, strict=True)
        ]  # fmt: skip
        query = {"picture": thumbnail(image), "label": test.label(row)}
        queries.append({"image": query, "voted": votes.get(row), "near": pictures})
    return queries
