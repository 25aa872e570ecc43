"""The linear probe against scikit-learn, torch's SGD and its own settings one at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn import functional as F

from vicreg_hf.metrics import linear_probe as linear
from vicreg_hf.metrics.linear_probe import linear_probe
from vicreg_hf.metrics.subsets import balanced_subset
from vicreg_hf.runtime.randomness import permutation

NUM_CLASSES = 4
SETTINGS = [(0.01, 0.0), (0.1, 0.0), (0.1, 0.03), (1.0, 1e-3)]


def blobs(rows: int, *, seed: int, dim: int = 6, noise: float = 1.5) -> tuple[Tensor, Tensor]:
    """Features that say much about their labels, but not all."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(NUM_CLASSES, (rows,), generator=generator)
    centres = torch.randn(NUM_CLASSES, dim, generator=torch.Generator().manual_seed(99))
    return centres[labels] + noise * torch.randn(rows, dim, generator=generator), labels


def noisy_digits(rows: int, *, test: bool) -> tuple[Tensor, Tensor]:
    """Handwritten digits in noise; no digit is in both splits."""
    pixels, labels = load_digits(return_X_y=True)
    random = np.random.default_rng(int(test))
    chosen = random.choice(np.flatnonzero((np.arange(len(labels)) % 3 == 0) == test), rows)
    noisy = pixels[chosen] + random.normal(0, 4, (rows, pixels.shape[1]))
    return torch.tensor(noisy, dtype=torch.float32), torch.from_numpy(labels[chosen])


def best_logistic_regression(train: Tensor, labels: Tensor, test: Tensor, wanted: Tensor) -> float:
    """Accuracy in float64 at the best of a grid of C, chosen by the test labels themselves."""
    scaler = StandardScaler().fit(train.double().numpy())
    x, x_test = (scaler.transform(v.double().numpy()) for v in (train, test))
    fits = (LogisticRegression(C=c, tol=1e-3, max_iter=300) for c in (0.001, 0.01, 0.1, 1.0))
    return max(float(fit.fit(x, labels).score(x_test, wanted)) for fit in fits)


# --- against scikit-learn


def test_accuracy_is_within_a_point_of_logistic_regression() -> None:
    (x, labels), (x_test, wanted) = noisy_digits(4000, test=False), noisy_digits(3000, test=True)
    expected = best_logistic_regression(x, labels, x_test, wanted)
    assert 0.8 < expected < 0.95
    assert linear_probe(x, labels, x_test).accuracy(wanted) > expected - 0.01


def test_accuracy_survives_scales_from_1e_4_to_1e4_and_constant_dimensions() -> None:
    (x, labels), (x_test, wanted) = noisy_digits(4000, test=False), noisy_digits(3000, test=True)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    scales = torch.logspace(-4, 4, 64)[order]
    constants = torch.tensor([0.0, 0.1, 1 / 3, -7.7, 1e4 + 0.1])
    x, x_test = (torch.cat([v * scales, constants.expand(len(v), -1)], dim=1) for v in (x, x_test))
    expected = best_logistic_regression(x, labels, x_test, wanted)
    assert linear_probe(x, labels, x_test).accuracy(wanted) > expected - 0.01


def test_what_is_small_beside_other_dimensions_counts_as_much() -> None:
    (x, labels), (x_test, _) = blobs(600, seed=0), blobs(200, seed=1)
    scales = torch.tensor([2.0**-20, 1.0, 2.0**-20, 2.0**20, 2.0**-20, 2.0**20])
    actual = linear_probe(x * scales, labels, x_test * scales)
    expected = linear_probe(x, labels, x_test)
    assert actual.validation == expected.validation
    assert torch.equal(actual.predictions, expected.predictions)


def test_a_dimension_constant_in_training_says_nothing_at_test() -> None:
    (x, labels), (x_test, _) = blobs(600, seed=0), blobs(200, seed=1)
    generator = torch.Generator().manual_seed(2)
    varying = 0.1 + 10 * torch.randn(200, 1, generator=generator)
    expected = linear_probe(x, labels, x_test).predictions
    x, x_test = torch.cat([x, torch.full((600, 1), 0.1)], 1), torch.cat([x_test, varying], 1)
    assert torch.equal(linear_probe(x, labels, x_test).predictions, expected)


