"""The base learning rate where none is given, and the rate of each step."""

from __future__ import annotations

import math

import pytest

from vicreg_hf.settings.learning_rate import default_base_lr, learning_rate
from vicreg_hf.settings.pretraining import PretrainingArguments


@pytest.mark.parametrize(
    ("step", "warmup_steps", "total_steps", "expected"),
    [
        (0, 10, 110, 0.0), (5, 10, 110, 1.0), (10, 10, 110, 2.0),  # warm-up is over
        (60, 10, 110, 1.001),  # half way down to 0.002
        (109, 10, 110, 0.002 + 1.998 * 0.5 * (1 + math.cos(math.pi * 0.99))),  # the last step
        (110, 10, 110, 0.002),
        (0, 0, 10, 2.0), (0, 4, 4, 0.0), (3, 4, 4, 1.5),  # without warm-up, and with nothing else
    ],
)  # fmt: skip
def test_learning_rate_matches_values_worked_by_hand(
    step: int, warmup_steps: int, total_steps: int, expected: float
) -> None:
    lr = learning_rate(step, peak=2.0, warmup_steps=warmup_steps, total_steps=total_steps)
    assert lr == pytest.approx(expected, rel=1e-12)


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
