"""The linear probe against scikit-learn, torch's SGD and its own settings one at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from largest_output import LargestOutput
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn import functional as F

from vicreg_hf.metrics.linear_probe import _moments, linear_probe
from vicreg_hf.metrics.subsets import balanced_subset
from vicreg_hf.runtime.randomness import permutation

NUM_CLASSES = 4


def blobs(rows: int, *, seed: int, dim: int = 6, noise: float = 1.5) -> tuple[Tensor, Tensor]:
    """Features that say much about their labels, but not all."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(NUM_CLASSES, (rows,), generator=generator)
    centres = torch.randn(NUM_CLASSES, dim, generator=torch.Generator().manual_seed(99))
    return centres[labels] + noise * torch.randn(rows, dim, generator=generator), labels


def noisy_digits(*, test: bool) -> tuple[Any, Any]:
    """2000 handwritten digits in noise, at any scales and beside constants; no digit is in both."""
    pixels, labels = load_digits(return_X_y=True)
    random = np.random.default_rng(int(test))
    rows = random.choice(np.flatnonzero((np.arange(len(labels)) % 3 == 0) == test), 2000)
    scales = np.random.default_rng(9).permutation(np.logspace(-4, 4, 64))
    noisy = (pixels[rows] + random.normal(0, 4, (2000, 64))) * scales
    constants = np.tile([0.0, 0.1, 1 / 3, -7.7, 1e4 + 0.1], (2000, 1))
    return np.concatenate([noisy, constants], axis=1).astype(np.float32), labels[rows]


def test_accuracy_is_within_a_point_of_logistic_regression_at_any_scales_and_constants() -> None:
    (x, labels), (x_test, wanted) = noisy_digits(test=False), noisy_digits(test=True)
    scaler = StandardScaler().fit(x.astype(np.float64))
    train, test = scaler.transform(x), scaler.transform(x_test)
    fits = (LogisticRegression(C=c, tol=1e-3, max_iter=300) for c in (0.001, 0.01, 0.1))
    best = max(float(fit.fit(train, labels).score(test, wanted)) for fit in fits)
    assert 0.8 < best < 0.95
    assert linear_probe(x, labels, x_test).accuracy(wanted) > best - 0.01


def sgd(
    x: Tensor, labels: Tensor, *, rate: float, decay: float, epochs: int, batch_size: int, seed: int
) -> torch.nn.Linear:
    """The same training by autograd and torch's optimiser."""
    model = torch.nn.Linear(x.shape[1], NUM_CLASSES, dtype=x.dtype)
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.zeros_(model.bias)
    groups = [{"params": [model.weight], "weight_decay": decay}, {"params": [model.bias]}]
    optimizer = torch.optim.SGD(groups, lr=rate, momentum=0.9)
    total = epochs * -(-len(x) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total)
    for epoch in range(epochs):
        order = permutation(len(x), seed=seed, epoch=epoch)
        for start in range(0, len(x), batch_size):
            rows = order[start : start + batch_size]
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return model


@pytest.mark.parametrize(("rows", "expected"), [(40, 32), (2000, 50), (42_000, 1024)])
def test_a_batch_is_a_fortieth_of_the_rows_from_32_to_1024(rows: int, expected: int) -> None:
    x, labels = blobs(rows, seed=0, dim=2)
    options: Any = {"epochs": 1, "learning_rates": [0.1], "weight_decays": [0.0]}
    assert linear_probe(x, labels, x, **options).batch_size == expected