@pytest.mark.parametrize("value", [0.0, 0.1, 123.456])
def test_the_rounding_of_a_constant_is_not_taken_for_its_spread(value: float) -> None:
    constant, test = torch.full((1200, 1), value), torch.tensor([[value + 1]])
    if value:
        assert constant.std(0) > 0.0  # so is it, where torch sums along one column
    x, x_test = linear._standardised(constant, test)
    torch.testing.assert_close(x, torch.zeros(1200, 1), rtol=0, atol=1e-4)
    torch.testing.assert_close(x_test, torch.ones(1, 1), rtol=0, atol=1e-4)


# --- the batched pass


@pytest.mark.parametrize("batch_size", [64, 300, 1000])  # 300: the last batch is of 100
def test_many_settings_at_once_learn_what_each_learns_alone(batch_size: int) -> None:
    x, labels = blobs(1000, seed=0)
    options: Any = {"epochs": 3, "batch_size": batch_size, "seed": 5}
    weight, bias = linear._train(x, labels, NUM_CLASSES, SETTINGS, **options)
    for s, setting in enumerate(SETTINGS):
        own = slice(s * NUM_CLASSES, (s + 1) * NUM_CLASSES)
        alone, alone_bias = linear._train(x, labels, NUM_CLASSES, [setting], **options)
        torch.testing.assert_close(weight[:, own], alone, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(bias[own], alone_bias, rtol=1e-4, atol=1e-5)


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


@pytest.mark.parametrize("setting", SETTINGS)
def test_training_is_that_of_torchs_sgd(setting: tuple[float, float]) -> None:
    x, labels = blobs(250, seed=0)
    x = x.double()
    options: Any = {"epochs": 3, "batch_size": 100, "seed": 5}
    with torch.random.fork_rng():
        expected = sgd(x, labels, rate=setting[0], decay=setting[1], **options)
    weight, bias = linear._train(x, labels, NUM_CLASSES, [setting], **options)
    close: Any = {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(weight, expected.weight.detach().T, **close)
    torch.testing.assert_close(bias, expected.bias.detach(), **close)


@pytest.mark.parametrize(("rows", "expected"), [(40, 32), (400, 32), (2000, 50), (42_000, 1024)])
def test_a_batch_is_a_fortieth_of_the_rows_from_32_to_1024(
    rows: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def train(x: Tensor, *args: Any, batch_size: int, **options: Any) -> tuple[Tensor, Tensor]:
        sizes.append(batch_size)
        return original(x[:1], args[0][:1], *args[1:], batch_size=batch_size, **options)

    original = linear._train
    monkeypatch.setattr(linear, "_train", train)
    x, labels = blobs(rows, seed=0)
    linear_probe(x, labels, x, epochs=1)
    linear_probe(x, labels, x, epochs=1, batch_size=7)
    assert sizes == [expected, expected, 7, 7]


# --- how a setting is chosen


def test_a_setting_is_chosen_on_rows_held_out_and_trained_again_on_all() -> None:
    (x, labels), (x_test, _) = blobs(400, seed=0), blobs(300, seed=1)
    rates, decays = (0.001, 0.1), (0.0, 0.1)
    options: Any = {"epochs": 4, "batch_size": 64, "seed": 7}
    result = linear_probe(x, labels, x_test, learning_rates=rates, weight_decays=decays, **options)
    x, x_test = (x - x.mean(0)) / x.std(0), (x_test - x.mean(0)) / x.std(0)
    held_out = torch.from_numpy(balanced_subset(labels, 0.1, 7))
    kept = torch.tensor([row not in held_out for row in range(len(x))])
    losses = {}
    assert list(result.validation) == [(rate, decay) for rate in rates for decay in decays]
    for (rate, decay), accuracy in result.validation.items():
        with torch.random.fork_rng():
            model = sgd(x[kept], labels[kept], rate=rate, decay=decay, **options)
        logits = model(x[held_out]).detach()
        found = logits.argmax(1)
        assert accuracy == pytest.approx((found == labels[held_out]).double().mean().item())
        losses[rate, decay] = torch.nn.functional.cross_entropy(logits, labels[held_out]).item()
    chosen = (result.learning_rate, result.weight_decay)
    assert chosen == min(losses, key=lambda setting: losses[setting])
    assert chosen != max(result.validation, key=lambda setting: result.validation[setting])
    with torch.random.fork_rng():
        model = sgd(x, labels, rate=chosen[0], decay=chosen[1], **options)
    assert torch.equal(result.predictions, model(x_test).argmax(1))


@pytest.mark.parametrize("bad", [(1e38, 0.0), (1e30, 1e-3)])  # infinite at once, and slowly
def test_a_setting_that_diverges_spoils_no_other(bad: tuple[float, float]) -> None:
    x, labels = blobs(300, seed=0)
    options: Any = {"epochs": 3, "batch_size": 100, "seed": 5}
    settings = [SETTINGS[0], bad, SETTINGS[1]]
    weight, bias = linear._train(x, labels, NUM_CLASSES, settings, **options)
    of = weight.view(-1, 3, NUM_CLASSES)
    assert not of[:, 1].isfinite().all()
    expected, expected_bias = linear._train(x, labels, NUM_CLASSES, settings[::2], **options)
    torch.testing.assert_close(of[:, ::2].flatten(1), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bias.view(3, -1)[::2].flatten(), expected_bias, atol=1e-5, rtol=1e-4)


def test_a_setting_that_diverges_is_never_chosen_however_common_the_first_class() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 5, generator=generator)
    labels = (torch.arange(300) % 20 == 0).long()  # nothing to learn but that most are of class 0
    result = linear_probe(
        x, labels, x, learning_rates=(1e38, 0.01), weight_decays=(0.0, 1e-3), batch_size=64
    )
    assert result.learning_rate == 0.01
    assert [result.validation[1e38, decay] for decay in (0.0, 1e-3)] == [0.0, 0.0]
    assert result.accuracy(labels) > 0.5


def test_a_sweep_in_which_everything_diverges_says_so() -> None:
    x, labels = blobs(100, seed=0)
    with pytest.raises(FloatingPointError, match="every linear classifier diverged"):
        linear_probe(x, labels, x, learning_rates=[1e38], weight_decays=[0.0])


def test_test_rows_have_no_part_in_training_or_choosing() -> None:
    (x, labels), (x_test, _) = blobs(300, seed=0), blobs(50, seed=1)
    expected = linear_probe(x, labels, x_test)
    actual = linear_probe(x, labels, torch.cat([x_test[:3], 1e4 * x_test]))
    assert torch.equal(actual.predictions[:3], expected.predictions[:3])
    assert actual.validation == expected.validation


# --- randomness


def test_a_seed_gives_the_same_result_and_nothing_else_random_has_a_part() -> None:
    (x, labels), (x_test, _) = blobs(300, seed=0), blobs(200, seed=1)
    first = linear_probe(x, labels, x_test, seed=3)
    with torch.random.fork_rng():
        torch.manual_seed(9)
        state = torch.get_rng_state()
        numpy_state = np.random.get_state(legacy=False)["state"]["key"].tolist()  # noqa: NPY002
        again = linear_probe(x, labels, x_test, seed=3)
        assert torch.equal(torch.get_rng_state(), state)
        assert np.random.get_state(legacy=False)["state"]["key"].tolist() == numpy_state  # noqa: NPY002
    assert torch.equal(again.predictions, first.predictions)
    assert again.validation == first.validation
    assert linear_probe(x, labels, x_test, seed=4).validation != first.validation


def test_inputs_stay_as_they_were() -> None:
    x, labels = blobs(100, seed=0)
    copy = x.clone()
    linear_probe(x, labels, x, epochs=2)
    assert torch.equal(x, copy)


# --- edges


def test_a_class_of_one_row_is_learned_in_the_end() -> None:
    x, labels = blobs(200, seed=0, noise=0.3)
    lone = torch.full((1, 6), 20.0)
    x, labels = torch.cat([x, lone]), torch.cat([labels, torch.tensor([NUM_CLASSES])])
    result = linear_probe(x, labels, torch.cat([lone, x[:50]]))
    assert result.predictions[0] == NUM_CLASSES
    assert torch.equal(result.predictions[1:], labels[:50])


def test_classes_of_one_row_each_are_learned() -> None:
    x, labels = 3 * torch.eye(5), torch.arange(5)
    result = linear_probe(x, labels, x)
    assert torch.equal(result.predictions, labels)
    assert max(result.validation.values()) == 1.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_dtypes_are_worked_on_in_float32(dtype: torch.dtype) -> None:
    (x, labels), (x_test, wanted) = blobs(300, seed=0), blobs(200, seed=1)
    x, x_test = x.to(dtype), x_test.to(dtype)
    result = linear_probe(x, labels, x_test)
    expected = linear_probe(x.float(), labels, x_test.float())
    assert torch.equal(result.predictions, expected.predictions)
    assert result.accuracy(wanted) > 0.5


def test_half_precision_does_not_overflow() -> None:
    x, labels = blobs(300, seed=0)
    x = (x * 1e4).clamp(-6e4, 6e4).half()
    assert linear_probe(x, labels, x).accuracy(labels) > 0.5


def test_classes_without_training_rows_are_never_predicted() -> None:
    (x, labels), (x_test, wanted) = blobs(300, seed=0), blobs(200, seed=1)
    result = linear_probe(x, labels, x_test, num_classes=10)
    assert result.predictions.max() < NUM_CLASSES
    plain = linear_probe(x, labels, x_test).accuracy(wanted)
    assert result.accuracy(wanted) == pytest.approx(plain, abs=0.03)


def test_accuracy_is_the_share_of_right_predictions() -> None:
    result = linear.LinearResult(torch.tensor([0, 1, 2, -1]), 0.1, 0.0, {}, {}, 32)
    assert result.accuracy(torch.tensor([0, 1, 1, 0])) == 0.5
    assert result.accuracy(np.array([0, 1, 1, 0], np.int32)) == 0.5


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 2], "every test row needs one label, got 4 rows and 3 labels"),
        ([0], "every test row needs one label, got 4 rows and 1 labels"),
        (3, r"labels must be one class for each row, got \(\)"),
        ([0.0] * 4, "labels must be integers, got torch.float32"),
    ],
)
def test_labels_of_other_rows_have_no_accuracy(labels: Any, message: str) -> None:
    result = linear.LinearResult(torch.tensor([0, 1, 2, -1]), 0.1, 0.0, {}, {}, 32)
    with pytest.raises(ValueError, match=message):
        result.accuracy(labels)


