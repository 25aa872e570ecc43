"""k nearest neighbours against scikit-learn."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from vicreg_hf.metrics import knn
from vicreg_hf.metrics.knn import knn_accuracy, knn_predict

NUM_CLASSES = 7


def split(rows: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Features that say something about their labels, but far from everything."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(NUM_CLASSES, (rows,), generator=generator)
    centres = torch.randn(NUM_CLASSES, 10, generator=torch.Generator().manual_seed(99))
    noise = 2 * torch.randn(rows, 10, generator=generator)
    return centres[labels] + noise, labels


def sklearn_predict(
    train: Tensor, labels: Tensor, test: Tensor, *, k: int, temperature: float
) -> NDArray[np.int64]:
    def votes(cosine_distance: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.exp((1 - cosine_distance) / temperature)

    weights: Any = votes  # its annotation knows only the names
    classifier = KNeighborsClassifier(k, weights=weights, metric="cosine", algorithm="brute")
    return classifier.fit(train.double().numpy(), labels.numpy()).predict(test.double().numpy())


@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("k", [1, 5, 20, 300])
def test_predictions_equal_scikit_learns(k: int, temperature: float) -> None:
    (train, labels), (test, _) = split(300, seed=0), split(200, seed=1)
    actual = knn_predict(train, labels, test, k=k, temperature=temperature)
    expected = sklearn_predict(train, labels, test, k=k, temperature=temperature)
    np.testing.assert_array_equal(actual.numpy(), expected)


@pytest.mark.parametrize("chunk", [1, 7, 50])
def test_work_in_chunks_gives_the_same_predictions(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (train, labels), (test, _) = split(100, seed=0), split(50, seed=1)
    expected = knn_predict(train, labels, test, k=5)
    monkeypatch.setattr(knn, "CHUNK", chunk)
    assert torch.equal(knn_predict(train, labels, test, k=5), expected)


def test_accuracy_is_the_share_of_right_predictions() -> None:
    train, labels = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
    test = torch.tensor([[2.0, 0.1], [0.1, 3.0], [5.0, 1.0], [1.0, 4.0]])
    assert knn_accuracy(train, labels, test, torch.tensor([0, 1, 0, 0]), k=1) == 0.75


def test_neighbours_vote_by_similarity_and_not_by_number_alone() -> None:
    train = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.1]])
    labels, test = torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.2]])
    assert knn_predict(train, labels, test, k=3).tolist() == [0]
    assert knn_predict(train, labels, test, k=3, temperature=1e3).tolist() == [1]


def test_length_of_features_does_not_matter() -> None:
    (train, labels), (test, _) = split(100, seed=0), split(50, seed=1)
    scales = torch.logspace(-3, 3, 100)[:, None]
    expected = knn_predict(train, labels, test, k=5)
    assert torch.equal(knn_predict(train * scales, labels, test, k=5), expected)


def test_a_tiny_temperature_does_not_overflow() -> None:
    (train, labels), (test, _) = split(100, seed=0), split(50, seed=1)
    nearest = knn_predict(train, labels, test, k=1)
    assert torch.equal(knn_predict(train, labels, test, k=20, temperature=1e-6), nearest)


@pytest.mark.parametrize("k", [-1, 0, 11])
def test_k_outside_the_training_rows_is_refused(k: int) -> None:
    train, labels = split(10, seed=0)
    with pytest.raises(ValueError, match=f"between 1 and 10 training rows, got {k}"):
        knn_predict(train, labels, train, k=k)


def test_labels_for_other_rows_are_refused() -> None:
    train, labels = split(10, seed=0)
    with pytest.raises(ValueError, match="got 10 rows and 9 labels"):
        knn_predict(train, labels[:9], train, k=1)


def test_test_labels_for_other_rows_are_refused() -> None:
    train, labels = split(10, seed=0)
    with pytest.raises(ValueError, match="10 rows and 1 labels"):
        knn_accuracy(train, labels, train, labels[:1], k=1)


ONES = torch.ones(10, 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_features": ONES * math.nan}, "^train_features must be finite numbers, and some"),
        ({"test_features": ONES * math.inf}, "^test_features must be finite numbers, and some"),
        ({"test_features": ONES[:, :9]}, r"of one width, got \(10, 10\) and \(10, 9\)"),
        ({"test_features": ONES[0]}, r"^test_features must be rows of features .*, got \(10,\)"),
        ({"train_features": "abc"}, "^train_features must be a tensor or an array .*, got str"),
        (
            {"train_features": np.array(["a"])},
            "^train_features must be a tensor or an array ",
        ),
        (
            {"train_labels": torch.zeros(10)},
            "^train_labels must be integers, got torch.float32",
        ),
        ({"train_labels": torch.zeros(10) > 0}, "^train_labels must be integers, got torch.bool"),
        ({"train_labels": ONES.long()}, r"^train_labels must be one class .*, got \(10, 10\)"),
        ({"train_labels": torch.arange(-1, 9)}, "^train_labels .* class from 0, got -1 in row 0"),
        ({"test_labels": torch.zeros(10)}, "^test_labels must be integers, got torch.float32"),
        ({"test_labels": -torch.arange(10)}, "^test_labels .* class from 0, got -9 in row 9"),
        ({"test_features": ONES[:0], "test_labels": torch.arange(0)}, "at least 1 row, got none"),
        ({"k": 2.5}, "k must lie between 1 and 10 training rows, got 2.5"),
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


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.int64])
def test_features_and_labels_may_be_arrays(dtype: Any) -> None:
    (train, labels), (test, wanted) = split(100, seed=0), split(50, seed=1)
    given = [train.numpy(), labels.numpy().astype(dtype), test.double().numpy(), wanted.tolist()]
    given[0].flags.writeable = False
    assert knn_accuracy(*given, k=5) == knn_accuracy(train, labels, test, wanted, k=5)


# --- handwritten digits


@pytest.mark.parametrize("temperature", [0.07, 0.01])
@pytest.mark.parametrize("k", [20, 200])
def test_predictions_on_digits_equal_scikit_learns_but_for_ties(k: int, temperature: float) -> None:
    pixels, labels = load_digits(return_X_y=True)
    unit = pixels / np.linalg.norm(pixels, axis=1, keepdims=True)
    weights: Any = lambda distance: np.exp(-distance / temperature)  # noqa: E731
    classifier = KNeighborsClassifier(k, weights=weights, metric="cosine", algorithm="brute")
    votes = np.sort(classifier.fit(unit[:1000], labels[:1000]).predict_proba(unit[1000:]), axis=1)
    tied = votes[:, -1] - votes[:, -2] < 1e-5
    x, y = torch.tensor(pixels, dtype=torch.float32), torch.from_numpy(labels)
    actual = knn_predict(x[:1000], y[:1000], x[1000:], k=k, temperature=temperature).numpy()
    expected = classifier.predict(unit[1000:])
    assert tied.mean() < 0.01
    np.testing.assert_array_equal(actual[~tied], expected[~tied])
    accuracy = knn_accuracy(x[:1000], y[:1000], x[1000:], y[1000:], k=k, temperature=temperature)
    assert accuracy == pytest.approx((actual == labels[1000:]).mean())
    assert accuracy > 0.85
