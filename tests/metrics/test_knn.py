"""k nearest neighbours against scikit-learn."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from vicreg_hf.metrics.knn import knn_accuracy, knn_predict, vote

NUM_CLASSES = 7


def split(rows: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Features that say something about their labels, but far from everything."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(NUM_CLASSES, (rows,), generator=generator)
    centres = torch.randn(NUM_CLASSES, 10, generator=torch.Generator().manual_seed(99))
    noise = 2 * torch.randn(rows, 10, generator=generator)
    return centres[labels] + noise, labels


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (300, 0.5)])
def test_predictions_equal_scikit_learns(k: int, temperature: float) -> None:
    (train, labels), (test, _) = split(300, seed=0), split(1100, seed=1)  # more than one chunk
    train = train * torch.logspace(-3, 3, 300)[:, None]  # lengths do not matter
    actual = knn_predict(train, labels, test, k=k, temperature=temperature)
    votes: Any = lambda distance: np.exp((1 - distance) / temperature)  # noqa: E731
    classifier = KNeighborsClassifier(k, weights=votes, metric="cosine", algorithm="brute")
    expected = classifier.fit(train.double(), labels).predict(test.double())
    np.testing.assert_array_equal(actual.numpy(), expected)


def test_accuracy_is_the_share_of_right_predictions() -> None:
    train, labels = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
    test = torch.tensor([[2.0, 0.1], [0.1, 3.0], [5.0, 1.0], [1.0, 4.0]])
    assert knn_accuracy(train, labels, test, torch.tensor([0, 1, 0, 0]), k=1) == 0.75


ONES = torch.ones(10, 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_features": ONES * math.nan}, "^train_features must be finite numbers, and some"),
        ({"test_features": ONES[:, :9]}, r"of one width, got \(10, 10\) and \(10, 9\)"),
        ({"test_features": ONES[0]}, r"^test_features must be rows of features .*, got \(10,\)"),
        ({"train_features": "abc"}, "^train_features must be a tensor or an array .*, got str"),
        ({"train_labels": torch.zeros(10)}, "^train_labels must be integers, got torch.float32"),
        ({"train_labels": ONES.long()}, r"^train_labels must be one class .*, got \(10, 10\)"),
        ({"train_labels": torch.arange(-1, 9)}, "^train_labels .* class from 0, got -1 in row 0"),
        (
            {"test_features": ONES[:0], "test_labels": ONES[0, :0].long()},
            "at least 1 test row, got none",
        ),
        ({"train_labels": torch.arange(9)}, "every train row .*, got 10 rows and 9 labels"),
        ({"k": 11}, "k must lie between 1 and 10 training rows, got 11"),
    ],
)
def test_what_has_no_neighbours_is_refused(change: dict[str, Any], message: str) -> None:
    features, labels = split(10, seed=0)
    given: dict[str, Any] = {
        "train_features": features, "train_labels": labels, "test_features": features,
        "test_labels": labels, "k": 1,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        knn_accuracy(**given | change)


def test_features_and_labels_may_be_arrays() -> None:
    (train, labels), (test, wanted) = split(100, seed=0), split(50, seed=1)
    rows = labels.numpy().astype(np.uint8)
    given: list[Any] = [train.numpy(), rows, test.double().numpy(), wanted.tolist()]
    given[0].flags.writeable = False
    assert knn_accuracy(*given, k=5) == knn_accuracy(train, labels, test, wanted, k=5)


def test_a_row_that_is_the_query_itself_has_no_vote() -> None:
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(1500, 3, generator=generator), torch.arange(1500) % 3
    own_rows = torch.arange(0, 1500, 1)[torch.randperm(1500, generator=generator)[:1100]]
    found = vote(x, labels, x[own_rows], k=5, own_rows=own_rows)
    for place in (0, 7, 1024, 1099):
        others = torch.arange(1500) != own_rows[place]
        expected = knn_predict(x[others], labels[others], x[own_rows[place]][None], k=5)
        assert found[place] == expected
    x[1] = x[0]  # a duplicate still votes
    assert vote(x, labels, x[:1], k=1, own_rows=torch.tensor([0])) == labels[1]