def test_features_and_labels_may_be_arrays() -> None:
    (x, labels), (x_test, _) = blobs(100, seed=0), blobs(20, seed=1)
    expected = linear_probe(x, labels, x_test, epochs=2)
    given: Any = x.numpy(), labels.numpy().astype(np.int32), x_test.numpy()
    assert torch.equal(linear_probe(*given, epochs=2).predictions, expected.predictions)


def test_the_rate_falls_to_zero_at_the_end() -> None:
    x, labels = blobs(64, seed=0)
    shares = [0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    gradient = x.T @ (torch.full((64, NUM_CLASSES), 0.25) - F.one_hot(labels, NUM_CLASSES)) / 64
    # so small a rate that every step sees the gradient of the first
    weight, _ = linear._train(
        x, labels, NUM_CLASSES, [(1e-6, 0.0)], epochs=4, batch_size=64, seed=0
    )
    momenta = [1, 1.9, 2.71, 3.439]
    moved = 1e-6 * sum(share * momentum for share, momentum in zip(shares, momenta, strict=True))
    torch.testing.assert_close(weight, -moved * gradient, rtol=1e-3, atol=1e-10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_labels": torch.tensor([0, 1])}, "one label, got 10 rows and 2 labels"),
        ({"train_labels": torch.zeros(10, dtype=torch.long)}, "at least two classes, got 1"),
        ({"train_labels": torch.zeros(10, dtype=torch.long), "num_classes": 5}, "classes, got 1"),
        ({"train_features": torch.ones(0, 6), "train_labels": torch.ones(0)}, "classes, got 0"),
        ({"train_labels": torch.arange(10), "num_classes": 9}, "below num_classes=9, got 9"),
        ({"train_labels": torch.arange(10) % 2, "num_classes": 1}, "num_classes=1, got 1"),
        ({"train_labels": torch.arange(-1, 9)}, "class from 0, got -1 in row 0"),
        ({"train_labels": torch.arange(10) % 2 * 1.0}, "must be integers, got torch.float32"),
        ({"test_features": torch.ones(3, 2)}, r"of one width, got \(10, \d+\) and \(3, 2\)"),
        ({"train_features": None}, "train_features must be a tensor or an array .*, got NoneType"),
        ({"learning_rates": ()}, "one learning rate and one weight decay, got none"),
        ({"weight_decays": ()}, "one learning rate and one weight decay, got none"),
    ],
)
def test_what_cannot_be_learned_is_refused(change: dict[str, Any], message: str) -> None:
    x, labels = blobs(10, seed=0)
    given: Any = {"train_features": x, "train_labels": labels, "test_features": x} | change
    with pytest.raises(ValueError, match=message):
        linear_probe(**given)
