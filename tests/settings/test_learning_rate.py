"""The base learning rate where none is given, and the rate of each step."""

from __future__ import annotations

import math

import pytest

from vicreg_hf.settings.learning_rate import default_base_lr, learning_rate
from vicreg_hf.settings.pretraining import PretrainingArguments


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.0),
        (5, 1.0),
        (10, 2.0),  # warm-up is over
        (60, 1.001),  # half way down to 0.002
        (109, 0.002 + 1.998 * 0.5 * (1 + math.cos(math.pi * 0.99))),  # the last step
        (110, 0.002),
    ],
)
def test_learning_rate_matches_values_worked_by_hand(step: int, expected: float) -> None:
    lr = learning_rate(step, peak=2.0, warmup_steps=10, total_steps=110)
    assert lr == pytest.approx(expected, rel=1e-12)


def test_there_is_a_rate_without_warmup_and_with_nothing_else() -> None:
    assert learning_rate(0, peak=2.0, warmup_steps=0, total_steps=10) == 2.0
    rates = [learning_rate(step, peak=4.0, warmup_steps=4, total_steps=4) for step in range(4)]
    assert rates == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("optimizer", "batch_size", "expected"),
    [
        ("lars", 128, 0.8), ("lars", 256, 0.5), ("lars", 512, 0.4), ("lars", 1024, 0.3),
        ("lars", 4096, 0.3), ("adamw", 4096, 1e-3),
    ],
)  # fmt: skip
def test_default_base_lr_is_the_papers_by_batch_size(
    optimizer: str, batch_size: int, expected: float
) -> None:
    assert default_base_lr(optimizer, batch_size) == expected
    args = PretrainingArguments(optimizer=optimizer, batch_size=batch_size)
    assert args.base_lr == expected