def test_a_setting_is_chosen_on_rows_held_out_and_trained_again_on_all() -> None:
    (x, labels), (x_test, _) = blobs(400, seed=0), blobs(300, seed=1)
    rates, decays = (0.001, 0.1, 1e30, 1e38), (0.0, 0.1)  # one diverges slowly, one at once
    options: Any = {"epochs": 4, "batch_size": 64, "seed": 7}
    result = linear_probe(x, labels, x_test, learning_rates=rates, weight_decays=decays, **options)
    assert list(result.validation) == [(rate, decay) for rate in rates for decay in decays]
    x, x_test = (x - x.mean(0)) / x.std(0), (x_test - x.mean(0)) / x.std(0)
    held_out = torch.from_numpy(balanced_subset(labels, 0.1, 7))
    kept = torch.tensor([row not in held_out for row in range(len(x))])
    losses = {}
    for rate, decay in list(result.validation)[:4]:
        model = sgd(x[kept], labels[kept], rate=rate, decay=decay, **options)
        loss = F.cross_entropy(model(x[held_out]), labels[held_out]).item()
        assert result.validation_loss[rate, decay] == pytest.approx(loss, rel=1e-3)
        losses[rate, decay] = loss
    chosen = (result.learning_rate, result.weight_decay)
    assert chosen == min(losses, key=lambda setting: losses[setting])
    assert chosen != max(result.validation, key=lambda setting: result.validation[setting])
    model = sgd(x, labels, rate=chosen[0], decay=chosen[1], **options)
    agree = result.predictions == model(x_test).argmax(1)
    assert agree.double().mean() > 0.99  # but for rows that float32 cannot tell apart
    with pytest.raises(FloatingPointError, match="every linear classifier diverged"):
        linear_probe(x, labels, x, learning_rates=[1e38], weight_decays=[0.0])


def test_test_rows_and_what_else_is_random_have_no_part_and_inputs_stay() -> None:
    (x, labels), (x_test, _) = blobs(300, seed=0), blobs(50, seed=1)
    before = x.clone()
    expected = linear_probe(x, labels, x_test, seed=3, epochs=5)
    with torch.random.fork_rng():
        torch.manual_seed(9)
        state = torch.get_rng_state()
        more = torch.cat([x_test, 1e4 * x_test])
        actual = linear_probe(x.numpy(), labels.int().numpy(), more.numpy(), seed=3, epochs=5)
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(actual.predictions[:50], expected.predictions)
    assert actual.validation_loss == expected.validation_loss
    other = linear_probe(x, labels, x_test, seed=4, epochs=5)
    assert other.validation_loss != expected.validation_loss
    assert torch.equal(x, before)


def test_a_class_of_one_row_is_learned_in_the_end() -> None:
    x, labels = blobs(200, seed=0, noise=0.3)
    lone = torch.full((1, 6), 20.0)
    x, labels = torch.cat([x, lone]), torch.cat([labels, torch.tensor([NUM_CLASSES])])
    result = linear_probe(x, labels, torch.cat([lone, x[:50]]), num_classes=10)
    assert result.predictions[0] == NUM_CLASSES
    assert torch.equal(result.predictions[1:], labels[:50])
    alone = linear_probe(3 * torch.eye(5), torch.arange(5), torch.eye(5))
    assert torch.equal(alone.predictions, torch.arange(5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_dtypes_are_worked_on_in_float32(dtype: torch.dtype) -> None:
    (x, labels), (x_test, wanted) = blobs(300, seed=0), blobs(200, seed=1)
    x, x_test = (6e3 * x).to(dtype), (6e3 * x_test).to(dtype)  # sums exceed half precision
    result = linear_probe(x, labels, x_test, epochs=5)
    expected = linear_probe(x.float(), labels, x_test.float(), epochs=5)
    assert torch.equal(result.predictions, expected.predictions)
    assert result.accuracy(wanted) > 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_labels": torch.tensor([0, 1])}, "one label, got 10 rows and 2 labels"),
        ({"train_labels": torch.zeros(10, dtype=torch.long)}, "at least two classes, got 1"),
        ({"train_labels": torch.arange(10), "num_classes": 9}, "below num_classes=9, got 9"),
        ({"learning_rates": ()}, "one learning rate and one weight decay, got none"),
    ],
)
def test_what_cannot_be_learned_is_refused(change: dict[str, Any], message: str) -> None:
    x, labels = blobs(10, seed=0)
    given: Any = {"train_features": x, "train_labels": labels, "test_features": x} | change
    with pytest.raises(ValueError, match=message):
        linear_probe(**given)


def test_features_of_other_precisions_are_not_copied_as_a_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.randn(3_000, 50, dtype=torch.float64)
    monkeypatch.setattr("vicreg_hf.metrics.linear_probe.VALUES_AT_ONCE", 15_000)
    with LargestOutput() as largest:
        found = _moments(x)
    assert largest.elements == 15_000
    torch.testing.assert_close(found, (x.float().mean(0), x.float().std(0)))
